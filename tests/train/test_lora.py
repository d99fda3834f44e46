"""Low-rank updates: nothing at first, equal to peft's arithmetic, merged without a difference, saved in peft's format."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from formary.errors import CheckpointError
from formary.hub import checkpoint
from formary.model.topologies import build, with_head
from formary.recipe.presets import preset
from formary.recipe.schema import Tune
from formary.train import lora
from formary.train.tuning import finish, prepare, trainable_count

TUNE = Tune(method="lora", rank=3, alpha=6)
PRESETS = ["gpt2-mini", "gpt-mini", "bert-mini", "seq2seq-mini", "bart-base"]
TOKENS = torch.tensor([[5, 9, 2, 7, 7, 1]])


def network_of(name, *, seed=0):
    switches = {"heads": 2}
    if name == "gpt-mini":  # queries wider than the model, fewer keys and values
        switches = {"heads": 2, "kv_heads": 1, "head_width": 24}
    config = preset(name, vocab_size=50, context=16, size="2x32", switches=switches)
    return build(config, seed=seed).eval()


def logits(network):
    with torch.inference_mode():
        both = network.config.topology == "encoder_decoder"
        return network.head(network(TOKENS, TOKENS) if both else network(TOKENS))


def their_logits(model, network):
    both = network.config.topology == "encoder_decoder"
    with torch.inference_mode():
        return model(input_ids=TOKENS, **({"decoder_input_ids": TOKENS} if both else {})).logits


def model_class(transformers, name):
    kinds = {"bert-mini": "MaskedLM", "seq2seq-mini": "Seq2SeqLM", "bart-base": "Seq2SeqLM"}
    return getattr(transformers, f"AutoModelFor{kinds.get(name, 'CausalLM')}")


def disturbed(network):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_b" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    return network


@pytest.mark.parametrize("name", PRESETS)
def test_updates_change_nothing_at_first_and_only_they_train(name):
    network = network_of(name)
    before = logits(network)
    prepare(network, TUNE, seed=0)
    torch.testing.assert_close(logits(network), before)
    trained = [n for n, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    assert trainable_count(network) == sum(p.numel() for n, p in network.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("name", PRESETS)
def test_a_merged_network_is_plain_and_answers_as_before(name):
    network = network_of(name)
    names = [n for n, _ in network.named_parameters()]
    prepare(network, TUNE, seed=0)
    before = logits(disturbed(network))
    finish(network)
    torch.testing.assert_close(logits(network), before, atol=1e-5, rtol=1e-5)
    assert sorted(n for n, _ in network.named_parameters()) == sorted(names)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_an_adapter_folder_brings_the_same_updates_back(name, targets, tmp_path):
    tune = TUNE.model_copy(update={"targets": targets})
    network = network_of(name)
    prepare(network, tune, seed=0)
    before = logits(disturbed(network))
    lora.save_adapter(tmp_path / "adapter", network, tune, base="base")
    again = network_of(name)
    lora.load_adapter(tmp_path / "adapter", again)
    torch.testing.assert_close(logits(again), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_peft_opens_our_adapter_and_answers_the_same(name, targets, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    tune = TUNE.model_copy(update={"targets": targets})
    network = network_of(name)
    (tmp_path / "base").mkdir()
    checkpoint.save(tmp_path / "base", network)
    prepare(network, tune, seed=0)
    ours = logits(disturbed(network))
    lora.save_adapter(tmp_path / "adapter", network, tune, base=str(tmp_path / "base"))
    base = model_class(transformers, name).from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(their_logits(theirs, network), ours, atol=1e-5, rtol=1e-4)


MADE = {
    "gpt-mini": ["q_proj", "v_proj", "down_proj"],
    "gpt2-mini": ["c_attn", "c_proj"],
    "bert-mini": ["query", "dense"],  # also the dense layer of the masked head
    "seq2seq-mini": ["q", "v", "wi_1", "wo"],
    "bart-base": ["k_proj", "out_proj", "fc1"],
}


@pytest.mark.parametrize("name", MADE)
def test_an_adapter_that_peft_made_is_read(name, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    (tmp_path / "base").mkdir()
    checkpoint.save(tmp_path / "base", network_of(name))
    base = model_class(transformers, name).from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=MADE[name], use_rslora=True)
    theirs = disturbed_peft(peft.get_peft_model(base, config).eval())
    theirs.save_pretrained(tmp_path / "adapter")
    network = network_of(name)
    lora.load_adapter(tmp_path / "adapter", network)
    expected = their_logits(theirs, network)
    torch.testing.assert_close(logits(network), expected, atol=1e-5, rtol=1e-4)
    finish(network)
    torch.testing.assert_close(logits(network), expected, atol=1e-5, rtol=1e-4)


def test_what_the_adapter_holds_may_train_on_and_is_saved_again(tmp_path):
    network = prepared_classifier("bert-mini")
    lora.save_adapter(tmp_path / "one", network, TUNE, base="b")
    again = with_head(network_of("bert-mini"), network.config, seed=8).eval()
    lora.load_adapter(tmp_path / "one", again)
    trained = [n for n, parameter in again.named_parameters() if parameter.requires_grad]
    assert trained == [n for n, parameter in network.named_parameters() if parameter.requires_grad]
    lora.save_adapter(tmp_path / "two", again, TUNE, base="b")
    for file in (lora.CONFIG, lora.WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def prepared_classifier(name, *, head="classify"):
    base = network_of(name)
    pooler = head == "classify" and name == "bert-mini"
    labels = ("start", "end") if head == "span" else ("no", "yes", "both")
    bias = name == "bert-mini" or head == "tag"
    changes = {"head": head, "labels": labels, "head_bias": bias, "pooler": pooler, "tied_embeddings": True}
    network = with_head(base, dataclasses.replace(base.config, **changes), seed=4).eval()
    prepare(network, TUNE, seed=0)
    return disturbed(network)


@pytest.mark.parametrize(
    ("name", "head"),
    [("bert-mini", "classify"), ("bert-mini", "tag"), ("bert-mini", "span"), ("gpt-mini", "classify")],
)
def test_peft_opens_an_adapter_with_the_head_that_was_trained_beside_it(name, head, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    network = prepared_classifier(name, head=head)
    (tmp_path / "base").mkdir()
    other_head = with_head(network_of(name), network.config, seed=9)
    checkpoint.save(tmp_path / "base", other_head)
    lora.save_adapter(tmp_path / "adapter", network, TUNE, base=str(tmp_path / "base"))
    classes = {"classify": "SequenceClassification", "tag": "TokenClassification", "span": "QuestionAnswering"}
    kind = getattr(transformers, f"AutoModelFor{classes[head]}")
    base = kind.from_pretrained(tmp_path / "base")
    base.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.inference_mode():
        hidden, answer = network(TOKENS), theirs(TOKENS)
        ours = network.head(network.summary(hidden) if head == "classify" else hidden)
        expected = torch.stack([answer.start_logits, answer.end_logits], -1) if head == "span" else answer.logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


SIZES = {"vocab_size": 50, "max_position_embeddings": 19}
CLASSIFIERS = {  # whose pooler is a part of the head in transformers
    "Roberta": {**SIZES, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 3},
    "DistilBert": {**SIZES, "dim": 24, "hidden_dim": 28, "n_layers": 2, "n_heads": 3},
}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_head_of_two_layers_goes_to_peft_and_comes_back(family, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForSequenceClassification")
    kind(getattr(transformers, f"{family}Config")(**CLASSIFIERS[family], num_labels=3)).save_pretrained(
        tmp_path / "base"
    )
    network, again = (checkpoint.load(tmp_path / "base").network for _ in range(2))
    prepare(network, TUNE, seed=0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)
    lora.save_adapter(tmp_path / "adapter", network, TUNE, base=str(tmp_path / "base"))
    lora.load_adapter(tmp_path / "adapter", again)
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.inference_mode():
        tokens = TOKENS + 2  # 1 is RoBERTa's padding
        ours, back = (one.head(one.summary(one(tokens))) for one in (network, again))
        torch.testing.assert_close(back, ours)
        torch.testing.assert_close(theirs(tokens).logits, ours, atol=1e-5, rtol=1e-4)


def test_a_classifiers_adapter_that_peft_made_brings_its_head(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    plain = with_head(network_of("gpt-mini"), prepared_classifier("gpt-mini").config, seed=9).eval()
    (tmp_path / "base").mkdir()
    checkpoint.save(tmp_path / "base", plain)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    base.config.pad_token_id = 0
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear")
    theirs = disturbed_peft(peft.get_peft_model(base, config).eval())
    with torch.no_grad():
        theirs.get_submodule("base_model.model.score.modules_to_save.default").weight.mul_(3.0)
    theirs.save_pretrained(tmp_path / "adapter")
    lora.load_adapter(tmp_path / "adapter", plain)
    with torch.inference_mode():
        ours = plain.head(plain.summary(plain(TOKENS)))
        torch.testing.assert_close(ours, theirs(TOKENS).logits, atol=1e-5, rtol=1e-4)


def test_an_adapter_of_a_bare_backbone_has_the_names_of_one(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = network_of("bert-mini")
    network = with_head(base, dataclasses.replace(base.config, head="none"), seed=0).eval()
    (tmp_path / "base").mkdir()
    checkpoint.save(tmp_path / "base", network)
    prepare(network, TUNE, seed=0)
    lora.save_adapter(tmp_path / "adapter", disturbed(network), TUNE, base=str(tmp_path / "base"))
    model = transformers.AutoModel.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.inference_mode():
        torch.testing.assert_close(network(TOKENS), theirs(TOKENS).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_a_weight_that_a_task_added_does_not_change_the_adapters_names(tmp_path):
    network = prepared_classifier("bert-mini", head="tag")
    lora.save_adapter(tmp_path / "without", network, TUNE, base="b")
    network.register_parameter("transitions", nn.Parameter(torch.zeros(15)))
    lora.save_adapter(tmp_path / "with", network, TUNE, base="b")
    names = [sorted(load_file(tmp_path / folder / lora.WEIGHTS)) for folder in ("without", "with")]
    assert names[0] == names[1] and all(name.startswith("base_model.model.") for name in names[0])


@given(
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    rank=st.integers(1, 5),
    alpha=st.floats(0.5, 32),
    bias=st.booleans(),
    shape=st.sampled_from([(4, 7), (2, 3, 7)]),
)
@settings(deadline=None, max_examples=30)
def test_a_layer_is_its_definition_and_merged_equals_unmerged(rows, rank, alpha, bias, shape):
    generator = torch.Generator().manual_seed(3)
    layer = lora.LoraLinear(
        nn.Linear(7, sum(rows), bias=bias), rows, Tune(method="lora", rank=rank, alpha=alpha), generator
    )
    inputs = torch.randn(shape, generator=generator)
    with torch.no_grad():
        for b in layer.lora_b:
            b.normal_(0.0, 0.1, generator=generator)
        pieces = [inputs @ a.T @ b.T * (alpha / rank) for a, b in zip(layer.lora_a, layer.lora_b)]
        expected = nn.functional.linear(inputs, layer.weight, layer.bias) + torch.cat(pieces, -1)
        torch.testing.assert_close(layer(inputs), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.merged()(inputs), expected, atol=1e-5, rtol=1e-4)


def test_dropout_acts_on_the_updates_alone_and_only_in_training():
    tune = Tune(method="lora", rank=2, lora_dropout=0.5)
    layer = lora.LoraLinear(nn.Linear(8, 6), [6], tune, torch.Generator().manual_seed(0))
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    plain = nn.functional.linear(inputs, layer.weight, layer.bias)
    torch.testing.assert_close(layer(inputs), plain)  # B is 0
    nn.init.ones_(layer.lora_b[0])
    assert not torch.equal(layer(inputs), layer(inputs))
    assert torch.equal(layer.eval()(inputs), layer(inputs))


def test_first_values_follow_the_seed():
    first, same, other = (network_of("gpt2-mini") for _ in range(3))
    for network, seed in ((first, 1), (same, 1), (other, 2)):
        prepare(network, TUNE, seed=seed)
    name = "transformer.blocks.0.attention.qkv.lora_a.0"
    assert torch.equal(first.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def disturbed_peft(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model


def test_a_pickle_another_model_and_another_method_are_refused(tmp_path):
    network = network_of("gpt2-mini")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="a pickle, which is never opened"):
        lora.load_adapter(tmp_path, network)
    prepare(network, TUNE, seed=0)
    lora.save_adapter(tmp_path / "a", network, TUNE, base="b")
    with pytest.raises(CheckpointError, match="belongs to another model"):
        lora.load_adapter(tmp_path / "a", network_of("bert-mini"))
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="only plain LoRA"):
        lora.load_adapter(tmp_path / "a", network_of("gpt2-mini"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"alpha_pattern": {"c_attn": 3}}, "alpha_pattern"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"r": 0}, "cannot be read"),
        ({"r": 5}, r"should have shape \(5, 32\), there is \(3, 32\)"),
        (None, "cannot be read"),
        ("missing", "cannot be read"),
        ("torn", "not a whole safetensors file"),
    ],
)
def test_a_folder_that_cannot_be_used_leaves_the_network_as_it_was(change, match, tmp_path):
    network = network_of("gpt2-mini")
    prepare(network, TUNE, seed=0)
    lora.save_adapter(tmp_path / "a", disturbed(network), TUNE, base="b")
    config, weights = tmp_path / "a" / lora.CONFIG, tmp_path / "a" / lora.WEIGHTS
    if change == "missing":
        config.unlink()
    elif change == "torn":
        weights.write_bytes(weights.read_bytes()[:-9])
    else:
        config.write_text("[]" if change is None else json.dumps(json.loads(config.read_text()) | change))
    plain = network_of("gpt2-mini")
    with pytest.raises(CheckpointError, match=match):
        lora.load_adapter(tmp_path / "a", plain)
    assert not any(isinstance(module, lora.LoraLinear) for module in plain.modules())
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_a_second_adapter_waits_until_the_first_is_merged(tmp_path):
    network = network_of("gpt2-mini")
    prepare(network, TUNE, seed=0)
    lora.save_adapter(tmp_path / "a", network, TUNE, base="b")
    with pytest.raises(CheckpointError, match="merge them"):
        lora.load_adapter(tmp_path / "a", network)

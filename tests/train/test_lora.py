"""Low-rank updates: nothing at first, equal to peft's arithmetic, merged without a difference, saved in peft's format."""

import json

import pytest
import torch

from formary.errors import CheckpointError
from formary.hub import checkpoint
from formary.model.presets import preset
from formary.model.topologies import build
from formary.recipe.schema import Tune
from formary.train import lora
from formary.train.tuning import finish, lr_scale, prepare, trainable_count

TUNE = Tune(method="lora", rank=3, alpha=6)
PRESETS = ["gpt2-mini", "gpt-mini", "bert-mini"]
TOKENS = torch.tensor([[5, 9, 2, 7, 7, 1]])


def network_of(name, *, seed=0):
    switches = {"kv_heads": 1, "heads": 2} if name == "gpt-mini" else {"heads": 2}
    config = preset(name, vocab_size=50, context=16, size="2x32", switches=switches)
    return build(config, seed=seed).eval()


def logits(network):
    with torch.inference_mode():
        return network.head(network(TOKENS))


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
    kind = transformers.AutoModelForMaskedLM if name == "bert-mini" else transformers.AutoModelForCausalLM
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.inference_mode():
        torch.testing.assert_close(theirs(TOKENS).logits, ours, atol=1e-5, rtol=1e-4)


def test_an_adapter_that_peft_made_is_read(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    (tmp_path / "base").mkdir()
    checkpoint.save(tmp_path / "base", network_of("gpt-mini"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    theirs = disturbed_peft(peft.get_peft_model(base, config).eval())
    theirs.save_pretrained(tmp_path / "adapter")
    network = network_of("gpt-mini")
    lora.load_adapter(tmp_path / "adapter", network)
    with torch.inference_mode():
        torch.testing.assert_close(logits(network), theirs(TOKENS).logits, atol=1e-5, rtol=1e-4)


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


def test_only_the_last_blocks_train_where_asked():
    network = network_of("bert-mini")
    prepare(network, Tune(method="last", layers=1), seed=0)
    trained = {n.split(".attention")[0].split(".ffn")[0] for n, p in network.named_parameters() if p.requires_grad}
    assert trained == {"transformer.blocks.1"}


def test_the_rate_falls_with_the_distance_from_the_head():
    config = network_of("bert-mini").config
    tune = Tune(layer_decay=0.5)
    names = [
        "head.dense.weight",
        "transformer.blocks.1.ffn.input.weight",
        "transformer.blocks.0.ffn.input.weight",
        "embedder.tokens.weight",
    ]
    assert [lr_scale(name, config, tune) for name in names] == [1.0, 0.5, 0.25, 0.125]
    assert lr_scale("embedder.tokens.weight", config, Tune()) == 1.0

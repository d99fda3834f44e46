"""Heads over labels against transformers, both ways: the same logits, the same names of labels, nothing left over.

Tiny random checkpoints in which every weight and bias is random.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from formary.errors import CheckpointError
from formary.hub.checkpoint import Checkpoint, load, save
from formary.model.config import ModelConfig
from formary.model.heads import LabelHead
from formary.model.topologies import Decoder, Encoder, Network, build, with_head
from formary.recipe.presets import preset

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, PAD = 53, 1
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 19,
}
DISTIL = {
    "vocab_size": VOCAB,
    "dim": 24,
    "hidden_dim": 28,
    "n_layers": 2,
    "n_heads": 3,
    "max_position_embeddings": 19,
}
GPT2 = {"vocab_size": VOCAB, "n_positions": 17, "n_embd": 24, "n_layer": 2, "n_head": 3}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}
FIELDS = {"Bert": BERT, "Roberta": BERT, "DistilBert": DISTIL, "GPT2": GPT2}
KINDS = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag",
    "ForQuestionAnswering": "span",
    "ForMultipleChoice": "choice",
}
FIXED = {"span": ("start", "end"), "choice": ("choice",)}  # labels that no checkpoint names
CLASSES = [
    *(stem + kind for stem in ("Bert", "Roberta", "DistilBert") for kind in KINDS),
    *(stem + kind for stem in ("GPT2", "Llama", "Qwen2", "Qwen3") for kind in list(KINDS)[:2]),
]
LABELS = {0: "ham", 1: "spam", 2: "neither"}


def parts(name: str) -> tuple[str, str]:
    """BertForTokenClassification -> Bert, ForTokenClassification."""
    stem, _, kind = name.partition("For")
    return stem, f"For{kind}"


def shake(module: nn.Module, seed: int = 0) -> None:
    """Random values in every weight and bias, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            center = 1.0 if parameter.ndim == 1 and "weight" in name else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))


def theirs(name: str, **fields: Any) -> nn.Module:
    stem, kind = parts(name)
    named = {} if KINDS[kind] in FIXED else {"id2label": LABELS}
    config = getattr(transformers, f"{stem}Config")(
        **{**FIELDS.get(stem, LLAMA), "pad_token_id": PAD, **named, **fields}
    )
    model = getattr(transformers, name)(config)
    shake(model)
    return model.eval()


def saved(folder: Path, name: str, **fields: Any) -> nn.Module:
    model = theirs(name, **fields)
    model.save_pretrained(folder)
    return model


def change(folder: Path, **fields: Any) -> None:
    """Other fields in config.json; None takes one out."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def opened(folder: Path) -> nn.Module:
    """What transformers makes of a folder; nothing missing, nothing left over."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


@torch.no_grad()
def assert_same(network: Network, model: nn.Module) -> None:
    """The same logits for rows of 13, 11 and 4 tokens, padded at the right."""
    assert isinstance(network, Encoder | Decoder) and isinstance(network.head, LabelHead)
    ids = torch.randint(3, VOCAB, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(13)[None] < torch.tensor([13, 11, 4])[:, None]
    ids = ids.masked_fill(~mask, PAD)
    more: dict[str, Tensor] = {}
    if network.config.token_types > 1:
        more = {"token_type_ids": (torch.arange(13) > 6).long().expand(3, -1)}
    inputs = {"input_ids": ids, "attention_mask": mask.long(), **more}
    if network.config.head == "choice":  # theirs reads rows of choices: (rows, choices, seq)
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    out = model(**inputs)
    if isinstance(network, Encoder):
        hidden = network(ids, mask=mask, types=more.get("token_type_ids"))
    else:
        hidden = network(ids)
    if network.config.head == "classify":
        ours, oracle = network.head(network.summary(hidden, mask)), out.logits
    elif network.config.head == "choice":
        ours, oracle = network.head(network.summary(hidden, mask))[:, 0], out.logits[0]
    elif network.config.head == "tag":
        ours, oracle = network.head(hidden)[mask], out.logits[mask]
    else:
        ours, oracle = network.head(hidden)[mask], torch.stack([out.start_logits, out.end_logits], dim=-1)[mask]
    assert oracle.std() > (0.02 if network.config.head == "choice" else 0.05)
    torch.testing.assert_close(ours, oracle, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_a_head_of_transformers_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    checkpoint = load(tmp_path)
    head = KINDS[parts(name)[1]]
    assert checkpoint.config.head == head and checkpoint.left_out == ()
    assert checkpoint.config.labels == FIXED.get(head, tuple(LABELS.values()))
    assert_same(checkpoint.network, model)


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_opens_our_head_with_its_labels(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "theirs", name)
    config = load(tmp_path / "theirs").config
    network = build(config, seed=3).eval()
    shake(network, seed=4)
    (tmp_path / "ours").mkdir()
    save(tmp_path / "ours", network)
    model = opened(tmp_path / "ours")
    assert type(model).__name__ == name
    if config.head not in FIXED:
        assert model.config.id2label == LABELS and model.config.label2id == {v: k for k, v in LABELS.items()}
    assert_same(network, model)
    again = load(tmp_path / "ours")
    assert dataclasses.replace(again.config, initialisation=config.initialisation) == config
    for weight, values in network.state_dict().items():
        assert torch.equal(again.network.state_dict()[weight], values), weight
    assert not (tmp_path / "ours" / "generation_config.json").exists()


@pytest.mark.parametrize(
    ("problem", "ours", "labels"),
    [
        ("single_label_classification", "single", LABELS),
        ("multi_label_classification", "multi", LABELS),
        ("regression", "regression", {0: "stars"}),
    ],
)
def test_the_problem_type_goes_both_ways(problem: str, ours: str, labels: dict[int, str], tmp_path: Path) -> None:
    saved(tmp_path, "BertForSequenceClassification", problem_type=problem, id2label=labels)
    checkpoint = load(tmp_path)
    assert checkpoint.config.problem == ours
    save(tmp_path, checkpoint.network)
    assert opened(tmp_path).config.problem_type == problem


def test_a_config_that_names_no_labels_numbers_them(tmp_path: Path) -> None:
    saved(tmp_path, "RobertaForSequenceClassification")
    change(tmp_path, id2label=None, label2id=None, num_labels=3)
    assert load(tmp_path).config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_one_output_without_a_problem_type_is_a_regression_as_in_transformers(tmp_path: Path) -> None:
    saved(tmp_path, "BertForSequenceClassification", id2label={0: "LABEL_0"})
    assert load(tmp_path).config.problem == "regression"


@pytest.mark.parametrize("name", [name for name in CLASSES if KINDS[parts(name)[1]] != "choice"])
def test_without_architectures_the_weights_tell_the_kind_of_head(name: str, tmp_path: Path) -> None:
    saved(tmp_path, name)
    change(tmp_path, architectures=None)
    assert load(tmp_path).config.head == KINDS[parts(name)[1]]


def test_ten_and_more_labels_keep_the_order_of_their_numbers(tmp_path: Path) -> None:
    labels = {number: f"topic {number}" for number in range(12)}
    saved(tmp_path, "DistilBertForSequenceClassification", id2label=labels)
    change(tmp_path, id2label=dict(sorted((str(number), label) for number, label in labels.items())))
    assert load(tmp_path).config.labels == tuple(labels.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, r"id2label: the labels should be numbered 0 to 2, not \[1, 2"),
        ({"id2label": {"0": "a", "1": "b"}}, r"classifier\.weight has shape \(3, 24\), config\.json asks for \(2, 24"),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, r"labels, each once: \('a', 'a', 'b'\)"),
        ({"problem_type": "ranking"}, r"problem_type 'ranking' is not one Formary reads \(single_label"),
    ],
)
def test_labels_that_do_not_fit_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, "BertForSequenceClassification")
    change(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("stem", "kind"), [("Bert", "tag"), ("Roberta", "classify"), ("Roberta", "span")])
def test_the_unread_pooler_of_an_older_checkpoint_is_left_out_and_named(stem: str, kind: str, tmp_path: Path) -> None:
    name = stem + next(theirs for theirs, ours in KINDS.items() if ours == kind)
    model = saved(tmp_path, name)
    weights = load_file(tmp_path / "model.safetensors")
    pooler = {
        f"{stem.lower()}.pooler.dense.{end}": torch.zeros(24, 24)[0 if end == "bias" else slice(None)].clone()
        for end in ("bias", "weight")
    }
    save_file({**weights, **pooler}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = load(tmp_path)
    assert checkpoint.left_out == tuple(pooler)
    assert_same(checkpoint.network, model)


def tuned(start: Checkpoint, **fields: Any) -> Network:
    """A new head on a checkpoint's network, as fine-tuning begins."""
    return with_head(start.network, dataclasses.replace(start.config, **fields), seed=0).eval()


def test_a_new_head_on_a_pretrained_network_opens_in_transformers(tmp_path: Path) -> None:
    transformers.BertForPreTraining(transformers.BertConfig(**BERT)).save_pretrained(tmp_path)
    network = tuned(
        load(tmp_path), head="classify", labels=("a", "b"), head_bias=True, pooler=True, next_sentence=False, pad_id=PAD
    )
    shake(network)
    save(tmp_path, network)
    assert_same(network, opened(tmp_path))


@pytest.mark.parametrize(
    "fields",
    [
        {"pooler": False, "pooling": "mean"},
        {"pooler": True, "pooler_activation": "relu"},
        {"pooler": True, "head_bias": False},
        {"pooler": True, "head": "tag"},
    ],
)
def test_a_head_that_no_family_has_is_kept_in_our_own_layout(fields: dict[str, Any], tmp_path: Path) -> None:
    config = preset("bert-mini", vocab_size=VOCAB, context=24, size="1x32")
    plain = {"head": "classify", "labels": ("a", "b"), "problem": "multi"}
    network = build(dataclasses.replace(config, **{**plain, **fields}), seed=0).eval()
    save(tmp_path, network)
    checkpoint = load(tmp_path)
    assert checkpoint.family == "formary" and checkpoint.config == network.config
    for weight, values in network.state_dict().items():
        assert torch.equal(checkpoint.network.state_dict()[weight], values), weight


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_how_a_bare_backbone_is_pooled_does_not_keep_it_from_transformers(pooling: Any, tmp_path: Path) -> None:
    config: ModelConfig = preset("bert-mini", vocab_size=VOCAB, context=24, size="1x32")
    save(tmp_path, build(dataclasses.replace(config, head="none", pooler=False, pooling=pooling), seed=0))
    assert load(tmp_path).family == "bert"

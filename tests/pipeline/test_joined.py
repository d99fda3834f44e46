"""Models made of two: a ViT's encoder with a GPT's decoder, or with BERT as a second tower; trained as any other."""

import json

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from formary.data import tokenizer as tokenizers
from formary.data.images import data_uri
from formary.errors import RecipeError
from formary.hub import checkpoint
from formary.infer.loaded import load
from formary.model.topologies import build
from formary.pipeline.run import run
from formary.recipe import schema
from formary.recipe.presets import preset
from formary.tasks.models import joined, joined_config

_RNG = np.random.default_rng(8)
_CLASSES = ("bag", "coat", "shoe")
_TEXTS = [f"a {name}" for name in _CLASSES]
VIT = {"image_size": 8, "patch_size": 4}


def vit(size="1x32", name="vit-mini", **switches):
    return build(preset(name, vocab_size=1, context=16, size=size, switches={**VIT, **switches}), seed=1)


def words(name, vocab_size=20, size="2x32"):
    return build(preset(name, vocab_size=vocab_size, context=16, size=size), seed=2)


def written(folder, name, task):
    """A model of texts with its tokenizer in a folder."""
    setting = schema.Tokenizer(kind="characters")
    tokenizer = tokenizers.train(_TEXTS, setting, task=task)
    folder.mkdir()
    checkpoint.save(folder, words(name, tokenizer.vocab_size))
    tokenizer.save(folder)
    return folder


@pytest.fixture
def home(tmp_path):
    (tmp_path / "vit").mkdir()
    checkpoint.save(tmp_path / "vit", vit())
    tokenizers.wordless().save(tmp_path / "vit")
    pixels = [(_RNG.integers(0, 80, (8, 8, 3)) + 60 * (n % 3)).astype(np.uint8) for n in range(40)]
    rows = [{"image": data_uri(p), "text": _TEXTS[n % 3], "caption": _TEXTS[n % 3]} for n, p in enumerate(pixels)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def trained(home, task, train=None, **model):
    recipe = {
        "name": "tiny",
        "task": task,
        "data": {"sources": ["rows.jsonl"], "split": {"validation": 0.15, "test": 0.2}},
        "model": {"start": "vit", **model},
        "train": {
            "steps": 4,
            "batch": 8,
            "context": 16,
            "validate_every": 4,
            "optimiser": {"lr": 1e-3},
            **(train or {}),
        },
        "evaluate": {"bootstrap": 100},
        "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run(home / "recipe.yaml", folder=home / "run", console=Console(quiet=True))


@pytest.mark.parametrize(
    "eyes", [{}, {"conv_stem": True, "qk_norm": True}, {"name": "yolos-mini", "detection_tokens": 3}]
)
@pytest.mark.parametrize(("name", "topology"), [("gpt2-mini", "encoder_decoder"), ("bert-mini", "two_towers")])
def test_both_sides_compute_what_they_did_alone(name, topology, eyes):
    seeing, wording = vit(**eyes).eval(), words(name).eval()
    whole = joined(seeing, wording, topology, seed=3).eval()
    pixels, tokens = torch.randn(2, 3, 8, 8), torch.randint(0, 20, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(whole.encoder(whole.embedder(pixels)), seeing(pixels))
        embedder = whole.decoder_embedder if topology == "encoder_decoder" else whole.text_embedder
        torch.testing.assert_close(embedder(tokens), wording.embedder(tokens))
        if topology == "encoder_decoder":  # without what is new it writes as it did
            for block in whole.transformer.blocks:
                block.cross.output.weight.zero_()
                block.cross.output.bias.zero_()
            hidden = whole(pixels, tokens)
            torch.testing.assert_close(whole.head(hidden), wording.head(wording(tokens)))
            assert whole.head.weight is whole.decoder_embedder.tokens.weight
        else:
            torch.testing.assert_close(whole.transformer(embedder(tokens)), wording(tokens))
            assert whole.config.pooling == "mean" and whole.config.shared_width == 32


def test_a_vit_and_a_gpt_learn_to_describe_pictures(home):
    written(home / "gpt", "gpt2-mini", "causal_lm")
    done = trained(home, "caption", start_text="gpt")
    model = load(home / "run/model")
    assert model.config.topology == "encoder_decoder" and model.config.encoder.layers == 1
    assert model.config.transformer.layers == 2
    assert model.predict([data_uri(np.zeros((9, 9, 3), np.uint8))])[0].keys() == {"text"}
    assert "vit with gpt" in done.report.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "special"), [("bert-mini", "masked_lm"), ("gpt2-mini", "causal_lm")])
def test_a_vit_and_a_model_of_texts_learn_to_match(home, name, special):
    written(home / "words", name, special)
    trained(home, "match_image_text", start_text="words")
    model = load(home / "run/model")
    assert model.config.pooling == ("mean" if name == "bert-mini" else "last")
    rows = [{"image": data_uri(np.zeros((9, 9, 3), np.uint8)), "candidates": _TEXTS}]
    assert set(model.predict(rows)[0]["probabilities"]) == set(_TEXTS)


@pytest.mark.parametrize("method", ["head", "last", "lora"])
def test_parts_of_two_towers_are_tuned(home, method):
    written(home / "words", "bert-mini", "masked_lm")
    before = {name: weight.clone() for name, weight in vit().named_parameters()}
    trained(home, "match_image_text", {"tune": {"method": method, "layers": 1}}, start_text="words")
    after = dict(load(home / "run/model").network.named_parameters())
    kept = torch.equal(after["embedder.patches.weight"], before["embedder.patches.weight"])
    moved = not torch.equal(after["encoder.blocks.0.ffn.input.weight"], before["transformer.blocks.0.ffn.input.weight"])
    assert kept and moved == (method != "head")
    assert float(after["similarity_scale"].detach()) != pytest.approx(np.log(1 / 0.07), abs=1e-6)


def test_what_does_not_join_is_refused_before_the_data_is_read(home):
    written(home / "words", "bert-mini", "masked_lm")
    with pytest.raises(RecipeError, match="a decoder that writes"):
        trained(home, "caption", start_text="words")
    with pytest.raises(RecipeError, match=r"model\.start_text: is for tasks with pictures and texts"):
        trained(home, "classify_image", start_text="words")
    with pytest.raises(RecipeError, match="there is none"):
        trained(home, "match_image_text", start=None, preset="clip-mini", start_text="words")
    with pytest.raises(RecipeError, match="has to be an encoder of pictures"):
        trained(home, "match_image_text", start="words", start_text="words")
    with pytest.raises(RecipeError, match=r"32 numbers, and model\.start gives 64"):
        joined_config(vit("1x64").config, words("gpt2-mini").config, "encoder_decoder")
    with pytest.raises(RecipeError, match="recipe:NAME is for"):
        trained(home, "match_image_text", start_text="recipe:spam-words")
    assert not (home / "run/data/documents").exists()

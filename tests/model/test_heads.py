"""Heads over labels: what they read, how they begin, and what of another network they keep."""

import dataclasses
import json

import pytest
import torch

from formary.errors import RecipeError
from formary.model.config import ModelConfig
from formary.model.heads import LabelHead, pooled
from formary.model.topologies import build, with_head
from formary.recipe.presets import preset

LABELS = ("ham", "spam", "other")


def labelled(name="bert-mini", head="classify", **fields):
    config = preset(name, vocab_size=97, context=24, size="2x64")
    plain = {"labels": LABELS, "next_sentence": False, "pooler": False, "head_bias": True}
    return dataclasses.replace(config, head=head, **{**plain, **fields})


def test_a_config_with_labels_survives_json():
    config = labelled(problem="multi", pooling="mean", pooler_activation="relu")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_written_before_there_were_labels_still_reads():
    values = preset("gpt2-mini", vocab_size=97, context=24).to_dict()
    for name in ("labels", "problem", "pooling", "pooler_activation"):
        del values[name]
    assert ModelConfig.from_dict(values) == preset("gpt2-mini", vocab_size=97, context=24)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("bert-mini", {"labels": ()}), ("gpt-mini", {"labels": ("a", "a")}), ("bart-base", {"labels": ("a", "b")})],
)
def test_a_label_head_without_labels_or_on_an_encoder_decoder_is_refused(name, fields):
    with pytest.raises(RecipeError, match="a classify head needs an encoder or decoder, and labels, each once"):
        labelled(name, **fields)


@pytest.mark.parametrize("name", ["bert-mini", "gpt2-mini", "gpt-mini"])
def test_a_label_head_scores_sequences_and_tokens(name):
    network = build(labelled(name), seed=0).eval()
    hidden = network(torch.randint(0, 97, (2, 11)))
    assert isinstance(network.head, LabelHead)
    assert network.head(network.summary(hidden)).shape == (2, 3)
    assert network.head(hidden).shape == (2, 11, 3)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_decoder_is_summed_up_by_its_last_real_token(padding):
    network = build(labelled("gpt2-mini"), seed=0).eval()
    hidden = torch.randn(3, 7, 64)
    lengths = torch.tensor([7, 4, 1])[:, None]
    places = torch.arange(7)[None]
    mask = places < lengths if padding == "right" else places >= 7 - lengths
    last = [6, 3, 0] if padding == "right" else [6, 6, 6]
    assert torch.equal(network.summary(hidden, mask), hidden[torch.arange(3), last])
    assert torch.equal(network.summary(hidden), hidden[:, -1])


def test_an_encoder_is_summed_up_by_its_pooler_else_as_pooling_says():
    hidden, mask = torch.randn(2, 5, 64), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])

    def summary(**fields):
        network = build(labelled(**fields), seed=0).eval()
        return network, network.summary(hidden, mask)

    assert torch.equal(summary(pooling="first")[1], hidden[:, 0])
    torch.testing.assert_close(summary(pooling="mean")[1], torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)]))
    network, relu = summary(pooler=True, pooler_activation="relu", pooling="mean")
    assert torch.equal(relu, network.pooler.dense(pooled(hidden, mask, "mean")).relu())
    network, tanh = summary(pooler=True)
    assert torch.equal(tanh, network.pooler.dense(hidden[:, 0]).tanh())


@pytest.mark.parametrize("name", ["bert-mini", "gpt2-mini"])
def test_a_new_head_begins_as_published_and_the_rest_is_kept(name):
    start = build(preset(name, vocab_size=97, context=24, size="2x64"), seed=1)
    kept = dict(start.named_parameters())
    network = with_head(start, labelled(name, labels=tuple("abcdefgh"), pooler=name == "bert-mini"), seed=2)
    assert network.head.output.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not network.head.output.bias.any()
    for weight, parameter in network.named_parameters():
        if not weight.startswith("head."):
            assert torch.equal(parameter, kept[weight]) and parameter is not kept[weight], weight
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_head_is_kept_for_the_same_labels_alone():
    start = build(labelled(), seed=1)
    same = with_head(start, labelled(), seed=2).head.output.weight
    renamed = with_head(start, labelled(labels=("x", "y", "z")), seed=2).head.output.weight
    of_tokens = with_head(start, labelled(head="tag"), seed=2).head.output.weight
    assert torch.equal(same, start.head.output.weight)
    assert torch.equal(renamed, of_tokens) and not torch.equal(renamed, same)


def test_the_same_seed_gives_the_same_new_head():
    start = build(preset("bert-mini", vocab_size=97, context=24, size="2x64"), seed=1)
    one, two = (with_head(start, labelled(), seed=5).head.output.weight for _ in range(2))
    assert torch.equal(one, two)

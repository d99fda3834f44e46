"""Ways to tune: what each lets train, how fast, and that a plain network is left behind."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formary.errors import RecipeError
from formary.model.topologies import build, with_head
from formary.recipe.presets import preset
from formary.recipe.schema import Tune
from formary.train.tuning import finish, lr_scale, prepare, trainable_count


def network_of(name, *, head=None, **switches):
    config = preset(name, vocab_size=50, context=16, size="3x32", switches={"heads": 2, **switches})
    network = build(config, seed=0)
    if head is None:
        return network
    return with_head(network, dataclasses.replace(config, head=head, labels=("a", "b")), seed=1)


def trained(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def prepared(network, **tune):
    prepare(network, Tune(**tune), seed=0)
    return trained(network)


def test_everything_trains_by_default():
    network = network_of("bert-mini", head="classify")
    assert prepared(network) == {name for name, _ in network.named_parameters()}
    assert trainable_count(network) == sum(parameter.numel() for parameter in network.parameters())


def test_only_the_head_and_what_leads_to_it_trains_where_asked():
    network = network_of("bert-mini", head="classify")
    assert prepared(network, method="head") == {
        "head.output.weight",
        "head.output.bias",
        "pooler.dense.weight",
        "pooler.dense.bias",
    }


@pytest.mark.parametrize("method", ["head", "last", "lora"])
def test_a_head_for_labels_always_trains(method):
    for name in ("bert-mini", "gpt-mini"):
        assert "head.output.weight" in prepared(network_of(name, head="classify"), method=method)


def test_the_last_blocks_train_and_the_norm_after_them():
    network = network_of("gpt-mini")
    names = prepared(network, method="last", layers=1)
    assert names == {
        n for n, _ in network.named_parameters() if n.startswith(("transformer.blocks.2.", "transformer.norm."))
    }


def test_the_last_blocks_of_an_encoder_decoder_are_those_of_both_sides():
    network = network_of("seq2seq-mini")
    names = {
        name.partition(".attention")[0] for name in prepared(network, method="last", layers=2) if ".attention." in name
    }
    assert names == {f"{side}.blocks.{block}" for side in ("encoder", "transformer") for block in (1, 2)}


def test_more_last_blocks_than_there_are_leave_the_embeddings_frozen():
    names = prepared(network_of("bert-mini"), method="last", layers=99)
    assert not any("embedder" in name for name in names)
    assert any("blocks.0." in name for name in names)


def test_a_head_that_is_the_embedding_cannot_train_alone():
    with pytest.raises(RecipeError, match="leaves nothing to train"):
        prepare(network_of("gpt2-mini"), Tune(method="head"), seed=0)
    assert prepared(network_of("gpt2-mini", tied_embeddings=False), method="head") == {"head.weight"}


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_low_rank_updates_go_beside_the_matrices_asked_for(targets):
    network = network_of("seq2seq-mini")
    places = {
        name.partition(".lora_")[0].split(".", 3)[3] for name in prepared(network, method="lora", targets=targets)
    }
    attention = {"attention.qkv", "attention.output", "cross.query", "cross.key_value", "cross.output"}
    assert places == attention | ({"ffn.input", "ffn.output"} if targets == "all" else set())


@pytest.mark.parametrize("method", ["full", "last", "lora"])
def test_a_finished_network_is_plain_and_may_train_as_a_whole(method):
    network = network_of("gpt-mini")
    before = {name: parameter.shape for name, parameter in network.named_parameters()}
    kinds = [type(module) for module in network.modules()]
    prepare(network, Tune(method=method), seed=0)
    finish(network)
    assert {name: parameter.shape for name, parameter in network.named_parameters()} == before
    assert [type(module) for module in network.modules()] == kinds
    assert trained(network) == set(before)


@pytest.mark.parametrize("training", [True, False])
def test_updates_and_merged_layers_keep_the_mode(training):
    network = network_of("bert-mini").train(training)
    prepare(network, Tune(method="lora"), seed=0)
    assert all(module.training == training for module in network.modules())
    finish(network)
    assert all(module.training == training for module in network.modules())


def test_frozen_weights_get_no_gradient_and_stay():
    network = network_of("gpt-mini")
    frozen = {name: parameter.clone() for name, parameter in network.named_parameters()}
    prepare(network, Tune(method="lora"), seed=0)
    network.head(network(torch.tensor([[3, 1, 4]]))).sum().backward()
    assert all((parameter.grad is not None) == ("lora_" in name) for name, parameter in network.named_parameters())
    for name, parameter in network.named_parameters():
        assert "lora_" in name or torch.equal(parameter, frozen[name])


def test_the_rate_falls_with_the_distance_from_the_head():
    config = network_of("bert-mini").config
    names = [
        "head.dense.weight",
        "pooler.dense.weight",
        "transformer.blocks.2.ffn.input.weight",
        "transformer.blocks.1.attention_norm.bias",
        "transformer.blocks.0.attention.qkv.lora_a.0",
        "embedder.tokens.weight",
    ]
    scales = [lr_scale(name, config, Tune(layer_decay=0.5)) for name in names]
    assert scales == [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625]
    assert {lr_scale(name, config, Tune()) for name in names} == {1.0}
    assert {lr_scale(name, config, None) for name in names} == {1.0}


def test_each_side_of_an_encoder_decoder_counts_from_its_own_top():
    config = network_of("seq2seq-mini").config
    assert config.encoder is not None
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, layers=5))
    scales = {
        "encoder.blocks.4.ffn.input.weight": 0.5,
        "transformer.blocks.2.ffn.input.weight": 0.5,
        "encoder.blocks.0.ffn.input.weight": 0.5**5,
        "embedder.tokens.weight": 0.5**6,
        "encoder.relative_bias.weight": 0.5**6,  # every block adds it to its scores
        "transformer.norm.weight": 1.0,
    }
    assert {name: lr_scale(name, config, Tune(layer_decay=0.5)) for name in scales} == scales


@given(decay=st.floats(0.05, 1.0))
def test_no_weight_learns_faster_than_one_above_it(decay):
    network = network_of("bert-mini")
    scale = {name: lr_scale(name, network.config, Tune(layer_decay=decay)) for name, _ in network.named_parameters()}
    assert max(scale.values()) <= 1.0 and min(scale.values()) == scale["embedder.tokens.weight"] > 0
    blocks = [scale[f"transformer.blocks.{i}.ffn.input.weight"] for i in range(3)]
    assert blocks == sorted(blocks)

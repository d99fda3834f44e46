"""The Transformer: what may see what, what shapes come out, and which sizes are refused."""

import dataclasses

import pytest
import torch

from formary.errors import RecipeError
from formary.model.attention import Rotary, rotate
from formary.model.config import ModelConfig, TransformerConfig
from formary.model.topologies import build, parameter_count
from formary.model.transformer import document_mask
from formary.recipe.presets import PRESETS, preset

WORDED = [name for name, fields in PRESETS.items() if fields.get("embedder", "tokens") == "tokens"]


def small(name, **switches):
    return preset(name, vocab_size=97, context=24, size="2x64", switches=switches)


@pytest.mark.parametrize("name", WORDED)
def test_every_preset_gives_logits_over_its_vocabulary(name):
    network = build(small(name), seed=0)
    tokens = torch.randint(0, 97, (2, 11))
    hidden = network(tokens, tokens) if network.config.topology == "encoder_decoder" else network(tokens)
    assert hidden.shape == (2, 11, 64)
    assert network.head(hidden).shape == (2, 11, 97)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope", "relative_bias", "none"])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_causal_stack_never_sees_the_future(position, norm_position):
    network = build(small("gpt2-mini", position=position, norm_position=norm_position), seed=1).eval()
    tokens = torch.randint(0, 97, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 97
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_an_encoder_sees_both_sides_but_no_padding():
    network = build(small("bert-mini"), seed=1).eval()
    tokens = torch.randint(0, 97, (1, 12))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 97
    assert not torch.allclose(network(tokens)[:, :9], network(changed)[:, :9])
    mask = torch.arange(12)[None] < 9
    torch.testing.assert_close(network(tokens, mask=mask)[:, :9], network(changed, mask=mask)[:, :9])


def test_packed_documents_with_a_mask_read_as_if_alone():
    network = build(small("gpt-mini"), seed=2).eval()
    one, two = torch.randint(0, 97, (1, 5)), torch.randint(0, 97, (1, 6))
    documents = torch.tensor([[0] * 5 + [1] * 6])
    positions = torch.tensor([[*range(5), *range(6)]])
    packed = network(torch.cat([one, two], dim=1), positions=positions, mask=document_mask(documents, causal=True))
    torch.testing.assert_close(packed[:, 5:], network(two))


def test_rotated_products_depend_on_distance_only():
    rotary = Rotary(TransformerConfig(layers=1, width=16, heads=1, position="rope", context=50))
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(a, b):
        return (rotate(query, rotary(torch.tensor([[a]]))) * rotate(key, rotary(torch.tensor([[b]])))).sum()

    torch.testing.assert_close(product(7, 3), product(41, 37))


def test_grouped_heads_equal_full_heads_with_copied_keys_and_values():
    grouped = build(small("gpt-mini", heads=4, kv_heads=2), seed=3).eval()
    full = build(small("gpt-mini", heads=4), seed=3).eval()
    state = grouped.state_dict()
    for name, weight in state.items():
        if name.endswith("qkv.weight"):
            query, key, value = weight.split([64, 32, 32])
            copied = [part.view(2, 16, 64).repeat_interleave(2, dim=0).reshape(64, 64) for part in (key, value)]
            state[name] = torch.cat([query, *copied])
    full.load_state_dict(state)
    tokens = torch.randint(0, 97, (2, 9))
    torch.testing.assert_close(grouped(tokens), full(tokens))


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"heads": 6, "kv_heads": 4, "head_width": 8}, "do not divide evenly into kv_heads 4"),
        ({"heads": 5}, "not divisible by heads 5"),
        ({"head_width": 7}, "must be even"),
        ({"dropout": 1.5}, "dropout"),
        ({"widht": 3}, "did you mean 'width'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(switches, message):
    with pytest.raises(RecipeError, match=message):
        small("gpt-mini", **switches)


def test_a_preset_of_the_wrong_topology_names_fitting_ones():
    with pytest.raises(RecipeError, match="needs an encoder"):
        preset("gpt-mini", vocab_size=10, context=8, topology="encoder")


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name):
    config = small(name)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_gpt2_has_its_published_size_and_initial_spread():
    network = build(preset("gpt2", vocab_size=50257, context=1024), seed=0)
    assert parameter_count(network) == 124_439_808
    assert network.embedder.tokens.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert network.transformer.blocks[0].ffn.output.weight.std().item() == pytest.approx(0.02 / 24**0.5, rel=0.02)


# T5's initial logits have unit variance, which costs half a nat; the others start near zero.
@pytest.mark.parametrize(("name", "extra"), [("gpt-mini", 0.0), ("bert-mini", 0.0), ("seq2seq-mini", 0.5)])
def test_a_fresh_model_predicts_about_uniformly(name, extra):
    network = build(small(name), seed=0).eval()
    tokens = torch.randint(0, 97, (4, 16))
    hidden = network(tokens, tokens) if name == "seq2seq-mini" else network(tokens)
    targets = torch.randint(0, 97, (64,))
    loss = torch.nn.functional.cross_entropy(network.head(hidden).flatten(0, 1), targets)
    assert loss.item() == pytest.approx(torch.tensor(97.0).log().item() + extra, abs=0.4)


def test_the_same_seed_builds_the_same_weights_and_a_config_is_frozen():
    config = small("gpt-mini")
    one, two = build(config, seed=5).state_dict(), build(config, seed=5).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3


def test_a_compiled_rotation_and_its_gradient_are_the_plain_one():
    heads = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    rotation = (angles.cos(), angles.sin())
    plain = rotate(heads, rotation)
    compiled = torch.compile(rotate, backend="aot_eager")(heads, rotation)
    torch.testing.assert_close(compiled, plain)
    weights = torch.randn_like(plain)
    gradients = [torch.autograd.grad((turned * weights).sum(), heads)[0] for turned in (plain, compiled)]
    torch.testing.assert_close(*gradients)

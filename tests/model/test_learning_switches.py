"""Value embeddings, the cap on logits, zero outputs at the start: what they compute, and that models without them stay as they are."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from formary.errors import RecipeError
from formary.hub.checkpoint import load, save
from formary.model.config import ModelConfig
from formary.model.topologies import build
from formary.recipe.presets import PRESETS, preset


def small(name="gpt-mini", layers=4, **switches):
    return preset(name, vocab_size=31, context=24, size=f"{layers}x64", switches=switches)


def tokens(*shape):
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("count", "tables"), [(1, [0, None, None, 0]), (2, [0, 1, 0, 1]), (0, [None] * 4)])
def test_the_first_layers_and_the_last_share_the_tables(count, tables):
    network = build(small(value_embeddings=count), seed=0)
    assert [network.config.transformer.value_table(layer) for layer in range(4)] == tables
    assert [block.attention.value_mix is not None for block in network.transformer.blocks] == [
        table is not None for table in tables
    ]


def test_the_embeddings_are_added_to_the_values_of_attention():
    """Against attention written out: one layer's output with mixed values."""
    network = build(small(layers=2, value_embeddings=1, heads=4, kv_heads=2), seed=0).eval()
    read = tokens(2, 9)
    attention = network.transformer.blocks[0].attention
    with torch.no_grad():
        attention.value_mix.weight.copy_(torch.tensor([0.7, -1.3]))
        network.value_embedder.tables.weight.normal_()
    (embedded,) = network.value_embedder(read)
    entry = network.transformer.blocks[0].attention_norm(network.embedder(read))
    rotation = network.transformer.rotary(torch.arange(9)[None])
    found = attention(entry, mask=None, causal=True, rotation=rotation, embedded=embedded)
    plain = build(small(layers=2, heads=4, kv_heads=2), seed=0).transformer.blocks[0].attention
    plain.load_state_dict({name: tensor for name, tensor in attention.state_dict().items() if "value_mix" not in name})
    alone = plain(entry, mask=None, causal=True, rotation=rotation)
    weights = _weights(attention, entry, rotation)
    brought = (weights @ embedded.view(2, 9, 2, 16).transpose(1, 2).repeat_interleave(2, dim=1)).transpose(1, 2)
    # Attention is linear in its values.
    expected = 0.7 * alone + attention.output(-1.3 * brought.flatten(2))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def _weights(attention, entry, rotation):
    """softmax(q k^T / sqrt(width)) under the causal mask, of the two heads that share keys each."""
    from formary.model.attention import rotate

    queries, keys, _ = attention.qkv(entry).split([64, 32, 32], dim=-1)
    queries = rotate(attention.query_norm(queries.view(2, 9, 4, 16).transpose(1, 2)), rotation)
    keys = rotate(attention.key_norm(keys.view(2, 9, 2, 16).transpose(1, 2)), rotation).repeat_interleave(2, dim=1)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    return (queries @ keys.mT / 4).masked_fill(hidden, float("-inf")).softmax(dim=-1)


def test_every_table_and_its_share_learn():
    network = build(small(value_embeddings=2), seed=0)
    read = tokens(3, 12)
    F.cross_entropy(network.head(network(read[:, :-1])).flatten(0, 1), read[:, 1:].flatten()).backward()
    for name, parameter in network.named_parameters():
        if "value" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("switches", [{"value_embeddings": 3}, {"value_embeddings": -1}, {"logit_cap": 0.0}])
def test_numbers_without_sense_are_refused(switches):
    with pytest.raises(RecipeError, match=next(iter(switches))):
        small(**switches)


@pytest.mark.parametrize("name", [name for name, fields in PRESETS.items() if fields["topology"] != "decoder"])
def test_value_embeddings_are_for_decoders(name):
    with pytest.raises(RecipeError, match="for decoders"):
        small(name, value_embeddings=1)


def test_capped_logits_are_those_of_gemma_2():
    plain, capped = (build(small(logit_cap=cap), seed=0) for cap in (None, 0.05))
    hidden = plain(tokens(2, 7))
    logits, bent = plain.head(hidden), capped.head(hidden)
    torch.testing.assert_close(bent, 0.05 * torch.tanh(logits / 0.05))
    assert logits.abs().max() > 0.1 and bent.abs().max() <= 0.05


def test_a_block_with_zero_outputs_begins_as_nothing():
    network = build(small(initialisation="zero_outputs"), seed=0).eval()
    vectors = network.embedder(tokens(2, 7))
    torch.testing.assert_close(network.transformer(vectors), network.transformer.norm(vectors))
    other = build(small(), seed=0)
    outputs = (".output.weight",)
    for (name, ours), theirs in zip(network.named_parameters(), other.parameters()):
        assert (ours == 0).all() if name.endswith(outputs) else torch.equal(ours, theirs), name


def test_models_without_the_switches_are_what_they_were():
    network = build(small(), seed=0)
    assert not any("value" in name for name, _ in network.named_parameters())
    old = network.config.to_dict()
    for name in ("logit_cap", "transformer.value_embeddings"):
        section = old
        *path, last = name.split(".")
        for part in path:
            section = section[part]
        del section[last]
    assert ModelConfig.from_dict(old) == network.config


@pytest.mark.parametrize(
    "switches", [{"value_embeddings": 2}, {"logit_cap": 15.0}, {"value_embeddings": 1, "logit_cap": 30.0}]
)
def test_they_are_saved_in_our_own_layout_and_come_back(switches, tmp_path):
    network = build(small(**switches), seed=0).eval()
    save(tmp_path, network)
    found = load(tmp_path)
    assert found.family == "formary" and found.config == network.config
    read = tokens(2, 9)
    torch.testing.assert_close(found.network.head(found.network(read)), network.head(network(read)), atol=0, rtol=0)


def test_how_a_model_began_does_not_decide_its_layout(tmp_path):
    network = build(dataclasses.replace(small(initialisation="zero_outputs"), bos_id=1, eos_id=2), seed=0)
    save(tmp_path, network)
    assert load(tmp_path).family == "qwen3"

"""An encoder in 8 bits computes in few operations what its modules compute one by one."""

import dataclasses

import pytest
import torch

from formary.infer.fused_encoder import FusedEncoder, fits
from formary.infer.kernels import quantised
from formary.model.config import ModelConfig, TransformerConfig
from formary.model.topologies import Encoder, build
from formary.recipe.presets import preset

MODERN = {
    "position": "rope",
    "norm": "rms",
    "norm_position": "pre",
    "gated": True,
    "activation": "silu",
    "bias": False,
    "embedding_norm": False,
}


def encoder(**switches):
    config = preset("bert-mini", vocab_size=200, context=48, size="2x64", switches=switches)
    network = build(config, seed=0).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim < 2:  # biases that matter
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return network


def tokens(*shape):
    return torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(2))


def check_alike(found, expected):
    """Equal, but for the few numbers behind one that lay between two digits and was rounded the other way."""
    off = (found - expected).abs()
    assert (off > 1e-5).float().mean() < 0.1 and off.max() < 0.05


@pytest.mark.parametrize(
    "switches",
    [{}, MODERN, {"norm": "rms"}, {**MODERN, "norm": "layer"}, {"kv_heads": 1, "heads": 2}],
    ids=["bert", "modern", "post-norm with rms", "pre-norm with layer norms", "grouped heads"],
)
@torch.inference_mode()
def test_it_gives_what_the_modules_give(switches):
    network = encoder(**switches)
    rounded = quantised(network, tokens(1, 48))
    assert fits(rounded) and not fits(network)
    fused = FusedEncoder(rounded)
    mask = torch.arange(31)[None] < torch.tensor([31, 30, 12, 3, 1])[:, None]
    for given in ({}, {"mask": mask}, {"mask": mask, "first_only": True}, {"types": tokens(5, 31) % 2}):
        expected, found = rounded(tokens(5, 31), **given), fused(tokens(5, 31), **given)
        assert found.shape == expected.shape
        check_alike(found, expected)


@torch.inference_mode()
def test_it_reads_pictures_too():
    stack = TransformerConfig(layers=2, width=32, heads=2, causal=False, context=17)
    config = ModelConfig(
        topology="encoder",
        transformer=stack,
        vocab_size=0,
        head="classify",
        labels=("a", "b"),
        image_size=16,
        patch_size=4,
        channels=1,
        initialisation="vit",
    )
    network = build(config, seed=0).eval()
    pixels = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    rounded = quantised(network, pixels)
    fused = FusedEncoder(rounded)
    check_alike(fused(pixels), rounded(pixels))
    assert isinstance(fused, Encoder) and fused.head is rounded.head


@torch.inference_mode()
def test_a_text_alone_and_in_company_are_the_same_within_rounding():
    fused = FusedEncoder(quantised(encoder(), tokens(1, 48)))
    alone = fused(tokens(5, 31)[2:3])
    check_alike(fused(tokens(5, 31))[2:3], alone)


def test_what_has_relative_bias_or_normed_queries_stays_as_it_is():
    network = encoder()
    rounded = quantised(network, tokens(1, 48))
    stack = dataclasses.replace(rounded.config.transformer, qk_norm=True)
    rounded.config = dataclasses.replace(rounded.config, transformer=stack)
    assert not fits(rounded)

"""A stem of small convolutions in place of one product for each patch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from formary.errors import RecipeError
from formary.hub import checkpoint
from formary.model.config import ModelConfig
from formary.model.embedders import conv_stem
from formary.model.topologies import build
from formary.recipe.presets import preset


def config(**switches: object) -> ModelConfig:
    small = {"image_size": 16, "channels": 1, "heads": 2, "ffn_width": 32, "conv_stem": True}
    return preset("vit-mini", vocab_size=1, context=17, size="2x24", switches={**small, **switches})


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
@pytest.mark.parametrize("width", [24, 30])
def test_a_stem_gives_as_many_patches_as_one_product_would(patch: int, width: int) -> None:
    pixels = torch.randn(2, 3, 2 * patch, 3 * patch)
    assert conv_stem(3, width, patch)(pixels).shape == (2, width, 2, 3)


def test_a_patch_sees_pixels_of_its_neighbours() -> None:
    network = build(config(patch_size=4, class_tokens=0), seed=0).eval()
    pixels = torch.zeros(1, 1, 16, 16, requires_grad=True)
    network.embedder(pixels)[0, 5].sum().backward()  # the patch of rows 4 to 7 and columns 4 to 7
    assert pixels.grad is not None
    rows = pixels.grad[0, 0].abs().sum(dim=1).nonzero().flatten().tolist()
    assert rows == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("patch", [1, 3, 6, 12])
def test_a_patch_that_is_no_power_of_two_is_refused(patch: int) -> None:
    with pytest.raises(RecipeError, match=f"patch_size {patch}: with conv_stem it must be 2, 4, 8"):
        config(patch_size=patch)


def test_convolutions_keep_the_variance_whatever_else_is_initialised_how() -> None:
    for initialisation in ("vit", "llama", "bert"):
        network = build(config(patch_size=4, initialisation=initialisation), seed=0)
        first = network.get_parameter("embedder.patches.0.weight")
        assert 0.3 < first.std().item() < 0.6  # sqrt(2 / 9)


@torch.no_grad()
def test_it_is_kept_in_formarys_own_layout(tmp_path: Path) -> None:
    network, pixels = build(config(patch_size=4), seed=0).eval(), torch.randn(2, 1, 16, 16)
    checkpoint.save(tmp_path / "own", network)
    loaded = checkpoint.load(tmp_path / "own")
    assert loaded.config == network.config
    torch.testing.assert_close(loaded.network.eval()(pixels), network(pixels))
    assert json.loads((tmp_path / "own/config.json").read_text())["model_type"] == "formary"

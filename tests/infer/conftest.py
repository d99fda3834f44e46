"""Tiny networks whose answers vary: random heads of their own, so that the likeliest token is not always the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from formary.model.topologies import Network, build
from formary.recipe.presets import preset

SWITCHES: dict[str, dict[str, Any]] = {
    "gpt2-mini": {},
    "gpt-mini": {"heads": 4, "kv_heads": 2},
    "seq2seq-mini": {"decoder_start_id": 0},
    "bart-base": {"decoder_start_id": 2},
    "bert-mini": {},
}


@pytest.fixture
def make_network() -> Callable[..., Network]:
    return make


def make(name: str, *, vocab_size: int = 40, context: int = 32, seed: int = 0, **switches: Any) -> Network:
    """A 2 x 32 network in float64, where no two candidates tie within rounding."""
    switches = {"tied_embeddings": False, **SWITCHES[name], **switches}
    network = build(preset(name, vocab_size=vocab_size, context=context, size="2x32", switches=switches), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.double().eval()

"""The random numbers of a process: every source seeded from one number, captured for a checkpoint, put back.

Batches need none of them, being functions of the step; dropout, and whatever a user's own function draws, do.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed torch (all devices), Python's `random` and NumPy's global generator."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def captured() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every source: its long part as tensors by name, the rest as JSON-able values."""
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state()
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda{number}"] = state
    values = {"python": [version, gauss], "numpy": [str(name), int(place), int(has_gauss), float(cached)]}
    return tensors, values


def put_back(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """The inverse of `captured`; devices that this machine lacks are passed over."""
    torch.set_rng_state(tensors["torch"])
    version, gauss = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, place, has_gauss, cached = values["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), place, has_gauss, cached))
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if f"cuda{number}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{number}"], number)

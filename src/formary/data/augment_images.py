"""Random changes to pictures while a model learns from them: cropping, flipping, RandAugment's operations, erasing, mixing.

All is drawn from the generator that is passed in, so that the changes of a step are the same whenever it is done. Pictures
come and go as 8-bit arrays, many at a time.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from formary.recipe.schema import AugmentImages

Batch = NDArray[np.uint8]
"""(batch, height, width, channels)"""

# RandAugment's operations (Cubuk et al. 2020, section 3.1) and how far each goes at strength 1.
_GEOMETRY = {"rotate": math.radians(30), "shear_x": 0.3, "shear_y": 0.3, "shift_x": 0.45, "shift_y": 0.45}
_COLOURS = ("brightness", "contrast", "solarise", "posterise")
_OPERATIONS = ("identity", *_GEOMETRY, *_COLOURS)
_ERASED = (0.02, 0.33)  # share of the picture (Zhong et al. 2020, section 4)


def varied(pictures: Batch, settings: AugmentImages, rng: np.random.Generator) -> Batch:
    """Pictures changed as the recipe says, each in its own way; mixing is `mixed`'s."""
    if settings.crop:
        pictures = _cropped(pictures, settings.crop, rng)
    if settings.flip:
        flips = rng.random(len(pictures)) < 0.5
        pictures = np.where(flips[:, None, None, None], pictures[:, :, ::-1], pictures)
    for _ in range(settings.operations):
        pictures = _operated(pictures, settings.strength, rng)
    if settings.erase:
        pictures = _erased(pictures, settings.erase, rng)
    return pictures


def partners(count: int, alpha: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Mixup (Zhang et al. 2018, section 2): for each of `count` pictures another, and the share that its own keeps.

    Returns:
        the numbers of the others (count,) and the shares (count,) from Beta(alpha, alpha), the larger of the two parts.
    """
    shares = rng.beta(alpha, alpha, size=count)
    return rng.permutation(count), np.maximum(shares, 1 - shares).astype(np.float32)


def _cropped(pictures: Batch, padding: int, rng: np.random.Generator) -> Batch:
    """A window of the same size somewhere in the picture with a black border."""
    count, height, width, _ = pictures.shape
    bordered = np.pad(pictures, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    down, right = rng.integers(0, 2 * padding + 1, size=(2, count))
    rows = down[:, None] + np.arange(height)
    columns = right[:, None] + np.arange(width)
    cropped: Batch = bordered[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cropped


def _operated(pictures: Batch, strength: float, rng: np.random.Generator) -> Batch:
    """One operation of RandAugment on each picture, drawn from all, in either direction."""
    kinds = rng.integers(len(_OPERATIONS), size=len(pictures))
    levels = rng.uniform(-strength, strength, size=len(pictures))
    changed = pictures.copy()
    moved = np.isin(kinds, [_OPERATIONS.index(name) for name in _GEOMETRY])
    if moved.any():
        changed[moved] = _moved(pictures[moved], kinds[moved], levels[moved])
    for name in _COLOURS:
        chosen = kinds == _OPERATIONS.index(name)
        if chosen.any():
            changed[chosen] = _coloured(name, pictures[chosen], levels[chosen, None, None, None])
    return changed


def _moved(pictures: Batch, kinds: NDArray[np.int64], levels: NDArray[np.float64]) -> Batch:
    affine = np.tile(np.eye(2, 3), (len(pictures), 1, 1))
    for name, furthest in _GEOMETRY.items():
        chosen = kinds == _OPERATIONS.index(name)
        by = levels[chosen] * furthest
        if name == "rotate":
            affine[chosen, 0, 0] = affine[chosen, 1, 1] = np.cos(by)
            affine[chosen, 0, 1], affine[chosen, 1, 0] = -np.sin(by), np.sin(by)
        elif name.startswith("shear"):
            affine[chosen, *((0, 1) if name == "shear_x" else (1, 0))] = by
        else:
            affine[chosen, 0 if name == "shift_x" else 1, 2] = 2 * by  # the picture is two units wide
    stack = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    grid = F.affine_grid(torch.from_numpy(affine).float(), list(stack.shape), align_corners=False)
    moved = F.grid_sample(stack, grid, align_corners=False)
    result: Batch = moved.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return result


def _coloured(name: str, pictures: Batch, levels: NDArray[np.float64]) -> Batch:
    if name == "posterise":  # up to four of the eight bits go
        gone = np.round(4 * np.abs(levels)).astype(np.uint8)
        return (pictures >> gone) << gone
    if name == "solarise":
        return np.where(pictures >= 256 * (1 - np.abs(levels)), 255 - pictures, pictures)
    whole = pictures.astype(np.float32)
    ground = 0.0 if name == "brightness" else whole.mean(axis=(1, 2, 3), keepdims=True)
    changed: Batch = (ground + (whole - ground) * (1 + 0.9 * levels)).round().clip(0, 255).astype(np.uint8)
    return changed


def _erased(pictures: Batch, chance: float, rng: np.random.Generator) -> Batch:
    """A rectangle of some pictures becomes noise."""
    changed = pictures.copy()
    height, width = pictures.shape[1:3]
    for number in np.flatnonzero(rng.random(len(pictures)) < chance):
        area, shape = rng.uniform(*_ERASED), math.exp(rng.uniform(-math.log(3.3), math.log(3.3)))
        tall = max(1, min(height, round(height * math.sqrt(area * shape))))
        wide = max(1, min(width, round(width * math.sqrt(area / shape))))
        top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
        noise = rng.integers(0, 256, size=(tall, wide, pictures.shape[3]), dtype=np.uint8)
        changed[number, top : top + tall, left : left + wide] = noise
    return changed

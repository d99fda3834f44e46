"""Random changes to pictures and their boxes while a detector learns: mosaics of four pictures, moved, mirrored.

As in `augment_images`, all is drawn from the generator passed in. What is cut off so far that it could no longer be told
loses its box.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from formary.recipe.schema import AugmentImages

Pictures = NDArray[np.uint8]
Corners = NDArray[np.float32]
Scene = tuple[Corners, NDArray[np.int64]]
"""(boxes, 4) corners as shares of the picture, and their labels (boxes,)."""

_SEEN = 0.6  # the share of a box that has to stay in the picture
_CUTS = 32  # places tried for the point where four pictures meet
_MIDDLE = (0.25, 0.75)  # where it may lie


def varied(
    pictures: Pictures, scenes: Sequence[Scene], settings: AugmentImages, rng: np.random.Generator
) -> tuple[Pictures, list[Scene]]:
    """Pictures (batch, height, width, channels) and what is in them, changed as the recipe says."""
    found = list(scenes)
    if settings.mosaic:
        pictures, found = _mosaics(pictures, found, settings.mosaic, rng)
    if settings.crop:
        pictures, found = _moved(pictures, found, settings.crop, rng)
    if settings.flip:
        flips = rng.random(len(pictures)) < 0.5
        pictures = np.where(flips[:, None, None, None], pictures[:, :, ::-1], pictures)
        found = [_mirrored(scene) if flip else scene for scene, flip in zip(found, flips)]
    return pictures, found


def _mirrored(scene: Scene) -> Scene:
    corners, labels = scene
    left, top, right, bottom = corners.T
    return np.stack([1 - right, top, 1 - left, bottom], axis=1), labels


def _moved(
    pictures: Pictures, scenes: list[Scene], most: int, rng: np.random.Generator
) -> tuple[Pictures, list[Scene]]:
    """By up to `most` pixels in both directions, over a black border."""
    count, height, width, _ = pictures.shape
    down, right = rng.integers(-most, most + 1, size=(2, count))
    bordered = np.pad(pictures, ((0, 0), (most, most), (most, most), (0, 0)))
    rows, columns = most - down[:, None] + np.arange(height), most - right[:, None] + np.arange(width)
    moved = bordered[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    by = np.stack([right / width, down / height, right / width, down / height], axis=1).astype(np.float32)
    return moved, [_within((corners + shift, labels), 0, 0, 1, 1) for (corners, labels), shift in zip(scenes, by)]


def _mosaics(
    pictures: Pictures, scenes: list[Scene], share: float, rng: np.random.Generator
) -> tuple[Pictures, list[Scene]]:
    """Some pictures become four parts of pictures of the batch, each where it was (after Bochkovskiy et al. 2020, 3.3).

    Of a few places where the four could meet, that is taken which cuts the fewest things.
    """
    count, height, width, _ = pictures.shape
    changed, found = pictures.copy(), list(scenes)
    for number in np.flatnonzero(rng.random(count) < share):
        parts = [number, *rng.integers(0, count, size=3)]
        boxes = np.concatenate([scenes[part][0] for part in parts])
        cuts = rng.uniform(*_MIDDLE, size=(_CUTS, 2))
        through = [((boxes[:, :2] < cut) & (cut < boxes[:, 2:])).any(axis=1).sum() for cut in cuts]
        x, y = cuts[int(np.argmin(through))]
        column, row = round(x * width), round(y * height)
        x, y = column / width, row / height
        kept = []
        for part, (top, left) in zip(parts, ((0, 0), (0, 1), (1, 0), (1, 1))):
            rows = slice(row, None) if top else slice(None, row)
            columns = slice(column, None) if left else slice(None, column)
            changed[number, rows, columns] = pictures[part, rows, columns]
            kept.append(_within(scenes[part], x if left else 0, y if top else 0, 1 if left else x, 1 if top else y))
        found[number] = (np.concatenate([one[0] for one in kept]), np.concatenate([one[1] for one in kept]))
    return changed, found


def _within(scene: Scene, left: float, top: float, right: float, bottom: float) -> Scene:
    """What is still to be seen of things through a window, their boxes clipped to it."""
    corners, labels = scene
    low, high = np.array([left, top], np.float32), np.array([right, bottom], np.float32)
    clipped = np.concatenate([corners[:, :2].clip(low, high), corners[:, 2:].clip(low, high)], axis=1)
    seen = _area(clipped) >= _SEEN * _area(corners)
    return clipped[seen], labels[seen]


def _area(corners: Corners) -> Corners:
    area: Corners = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    return area

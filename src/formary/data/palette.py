"""A few colours that stand for all: pictures become numbers of colours, and numbers pictures.

Chosen by k-means over pixels, as for image GPT (Chen et al. 2020, section 3.3), and ordered from dark to light.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.spatial import cKDTree

from formary.data.images import Pixels
from formary.errors import DataError

_LOOKED_AT = 200_000  # pixels that colours are chosen from
_UNKNOWN = -1
_LIGHT = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)


class Palette:
    """Colours, (colours, 3) uint8, each different."""

    def __init__(self, colours: NDArray[np.uint8]) -> None:
        self.colours = colours

    def __len__(self) -> int:
        return len(self.colours)

    @classmethod
    def learned(cls, pictures: Sequence[Pixels], count: int, *, seed: int) -> Self:
        """At most `count` colours for pictures of three channels; all of theirs, where they have no more.

        Raises:
            DataError: there are no pictures.
        """
        if not pictures:
            raise DataError("data.sources: there are no training pictures to take colours from")
        rng = np.random.default_rng(seed)
        share = max(1, _LOOKED_AT // len(pictures))
        seen = np.concatenate([_some(picture.reshape(-1, 3), share, rng) for picture in pictures])
        distinct = np.unique(seen, axis=0)
        if len(distinct) > count:
            means, _ = kmeans2(seen.astype(np.float64), count, minit="++", rng=rng)
            distinct = np.unique(np.rint(means).astype(np.uint8), axis=0)
        return cls(distinct[np.lexsort((*distinct.T, distinct @ _LIGHT))])

    @classmethod
    def of_names(cls, names: Sequence[str]) -> Self:
        """The palette of colours by their names, as `names` gives them."""
        return cls(np.array([list(bytes.fromhex(name[1:])) for name in names], dtype=np.uint8).reshape(-1, 3))

    @property
    def names(self) -> list[str]:
        """Each colour as web pages write it: #rrggbb."""
        return [f"#{bytes(colour).hex()}" for colour in self.colours]

    def nearest(self, picture: Pixels) -> NDArray[np.uint16]:
        """The number of the colour nearest to each pixel: (height, width, 3) -> (height, width)."""
        red, green, blue = (picture[..., channel].astype(np.int64) for channel in range(3))
        packed = (red << 16) | (green << 8) | blue
        found = self._known[packed]
        if (new := found == _UNKNOWN).any():
            fresh = np.unique(packed[new])
            channels = np.stack([fresh >> 16, (fresh >> 8) & 255, fresh & 255], axis=1)
            self._known[fresh] = cKDTree(self.colours.astype(np.float64)).query(channels)[1]
            found = self._known[packed]
        return found.astype(np.uint16)

    @cached_property
    def _known(self) -> NDArray[np.int16]:
        """The number of every colour that was looked for so far."""
        return np.full(1 << 24, _UNKNOWN, dtype=np.int16)


def _some(pixels: NDArray[np.uint8], count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    return pixels if len(pixels) <= count else pixels[rng.choice(len(pixels), count, replace=False)]

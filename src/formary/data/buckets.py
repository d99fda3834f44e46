"""Batches of rows of like length, so that little of a batch is padding.

The one idea: an epoch is shuffled, cut into stretches of many batches, each stretch sorted by length and cut into
batches, and the batches shuffled. What a step reads is a function of the step alone, as everywhere in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_STRETCH = 50  # batches that are sorted together: more means less padding and less chance


class LengthBuckets:
    """Which rows each training step reads.

    Args:
        lengths: (rows,) tokens of each row.
        batch: rows per step; the last step of an epoch may have fewer.
        seed: of the shuffling.
    """

    def __init__(self, lengths: Sequence[int], *, batch: int, seed: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch
        self.seed = seed
        self.steps_per_epoch = max(1, -(-len(self.lengths) // batch))
        self._epoch = -1
        self._batches: list[NDArray[np.int64]] = []

    def rows(self, step: int) -> NDArray[np.int64]:
        """The numbers of the rows of one step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._cut(np.random.default_rng([self.seed, epoch, 7]))
        return self._batches[place]

    def _cut(self, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        order = rng.permutation(len(self.lengths))
        stretch = self.batch_size * _STRETCH
        for start in range(0, len(order), stretch):
            part = order[start : start + stretch]
            order[start : start + stretch] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[place] for place in rng.permutation(len(batches))]


def by_length(lengths: Sequence[int], *, tokens: int) -> Iterator[NDArray[np.int64]]:
    """Every row once, longest first, in groups whose padded size stays within `tokens` (at least one row each)."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    start = 0
    while start < len(order):
        size = max(1, tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size

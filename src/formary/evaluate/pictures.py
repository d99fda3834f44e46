"""Measures models of pictures by the bits per pixel that they need for real ones, beside simple models of the same pixels.

All see the same few colours, so the bits of all can be compared. Baselines: the colours of each place, whatever is around it,
and a two-dimensional Markov model: each pixel from the one to its left and the one above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.data.records import label_names
from formary.errors import DataError
from formary.evaluate import interval
from formary.evaluate.slices import Slice, worst
from formary.recipe.schema import Evaluate

Row = Mapping[str, Any]
Answer = Mapping[str, Any]
Codes = NDArray[np.uint16]
"""(pictures, height, width) numbers of colours"""

Floats = NDArray[np.float64]

LOWER_IS_BETTER = ("bits_per_dimension",)
PLACES, MARKOV = "colours of each place", "2-D Markov (left, above)"

_STRENGTHS = (
    0.1,
    1.0,
    10.0,
    100.0,
)  # of the pull of rare contexts towards the next simpler model, chosen on held-out pictures
_HELD_OUT = 10  # one in so many training pictures
_WORST = 20  # rows shown


def metrics(
    rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]], *, colours: int, settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    """Bits per dimension, a dimension being a pixel in one of so many colours, with its interval over pictures.

    Args:
        answers: {"bits", "pixels"} per row, by model; "model" is the one that is judged.

    Raises:
        DataError: there are no pictures.
    """
    if not rows:
        raise DataError(f"{where}: there are no pictures to measure; give the split at least one row")
    return [
        interval.metric_entry(
            "bits_per_dimension",
            f"{where}, mean over pictures, each pixel one of {colours} colours",
            {name: interval.mean(_per_pixel(given)) for name, given in answers.items()},
            len(rows),
            settings=settings,
            lower_is_better=True,
        )
    ]


def details(rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, Any]:
    """Labels whose pictures need the most bits, and the pictures that do: {"slices", "worst": [{"row" (from 1), "label", ...}]}."""
    bits = _per_pixel(answers)
    names = np.array(
        [next(iter(label_names(row["label"])), "") if row.get("label") is not None else "" for row in rows]
    )
    parts = [Slice("label", str(name), names == name) for name in np.unique(names)]
    order = np.argsort(-bits, kind="stable")[:_WORST]
    return {
        "slices": worst(parts, bits, "bits_per_dimension", errors=True),
        "worst": [
            {"row": int(n) + 1, "label": str(names[n]) or None, "bits_per_dimension": float(bits[n])} for n in order
        ],
    }


def baselines(training: Codes, pictures: Codes, colours: int) -> dict[str, list[dict[str, Any]]]:
    """What models without a network need for each picture, learned on the training pictures."""
    found = {PLACES: places(training, pictures, colours), MARKOV: markov(training, pictures, colours)}
    size = int(np.prod(pictures.shape[1:]))
    return {name: [{"bits": float(b), "pixels": size} for b in bits] for name, bits in found.items()}


def places(training: Codes, pictures: Codes, colours: int) -> Floats:
    """Bits (pictures,) where each place has a distribution of its own, one count added to every colour (Laplace)."""
    counts = np.stack([(training == colour).sum(axis=0) for colour in range(colours)], axis=-1) + 1.0
    bits = -np.log2(counts / counts.sum(axis=-1, keepdims=True))
    rows, columns = np.indices(pictures.shape[1:])
    return np.array([bits[rows, columns, picture].sum() for picture in pictures])


def markov(training: Codes, pictures: Codes, colours: int) -> Floats:
    """Bits (pictures,) of each pixel given the left and the upper one; beyond the edge stands a colour of its own.

    Rare contexts lean on the left pixel alone, that on all pixels, and these on equal shares; how much is what is best for
    held-out training pictures (Dirichlet smoothing: MacKay and Peto 1995).
    """
    held = np.arange(len(training)) % _HELD_OUT == 0
    if held.all() or not held.any():
        strength = 1.0
    else:
        strength = min(_STRENGTHS, key=lambda s: _Markov(training[~held], colours, s).bits(training[held]).sum())
    return _Markov(training, colours, strength).bits(pictures)


class _Markov:
    """Counts of pixels in their contexts; contexts are packed into one number, and only those that occur are held."""

    def __init__(self, training: Codes, colours: int, strength: float) -> None:
        self.colours, self.strength = colours, strength
        flat, contexts = training.reshape(-1).astype(np.int64), self._contexts(training)
        self.tables = [(_counts(context), _counts(context * colours + flat)) for context in contexts]

    def bits(self, pictures: Codes) -> Floats:
        """(pictures,)"""
        flat = pictures.reshape(-1).astype(np.int64)
        likely = np.full(len(flat), 1 / self.colours)
        for context, (of_context, of_pixel) in zip(self._contexts(pictures), self.tables):
            seen, hits = _looked_up(of_context, context), _looked_up(of_pixel, context * self.colours + flat)
            likely = (hits + self.strength * likely) / (seen + self.strength)
        return -np.log2(likely).reshape(len(pictures), -1).sum(axis=1)

    def _contexts(self, pictures: Codes) -> list[NDArray[np.int64]]:
        """From nothing over the left pixel to the left and the upper one, a number for each pixel."""
        edged = np.pad(pictures.astype(np.int64), ((0, 0), (1, 0), (1, 0)), constant_values=self.colours)
        left, above = edged[:, 1:, :-1].reshape(-1), edged[:, :-1, 1:].reshape(-1)
        return [np.zeros_like(left), left, left * (self.colours + 1) + above]


def _counts(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers that occur, in order, and how often."""
    return np.unique(numbers, return_counts=True)


def _looked_up(table: tuple[NDArray[np.int64], NDArray[np.int64]], numbers: NDArray[np.int64]) -> Floats:
    known, counts = table
    at = np.searchsorted(known, numbers).clip(max=len(known) - 1)
    return np.where(known[at] == numbers, counts[at], 0).astype(np.float64)


def _per_pixel(answers: Sequence[Answer]) -> Floats:
    return np.array([answer["bits"] / answer["pixels"] for answer in answers], dtype=np.float64)

"""Slices of rows: where a model is worst, by the better end of each interval, so that few rows do not look worst by chance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.evaluate import interval

FEW_VALUES = 20
"""A column with no more distinct values than this makes slices."""

_SHOWN = 20  # slices
_SMALLEST = 5  # rows of a slice


@dataclass(frozen=True)
class Slice:
    """Rows that have something in common."""

    by: str
    name: str
    rows: NDArray[np.bool_]  # (rows,) which


def worst(
    parts: Iterable[Slice], scores: NDArray[np.float64], metric: str, *, errors: bool = False
) -> list[dict[str, Any]]:
    """The worst slices, the worst first.

    Args:
        parts: those of few rows, and of all rows, are left out.
        scores: (rows,) 1 for a hit and 0 for a miss.
        metric: what their mean is called.
        errors: whether scores are sizes of errors instead, of which less is better.

    Returns:
        {"by", "slice", "rows", "metric", "below": whether all of the interval is worse than the mean of all rows, "value",
        "low", "high"}.
    """
    whole = float(scores.mean()) if len(scores) else math.nan
    measured = []
    for part in parts:
        chosen = scores[part.rows]
        if not _SMALLEST <= len(chosen) < len(scores):
            continue
        if errors:
            doubt = interval.bootstrap_rows(len(chosen), interval.mean(chosen), resamples=500, seed=0)
            rank, below = -doubt.low, doubt.low > whole
        else:
            doubt = interval.wilson(int(chosen.sum()), len(chosen))
            rank, below = doubt.high, doubt.high < whole
        shown = {"by": part.by, "slice": part.name, "rows": len(chosen), "metric": metric, "below": below}
        measured.append((rank, shown | doubt.to_json()))
    return [shown for _, shown in sorted(measured, key=lambda pair: pair[0])[:_SHOWN]]

"""From scores of all items to an answer that ranks them: the first ones, and where a wanted item stands.

Models and baselines answer through it alike. Items of equal score share a place; who measures says what that is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.tasks.protocol import Answer


def ranked(
    scores: NDArray[Any],
    names: Mapping[int, str],
    *,
    k: int,
    barred: Sequence[int] = (),
    target: int | None = None,
    new: int | None = None,
) -> Answer:
    """{"items": [{"item", "score"}, ...]}, the k best of the finite scores (items,) with their shares of a softmax over all.

    Args:
        barred: items that cannot be recommended to this user.
        target: the wanted item, which adds "rank" (from 1; None where it could not be recommended), how many are "tied"
            with it, itself included, and how many "candidates" there are.
        new: the first item that training never had; a target from there on also stands among those alone, as "new".
    """
    scores = scores.astype(np.float64)
    scores[[item for item in barred if item < len(scores)]] = -np.inf
    open_ = np.isfinite(scores)
    candidates = int(open_.sum())
    best = _largest(scores, min(k, candidates))
    shares = scores
    if candidates:
        shares = np.exp(scores - scores[best[0]])
        shares /= shares.sum()
    answer: Answer = {"items": [{"item": names[int(item)], "score": float(shares[item])} for item in best]}
    if target is None:
        return answer
    answer |= {"rank": None, "tied": 1, "candidates": candidates}
    if 0 <= target < len(scores) and open_[target]:
        answer |= _standing(scores, target)
        if new is not None and target >= new:
            answer["new"] = {**_standing(scores[new:], target - new), "candidates": int(open_[new:].sum())}
    return answer


def _largest(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The places of the k largest, the largest first; of equal ones those that come first."""
    if k < 1:
        return np.zeros(0, dtype=np.int64)
    bound = np.partition(scores, len(scores) - k)[len(scores) - k]
    some = np.flatnonzero(scores >= bound)
    return some[np.argsort(-scores[some], kind="stable")][:k]


def _standing(scores: NDArray[np.float64], target: int) -> dict[str, int]:
    return {"rank": int((scores > scores[target]).sum()) + 1, "tied": int((scores == scores[target]).sum())}

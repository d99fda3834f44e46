"""Measures preferences: how often a model prefers the answer that people chose to the one they rejected.

Chance is 0.5. People often choose the longer text, so that choice is the baseline. It does not judge how far apart two
answers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.errors import DataError
from formary.evaluate import interval
from formary.recipe.schema import Evaluate

Pair = Mapping[str, str]
Answer = Mapping[str, Any]


def metrics(
    pairs: Sequence[Pair], answers: Mapping[str, Sequence[Answer]], *, settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    """The share of pairs in which the chosen text is preferred, with its interval and paired verdicts.

    Args:
        pairs: with `chosen` and `rejected`.
        answers: {"preferred": "chosen" or "rejected"} per pair, by model; "model" is the one that is judged.
        where: what was measured, such as "test, 1,000 rows".

    Raises:
        DataError: there are no pairs.
    """
    if not pairs:
        raise DataError(f"{where}: there are no pairs to compare; give the split at least one row")
    return [
        interval.metric_entry(
            "preference_accuracy",
            f"{where}, share of pairs in which the chosen text is preferred; chance is 0.5",
            {name: _share(_right(given)) for name, given in answers.items()},
            len(pairs),
            settings=settings,
            share_of_rows=True,
        )
    ]


def details(pairs: Sequence[Pair], answers: Sequence[Answer]) -> dict[str, Any]:
    """The mean margin, and the share right where the chosen text is the longer one and where it is not.

    Returns:
        {"mean_margin": nats, "by_length": [{"chosen_is", "rows", "preference_accuracy"}]}
    """
    right, longer = (
        _right(answers),
        np.array([len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs], dtype=bool),
    )
    slices = [
        {"chosen_is": name, "rows": int(chosen.sum()), "preference_accuracy": float(right[chosen].mean())}
        for name, chosen in (("longer", longer), ("not longer", ~longer))
        if chosen.any()
    ]
    margins = [float(answer["margin"]) for answer in answers]
    return {"mean_margin": float(np.mean(margins)) if margins else None, "by_length": slices}


def baselines(pairs: Sequence[Pair]) -> dict[str, list[dict[str, Any]]]:
    """Whoever prefers the longer text, and of equally long ones the rejected: it knows nothing of what they say."""
    longer = (len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
    return {"the longer text": [{"preferred": "chosen" if chosen else "rejected"} for chosen in longer]}


def _right(answers: Sequence[Answer]) -> NDArray[np.float64]:
    return np.array([answer["preferred"] == "chosen" for answer in answers], dtype=np.float64)


def _share(hits: NDArray[np.float64]) -> interval.Statistic:
    return lambda weights: np.asarray((weights @ hits) / weights.sum(axis=-1))

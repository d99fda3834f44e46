"""Pictures and texts found by one another: recall within the first k and the mean reciprocal rank, both ways.

Ranking and ties are those of `vectors`: a text of several pictures is one candidate, and all its pictures are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.evaluate import vectors
from formary.recipe.schema import Evaluate

Row = Mapping[str, Any]
Answer = Mapping[str, Any]

_WAYS = (("text_retrieval_", "image", "text"), ("image_retrieval_", "text", "image"))  # name, asked, wanted
_CELLS = 20_000_000  # of a table of distances held at a time
_SHOWN = 10


def metrics(
    rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]], *, settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    """Texts found for pictures, then pictures for texts: recall@1, @5, @10 and MRR; intervals over queries.

    Args:
        rows: with `image`, what the picture is called, and `text`.
        answers: {"image_vector", "text_vector"} per row, by model.
        where: what was measured, such as "test, 150 rows".

    Raises:
        DataError: there are no rows.
    """
    found: list[dict[str, Any]] = []
    for prefix, asked, wanted in _WAYS:
        by_model = {model: _answers(given, asked, wanted) for model, given in answers.items()}
        pairs = _pairs(rows, asked, wanted)
        found += vectors.metrics(pairs, by_model, settings=settings, where=where, prefix=prefix)
    return found


def details(rows: Sequence[Row], answers: Sequence[Answer], *, thumbnail: Callable[[int], str]) -> dict[str, Any]:
    """Pictures whose text stands lowest, with the text that was found instead, and mean cosines of pairs and others.

    Args:
        thumbnail: the picture of a row, counted from 0, for a page.
    """
    found = vectors.details(_pairs(rows, "image", "text"), _answers(answers, "image", "text"), examples=_SHOWN)
    worst = [
        {
            "row": one["row"] + 1,
            "image": thumbnail(one["row"]),
            "text": one["positive"],
            "rank": one["rank"],
            "found": one["found"],
        }
        for one in found["worst"]
    ]
    return {"worst": worst, "cosine": found["cosine"]}


def baselines(
    training: Sequence[Row], rows: Sequence[Row], *, features: Callable[[Sequence[Row]], NDArray[np.float32]]
) -> dict[str, list[dict[str, Any]]]:
    """The text of the training picture with the least distance in pixels stands for a picture; compared by TF-IDF."""
    if not training or not rows:
        return {}
    near = _nearest(features(training), features(rows))
    texts = [{"text": training[place]["text"], "positive": row["text"]} for place, row in zip(near, rows)]
    known = [{"text": row["text"], "positive": row["text"]} for row in training]
    return {
        "text of the nearest picture": [
            {"image_vector": one["vector"], "text_vector": one["positive"]}
            for given in vectors.baselines(known, texts).values()
            for one in given
        ]
    }


def _nearest(known: NDArray[np.float32], asked: NDArray[np.float32]) -> list[int]:
    squares, found = (known**2).sum(axis=1), list[int]()
    at_once = max(1, _CELLS // len(known))
    for start in range(0, len(asked), at_once):
        distances = squares - 2 * asked[start : start + at_once] @ known.T
        found += distances.argmin(axis=1).tolist()
    return found


def _pairs(rows: Sequence[Row], asked: str, wanted: str) -> list[dict[str, Any]]:
    return [{"text": row[asked], "positive": row[wanted]} for row in rows]


def _answers(answers: Sequence[Answer], asked: str, wanted: str) -> list[dict[str, Any]]:
    return [{"vector": one[f"{asked}_vector"], "positive": one[f"{wanted}_vector"]} for one in answers]

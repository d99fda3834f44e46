"""Measures boxes that were found in pictures: average precision and recall as COCO has them, and what kind of errors there are.

The figures are those of pycocotools (Lin et al. 2014), but may be had of any multiset of the pictures, so that intervals
come from a bootstrap over pictures: boxes of one picture share their luck. Only where a box is found right can precision
rise, so sums are kept at these places alone. The baseline finds in every picture what was commonest in training.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.data.boxes import Boxes, boxes_of
from formary.data.images import data_uri, decoded, size_of
from formary.errors import DataError
from formary.evaluate import interval
from formary.evaluate.interval import Statistic
from formary.recipe.schema import Evaluate

Floats = NDArray[np.float64]
Row = Mapping[str, Any]
Answer = Mapping[str, Any]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU from which on a box is right."""

SURE = 0.5
"""Score from which on a box is shown, and counted as an error where it is one."""

_RECALLS = np.linspace(0.0, 1.0, 101)
_MOST = 100  # boxes of a picture and label that count
_ENTRIES = (("map@50:95", slice(None)), ("map@50", slice(0, 1)), ("map@75", slice(5, 6)))
_CELLS = 8  # of a picture's side: boxes with corners in the same cells are one box to the baseline
_LISTED = 12  # pictures of which errors are shown
_DRAWN = 256  # pixels of their longer sides
_NEAR = 0.1  # IoU from which on a box is badly placed, and not on nothing (Bolya et al. 2020, section 2.2)


@dataclass(frozen=True)
class Found:
    """One label's boxes at one threshold, summed where one is right; the surest come first.

    Args:
        right: (pictures, places) how many right boxes of each picture there are up to each place.
        said: (pictures, places) the same of all boxes, without those that do not count.
        there: (pictures,) how many boxes there are to find.
    """

    right: Floats
    said: Floats
    there: Floats

    def precision(self, weights: Floats) -> Floats:
        """Average precision at 101 recalls under multiplicities (resamples, pictures): (resamples,), NaN without boxes."""
        there = weights @ self.there
        with np.errstate(invalid="ignore", divide="ignore"):
            right = weights @ self.right
            precision = right / (weights @ self.said + np.spacing(1))
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            reached = np.searchsorted(_RECALLS, (right / there[:, None]).ravel(), side="right").reshape(right.shape)
        newly = np.diff(reached, axis=1, prepend=0)
        return np.where(there > 0, (np.nan_to_num(best) * newly).sum(axis=1) / len(_RECALLS), np.nan)

    def recall(self, weights: Floats) -> Floats:
        """The share that is found at all: (resamples,), NaN without boxes."""
        there = weights @ self.there
        with np.errstate(invalid="ignore", divide="ignore"):
            found = weights @ self.right[:, -1] if self.right.shape[1] else np.zeros(len(weights))
            return np.where(there > 0, found / there, np.nan)


def truths_of(rows: Sequence[Row]) -> list[Boxes]:
    """What is in the pictures of rows.

    Raises:
        DataError: a row has no boxes, or impossible ones.
    """
    return [boxes_of(row, f"row {number}") for number, row in enumerate(rows, 1)]


def metrics(
    rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]], *, settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    """Mean average precision over IoU 0.50 to 0.95, at 0.50 and at 0.75, and average recall, with intervals over pictures.

    Raises:
        DataError: no row has a box.
    """
    truths = truths_of(rows)
    count = sum(len(truth.labels) for truth in truths)
    if not count:
        raise DataError(f"{where}: no picture has a box, so there is nothing to measure")
    by_model = {name: found_of(truths, given) for name, given in answers.items()}
    protocol = f"{where}, {count:,} boxes, as COCO, at most {_MOST} boxes a picture and label"
    measures = {name: {model: _mean_precision(found, at) for model, found in by_model.items()} for name, at in _ENTRIES}
    measures[f"ar@{_MOST}"] = {model: _mean_recall(found) for model, found in by_model.items()}
    return [
        interval.metric_entry(name, protocol, statistics, len(rows), settings=settings)
        for name, statistics in measures.items()
    ]


def found_of(truths: Sequence[Boxes], answers: Sequence[Answer]) -> dict[str, list[Found]]:
    """By label that is in some picture, what was found at each threshold."""
    said: dict[str, dict[int, list[tuple[float, Any]]]] = defaultdict(lambda: defaultdict(list))
    for picture, answer in enumerate(answers):
        for box in answer["boxes"]:
            said[box["label"]][picture].append((box["score"], box["box"]))
    return {
        label: _of_label(label, truths, said[label])
        for label in sorted({label for truth in truths for label in truth.labels})
    }


def _of_label(label: str, truths: Sequence[Boxes], said: Mapping[int, list[tuple[float, Any]]]) -> list[Found]:
    there = np.zeros(len(truths))
    scores: list[Floats] = [np.zeros(0)]
    pictures: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    outcomes: list[NDArray[np.int8]] = [np.zeros((len(THRESHOLDS), 0), dtype=np.int8)]
    for picture, truth in enumerate(truths):
        own = np.array([name == label for name in truth.labels], dtype=bool)
        there[picture] = (own & ~truth.crowd).sum()
        if not (given := said.get(picture)):
            continue
        order = np.argsort([-score for score, _ in given], kind="stable")[:_MOST]
        boxes = np.array([given[n][1] for n in order], dtype=np.float64)
        overlap = iou(cornered(boxes), truth.corners[own], truth.crowd[own])
        scores.append(np.array([given[n][0] for n in order]))
        pictures.append(np.full(len(order), picture))
        outcomes.append(np.stack([_outcomes(overlap, truth.crowd[own], threshold) for threshold in THRESHOLDS]))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    picture_of, outcome = np.concatenate(pictures)[order], np.concatenate(outcomes, axis=1)[:, order]
    return [_summed(picture_of, one, there) for one in outcome]


_RIGHT, _WRONG, _ASIDE = 1, 0, -1


def _outcomes(overlap: Floats, crowd: NDArray[np.bool_], threshold: float) -> NDArray[np.int8]:
    """Of each box, the surest first: right (it takes the box it overlaps most that is free), wrong, or in a crowd."""
    taken = np.zeros(len(crowd), dtype=bool)
    found = np.full(len(overlap), _WRONG, dtype=np.int8)
    for number, with_each in enumerate(overlap):
        for group, outcome in ((~crowd & ~taken, _RIGHT), (crowd, _ASIDE)):
            free = np.where(group & (with_each >= min(threshold, 1 - 1e-10)), with_each, -1.0)
            if len(free) and free.max() >= 0:
                best = len(free) - 1 - int(np.argmax(free[::-1]))  # of equals the last, as in pycocotools
                taken[best] = outcome == _RIGHT
                found[number] = outcome
                break
    return found


def _summed(picture_of: NDArray[np.int64], outcomes: NDArray[np.int8], there: Floats) -> Found:
    places = np.flatnonzero(outcomes == _RIGHT)
    right, said = (np.zeros((len(there), len(places))) for _ in range(2))
    ends = np.searchsorted(places, np.arange(len(outcomes)))  # the place from which on each box is among the sums
    for sums, counted in ((right, outcomes == _RIGHT), (said, outcomes != _ASIDE)):
        counted = counted & (ends < len(places))
        np.add.at(sums, (picture_of[counted], ends[counted]), 1.0)
        np.cumsum(sums, axis=1, out=sums)
    return Found(right, said, there)


def _mean_precision(found: Mapping[str, Sequence[Found]], at: slice) -> Statistic:
    return lambda weights: _mean([one.precision(weights) for each in found.values() for one in each[at]])


def _mean_recall(found: Mapping[str, Sequence[Found]]) -> Statistic:
    return lambda weights: _mean([one.recall(weights) for each in found.values() for one in each])


def _mean(values: Sequence[Floats]) -> Floats:
    """Over labels and thresholds, without those of which there is nothing to find."""
    stacked = np.stack(values)
    known = ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, stacked, 0.0).sum(axis=0) / known.sum(axis=0))


def cornered(boxes: Floats) -> Floats:
    """x, y, width, height (boxes, 4) as left, top, right, bottom."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def iou(one: Floats, other: Floats, crowd: NDArray[np.bool_] | None = None) -> Floats:
    """Common area by joint area of corners (n, 4) and (m, 4): (n, m); with a crowd, by the first's area."""
    low, high = np.maximum(one[:, None, :2], other[None, :, :2]), np.minimum(one[:, None, 2:], other[None, :, 2:])
    common = (high - low).clip(min=0).prod(axis=2)
    area, other_area = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (one, other))
    joint = area[:, None] + other_area[None, :] - common
    if crowd is not None:
        joint = np.where(crowd[None, :], area[:, None], joint)
    return np.asarray(np.divide(common, joint, out=np.zeros_like(common), where=joint > 0))


# Baseline --------------------------------------------------------------------------------------------------------------


def baselines(training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """In every picture the boxes and labels that were commonest in training, as shares of the picture's size."""
    kinds: dict[tuple[Any, ...], list[Floats]] = defaultdict(list)
    for row, truth in zip(training, truths_of(training)):
        shares = truth.corners / np.tile(size_of(row["image"], "training row"), 2)
        for label, corners in zip(truth.labels, shares):
            kinds[label, *np.round(corners * _CELLS).astype(int)].append(corners)
    commonest = sorted(kinds.items(), key=lambda one: (-len(one[1]), one[0]))[:_MOST]
    found: list[dict[str, Any]] = []
    for row in rows:
        size = np.tile(size_of(row["image"], "row"), 2)
        boxes = []
        for (label, *_), members in commonest:
            left, top, right, bottom = (np.mean(members, axis=0) * size).tolist()
            score = len(members) / len(training)
            boxes.append({"label": label, "score": score, "box": [left, top, right - left, bottom - top]})
        found.append({"boxes": boxes})
    return {"commonest boxes": found}


# Details ---------------------------------------------------------------------------------------------------------------


def details(rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, Any]:
    """Where boxes are right and wrong, JSON-able.

    Returns:
        {"classes", "box_errors", "scenes"}: the average precision of each label with its interval; how many sure boxes are
        right or wrong in which way; and pictures with what is in them and what was found, the worst first.
    """
    truths = truths_of(rows)
    scenes: list[dict[str, Any]] = []
    kinds = Counter[str]()
    for number, (truth, answer) in enumerate(zip(truths, answers, strict=True), 1):
        sure = [box for box in answer["boxes"] if box["score"] >= SURE]
        outcome, missed = errors_of(truth, sure)
        kinds.update([*outcome, *["missed"] * missed])
        wrong = missed + sum(kind != "right" for kind in outcome)
        boxes = [{"label": name, "box": box} for name, box in zip(truth.labels, _plain(truth.corners))]
        scenes.append({"row": number, "errors": wrong, "true": boxes, "found": sure})
    worst = sorted(scenes, key=lambda scene: -scene["errors"])[:_LISTED]
    for scene in worst:
        image = rows[scene["row"] - 1]["image"]
        scene["size"] = size_of(image, f"row {scene['row']}")
        scene["image"] = data_uri(decoded(image, f"row {scene['row']}"), longest=_DRAWN)
    return {
        "classes": classes_of(rows, answers),
        "box_errors": dict(kinds.most_common()),
        "scenes": worst,
    }


def classes_of(rows: Sequence[Row], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Average precision of each label over IoU 0.50 to 0.95 ("ap") and at 0.50 ("ap50") and recall, with intervals."""
    classes = []
    for label, found in found_of(truths_of(rows), answers).items():
        if not (count := int(found[0].there.sum())):  # it is in crowds alone
            continue
        entry: dict[str, Any] = {"label": label, "boxes": count}
        for name, statistic in (
            ("ap", _mean_precision({label: found}, slice(None))),
            ("ap50", _mean_precision({label: found}, slice(0, 1))),
            ("ar", _mean_recall({label: found})),
        ):
            measured = interval.bootstrap_rows(len(rows), statistic, seed=0).to_json()
            entry |= {name: measured["value"], f"{name}_low": measured["low"], f"{name}_high": measured["high"]}
        classes.append(entry)
    return sorted(classes, key=lambda entry: -entry["ap"])


def errors_of(truth: Boxes, sure: Sequence[Mapping[str, Any]]) -> tuple[list[str], int]:
    """Of each box what it is (after Bolya et al. 2020, section 2.2), and how many of the true ones nobody found.

    "right", "wrong label", "badly placed", "found twice", or "nothing there".
    """
    order = sorted(range(len(sure)), key=lambda n: -sure[n]["score"])
    overlap = iou(cornered(np.array([box["box"] for box in sure], dtype=np.float64).reshape(-1, 4)), truth.corners)
    free = {n for n in range(len(truth.labels)) if not truth.crowd[n]}
    kinds = [""] * len(sure)
    for number in order:
        same = np.array([label == sure[number]["label"] for label in truth.labels], dtype=bool)
        near = sorted(np.flatnonzero(same & (overlap[number] >= SURE)), key=lambda n: -overlap[number, n])
        taken = next((n for n in near if n in free), None)
        if taken is not None:
            free.discard(int(taken))
            kinds[number] = "right"
        elif near:
            kinds[number] = "right" if truth.crowd[near[0]] else "found twice"
    for number in order:
        if kinds[number]:
            continue
        best = overlap[number].max(initial=0.0)
        wrong = best >= SURE
        kinds[number] = "wrong label" if wrong else "badly placed" if best >= _NEAR else "nothing there"
        if wrong:
            free.discard(int(overlap[number].argmax()))
    return kinds, len(free)


def _plain(corners: Floats) -> list[list[float]]:
    """Corners as x, y, width, height."""
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(2).tolist()

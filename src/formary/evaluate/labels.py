"""Measures labels and numbers given to texts: metrics with intervals, where a classifier errs, and baselines.

Truth and answers become arrays once; the metrics on them are in `label_scores.py`, the resampling in `interval.py`.
Labels that training never saw, classes that the test rows lack and ties are ordinary: a metric undefined is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from formary.data.records import label_names
from formary.errors import DataError
from formary.evaluate import interval, label_scores, linear
from formary.evaluate.interval import Statistic
from formary.evaluate.label_scores import Flags, Floats, Ints
from formary.evaluate.slices import FEW_VALUES, Slice, worst
from formary.recipe.schema import Evaluate

Row = Mapping[str, Any]
Answer = Mapping[str, Any]
Kind = Literal["single", "multi", "regression"]

LOWER_IS_BETTER = frozenset({"ece", "log_loss", "mae", "rmse"})
_SHARES_OF_ROWS = frozenset({"accuracy", "subset_accuracy"})
_HOW = {  # what the protocol says beyond the rows
    "balanced_accuracy": "mean recall of the classes",
    "ece": f"{label_scores.BINS} bins of equal width",
    "mcc": "Matthews correlation",
}
_WORST = 20  # rows shown
_SHOWN = 500  # characters of a text that is shown
_LARGEST_TABLE = 50  # classes in a confusion matrix; rarer ones share a line
_POINTS = 1000  # rows of a regression that are given as points (true, answered)
_REST = "(other labels)"


# Metrics -----------------------------------------------------------------------------------------------------------------


def metrics(
    rows: Sequence[Row],
    answers: Mapping[str, Sequence[Answer]],
    *,
    settings: Evaluate,
    where: str,
    labels: Sequence[str],
    kind: Kind,
) -> list[dict[str, Any]]:
    """Metrics of the model beside baselines on the same rows; the first is accuracy, subset accuracy or MAE.

    Macro averages are over the labels that occur among the rows or the answers. Metrics of probabilities are given for
    models whose every answer has them, and a metric that is not defined on these rows (ROC-AUC of one class) for none.

    Args:
        rows: with `label`: one, several, or a number.
        answers: by model; "model" is the one that is judged, the others are baselines.
        where: what was measured, such as "test, 1,000 rows".
        labels: the names the model knows; rows may have others, which it is bound to miss.

    Raises:
        DataError: there are no rows.
    """
    if not rows:
        raise DataError(f"{where}: there are no rows to measure labels on; give the split at least one row")
    classes = _classes(rows, answers.values(), labels) if kind != "regression" else []
    by_model = {model: _statistics(rows, given, classes, kind) for model, given in answers.items()}
    whole = np.ones((1, len(rows)))
    entries = []
    for name in by_model["model"]:
        every = {model: statistics[name] for model, statistics in by_model.items() if name in statistics}
        defined = {model: statistic for model, statistic in every.items() if math.isfinite(statistic(whole)[0])}
        if "model" not in defined:
            continue
        protocol = ", ".join(filter(None, [where, _how(name, classes, kind)]))
        entry = interval.metric_entry(
            name,
            protocol,
            defined,
            len(rows),
            settings=settings,
            lower_is_better=name in LOWER_IS_BETTER,
            share_of_rows=name in _SHARES_OF_ROWS,
        )
        entries.append(entry)
    return entries


def _how(name: str, classes: Sequence[str], kind: Kind) -> str:
    if name in ("roc_auc", "average_precision") and kind == "single":
        return f"of label {classes[1]}" if len(classes) == 2 else "each label against the rest, then the mean"
    return "mean over labels" if name.startswith("macro_") or name == "average_precision" else _HOW.get(name, "")


def _statistics(
    rows: Sequence[Row], answers: Sequence[Answer], classes: Sequence[str], kind: Kind
) -> dict[str, Statistic]:
    if kind == "regression":
        return label_scores.numbers(*_numbers(rows, answers))
    probabilities = _probabilities(answers, classes)
    if kind == "multi":
        held, guessed = _flags(rows, answers, classes)
        statistics = label_scores.several_labels(held, guessed)
        if probabilities is not None:
            statistics |= label_scores.several_labels_probabilities(held, probabilities)
        return statistics
    true, guess = _codes(rows, answers, classes)
    statistics = label_scores.single_label(true, guess, len(classes))
    if probabilities is not None:
        statistics |= label_scores.single_label_probabilities(true, guess, probabilities)
    return statistics


# Rows and answers as arrays ----------------------------------------------------------------------------------------------


def _classes(rows: Sequence[Row], answers: Any, labels: Sequence[str]) -> list[str]:
    """The model's labels in their order, then those that only rows or baselines have."""
    found = {name for row in rows for name in label_names(row["label"])}
    found.update(name for given in answers for answer in given for name in answered_labels(answer))
    return [*labels, *sorted(found.difference(labels))]


def answered_labels(answer: Answer) -> list[str]:
    """The label or labels of an answer."""
    return list(answer["labels"]) if "labels" in answer else [answer["label"]]


def _codes(rows: Sequence[Row], answers: Sequence[Answer], classes: Sequence[str]) -> tuple[Ints, Ints]:
    number = {name: place for place, name in enumerate(classes)}
    true = [number[label_names(row["label"])[0]] for row in rows]
    guess = [number[answer["label"]] for answer in answers]
    return np.array(true, dtype=np.int64), np.array(guess, dtype=np.int64)


def _flags(rows: Sequence[Row], answers: Sequence[Answer], classes: Sequence[str]) -> tuple[Flags, Flags]:
    number = {name: place for place, name in enumerate(classes)}
    tables = np.zeros((2, len(rows), len(classes)), dtype=np.bool_)
    for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        tables[0, place, [number[name] for name in label_names(row["label"])]] = True
        tables[1, place, [number[name] for name in answered_labels(answer)]] = True
    return tables[0], tables[1]


def _probabilities(answers: Sequence[Answer], classes: Sequence[str]) -> Floats | None:
    """(rows, classes), 0 for classes a model does not know; None when an answer has none."""
    if not all(answer.get("probabilities") for answer in answers):
        return None
    return np.array([[answer["probabilities"].get(name, 0.0) for name in classes] for answer in answers], np.float64)


def _numbers(rows: Sequence[Row], answers: Sequence[Answer]) -> tuple[Floats, Floats]:
    true, guess = [float(row["label"]) for row in rows], [float(answer["value"]) for answer in answers]
    return np.array(true), np.array(guess)


# Details -----------------------------------------------------------------------------------------------------------------


def details(
    rows: Sequence[Row],
    answers: Sequence[Answer],
    *,
    labels: Sequence[str],
    kind: Kind,
    columns: Sequence[str] = (),
) -> dict[str, Any]:
    """Where the model is right and wrong, JSON-able.

    Args:
        columns: of the rows; those with few distinct values make slices.

    Returns:
        {"kind", "labels", "confusion", "classes", "calibration", "worst", "slices"}; a regression has "points" in
        place of what needs labels, several labels a row have no "confusion", answers without probabilities no
        "calibration".
        confusion: {"labels", "counts"}, counts[true][answered]; beyond 50 labels the rarer ones share the last line.
        classes: [{"label", "precision", "recall", "f1", "support", "answered"}]; None where undefined.
        calibration: {"ece", "bins": [{"low", "high", "rows", "confidence", "accuracy"}]}.
        worst: the 20 most confidently wrong rows (regression: the largest errors), [{"row" (from 1), "text",
        "text_pair"?, "label", "answer", "probability"? | "error"?}].
        slices: worst first, [{"by", "slice", "rows", "metric", "value", "low", "high", "below": whether the whole
        interval is worse than the value over all rows}].
    """
    classes = _classes(rows, [answers], labels) if kind != "regression" else []
    found: dict[str, Any] = {"kind": kind, "labels": classes}
    probabilities = _probabilities(answers, classes) if classes and rows else None
    if kind == "regression":
        true, guess = _numbers(rows, answers)
        step = max(1, math.ceil(len(rows) / _POINTS))
        found["points"] = [[float(a), float(b)] for a, b in zip(true[::step], guess[::step], strict=True)]
        badness = score = np.abs(guess - true)
    else:
        held, guessed = _flags(rows, answers, classes)
        hits = (held == guessed).all(axis=1)
        if kind == "single":
            found["confusion"] = _confusion(*_codes(rows, answers, classes), classes)
        found["classes"] = _per_class(held, guessed, classes)
        if probabilities is not None:
            found["calibration"] = _calibration(held, guessed, probabilities, kind)
        certainty = 0.0 if probabilities is None else _certainty(held, guessed, probabilities, kind)
        badness = np.where(hits, 0.0, 1.0 + certainty)
        score = hits.astype(np.float64)
    order = [int(place) for place in np.argsort(-badness, kind="stable")[:_WORST] if badness[place] > 0]
    found["worst"] = [_shown(place, rows[place], answers[place], kind) for place in order]
    name = {"single": "accuracy", "multi": "subset_accuracy", "regression": "mae"}[kind]
    found["slices"] = worst(_parts(rows, kind, columns), score, name, errors=kind == "regression")
    return found


def _certainty(held: Flags, guessed: Flags, probabilities: Floats, kind: Kind) -> Floats:
    """How sure a model is of its wrong answer; of several labels, of the one it is most wrong about: (rows,)."""
    sure = probabilities if kind == "single" else np.abs(held - probabilities)
    wrong = guessed & ~held if kind == "single" else guessed != held
    return np.asarray(np.where(wrong, sure, 0.0).max(axis=1, initial=0.0))


def _confusion(true: Ints, guess: Ints, classes: Sequence[str]) -> dict[str, Any]:
    size = len(classes)
    counts = np.bincount(true * size + guess, minlength=size * size).reshape(size, size)
    names = list(classes)
    if size > _LARGEST_TABLE:
        order = np.argsort(-(counts.sum(axis=0) + counts.sum(axis=1)), kind="stable")
        kept = np.sort(order[: _LARGEST_TABLE - 1])
        line = np.full(size, len(kept))
        line[kept] = np.arange(len(kept))
        joined = np.zeros((_LARGEST_TABLE, _LARGEST_TABLE), dtype=np.int64)
        np.add.at(joined, (line[:, None], line[None, :]), counts)
        counts, names = joined, [*(classes[place] for place in kept), _REST]
    return {"labels": names, "counts": counts.tolist()}


def _per_class(held: Flags, guessed: Flags, classes: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for name, true, guess in zip(classes, held.T, guessed.T, strict=True):
        both, support, answered = int((true & guess).sum()), int(true.sum()), int(guess.sum())
        found.append(
            {
                "label": name,
                "precision": both / answered if answered else None,
                "recall": both / support if support else None,
                "f1": 2 * both / (support + answered) if support + answered else None,
                "support": support,
                "answered": answered,
            }
        )
    return found


def _calibration(held: Flags, guessed: Flags, probabilities: Floats, kind: Kind) -> dict[str, Any]:
    """Of one label a row the answered one's probability; of several, every label's probability in every row."""
    chosen = guessed if kind == "single" else np.ones_like(guessed)
    confidence, hits = probabilities[chosen], held[chosen].astype(np.float64)
    place = label_scores.bins(confidence)
    error = label_scores.calibration_error(hits, confidence)(np.ones((1, len(hits))))
    listed = []
    for number in range(label_scores.BINS):
        inside = place == number
        some = bool(inside.any())
        listed.append(
            {
                "low": number / label_scores.BINS,
                "high": (number + 1) / label_scores.BINS,
                "rows": int(inside.sum()),
                "confidence": float(confidence[inside].mean()) if some else None,
                "accuracy": float(hits[inside].mean()) if some else None,
            }
        )
    return {"ece": float(error[0]), "bins": listed}


def _shown(place: int, row: Row, answer: Answer, kind: Kind) -> dict[str, Any]:
    shown: dict[str, Any] = {"row": place + 1, "text": str(row.get("text", ""))[:_SHOWN]}
    if row.get("text_pair") is not None:
        shown["text_pair"] = str(row["text_pair"])[:_SHOWN]
    if kind == "regression":
        true, guess = float(row["label"]), float(answer["value"])
        return shown | {"label": true, "answer": guess, "error": guess - true}
    names = label_names(row["label"])
    if kind == "multi":
        return shown | {"label": names, "answer": answered_labels(answer)}
    shown |= {"label": names[0], "answer": answer["label"]}
    given = answer.get("probabilities") or {}
    chance = answer.get("probability", given.get(answer["label"]))
    return shown if chance is None else shown | {"probability": float(chance)}


# Slices ------------------------------------------------------------------------------------------------------------------


def _parts(rows: Sequence[Row], kind: Kind, columns: Sequence[str]) -> list[Slice]:
    labels = [label_names(row["label"]) for row in rows]
    lengths = np.array([len(text_of(row)) for row in rows], dtype=np.int64)
    parts: list[Slice] = []
    if lengths.any():
        parts = _quartiles("text length", lengths, lambda low, high: f"{low:,} to {high:,} characters")
    if kind == "regression":
        values = np.array([float(row["label"]) for row in rows])
        parts += _quartiles("value", values, lambda low, high: f"{low:g} to {high:g}")
    else:
        parts += _values("label", labels)
    for column in columns:
        values_of = [row.get(column) for row in rows]
        if all(value is None or isinstance(value, str | int | float) for value in values_of):
            names = [["(none)"] if value is None else label_names(value) for value in values_of]
            distinct = len({name for row_names in names for name in row_names})
            if 2 <= distinct <= FEW_VALUES and (kind == "regression" or names != labels):
                parts += _values(column, names)
    return parts


def _values(by: str, names: Sequence[Sequence[str]]) -> list[Slice]:
    """One slice for each name, those with the most rows first."""
    counts = Counter(name for row_names in names for name in set(row_names))
    common = sorted(counts, key=lambda name: (-counts[name], name))
    return [Slice(by, name, np.array([name in row_names for row_names in names])) for name in common]


def _quartiles(by: str, values: NDArray[Any], words: Callable[[Any, Any], str]) -> list[Slice]:
    """Up to four slices of about equally many rows; equal values stay together."""
    if len(values) == 0:
        return []
    edges = np.unique(np.quantile(values, [0.25, 0.5, 0.75], method="lower"))
    place = np.searchsorted(edges, values)
    groups = [place == number for number in np.unique(place)]
    return [Slice(by, words(values[group].min(), values[group].max()), group) for group in groups]


def text_of(row: Row) -> str:
    """The text of a row, and its second one when there is one."""
    return "\n".join(str(row[name]) for name in ("text", "text_pair") if row.get(name) is not None)


# Baselines ---------------------------------------------------------------------------------------------------------------


def baselines(
    train_rows: Sequence[Row],
    rows: Sequence[Row],
    *,
    kind: Kind,
    features: Callable[[Sequence[Row]], NDArray[Any]] | None = None,
    features_are: str = "features",
) -> dict[str, list[dict[str, Any]]]:
    """What needs no network: the commonest answer, and a linear model of TF-IDF weighted words or of given features.

    Args:
        features: numbers (rows, numbers) of rows, where they have no text; `features_are` names them.
    """
    if not train_rows:
        return {}
    labels: list[Any] = [
        float(row["label"]) if kind == "regression" else label_names(row["label"]) for row in train_rows
    ]
    if features is not None:
        return linear.answers_of(features(train_rows), labels, features(rows), kind=kind, of=features_are)
    return linear.answers([text_of(row) for row in train_rows], labels, [text_of(row) for row in rows], kind=kind)

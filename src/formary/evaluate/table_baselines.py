"""Baselines for rows of a table: the commonest answer, a linear model of one-hot and standardised columns, boosted trees.

The trees are what tables are usually given to; they take missing numbers as they are. Nothing is tuned on test rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.data.records import label_names
from formary.data.series import missing
from formary.data.table import Column, name_of, number_of
from formary.evaluate import linear

Row = Mapping[str, Any]
Answers = list[dict[str, Any]]

LINEAR, TREES = "logistic regression", "gradient-boosted trees"
_MOST_NAMES = 250  # categories that the trees tell apart; rarer ones are one
_SEED = 0


def baselines(
    training: Sequence[Row], rows: Sequence[Row], columns: Sequence[Column], kind: linear.Kind
) -> dict[str, Answers]:
    """By baseline, its answers to the rows, in the form of a classifier's own; several labels have the commonest alone."""
    labels: list[Any] = [float(row["label"]) if kind == "regression" else label_names(row["label"]) for row in training]
    found = {"mean" if kind == "regression" else "majority class": linear.commonest(labels, len(rows), kind)}
    single = [names if kind == "regression" else names[0] for names in labels] if kind != "multi" else []
    if not rows or len(set(single)) < 2:
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that ends early is still a baseline
        for name, model in _models(kind).items():
            tables = [
                _one_hot(training, part, columns) if name != TREES else _codes(training, part, columns)
                for part in (training, rows)
            ]
            if name == TREES:
                model.set_params(categorical_features=[column.names is not None for column in columns])
            model.fit(tables[0], np.array(single))
            found[name] = _answers(model, tables[1], kind)
    return found


def _models(kind: linear.Kind) -> dict[str, Any]:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV

    if kind == "regression":
        return {"ridge": RidgeCV(), TREES: HistGradientBoostingRegressor(early_stopping=True, random_state=_SEED)}
    trees = HistGradientBoostingClassifier(learning_rate=0.05, early_stopping=True, random_state=_SEED)
    return {LINEAR: LogisticRegressionCV(Cs=5, cv=3, max_iter=1000), TREES: trees}


def _answers(model: Any, table: NDArray[Any], kind: linear.Kind) -> Answers:
    if kind == "regression":
        return [{"value": float(value)} for value in model.predict(table)]
    names = [str(name) for name in model.classes_]
    return [
        {
            "label": names[int(row.argmax())],
            "probability": float(row.max()),
            "probabilities": dict(zip(names, row.tolist())),
        }
        for row in model.predict_proba(table)
    ]


def _one_hot(training: Sequence[Row], rows: Sequence[Row], columns: Sequence[Column]) -> NDArray[np.float64]:
    """Numbers standardised by the training rows, the mean where missing and a flag that says so; names as flags."""
    parts = []
    for column in columns:
        if column.names is not None:
            given = [None if missing(row.get(column.name)) else name_of(row[column.name]) for row in rows]
            parts.append(
                np.array([[value == name for name in (None, *column.names)] for value in given], dtype=np.float64)
            )
            continue
        known, numbers = (_numbers(part, column.name) for part in (training, rows))
        scaled = (numbers - np.nanmean(known)) / (np.nanstd(known) or 1.0)
        parts += [np.nan_to_num(scaled)[:, None], np.isnan(scaled)[:, None].astype(np.float64)]
    return np.concatenate(parts, axis=1)


def _codes(training: Sequence[Row], rows: Sequence[Row], columns: Sequence[Column]) -> NDArray[np.float64]:
    """Numbers as they are and numbers of names, NaN where missing."""
    found = np.full((len(rows), len(columns)), np.nan)
    for place, column in enumerate(columns):
        if column.names is None:
            found[:, place] = _numbers(rows, column.name)
            continue
        code = {name: float(n) for n, name in enumerate(column.names[:_MOST_NAMES])}
        found[:, place] = [
            code.get(name_of(row[column.name]), np.nan) if column.name in row else np.nan for row in rows
        ]
    return found


def _numbers(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    return np.array([number_of(row.get(name), name, f"row {n}") for n, row in enumerate(rows, 1)])

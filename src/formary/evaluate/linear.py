"""Baselines for labels that need no network: the commonest answer, and a linear model of TF-IDF weights or other numbers.

The second is hard to beat on a few hundred rows, and that is why it is here. Characters stand in for words where a
language writes none apart. It measures nothing and knows of no rows, only of texts, numbers and their labels.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["single", "multi", "regression"]
Answers = list[dict[str, Any]]

_MODELS = {"single": "logistic regression", "multi": "logistic regression", "regression": "ridge"}
LINEAR = {kind: f"TF-IDF + {model}" for kind, model in _MODELS.items()}
_STRENGTHS = (1.0, 10.0, 100.0)  # C of the logistic regression
_PENALTIES = (0.1, 1.0, 10.0)  # alpha of the ridge
_FOLDS = 3
_CHEAP = 10_000  # rows times classes up to which the strength is chosen by cross-validation ...
_UNCHOSEN = 1  # ... and beyond which the middle one of the above is taken
_MANY_ROWS = 1_000  # from here on an n-gram must occur in two rows
_MANY_FEATURES = 200_000
_LETTER = re.compile(r"[^\W\d_]")
_UNSPACED = re.compile(
    "[\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0eff]"
)


def answers(texts: Sequence[str], labels: Sequence[Any], asked: Sequence[str], *, kind: Kind) -> dict[str, Answers]:
    """By baseline, its answers to the asked texts, in the form of a classifier's own, with probabilities.

    The commonest answer is the majority class with the shares of all classes as probabilities, the commonest set of
    labels, or the mean. The linear model is left out where it cannot learn: one class only, or texts without a word.

    Args:
        texts, labels: to learn from; label names of each text, or numbers for a regression.
    """
    tables = _tables(texts, asked) if asked else None
    return _baselines(tables, labels, len(asked), kind, LINEAR[kind])


def answers_of(
    known: NDArray[Any], labels: Sequence[Any], asked: NDArray[Any], *, kind: Kind, of: str
) -> dict[str, Answers]:
    """`answers` from numbers in place of texts: (rows, numbers) to learn from and asked, which are of something (pixels)."""
    tables = (known, asked) if len(asked) else None
    return _baselines(tables, labels, len(asked), kind, f"{_MODELS[kind]} on {of}")


def _baselines(
    tables: tuple[Any, Any] | None, labels: Sequence[Any], count: int, kind: Kind, name: str
) -> dict[str, Answers]:
    found = {"mean" if kind == "regression" else "majority class": commonest(labels, count, kind)}
    if tables is None:
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that ends early is still a baseline
        if kind == "regression":
            learned = _ridge(*tables, np.array(labels, dtype=np.float64))
        elif kind == "multi":
            learned = _several(*tables, labels)
        else:
            learned = _one(*tables, [names[0] for names in labels])
    return found | ({name: learned} if learned else {})


def is_unspaced(texts: Sequence[str]) -> bool:
    """Whether more than half of the letters belong to scripts that write words without spaces (Chinese, Thai, ...)."""
    sample = "\n".join(text[:500] for text in texts[:1000])
    return 2 * len(_UNSPACED.findall(sample)) > len(_LETTER.findall(sample))


def commonest(labels: Sequence[Any], count: int, kind: Kind) -> Answers:
    """The mean, the majority class with the shares of all as probabilities, or the commonest set of labels, so many times."""
    if kind == "regression":
        return [{"value": float(np.mean(labels))} for _ in range(count)]
    shares = {name: held / len(labels) for name, held in Counter(name for names in labels for name in names).items()}
    shares = dict(sorted(shares.items()))
    sets = Counter(tuple(sorted(names)) for names in labels)
    best = min(sets, key=lambda names: (-sets[names], names))
    if kind == "multi":
        return [{"labels": list(best), "probabilities": shares} for _ in range(count)]
    return [{"label": best[0], "probability": shares[best[0]], "probabilities": shares} for _ in range(count)]


def _tables(texts: Sequence[str], asked: Sequence[str]) -> tuple[Any, Any] | None:
    """Sparse TF-IDF weights of the texts to learn from and of those asked; None when there is no word in them."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    unspaced = is_unspaced(texts)
    vectorizer = TfidfVectorizer(
        analyzer="char" if unspaced else "word",
        token_pattern=None if unspaced else r"(?u)\b\w+\b",
        ngram_range=(1, 3) if unspaced else (1, 2),
        min_df=2 if len(texts) >= _MANY_ROWS else 1,
        max_features=_MANY_FEATURES,
        sublinear_tf=True,
    )
    try:
        return vectorizer.fit_transform(texts), vectorizer.transform(asked)
    except ValueError:  # empty vocabulary
        return None


def _one(known: Any, asked: Any, labels: Sequence[str]) -> Answers:
    names = np.array(labels)
    if len(set(labels)) < 2:
        return []
    strength = _STRENGTHS[_UNCHOSEN]
    if len(names) * len(set(labels)) <= _CHEAP:
        strength = _best_strength(known, names)
    model = _logistic(strength).fit(known, names)
    classes = [str(name) for name in model.classes_]
    return [
        {
            "label": classes[int(row.argmax())],
            "probability": float(row.max()),
            "probabilities": dict(zip(classes, row.tolist(), strict=True)),
        }
        for row in model.predict_proba(asked)
    ]


def _best_strength(known: Any, names: NDArray[Any]) -> float:
    """The C with the most hits in 3-fold cross-validation over the classes with a row for each fold."""
    from sklearn.model_selection import StratifiedKFold

    distinct, counts = np.unique(names, return_counts=True)
    rows = np.flatnonzero(np.isin(names, distinct[counts >= _FOLDS]))
    if len(set(names[rows])) < 2:
        return _STRENGTHS[_UNCHOSEN]
    folds = list(StratifiedKFold(_FOLDS, shuffle=True, random_state=0).split(rows, names[rows]))
    hits = [
        sum(
            int(
                (
                    _logistic(strength).fit(known[rows[a]], names[rows[a]]).predict(known[rows[b]]) == names[rows[b]]
                ).sum()
            )
            for a, b in folds
        )
        for strength in _STRENGTHS
    ]
    return _STRENGTHS[int(np.argmax(hits))]


def _several(known: Any, asked: Any, labels: Sequence[Any]) -> Answers:
    """One yes or no of its own for each label; a label that every row or no row has keeps its share."""
    classes = sorted({name for names in labels for name in names})
    if not classes:
        return []
    shares = np.zeros((asked.shape[0], len(classes)))
    for place, name in enumerate(classes):
        held = np.array([name in names for names in labels])
        if held.all():
            shares[:, place] = 1.0
        else:
            shares[:, place] = _logistic(_STRENGTHS[_UNCHOSEN]).fit(known, held).predict_proba(asked)[:, 1]
    return [
        {
            "labels": [name for name, share in zip(classes, row, strict=True) if share >= 0.5],
            "probabilities": dict(zip(classes, row, strict=True)),
        }
        for row in shares.tolist()
    ]


def _ridge(known: Any, asked: Any, values: NDArray[np.float64]) -> Answers:
    """Ridge regression; the penalty with the least squared error in 3-fold cross-validation where that is cheap."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold

    penalty = _PENALTIES[_UNCHOSEN]
    if 2 * _FOLDS <= len(values) <= _CHEAP:
        folds = list(KFold(_FOLDS, shuffle=True, random_state=0).split(values))
        errors = [
            sum(
                float(((Ridge(alpha=a).fit(known[i], values[i]).predict(known[j]) - values[j]) ** 2).sum())
                for i, j in folds
            )
            for a in _PENALTIES
        ]
        penalty = _PENALTIES[int(np.argmin(errors))]
    return [{"value": float(value)} for value in Ridge(alpha=penalty).fit(known, values).predict(asked)]


def _logistic(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=300)

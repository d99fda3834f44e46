"""Metrics of labels and numbers under multiplicities of rows, the form in which `evaluate/interval.py` resamples them.

The one idea: a resample is a weight per row, so a thousand resamples are a few sums over one matrix (resamples, rows).
Values are those of scikit-learn on the drawn rows; NaN where a metric is not defined. No rows, reports or models here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.evaluate.interval import Statistic, mean

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

BINS = 15  # of equal width, for the expected calibration error (Guo et al. 2017)
_SMALLEST = float(np.finfo(np.float64).eps)  # a probability of 0 costs this much in the log loss, as in scikit-learn


# One label a row -------------------------------------------------------------------------------------------------------


def single_label(true: Ints, guess: Ints, classes: int) -> dict[str, Statistic]:
    """Accuracy, balanced accuracy, F1, precision, recall and MCC of one guess a row, numbers of classes: (rows,).

    Macro averages are over the classes that occur among the drawn rows or their guesses.
    """
    sums = [_sums_by(group, classes) for group in (np.where(true == guess, true, -1), guess, true)]

    def of(score: Callable[[Floats, Floats, Floats], Floats]) -> Statistic:
        return lambda weights: score(*(table(weights) for table in sums))

    return {
        "accuracy": mean((true == guess).astype(np.float64)),
        "balanced_accuracy": of(lambda hits, guessed, held: _mean_of(_ratio(hits, held))),
        "macro_f1": of(_macro_f1),
        "micro_f1": of(_micro_f1),
        "macro_precision": of(lambda hits, guessed, held: _macro(_ratio(hits, guessed), guessed, held)),
        "macro_recall": of(lambda hits, guessed, held: _macro(_ratio(hits, held), guessed, held)),
        "mcc": of(_mcc),
    }


def single_label_probabilities(true: Ints, guess: Ints, probabilities: Floats) -> dict[str, Statistic]:
    """ROC-AUC, average precision, ECE and log loss of probabilities (rows, classes).

    Of two classes the second is the positive one; of more, each is set against the rest and the mean is taken over
    those that occur among the drawn rows.
    """
    rows, classes = probabilities.shape
    positives = [1] if classes == 2 else range(classes)
    held = [(true == number, probabilities[:, number]) for number in positives]
    own = np.clip(probabilities[np.arange(rows), true], _SMALLEST, 1 - _SMALLEST)
    return {
        "roc_auc": _averaged([roc_auc(flags, scores) for flags, scores in held]),
        "average_precision": _averaged([average_precision(flags, scores) for flags, scores in held]),
        "ece": calibration_error((true == guess).astype(np.float64), probabilities[np.arange(rows), guess]),
        "log_loss": mean(-np.log(own)),
    }


# Several labels a row ----------------------------------------------------------------------------------------------------


def several_labels(true: Flags, guess: Flags) -> dict[str, Statistic]:
    """Subset accuracy and F1 of sets of labels, flags (rows, labels)."""
    tables = [table.astype(np.float64) for table in (true & guess, guess, true)]
    return {
        "subset_accuracy": mean((true == guess).all(axis=1).astype(np.float64)),
        "micro_f1": lambda weights: _micro_f1(*(weights @ table for table in tables)),
        "macro_f1": lambda weights: _macro_f1(*(weights @ table for table in tables)),
    }


def several_labels_probabilities(true: Flags, probabilities: Floats) -> dict[str, Statistic]:
    """Average precision per label, then the mean over labels that occur among the drawn rows."""
    each = [average_precision(true[:, number], probabilities[:, number]) for number in range(true.shape[1])]
    return {"average_precision": _averaged(each)} if each else {}


# A number a row ----------------------------------------------------------------------------------------------------------


def numbers(true: Floats, guess: Floats) -> dict[str, Statistic]:
    """MAE, RMSE, R2, Pearson's and Spearman's correlation of numbers (rows,)."""
    error = guess - true
    squared = mean(error**2)
    columns = [true - true.mean(), guess - guess.mean()]  # sums of squares near 0 keep their digits
    ranks = [_ranks(true), _ranks(guess)]

    def r2(weights: Floats) -> Floats:
        spread = weights @ columns[0] ** 2 - (weights @ columns[0]) ** 2 / weights.sum(axis=1)
        return 1 - _ratio(weights @ error**2, np.where(_varies(weights, true), spread, 0.0))

    return {
        "mae": mean(np.abs(error)),
        "rmse": lambda weights: np.sqrt(squared(weights)),
        "r2": r2,
        "pearson": lambda weights: _correlation(weights, *columns),
        "spearman": lambda weights: _correlation(weights, *(rank(weights) for rank in ranks)),
    }


# Parts ---------------------------------------------------------------------------------------------------------------------


def roc_auc(positive: Flags, scores: Floats) -> Statistic:
    """The chance that a positive row scores above a negative one, ties counting half; NaN without both."""
    groups = _by_score(positive, scores)

    def area(weights: Floats) -> Floats:
        up, both = groups(weights)
        down = both - up
        wins = (down * (np.cumsum(up, axis=1) - up / 2)).sum(axis=1)
        return _ratio(wins, up.sum(axis=1) * down.sum(axis=1))

    return area


def average_precision(positive: Flags, scores: Floats) -> Statistic:
    """Precision at each threshold weighted by the recall it adds; NaN without positive rows."""
    groups = _by_score(positive, scores)

    def area(weights: Floats) -> Floats:
        up, both = groups(weights)
        precision = np.cumsum(up, axis=1) / np.maximum(np.cumsum(both, axis=1), 1e-300)
        return _ratio((up * precision).sum(axis=1), up.sum(axis=1))

    return area


def calibration_error(hits: Floats, confidence: Floats) -> Statistic:
    """ECE: how far accuracy and confidence lie apart, over bins of equal width weighted by their rows."""
    table = np.zeros((len(hits), BINS))
    table[np.arange(len(hits)), bins(confidence)] = hits - confidence
    return lambda weights: np.asarray(np.abs(weights @ table).sum(axis=1) / weights.sum(axis=1))


def bins(confidence: Floats) -> Ints:
    """The bin of each probability, (0, 1/15], (1/15, 2/15], ...: (rows,)."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def _macro_f1(hits: Floats, guessed: Floats, held: Floats) -> Floats:
    return _macro(_ratio(2 * hits, guessed + held), guessed, held)


def _micro_f1(hits: Floats, guessed: Floats, held: Floats) -> Floats:
    return _ratio(2 * hits.sum(axis=1), guessed.sum(axis=1) + held.sum(axis=1))


def _mcc(hits: Floats, guessed: Floats, held: Floats) -> Floats:
    """Matthews correlation of several classes (Gorodkin 2004); 0 for a constant guess, NaN for a constant truth."""
    rows = held.sum(axis=1)
    together = hits.sum(axis=1) * rows - (guessed * held).sum(axis=1)
    spread_held = rows**2 - (held**2).sum(axis=1)
    spread_guessed = rows**2 - (guessed**2).sum(axis=1)
    correlation = np.nan_to_num(_ratio(together, np.sqrt(np.maximum(spread_held * spread_guessed, 0))))
    return np.where(spread_held > 0, correlation, np.nan)


def _macro(scores: Floats, guessed: Floats, held: Floats) -> Floats:
    """The mean over classes that occur (or are guessed) at all; a score that is not defined counts as 0."""
    return _mean_of(np.where(guessed + held > 0, np.nan_to_num(scores), np.nan))


def _averaged(statistics: Sequence[Statistic]) -> Statistic:
    return lambda weights: _mean_of(np.stack([statistic(weights) for statistic in statistics], axis=1))


def _mean_of(scores: Floats) -> Floats:
    """The mean of what is defined: (resamples, classes) -> (resamples,)."""
    defined = np.isfinite(scores)
    return _ratio(np.where(defined, scores, 0.0).sum(axis=1), defined.sum(axis=1))


def _ratio(above: Floats, below: NDArray[Any]) -> Floats:
    """above / below, NaN where there is nothing to divide by."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def _sums_by(groups: Ints, count: int) -> Callable[[Floats], Floats]:
    """Weights summed over the rows of each group, (resamples, rows) -> (resamples, count); rows of group -1 nowhere."""
    order = np.argsort(groups, kind="stable")
    order = order[groups[order] >= 0]
    present, starts = np.unique(groups[order], return_index=True)

    def sums(weights: Floats) -> Floats:
        table = np.zeros((len(weights), count))
        if len(order):
            table[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
        return table

    return sums


def _by_score(positive: Flags, scores: Floats) -> Callable[[Floats], tuple[Floats, Floats]]:
    """Weights of positive rows and of all rows at each distinct score, highest first: (resamples, scores) each."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(scores[order]) != 0))
    flags = positive[order].astype(np.float64)

    def sums(weights: Floats) -> tuple[Floats, Floats]:
        drawn = weights[:, order]
        if len(starts) == len(order):
            return drawn * flags, drawn
        return np.add.reduceat(drawn * flags, starts, axis=1), np.add.reduceat(drawn, starts, axis=1)

    return sums


def _ranks(values: Floats) -> Callable[[Floats], Floats]:
    """Ranks among the drawn rows, equal values sharing their mean rank: (resamples, rows) -> (resamples, rows)."""
    distinct, group = np.unique(values, return_inverse=True)
    held = _sums_by(group.astype(np.int64), len(distinct))

    def ranks(weights: Floats) -> Floats:
        counts = held(weights)
        return np.asarray((np.cumsum(counts, axis=1) - counts / 2)[:, group])

    return ranks


def _correlation(weights: Floats, first: Floats, second: Floats) -> Floats:
    """Pearson's correlation of columns (rows,) or (resamples, rows) under weights; NaN where one is constant."""
    varies = _varies(weights, first) & _varies(weights, second)
    total = weights.sum(axis=1, keepdims=True)
    first = first - (weights * first).sum(axis=1, keepdims=True) / total
    second = second - (weights * second).sum(axis=1, keepdims=True) / total
    spreads = [np.sqrt((weights * column**2).sum(axis=1)) for column in (first, second)]
    product = np.where(varies, spreads[0] * spreads[1], 0.0)
    return np.clip(_ratio((weights * first * second).sum(axis=1), product), -1, 1)


def _varies(weights: Floats, column: Floats) -> Flags:
    """Whether the drawn rows hold different values at all: (resamples,)."""
    lowest = np.where(weights > 0, column, np.inf).min(axis=1)
    return np.asarray(np.where(weights > 0, column, -np.inf).max(axis=1) > lowest)

"""95 % intervals for metrics, and the verdict when two models meet on the same text or the same rows.

The one idea: resample whole documents (or blocks of a long one, or rows), measure again; the spread is the doubt.
It does not compute losses or metrics and does not know which model made them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formary.recipe.schema import Evaluate

Array = NDArray[np.float64]
Verdict = Literal["better", "worse", "cannot tell"]
Statistic = Callable[[Array], Array]  # multiplicities of rows (resamples, rows) -> the metric of each (resamples,)

_TAIL = 0.025  # on each side of a 95 % interval
_AT_ONCE = 2_000_000  # resampled units held in memory at a time
_FEW = 30  # fewer documents than this say too little about documents: blocks are resampled instead
_BLOCKS = 100  # a few documents are cut into about this many blocks ...
_SHORTEST_BLOCK = 64  # ... of at least this many tokens: neighbouring tokens share a sentence, hence their luck
_FEWEST = 6  # rows below which no verdict is possible: even if all favour one model, the sign test has p > 0.05
_ROUNDING = 1e-12  # differences smaller than this are float noise, not skill
_SEED = 0  # of a metric's bootstrap: the same figures at every reading of the same answers
_VERDICTS = {"better": "better than", "worse": "worse than", "cannot tell": "no clear difference from"}
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A measured value and the 95 % interval around it; infinite bounds say "one unit, no idea of the doubt"."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there was enough data for bounds at all."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def to_json(self) -> dict[str, float | None]:
        """`{"value", "low", "high"}`, where what is not finite becomes None (JSON has no infinity)."""
        fields = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if math.isfinite(number) else None for name, number in fields.items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Interval:
        """The inverse of `to_json`; a missing bound is infinite, a missing value is not a number."""
        absent = {"value": math.nan, "low": -math.inf, "high": math.inf}
        return cls(**{n: float(fields[n]) if fields.get(n) is not None else absent[n] for n in absent})


@dataclass(frozen=True)
class Difference:
    """Model minus baseline, its interval, and what the interval allows to say of the model."""

    interval: Interval
    verdict: Verdict


@dataclass(frozen=True)
class Units:
    """What is resampled: sums per document or per block, and the words for it ("48 documents")."""

    numerators: Array  # (units,)
    denominators: Array  # (units,)
    words: str


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int,
    transform: Callable[[Any], Any] | None = None,
) -> Interval:
    """sum(numerators) / sum(denominators) with its bias-corrected and accelerated (BCa) 95 % bootstrap interval.

    One entry per document: loss sum and token count give the loss per token, bits and bytes give bits per byte.
    Documents are what is drawn, because tokens within one are not independent. With fewer than about 30 documents
    pass the sums of `blocks` (or let `units` decide); one unit alone has infinite bounds.

    Args:
        numerators: (n,) sums per document.
        denominators: (n,) what they are divided by; not negative, and positive wherever the numerator is not 0.
        resamples: draws of n documents with replacement.
        seed: the same seed gives the same interval.
        transform: a monotone numpy function of the ratio, such as `np.exp` for perplexity from loss per token.

    Raises:
        ValueError: shapes differ, nothing to divide by, or values are not finite.

    Source: Efron 1987, "Better bootstrap confidence intervals".
    """

    def statistic(sums: Array) -> Array:
        ratio = sums[0] / sums[1]
        return np.asarray(ratio if transform is None else transform(ratio), dtype=np.float64)

    return _bca(_columns(numerators, denominators), statistic, resamples, seed)


def paired_difference(
    model: ArrayLike,
    baseline: ArrayLike,
    denominators: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int,
    lower_is_better: bool = True,
    transform: Callable[[Any], Any] | None = None,
) -> Difference:
    """The metric of `model` minus that of `baseline` over the same documents, and the verdict on the model.

    Both are resampled together, so what makes a document hard for both cancels: this sees differences that two
    overlapping intervals hide. "better" or "worse" is said when the whole 95 % interval lies on one side of 0.

    Args:
        model, baseline: (n,) numerators per document (or block), as in `bootstrap_ratio`.
        denominators: (n,) shared by both: bytes for bits per byte, tokens when both count the same tokens.
        lower_is_better: True for loss, bits per byte, perplexity; False for accuracy.
    """

    def statistic(sums: Array) -> Array:
        ratios = sums[:2] / sums[2]
        measured = ratios if transform is None else transform(ratios)
        return np.asarray(measured[0] - measured[1], dtype=np.float64)

    interval = _bca(_columns(model, baseline, denominators), statistic, resamples, seed)
    if interval.high < 0:
        return Difference(interval, "better" if lower_is_better else "worse")
    if interval.low > 0:
        return Difference(interval, "worse" if lower_is_better else "better")
    return Difference(interval, "cannot tell")


def bootstrap_rows(count: int, statistic: Statistic, *, resamples: int = 1000, seed: int) -> Interval:
    """Any metric of `count` rows with its percentile 95 % bootstrap interval over rows.

    A metric that is no ratio of sums, such as macro F1 or ROC-AUC, is measured anew on every resample. Where it is not
    defined (NaN: a class was not drawn) that resample is left out; bounds are infinite when this is so in most of them.

    Args:
        statistic: the metric under multiplicities of the rows, float64 (resamples, count) -> (resamples,); all ones
            is the metric as measured. It is called several times, with few resamples at a time where rows are many.
        seed: the same seed draws the same rows, for every statistic.
    """
    values, drawn = _draw(count, [statistic], resamples, seed)
    return _percentile(float(values[0]), drawn[0], count)


def paired_rows(
    count: int,
    model: Statistic,
    baseline: Statistic,
    *,
    resamples: int = 1000,
    seed: int,
    lower_is_better: bool = False,
) -> Difference:
    """The metric of `model` minus that of `baseline` on the same resampled rows, and the verdict on the model.

    "better" or "worse" is said when the whole 95 % interval lies on one side of 0 and there are 6 rows or more.
    """
    values, drawn = _draw(count, [model, baseline], resamples, seed)
    return _difference(values, drawn, count, lower_is_better)


def wilson(hits: int, count: int) -> Interval:
    """A share of rows with Wilson's 95 % interval: holds for few rows, and at 0 and 1, where a bootstrap sees no doubt.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    value, z = hits / count, _NORMAL.inv_cdf(1 - _TAIL)
    middle = (value + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(value * (1 - value) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return Interval(value, max(0.0, min(middle - half, value)), min(1.0, max(middle + half, value)))


def mean(values: Array) -> Statistic:
    """The mean of `values` (rows,) over the rows drawn."""
    return lambda weights: np.asarray((weights @ values) / weights.sum(axis=-1))


def metric_entry(
    name: str,
    protocol: str,
    statistics: Mapping[str, Statistic],
    count: int,
    *,
    settings: Evaluate,
    lower_is_better: bool = False,
    share_of_rows: bool = False,
) -> dict[str, Any]:
    """One metric of the model and its baselines with intervals over rows, paired verdicts and a sentence about it.

    Args:
        name: such as "macro_f1".
        protocol: on what and how it was measured.
        statistics: "model" and any baselines, as in `bootstrap_rows`.
        share_of_rows: the metric is a mean of hits and misses, such as accuracy; where all rows are one or the other,
            Wilson's interval is given in place of a bootstrap that sees no doubt.

    Returns:
        {"metric", "protocol", "model", "baselines", "verdicts", "says"}, JSON-able, as `language_model.evaluate` has.
    """
    others = [other for other in statistics if other != "model"]
    values, drawn = _draw(count, [statistics[key] for key in ("model", *others)], settings.bootstrap, _SEED)
    intervals = [_percentile(float(value), row, count) for value, row in zip(values, drawn, strict=True)]
    if share_of_rows:
        intervals = [wilson(round(i.value * count), count) if i.value in (0.0, 1.0) else i for i in intervals]
    measured, *beside = intervals
    baselines = dict(zip(others, beside, strict=True))
    verdicts: dict[str, Verdict] = {
        other: _difference(values[[0, place]], drawn[[0, place]], count, lower_is_better).verdict
        for place, other in enumerate(others, 1)
    }
    return {
        "metric": name,
        "protocol": protocol,
        "model": measured.to_json(),
        "baselines": {other: value.to_json() for other, value in baselines.items()},
        "verdicts": verdicts,
        "says": sentence(name, measured, baselines, verdicts),
    }


def sentence(name: str, model: Interval, baselines: Mapping[str, Interval], verdicts: Mapping[str, Verdict]) -> str:
    """A metric in words: accuracy 0.912 (0.890 to 0.931); better than majority class 0.500."""
    beside = [f"{_VERDICTS[verdicts[other]]} {other} {number(value.value)}" for other, value in baselines.items()]
    bounds = f" ({number(model.low)} to {number(model.high)})" if model.known else ""
    return "; ".join([f"{name.replace('_', ' ')} {number(model.value)}{bounds}", *beside])


def number(value: float) -> str:
    """A metric with as many digits as are worth reading."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def blocks(values: ArrayLike, *, length: int) -> Array:
    """Sums over consecutive blocks of `length` entries of one document: (tokens,) -> (blocks,).

    A single long document has no other documents to be compared with, but its blocks are nearly independent once
    they are longer than what ties neighbouring tokens together; resampling them keeps that tie inside a block
    (Carlstein 1986, Künsch 1989). The remainder joins the last block, so that no short block weighs like a long one.
    Cut numerators and denominators with the same length.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or length < 1:
        raise ValueError(f"blocks needs one document (tokens,) and length >= 1, got {values.shape} and {length}")
    if len(values) == 0:
        return np.zeros(0)
    count = max(1, len(values) // length)
    return np.asarray(np.add.reduceat(values, np.arange(count) * length), dtype=np.float64)


def units(
    numerators: ArrayLike,
    denominators: ArrayLike,
    document_starts: ArrayLike,
    *,
    few: int = _FEW,
    length: int | None = None,
) -> Units:
    """Per-token values summed into what should be resampled: documents, or blocks where there are few documents.

    Args:
        numerators, denominators: (tokens,) such as bits and bytes of each token.
        document_starts: (documents + 1,) offsets, the last one being the number of tokens.
        few: below this many documents, each is cut into blocks.
        length: tokens in a block; by default what gives about 100 blocks, at least 64 tokens.
    """
    numerators = np.asarray(numerators, dtype=np.float64)
    denominators = np.asarray(denominators, dtype=np.float64)
    starts = np.asarray(document_starts, dtype=np.int64)
    if numerators.shape != denominators.shape or len(starts) == 0 or starts[-1] != len(numerators):
        raise ValueError(f"{numerators.shape} numerators, {denominators.shape} denominators do not fit document_starts")
    starts = np.append(starts[:-1][starts[:-1] < starts[1:]], starts[-1])  # empty documents hold nothing
    documents = len(starts) - 1
    if documents == 0:
        return Units(np.zeros(0), np.zeros(0), "0 documents")
    if documents >= few:
        per_document = [np.asarray(np.add.reduceat(v, starts[:-1])) for v in (numerators, denominators)]
        return Units(per_document[0], per_document[1], f"{documents:,} documents")
    size = length or max(_SHORTEST_BLOCK, len(numerators) // _BLOCKS)
    pieces = list(pairwise(starts))
    cut = [np.concatenate([blocks(v[a:b], length=size) for a, b in pieces]) for v in (numerators, denominators)]
    whole = "1 document" if documents == 1 else f"{documents} documents"
    return Units(cut[0], cut[1], f"{len(cut[0]):,} blocks of {size:,} tokens from {whole}")


def _columns(*columns: ArrayLike) -> Array:
    """The columns as (k, n) without units that hold nothing; the last column is the denominator."""
    table = [np.asarray(column, dtype=np.float64) for column in columns]
    if any(column.ndim != 1 or column.shape != table[0].shape for column in table):
        raise ValueError(f"expected equally long arrays (n,), got {[column.shape for column in table]}")
    stacked = np.stack(table)
    if not np.isfinite(stacked).all():
        raise ValueError("numerators and denominators must be finite")
    if (stacked[-1] < 0).any() or stacked[:, stacked[-1] == 0].any():
        raise ValueError("a denominator is negative, or 0 below a numerator that is not")
    stacked = np.asarray(stacked[:, stacked[-1] > 0], dtype=np.float64)
    if stacked.shape[1] == 0:
        raise ValueError("there is nothing to divide by: no unit has a positive denominator")
    return stacked


def _bca(columns: Array, statistic: Callable[[Array], Array], resamples: int, seed: int) -> Interval:
    """The BCa interval of a statistic of column sums, (k, ...) -> (...)."""
    units_ = columns.shape[1]
    sums = columns.sum(axis=1)
    value = float(statistic(sums))
    if units_ == 1:
        return Interval(value, -math.inf, math.inf)
    drawn = np.sort(statistic(_resample(columns, resamples, seed)))
    bias = _NORMAL.inv_cdf(_inside((np.sum(drawn < value) + 0.5 * np.sum(drawn == value)) / resamples, resamples))
    left_out = statistic(sums[:, None] - columns)  # jackknife: every sum without one unit
    pull = left_out.mean() - left_out
    spread = float(np.sum(pull**2))
    acceleration = float(np.sum(pull**3)) / (6 * spread**1.5) if spread > 0 and math.isfinite(spread) else 0.0
    bounds = []
    for tail in (_TAIL, 1 - _TAIL):
        z = bias + _NORMAL.inv_cdf(tail)
        bounds.append(_NORMAL.cdf(bias + z / max(1 - acceleration * z, 1e-9)))
    low, high = np.quantile(drawn, bounds)
    return Interval(value, float(low), float(high))


def _resample(columns: Array, resamples: int, seed: int) -> Array:
    """Column sums over `resamples` draws of n units with replacement: (k, resamples)."""
    random = np.random.default_rng(seed)
    count = columns.shape[1]
    at_once = max(1, _AT_ONCE // count)
    sums = np.empty((len(columns), resamples))
    for start in range(0, resamples, at_once):
        stop = min(start + at_once, resamples)
        chosen = random.integers(0, count, size=(stop - start, count), dtype=np.int32)
        for column, total in zip(columns, sums, strict=True):
            total[start:stop] = column[chosen].sum(axis=1)
    return sums


def _inside(share: float, resamples: int) -> float:
    """A share kept off 0 and 1, where the normal quantile is infinite."""
    return float(np.clip(share, 0.5 / resamples, 1 - 0.5 / resamples))


def _draw(count: int, statistics: Sequence[Statistic], resamples: int, seed: int) -> tuple[Array, Array]:
    """Every statistic as measured (statistics,) and on the same resamples of the rows (statistics, resamples)."""
    if count < 1:
        raise ValueError("there are no rows to resample")
    random = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // count)
    drawn = []
    for start in range(0, resamples, at_once):
        some = min(at_once, resamples - start)
        rows = random.integers(0, count, size=(some, count)) + np.arange(some)[:, None] * count
        weights = np.bincount(rows.ravel(), minlength=some * count).reshape(some, count).astype(np.float64)
        drawn.append(np.stack([statistic(weights) for statistic in statistics]))
    values = np.array([float(statistic(np.ones((1, count)))[0]) for statistic in statistics])
    return values, np.concatenate(drawn, axis=1).astype(np.float64)


def _percentile(value: float, drawn: Array, count: int) -> Interval:
    """The middle 95 % of what was drawn, widened to the value where that lies outside (a biased statistic)."""
    defined = drawn[np.isfinite(drawn)]
    if count == 1 or not math.isfinite(value) or 2 * len(defined) < len(drawn):
        return Interval(value, -math.inf, math.inf)
    low, high = np.quantile(defined, [_TAIL, 1 - _TAIL])
    return Interval(value, min(float(low), value), max(float(high), value))


def _difference(values: Array, drawn: Array, count: int, lower_is_better: bool) -> Difference:
    """Model (first) minus baseline (second), and the verdict."""
    interval = _percentile(float(values[0] - values[1]), drawn[0] - drawn[1], count)
    if count < _FEWEST or not (interval.low > _ROUNDING or interval.high < -_ROUNDING):
        return Difference(interval, "cannot tell")
    return Difference(interval, "better" if (interval.high < 0) == lower_is_better else "worse")

"""Measures forecasts of series: errors of the point, scores of the quantiles, and how often intervals hold the truth.

Forecasts of a backtest overlap or follow one another, so errors near in time are alike: the bootstrap draws stretches of
time as blocks (Künsch 1989), of the cube root of all horizons (Hall, Horowitz and Jing 1995). The baselines are in
`forecast_baselines`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.data.series import Points
from formary.data.times import texts_of
from formary.errors import DataError
from formary.evaluate import interval
from formary.evaluate.interval import Statistic
from formary.recipe.schema import Evaluate

Floats = NDArray[np.float64]
Answer = Mapping[str, Any]

LOWER_IS_BETTER = frozenset({"mae", "mse", "mape", "smape", "mase", "crps"})
_DRAWN = 3  # forecasts drawn in the report
_BEFORE = 3  # horizons of history drawn before each
_WIDE = ((0.025, 0.975), (0.05, 0.95), (0.1, 0.9))  # the interval that is drawn, the first that was learned
_PERCENT = "of steps whose true value is not 0"


@dataclass(frozen=True)
class Steps:
    """The forecasts of a backtest as arrays, one line for each forecast.

    Args:
        truth: (forecasts, horizon), NaN where nobody knows it.
        point: (forecasts, horizon).
        quantiles: (forecasts, horizon, levels), or None where some forecast has none.
        levels: of the quantiles.
        scales: (forecasts,) mean absolute error of the seasonal naive forecast in the history, NaN where it is 0.
        blocks: (forecasts,) the number of the stretch of time that each belongs to.
    """

    truth: Floats
    point: Floats
    quantiles: Floats | None
    levels: tuple[float, ...]
    scales: Floats
    blocks: NDArray[np.int64]


def steps_of(series: Sequence[Points], answers: Sequence[Answer], *, season: int) -> Steps:
    """The forecasts beside the truth.

    Raises:
        DataError: there is no forecast whose steps are known.
    """
    lines: list[tuple[Floats, Floats, list[list[float]] | None, float, tuple[int, int]]] = []
    levels: tuple[float, ...] = ()
    scales: dict[tuple[int, str], float] = {}
    for number, (points, answer) in enumerate(zip(series, answers, strict=True)):
        origins = [forecast["origin"] for forecast in answer["forecasts"]]
        first = min(origins, default=0)
        for forecast in answer["forecasts"]:
            column, origin, point = (
                forecast["column"],
                forecast["origin"],
                np.array(forecast["point"], dtype=np.float64),
            )
            truth = points.values[column][origin : origin + len(point)]
            truth = np.pad(truth, (0, len(point) - len(truth)), constant_values=np.nan)
            if (number, column) not in scales:
                scales[number, column] = seasonal_error(points.values[column][:first], season)
            given = forecast.get("quantiles") or {}
            levels = tuple(float(name) for name in given) or levels
            horizons = (max(origins) - first) / len(point) + 1
            block = (number, (origin - first) // (len(point) * round(horizons ** (1 / 3))))
            lines.append((truth, point, list(given.values()) or None, scales[number, column], block))
    if not lines:
        raise DataError(
            "there are no forecasts to measure: the part is shorter than the horizon (train.objective.horizon)"
        )
    known = {block: place for place, block in enumerate(dict.fromkeys(line[4] for line in lines))}
    whole = all(line[2] for line in lines)
    return Steps(
        truth=np.stack([line[0] for line in lines]),
        point=np.stack([line[1] for line in lines]),
        quantiles=np.array([line[2] for line in lines], dtype=np.float64).transpose(0, 2, 1) if whole else None,
        levels=levels if whole else (),
        scales=np.array([line[3] for line in lines]),
        blocks=np.array([known[line[4]] for line in lines]),
    )


def seasonal_error(history: Floats, season: int) -> float:
    """Mean |y[t] - y[t - season]| of a history: what MASE divides by (Hyndman and Koehler 2006, eq. 2); NaN where it is 0."""
    season = season if len(history) > season else 1
    errors = np.abs(history[season:] - history[:-season])
    errors = errors[~np.isnan(errors)]
    return float(errors.mean()) if len(errors) and errors.mean() > 0 else float("nan")


# Errors ----------------------------------------------------------------------------------------------------------------


def errors_of(steps: Steps) -> dict[str, Floats]:
    """Each metric before its mean: (forecasts, horizon), NaN where it is not defined.

    mape and smape are in percent; smape is 200 |y - f| / (|y| + |f|) (Makridakis 1993), crps twice the pinball loss, its
    mean over the quantiles (Laio and Tamea 2007, eq. 12), coverage_80 whether the 80 % interval holds the truth.
    """
    error = np.abs(steps.truth - steps.point)
    with np.errstate(divide="ignore", invalid="ignore"):
        both = np.abs(steps.truth) + np.abs(steps.point)
        found = {
            "mase": error / steps.scales[:, None],
            "mae": error,
            "mse": error**2,
            "mape": np.where(steps.truth == 0, np.nan, 100 * error / np.abs(steps.truth)),
            "smape": np.where(both == 0, np.where(np.isnan(error), np.nan, 0.0), 200 * error / both),
        }
    if steps.quantiles is not None:
        found["crps"] = 2 * pinball(steps.truth[..., None], steps.quantiles, np.array(steps.levels)).mean(axis=-1)
        for low, high in interval_levels(steps.levels):
            below, above = (steps.quantiles[..., steps.levels.index(level)] for level in (low, high))
            inside = ((below <= steps.truth) & (steps.truth <= above)).astype(np.float64)
            found[f"coverage_{100 * (high - low):.0f}"] = np.where(np.isnan(steps.truth), np.nan, inside)
    return found


def pinball(truth: Floats, quantile: Floats, level: Floats) -> Floats:
    """max(q (y - f), (q - 1) (y - f)): what the quantile of level q minimises (Koenker and Bassett 1978)."""
    error = truth - quantile
    return np.asarray(np.maximum(level * error, (level - 1) * error))


def interval_levels(levels: Sequence[float]) -> list[tuple[float, float]]:
    """The pairs of quantiles around the median that make central intervals, the widest first."""
    lows = sorted(level for level in levels if level < 0.5)
    return [(low, high) for low in lows for high in levels if abs(low + high - 1) < 1e-9]


def metrics(
    series: Sequence[Points], answers: Mapping[str, Sequence[Answer]], *, season: int, settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    """Metrics of the model beside baselines on the same forecasts; the first is MASE, or MAE where that is undefined.

    Scores of quantiles are given for models whose every forecast has them, coverage for the model alone: it has no better
    direction, only its promise.
    """
    by_model = {name: steps_of(series, given, season=season) for name, given in answers.items()}
    model = by_model["model"]
    errors = {name: errors_of(steps) for name, steps in by_model.items()}
    count = int(model.blocks.max()) + 1
    forecasts, horizon = model.truth.shape
    protocol = (
        f"{where}, backtest of {forecasts:,} forecasts of {horizon:,} steps, resampled in {count:,} stretches of time"
    )
    entries = []
    for name, values in errors["model"].items():
        others = {} if name.startswith("coverage") else {n: e for n, e in errors.items() if name in e}
        every = {"model": errors["model"]} | others
        if np.isnan(values).all():
            continue
        how = {"mase": f"season {season}", "mape": _PERCENT, "crps": f"{len(model.levels)} quantiles"}.get(name, "")
        entry = interval.metric_entry(
            name,
            ", ".join(filter(None, [protocol, how])),
            {n: _mean_of(e[name], by_model[n].blocks, count) for n, e in every.items()},
            count,
            settings=settings,
            lower_is_better=name in LOWER_IS_BETTER,
        )
        entries.append(entry)
    return entries


def _mean_of(values: Floats, blocks: NDArray[np.int64], count: int) -> Statistic:
    """The mean over the steps of the blocks drawn."""
    known = ~np.isnan(values)
    sums = np.bincount(blocks, weights=np.where(known, values, 0.0).sum(axis=1), minlength=count)
    sizes = np.bincount(blocks, weights=known.sum(axis=1).astype(np.float64), minlength=count)

    def statistic(weights: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((weights @ sums) / (weights @ sizes))

    return statistic


# Details ---------------------------------------------------------------------------------------------------------------


def details(series: Sequence[Points], answers: Sequence[Answer], *, season: int) -> dict[str, Any]:
    """Where forecasts are right and wrong, JSON-able.

    Returns:
        {"steps_ahead", "promises"?, "columns"?, "forecasts"}: the error by how far ahead, how often each quantile lay above
        the truth, the error of each series and column where there are several, and a few forecasts to be drawn.
    """
    steps = steps_of(series, answers, season=season)
    errors = errors_of(steps)
    horizon = steps.truth.shape[1]
    told = np.unique(np.round(np.geomspace(1, horizon, num=min(8, horizon))).astype(int))
    found: dict[str, Any] = {
        "steps_ahead": [
            {"step": int(n), **{name: _mean(errors[name][:, n - 1]) for name in ("mae", "mape", "mase")}} for n in told
        ]
    }
    if steps.quantiles is not None:
        known = ~np.isnan(steps.truth)
        found["promises"] = [
            {"quantile": level, "truth below it": float((steps.truth < steps.quantiles[..., n])[known].mean())}
            for n, level in enumerate(steps.levels)
        ]
    listed = [(place, f) for place, answer in enumerate(answers) for f in answer["forecasts"]]
    names = [(series[place].name, forecast["column"]) for place, forecast in listed]
    if len(distinct := list(dict.fromkeys(names))) > 1:
        rows = {name: [n for n, other in enumerate(names) if other == name] for name in distinct}
        by_column = [
            {"series": name or "–", "column": column, **{m: _mean(errors[m][places]) for m in ("mase", "mae", "mape")}}
            for (name, column), places in rows.items()
        ]
        found["columns"] = sorted(by_column, key=lambda entry: -(entry["mase"] or 0))[:20]
    chosen = np.unique(np.linspace(0, len(listed) - 1, num=min(_DRAWN, len(listed))).round().astype(int))
    found["forecasts"] = [drawn(series[listed[n][0]], listed[n][1]) for n in chosen]
    return found


def drawn(points: Points, forecast: Answer) -> dict[str, Any]:
    """A forecast as it is drawn: what was before, what came, and what was said."""
    origin, point = forecast["origin"], list(forecast["point"])
    first = max(0, origin - _BEFORE * len(point))
    values = points.values[forecast["column"]][first : origin + len(point)]
    levels = {float(name): given for name, given in (forecast.get("quantiles") or {}).items()}
    low, high = next((pair for pair in _WIDE if levels.keys() >= set(pair)), (None, None))
    return {
        "title": " ".join(filter(None, [points.name, forecast["column"]])),
        "from": texts_of(points.step.times(points.times[0], np.array([origin])))[0],
        "before": origin - first,
        "truth": [None if np.isnan(value) else float(value) for value in values],
        "point": point,
        "low": None if low is None else levels[low],
        "high": None if high is None else levels[high],
        "level": None if low is None or high is None else round(high - low, 6),
    }


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None

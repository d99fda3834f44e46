"""What a forecast has to beat: the last value, the last season, a linear map of the last window, exponential smoothing.

Each gives the same answers as a model, for the same origins, and sees nothing after them. But for exponential smoothing
they have quantiles too: those of their own errors on the training series, step by step ahead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.data.series import Points

Floats = NDArray[np.float64]
Rule = Callable[[Floats], Floats]
"""From windows of history (windows, steps) to forecasts (windows, horizon)."""

_MOST_WINDOWS = 20_000  # that a linear map learns from, and errors are collected on
_ALPHAS = (1e-2, 1.0, 1e2, 1e4)  # strengths of the ridge penalty, chosen on the last fifth of the training windows
_HELD = 0.2
_SEASONS, _LEAST = 20, 400  # of history that exponential smoothing is fitted to
_LONGEST_SEASON = 60  # longer ones have too many states to fit; then the usual one of the step is taken
_MOST_FITS = 40  # series and columns that are smoothed; of more the baseline is left out


def baselines(
    training: Sequence[Points],
    series: Sequence[Points],
    origins: Sequence[Sequence[int]],
    *,
    columns: Sequence[str],
    horizon: int,
    context: int,
    season: int,
    levels: Sequence[float],
) -> dict[str, list[dict[str, Any]]]:
    """The answers of every baseline to the series at their origins.

    Args:
        training: what may be learned from.
        levels: of the quantiles that are said beside the point.
    """
    seasons = {season, *(points.step.season for points in series)}
    length = max(context, *seasons)
    windows = np.concatenate(
        [cut for points in training for name in columns for cut in _windows(points.values[name], length, horizon)]
        or [np.zeros((0, length + horizon))]
    )
    windows = (
        windows[np.linspace(0, len(windows) - 1, min(len(windows), _MOST_WINDOWS)).astype(int)]
        if len(windows)
        else windows
    )
    rules: dict[str, Rule] = {"naive": lambda past: np.repeat(past[:, -1:], horizon, axis=1)}
    for steps in sorted(seasons - {1}):
        name = "seasonal naive" if seasons <= {1, steps} else f"seasonal naive, {steps} steps"
        rules[name] = lambda past, steps=steps: seasonal(past, steps, horizon)  # type: ignore[misc]
    if len(windows) > 2:
        rules["linear"] = linear(windows[:, :length], windows[:, length:])
    found = {}
    for name, rule in rules.items():
        spread = _spread(rule, windows, length, levels)
        found[name] = [
            {"series": points.name, "forecasts": _said(rule, points, columns, starts, length, spread, levels)}
            for points, starts in zip(series, origins)
        ]
    smoothed = exponential_smoothing(series, origins, columns=columns, horizon=horizon, season=season)
    return found | ({"ETS": smoothed} if smoothed is not None else {})


def seasonal(past: Floats, season: int, horizon: int) -> Floats:
    """The last season again and again: (windows, steps) -> (windows, horizon)."""
    season = min(season, past.shape[1])
    return past[:, past.shape[1] - season + np.arange(horizon) % season]


def linear(past: Floats, future: Floats) -> Rule:
    """One linear map from a window to what follows, both measured from the window's last value (NLinear, Zeng et al. 2023)."""
    from sklearn.linear_model import Ridge

    inputs, targets = past - past[:, -1:], future - past[:, -1:]
    scale = float(inputs.std()) or 1.0
    held = max(1, round(_HELD * len(inputs)))

    def fitted(alpha: float, count: int) -> Any:
        return Ridge(alpha=alpha, fit_intercept=True).fit(inputs[:count] / scale, targets[:count])

    def error(alpha: float) -> float:
        said = fitted(alpha, len(inputs) - held).predict(inputs[-held:] / scale)
        return float(np.abs(said - targets[-held:]).mean())

    best = min(_ALPHAS, key=error)
    map_ = fitted(best, len(inputs))
    return lambda window: np.asarray(map_.predict((window - window[:, -1:]) / scale) + window[:, -1:])


def exponential_smoothing(
    series: Sequence[Points], origins: Sequence[Sequence[int]], *, columns: Sequence[str], horizon: int, season: int
) -> list[dict[str, Any]] | None:
    """Additive Holt-Winters with a damped trend (ETS(A,Ad,A), Hyndman et al. 2008), None without statsmodels.

    Its parameters are fitted once, to the history before the first origin, and its states brought up to each later one.
    """
    try:
        from statsmodels.tsa.exponential_smoothing.ets import ETSModel
    except ImportError:
        return None
    if len(series) * len(columns) > _MOST_FITS:
        return None
    most = max(_SEASONS * min(season, _LONGEST_SEASON), _LEAST)
    answers = []
    for points, starts in zip(series, origins):
        forecasts = []
        for column in columns:
            values = _filled(points.values[column])
            usual = season if season <= _LONGEST_SEASON else points.step.season
            fits = 1 < usual <= _LONGEST_SEASON and starts and starts[0] >= 2 * usual
            how = {"error": "add", "trend": "add", "damped_trend": True}
            how |= {"seasonal": "add", "seasonal_periods": usual} if fits else {}
            fitted = None
            for start in starts:
                model = ETSModel(values[max(0, starts[0] - most) : start], **how)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    fitted = model.fit(disp=False, maxiter=200).params if fitted is None else fitted
                    point = np.asarray(model.smooth(fitted).forecast(horizon))
                point = np.where(np.isfinite(point), point, values[start - 1])
                forecasts.append({"column": column, "origin": start, "point": point.tolist()})
        answers.append({"series": points.name, "forecasts": forecasts})
    return answers


def _windows(values: Floats, length: int, horizon: int) -> list[Floats]:
    """Every stretch of history and future in a column without missing future values; gaps of the history are filled."""
    if len(values) < length + horizon:
        return []
    cut = np.lib.stride_tricks.sliding_window_view(_filled(values), length + horizon)
    known = np.lib.stride_tricks.sliding_window_view(~np.isnan(values), length + horizon)[:, length:].all(axis=1)
    return [cut[known]]


def _filled(values: Floats) -> Floats:
    """Missing values as the last known one, at the beginning as the first."""
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return np.zeros_like(values)
    at = np.clip(np.searchsorted(known, np.arange(len(values)), side="right") - 1, 0, None)
    return np.asarray(values[known[at]])


def _spread(rule: Rule, windows: Floats, length: int, levels: Sequence[float]) -> Floats | None:
    """Quantiles of a rule's errors on training windows: (levels, horizon)."""
    if not len(windows) or not levels:
        return None
    return np.asarray(np.quantile(windows[:, length:] - rule(windows[:, :length]), levels, axis=0))


def _said(
    rule: Rule,
    points: Points,
    columns: Sequence[str],
    starts: Sequence[int],
    length: int,
    spread: Floats | None,
    levels: Sequence[float],
) -> list[dict[str, Any]]:
    forecasts = []
    for column in columns:
        values = points.values[column]
        for start in starts:
            past = _filled(values[:start])[-length:]
            point = rule(np.pad(past, (length - len(past), 0), mode="edge")[None])[0]
            said = {} if spread is None else {f"{q:g}": (point + e).tolist() for q, e in zip(levels, spread)}
            forecasts.append({"column": column, "origin": start, "point": point.tolist(), "quantiles": said})
    return forecasts

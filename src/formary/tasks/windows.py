"""How forecasters read series: stretches of history and future around an origin, one column at a time, with what is known.

The counterpart of `reading` for texts. Every stretch is a view of one array for each series and column, so that windows
cost no memory; values are in the unit of the series' own history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from formary.data.series import Points, points_of
from formary.data.times import calendar, texts_of
from formary.errors import DataError, RecipeError
from formary.recipe.schema import Objective
from formary.tasks.protocol import Example, Row

_FEWEST_KNOWN = 0.5  # share of a window's history that has to be there to learn from it


@dataclass(frozen=True)
class Settings:
    """What a forecaster knows beside its weights; JSON-able."""

    context: int  # steps of history
    season: int
    columns: tuple[str, ...]  # to forecast
    known: tuple[str, ...]  # known of the future
    scales: tuple[tuple[float, float], ...]  # mean and spread of each of the known columns
    cycles: tuple[str, ...]  # of the calendar
    step: str  # between times, in words
    anchor: str  # what a forecast is measured from: the level of its history, or the season before
    every: int  # steps between the forecasts of a backtest
    names: Mapping[str, str]  # our names: the file's, as data.columns had them


class Windows:
    """Reads series for a model of so many steps of history and horizon, in whole patches each."""

    def __init__(self, settings: Settings, horizon: int, patch: int) -> None:
        self.told, self.horizon = settings, horizon
        self.before, self.after = (-(-steps // patch) * patch for steps in (settings.context, horizon))
        self.noted: list[str] = []

    def points(self, row: Row, where: str) -> Points:
        """A row as a series with the columns that the task needs, those to forecast first.

        Raises:
            DataError: it lacks one, or has another step than the model learned.
        """
        points = points_of(row, where)
        lacking = [name for name in (*self.told.columns, *self.told.known) if name not in points.values]
        if lacking:
            raise DataError(
                f"{where}: column '{lacking[0]}' is missing; the model forecasts {', '.join(self.told.columns)}"
                + (f" and is told {', '.join(self.told.known)}" if self.told.known else "")
            )
        if str(points.step) != self.told.step:
            raise DataError(
                f"{where}: its step is {points.step}, and the model learned series with a step of {self.told.step}"
            )
        return points

    def origins(self, points: Points, *, every: int = 1) -> list[int]:
        """The steps from which on a series is forecast whose values there are known: all that its part allows."""
        first = self.told.context if points.start is None else max(points.start, 1)
        return list(range(first, len(points.times) - self.horizon + 1, every))

    def around(self, points: Points, column: str, origins: Sequence[int], row: int, *, learned: bool) -> list[Example]:
        """The stretches around origins: history, then the future, of whose values `collate` makes the targets."""
        before, after = self.before, self.after
        values = points.values[column]
        past = values[: points.start if points.start is not None else None]
        level, unit = (
            (float(np.nanmean(past)), float(np.nanstd(past)) or 1.0) if (~np.isnan(past)).any() else (0.0, 1.0)
        )
        times = points.step.times(points.times[0], np.arange(-before, len(values) + after))
        known = [
            (np.pad(points.values[name], (before, after), constant_values=np.nan) - mean) / spread
            for name, (mean, spread) in zip(self.told.known, self.told.scales)
        ]
        if self.told.anchor == "season":  # what is learned is a difference; those of the past say most of it
            since = np.nan_to_num(_since(values, self.told.season) / unit)
            known = [np.pad(since, (before, after)), *known]
        channels = [
            np.pad((values - level) / unit, (before, after), constant_values=np.nan),
            *map(np.nan_to_num, known),
        ]
        steps = np.concatenate([np.stack(channels, 1), calendar(times, self.told.cycles)], axis=1).astype(np.float32)
        there = np.concatenate([[0], np.cumsum(~np.isnan(values))])
        found = []
        for origin in origins:
            history = there[origin] - there[max(0, origin - self.told.context)]
            future = there[min(origin + self.horizon, len(values))] - there[origin]
            if learned and (history < _FEWEST_KNOWN * min(origin, self.told.context) or not future):
                continue
            window = steps[origin : origin + before + after]
            found.append(Example(window, row=row, memory=(points, column, origin, level, unit)))
        return found

    def end(self, points: Points, where: str) -> int:
        """The step after the last value; what follows tells the future's known columns.

        Raises:
            DataError: fewer than two values to go by, or a column that has to be known ends before the horizon.
        """
        given = np.flatnonzero(~np.isnan(np.stack([points.values[name] for name in self.told.columns])).all(axis=0))
        if len(given) < 2:
            raise DataError(f"{where}: a forecast needs at least two known values of {', '.join(self.told.columns)}")
        end = int(given[-1]) + 1
        for name in self.told.known:
            ahead = points.values[name][end : end + self.horizon]
            if len(ahead) < self.horizon or np.isnan(ahead).any():
                raise DataError(
                    f"{where}: column '{name}' has to be known for the {self.horizon} steps after "
                    f"{texts_of(points.times[[end - 1]])[0]}; add rows for them with an empty {self.told.columns[0]}"
                )
        if end < self.told.context:
            self.noted.append(
                f"{where}: {end:,} steps are fewer than the context of {self.told.context:,}; the rest counts as missing"
            )
        return end


def _since(values: NDArray[np.float64], season: int) -> NDArray[np.float64]:
    """The difference of each value from the one a season before, NaN where that is not known."""
    return values - np.concatenate([np.full(min(season, len(values)), np.nan), values])[: len(values)]


def columns_of(series: Sequence[Points], asked: Objective) -> tuple[str, ...]:
    """The columns to forecast."""
    there = list(dict.fromkeys(name for points in series for name in points.values))
    wrong = next((name for name in [*(asked.values or ()), *asked.known] if name not in there), None)
    if wrong is not None:
        field = "known" if wrong in asked.known else "values"
        raise RecipeError(
            f"train.objective.{field}: there is no column of numbers '{wrong}'; there are {', '.join(there)}"
        )
    rest = [name for name in there if name not in asked.known]
    columns = asked.values or (["value"] if "value" in rest else rest)
    if not columns:
        raise RecipeError("train.objective.known: it names every column of numbers, so there is none to forecast")
    return tuple(columns)


def moves(numbers: NDArray[np.float64]) -> bool:
    known = numbers[~np.isnan(numbers)]
    return bool(len(known) and known.max() > known.min())

"""Points become series: rows with a time are sorted onto a regular grid, and what is found on the way is said.

A series is one row: {"series", "time": [...], "values": {column: [...]}, "from"?}; `from` is where the part begins that is
to be forecast, all before it is history. The step between times is inferred; steps without a row and empty cells are None.
What cannot be mended without guessing (two values at one time, times off the grid, a word for a number) is refused.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.data.records import Part, Row, RowForm
from formary.data.times import Step, Times, step_of, texts_of, times_of
from formary.errors import DataError, RecipeError
from formary.recipe.schema import Split

Floats = NDArray[np.float64]
TIME, SERIES = "time", "series"
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
"""What stands for a missing value, in small letters."""

_TOLD = 3  # columns listed in a message
_MOSTLY_EMPTY = 5.0  # steps of the grid for each row from which on times count as irregular


@dataclass(frozen=True)
class Points:
    """The points of one series in the order of time, on its grid.

    Args:
        name: of the series, "" where there is only one.
        times: (steps,) every step, also those without a row.
        step: between two of them.
        values: by column, (steps,), NaN where missing.
        start: the step from which on it is to be forecast; None where nobody said.
    """

    name: str
    times: Times
    step: Step
    values: Mapping[str, Floats]
    start: int | None = None


def gather(rows: Iterator[Row], split: Split | None) -> Generator[tuple[Part, Row], None, list[str]]:
    """One row a series, cut by time: training ends where validation begins, validation where test begins.

    The cuts are times, the same for every series: the shares of the split are shares of all points. Each part holds
    the history before it. Rows that are series already are passed on. Returns what was found, as sentences.

    Raises:
        DataError: a time or a number cannot be read, a time occurs twice, times are irregular; file and line are named.
        RecipeError: folds, which would train on the future.
    """
    if split is not None and split.folds is not None:
        raise RecipeError(
            "data.split.folds: a series is split by time, so that nothing is learned of the future; use shares"
        )
    loose: dict[str, list[Row]] = {}
    made: list[tuple[Points, str]] = []
    for row in rows:
        if isinstance(row.values.get(TIME), list | tuple):
            made.append((points_of(row.values, row.origin), row.origin))
        else:
            loose.setdefault(_name(row.values), []).append(row)
    notes: list[str] = []
    if loose:
        made += _series_of_points(loose, notes)
    cuts = _cuts([points for points, _ in made], split)
    for points, origin in made:
        yield from ((part, _row(cut, origin)) for part, cut in _parts(points, cuts))
    return notes


def text_of(values: Mapping[str, Any]) -> str:
    """What a point or a series is compared by: everything of a point, the name and the span of a series."""
    times = values[TIME]
    if not isinstance(times, list | tuple):
        return "\n".join(f"{name}: {value}" for name, value in values.items())
    name = values.get(SERIES) or "the series"
    return f"{name} from {times[0]} to {times[-1]}, {len(times):,} steps, forecast from {values.get('from')}"


FORM = RowForm(columns=(TIME,), text=text_of, alike=False, gather=gather)


def points_of(values: Mapping[str, Any], where: str) -> Points:
    """A series as `gather` writes it, or as a client does: {"time": [...], "values": [...] or {column: [...]}}, {"rows": [...]}.

    Raises:
        DataError: lists of unequal length, unreadable times or numbers, or what `gather` refuses.
    """
    if isinstance(values.get("rows"), list):
        values = _columns_of(values["rows"], where)
    times, given = values.get(TIME), values.get("values", values.get("value"))
    if not isinstance(times, list | tuple) or not isinstance(given, list | tuple | Mapping):
        raise DataError(f'{where}: a series is {{"time": [...], "values": [...]}} or {{"values": {{column: [...]}}}}')
    columns = dict(given) if isinstance(given, Mapping) else {"value": given}
    for name, numbers in columns.items():
        if not isinstance(numbers, list | tuple) or len(numbers) != len(times):
            many = f"{len(numbers):,} values" if isinstance(numbers, list | tuple) else type(numbers).__name__
            raise DataError(f"{where}: '{name}' has {many} for {len(times):,} times")
    places = [f"{where}, entry {number}" for number in range(1, len(times) + 1)]
    read, _ = times_of(times, places)
    cells = {name: np.array([_number(v, name, p) for v, p in zip(n, places)]) for name, n in columns.items()}
    made = _on_grid(str(values.get(SERIES) or ""), read, places, cells, step_of(np.unique(read), where), [])
    start = values.get("from")
    return made if start is None else Points(made.name, made.times, made.step, made.values, int(start))


def _columns_of(rows: Sequence[Any], where: str) -> dict[str, Any]:
    """Points of one series as its columns."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or TIME not in row:
            raise DataError(f'{where}, entry {number}: a point is {{"time": ..., "value": ...}}')
    if len(names := {_name(row) for row in rows}) > 1:
        raise DataError(f"{where}: its rows are of {len(names)} series; send each as an input of its own")
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in (TIME, SERIES)]
    listed = {column: [row.get(column) for row in rows] for column in columns}
    return {SERIES: next(iter(names), ""), TIME: [row[TIME] for row in rows], "values": listed}


def _row(points: Points, origin: str) -> Row:
    values: dict[str, Any] = {
        SERIES: points.name,
        TIME: texts_of(points.times),
        "values": {
            name: [None if math.isnan(v) else v for v in column.tolist()] for name, column in points.values.items()
        },
    }
    return Row(values if points.start is None else {**values, "from": points.start}, origin)


# Reading points --------------------------------------------------------------------------------------------------------


def _series_of_points(loose: Mapping[str, list[Row]], notes: list[str]) -> list[tuple[Points, str]]:
    rows = [row for part in loose.values() for row in part]
    columns = _number_columns(rows, notes)
    read = {
        name: times_of([row.values[TIME] for row in part], [row.origin for row in part]) for name, part in loose.items()
    }
    notes += sorted({note for _, said in read.values() for note in said})
    longest = max(read, key=lambda name: len(read[name][0]))
    step = step_of(np.unique(read[longest][0]), loose[longest][0].origin)
    made = []
    for name, part in loose.items():
        places = [row.origin for row in part]
        cells = {
            column: np.array([_number(r.values.get(column), column, r.origin) for r in part]) for column in columns
        }
        made.append((_on_grid(name, read[name][0], places, cells, step, notes), places[0]))
    return made


def _number_columns(rows: Sequence[Row], notes: list[str]) -> list[str]:
    """The columns that hold numbers; those of words are left out and named.

    Raises:
        DataError: a column of numbers holds a word, or no column has numbers.
    """
    names = [name for name in dict.fromkeys(name for row in rows for name in row.values) if name not in (TIME, SERIES)]
    found, words = [], []
    for name in names:
        wrong = [row for row in rows if not _is_number(row.values.get(name))]
        if not wrong:
            found.append(name)
        elif name == "value" or 2 * len(wrong) < sum(not missing(row.values.get(name)) for row in rows):
            shown = wrong[0]
            raise DataError(
                f"{shown.origin}: column '{name}' holds {str(shown.values.get(name))!r:.40}, and a series needs numbers "
                "(decimals with a point; an empty cell where one is missing)"
            )
        else:
            words.append(name)
    if not found:
        raise DataError(
            f"{rows[0].origin}: no column but '{TIME}' holds numbers ({', '.join(names[:12]) or 'there is none'}); "
            "map the one to forecast with data.columns.value"
        )
    if words:
        notes.append(f"columns of words are not read: {', '.join(words)}")
    return found


def missing(value: Any) -> bool:
    """Whether a cell is empty, or says that it is."""
    if isinstance(value, str):
        return value.strip().lower() in MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    if missing(value):
        return True
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _number(value: Any, column: str, where: str) -> float:
    if missing(value):
        return math.nan
    if not _is_number(value):
        raise DataError(f"{where}: '{column}' holds {value!r:.40}, which is not a finite number")
    return float(value)


def _name(values: Mapping[str, Any]) -> str:
    return "" if missing(values.get(SERIES)) else str(values[SERIES])


def _on_grid(
    name: str, times: Times, places: Sequence[str], cells: Mapping[str, Floats], step: Step, notes: list[str]
) -> Points:
    """The points at their places on the grid."""
    called = f"series '{name}'" if name else "the series"
    order = np.argsort(times, kind="stable")
    again = np.flatnonzero(np.diff(times[order]) == np.timedelta64(0, "s"))
    if len(again):
        first, second = order[again[0]], order[again[0] + 1]
        raise DataError(
            f"{places[second]}: {texts_of(times[[second]])[0]} was there before, at {places[first]}, in {called}. Where "
            "rows are of several series, name the column that tells them apart with data.columns.series; where a clock was "
            "put back, write times with their offset (2024-10-27T02:30+01:00)"
        )
    start = times[order[0]]
    at = step.count(start, times)
    off = np.flatnonzero(step.times(start, at) != times)
    if len(off):
        raise DataError(
            f"{places[off[0]]}: {texts_of(times[off[:1]])[0]} is not a whole number of steps ({step}) after the first time of "
            f"{called}, {texts_of(times[order[:1]])[0]}; bring the rows to one regular step first (averages of each hour, say)"
        )
    length = int(at.max()) + 1
    if length > _MOSTLY_EMPTY * len(times):
        raise DataError(
            f"{places[0]}: {called} has {len(times):,} rows on a grid of {length:,} steps ({step}), so its times are "
            "irregular; bring them to one regular step first (averages of each hour, say)"
        )
    values = {column: np.full(length, np.nan) for column in cells}
    for column, numbers in cells.items():
        values[column][at] = numbers
    if length > len(times):
        gap = int(np.setdiff1d(np.arange(length), at)[0])
        notes.append(
            f"{called}: {length - len(times):,} of {length:,} steps ({step}) have no row, the first "
            f"{texts_of(step.times(start, np.array([gap])))[0]}; they count as missing"
        )
    empty = {column: int(np.isnan(numbers).sum()) for column, numbers in cells.items() if np.isnan(numbers).any()}
    if empty:
        told = ", ".join(f"{count:,} in {column}" for column, count in list(empty.items())[:_TOLD])
        notes.append(f"{called}: empty cells count as missing: {told}")
    return Points(name, step.times(start, np.arange(length)), step, values)


# Cutting ---------------------------------------------------------------------------------------------------------------


def _cuts(series: Sequence[Points], split: Split | None) -> list[tuple[Part, Any, Any]]:
    """(part, its first time, the time after its last); None where it has no bound."""
    if split is None:
        return [("train", None, None)]
    every = np.sort(np.concatenate([points.times for points in series]))
    ends = [round(len(every) * (1 - split.test - split.validation)), round(len(every) * (1 - split.test))]
    validation, test = (every[end] if end < len(every) else None for end in ends)
    found: list[tuple[Part, Any, Any]] = [("train", None, validation if split.validation else test)]
    found += [("validation", validation, test)] if split.validation else []
    return [*found, ("test", test, None)] if split.test else found


def _parts(points: Points, cuts: Sequence[tuple[Part, Any, Any]]) -> Iterator[tuple[Part, Points]]:
    for part, first, end in cuts:
        start = 0 if first is None else int(np.searchsorted(points.times, first))
        stop = len(points.times) if end is None else int(np.searchsorted(points.times, end))
        if start < stop and (first is None or start > 0):  # a series that has only begun has no history
            cut = {column: numbers[:stop] for column, numbers in points.values.items()}
            given = points.start if first is None else start
            yield part, Points(points.name, points.times[:stop], points.step, cut, given)

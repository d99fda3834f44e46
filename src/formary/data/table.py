"""Rows of a table as numbers: which columns hold quantities and which names, learned once from the training rows.

A quantity is brought to the normal score of its rank among the training values (as the quantile transform of Gorishniy et
al. 2021, section 4.2), so that neither units nor outliers matter. Missing cells stay missing, rare names are one name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.data.records import label_names
from formary.data.series import missing
from formary.errors import DataError, RecipeError

Row = Mapping[str, Any]

MISSING, OTHER = 0, 1  # numbers of what is no name of its own: an empty cell, a name that is rare or new
_KNOTS = 256  # quantiles that a quantity is measured by
_RARE = 3  # names of fewer rows share one
_FEW_WORDS = 0.05  # share of cells up to which words among numbers are mistakes
_MOST_NAMES = 0.5  # names that are different in more than this share of the rows tell nothing


@dataclass(frozen=True)
class Column:
    """One column: names in order of their numbers from 2 on, or values with their normal scores."""

    name: str
    names: tuple[str, ...] | None = None
    knots: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """How many categories there are with the missing and the other one; 0 for numbers."""
        return 0 if self.names is None else len(self.names) + 2


class Table:
    """The columns that a task reads."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = tuple(columns)
        self.sizes = tuple(column.size for column in columns)
        self.numbers = [{n: i for i, n in enumerate(column.names or (), OTHER + 1)} for column in columns]
        self.new: Counter[str] = Counter()  # names that training did not have, by column
        self.absent: Counter[str] = Counter()  # rows without a column

    def cells(self, rows: Sequence[Row], where: str) -> NDArray[np.float32]:
        """(rows, columns): normal scores with NaN where missing, and numbers of names.

        Raises:
            DataError: a row has none of the columns, or a word where a number belongs; row and column are named.
        """
        found = np.zeros((len(rows), len(self.columns)), dtype=np.float32)
        for number, row in enumerate(rows):
            if not any(column.name in row for column in self.columns):
                listed = ", ".join(column.name for column in self.columns[:12])
                raise DataError(f"{where} {number + 1}: it has none of the columns that the model reads: {listed}")
        for place, column in enumerate(self.columns):
            values = [row.get(column.name) for row in rows]
            self.absent[column.name] += sum(column.name not in row for row in rows)
            if column.names is None:
                read = [number_of(value, column.name, f"{where} {n}") for n, value in enumerate(values, 1)]
                given = np.array(read, dtype=np.float64)
                scaled = np.interp(given, column.knots, column.scores)
                found[:, place] = np.where(np.isnan(given), np.nan, scaled)
            else:
                found[:, place] = [MISSING if missing(v) else self._named(place, name_of(v)) for v in values]
        return found

    def _named(self, place: int, name: str) -> int:
        number = self.numbers[place].get(name, OTHER)
        self.new[self.columns[place].name] += number == OTHER
        return number

    def notes(self) -> list[str]:
        """What was missing or new in the rows read so far."""
        said = [f"column '{name}' is missing in {count:,} rows" for name, count in self.absent.items() if count]
        return said + [f"{n:,} values of '{name}' are rare or new and read as one" for name, n in self.new.items() if n]

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(column) for column in self.columns]

    @staticmethod
    def from_json(columns: Sequence[Mapping[str, Any]]) -> Table:
        return Table(
            [
                Column(
                    c["name"], None if c["names"] is None else tuple(c["names"]), tuple(c["knots"]), tuple(c["scores"])
                )
                for c in columns
            ]
        )


def learned(rows: Sequence[Row], *, but: Sequence[str], only: Sequence[str] | None) -> tuple[Table, list[str]]:
    """The columns of training rows, and sentences about those that are left out.

    Args:
        but: columns that are not read, such as the label.
        only: the columns to read; None: all that differ from row to row without numbering the rows.

    Raises:
        DataError: a column of numbers holds a word, or no column is left. RecipeError: there is no such column.
    """
    there = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in but]
    if wrong := next((name for name in only or () if name not in there), None):
        raise RecipeError(f"train.objective.columns: there is no column '{wrong}'; there are {', '.join(there)}")
    columns, left = [], []
    for name in only or there:
        values = [row.get(name) for row in rows]
        given = [value for value in values if not missing(value)]
        if _are_numbers(values, name):
            numbers = np.array([number_of(value, name, "a row") for value in given])
            steps = np.diff(numbers)
            if (
                not len(numbers)
                or numbers.min() == numbers.max()
                or (len(steps) > 1 and (steps == 1).all() and not only)
            ):
                left.append(name)
            else:
                columns.append(_quantity(name, numbers))
            continue
        counts = Counter(name_of(value) for value in given)
        kept = tuple(sorted(n for n, count in counts.items() if count >= _RARE))
        if (
            not kept
            or len(counts) + (len(given) < len(values)) < 2
            or (len(counts) > _MOST_NAMES * len(given) and not only)
        ):
            left.append(name)
        else:
            columns.append(Column(name, kept))
    if not columns:
        raise DataError(
            f"training row 1: no column beside the label tells rows apart ({', '.join(there) or 'there is none'})"
        )
    return Table(columns), [f"columns that tell nothing are left out: {', '.join(left)}"] if left else []


def _quantity(name: str, numbers: NDArray[np.float64]) -> Column:
    count = min(_KNOTS, len(numbers))
    levels = (np.arange(count) + 0.5) / count
    scores = np.array([NormalDist().inv_cdf(level) for level in levels])
    knots, place = np.unique(np.quantile(numbers, levels), return_inverse=True)
    sums = np.bincount(place, weights=scores) / np.bincount(place)  # equal values share the mean of their scores
    return Column(name, None, tuple(knots.tolist()), tuple(sums.tolist()))


def _are_numbers(values: Sequence[Any], name: str) -> bool:
    wrong = [(n, value) for n, value in enumerate(values, 1) if not missing(value) and not _is_number(value)]
    given = sum(not missing(value) for value in values)
    if wrong and len(wrong) <= _FEW_WORDS * given:
        number, value = wrong[0]
        raise DataError(
            f"training row {number}: column '{name}' holds {str(value)!r:.40}, and {given - len(wrong):,} other rows have "
            f"numbers there; mend the cell, or empty it where nobody knows the number (there are {len(wrong):,} such)"
        )
    return not wrong


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def number_of(value: Any, column: str, where: str) -> float:
    """A cell as a number, NaN where it is missing.

    Raises:
        DataError: it holds a word.
    """
    if missing(value):
        return math.nan
    if not _is_number(value):
        raise DataError(f"{where}: column '{column}' holds {str(value)!r:.40}, and the model knows it as a number")
    return float(value)


def name_of(value: Any) -> str:
    """A cell as a name: 3, 3.0 and "3" are the same."""
    return label_names(value)[0].strip() if isinstance(value, bool | int | float) else str(value).strip()

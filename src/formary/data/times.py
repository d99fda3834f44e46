"""Times as people write them, the regular step between them, and the calendar.

Times become seconds on the clock they were written by: an offset that all of them share is dropped, different ones are
brought to UTC. A step is a number of seconds, of months, or of business days; months have no fixed length, so they are
counted and not divided.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from formary.errors import DataError

Times = NDArray[np.datetime64]
Ints = NDArray[np.int64]

_DAY = 86_400
_UNITS = ((7 * _DAY, "week"), (_DAY, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
_YEAR, _MONTH = re.compile(r"[12]\d{3}"), re.compile(r"([12]\d{3})[-/](\d{1,2})")
_QUARTER = re.compile(r"([12]\d{3})(?:\.0)?[-/ ]?[Qq](\d)(?:\.0)?")
_UNUSUAL = re.compile(r"([12]\d{3})[-/.](\d{1,2})[-/.](\d{1,2})(?:[T ]+(\d{1,2}):(\d{2})(?::(\d{2}))?)?")
_EPOCH, _MILLISECONDS = 1e8, 1e11  # numbers from which on they are seconds, milliseconds since 1970


@dataclass(frozen=True)
class Step:
    """The regular step of a series: so many seconds, business days or months."""

    unit: Literal["second", "business day", "month"]
    size: int

    def __str__(self) -> str:
        if self.unit == "month":
            years, quarters = self.size % 12 == 0, self.size % 3 == 0
            size, unit = (
                (self.size // 12, "year")
                if years
                else (self.size // 3, "quarter")
                if quarters
                else (self.size, "month")
            )
        elif self.unit == "second":
            length, unit = next((length, unit) for length, unit in _UNITS if self.size % length == 0)
            size = self.size // length
        else:
            size, unit = self.size, self.unit
        return f"1 {unit}" if size == 1 else f"{size} {unit}s"

    @property
    def season(self) -> int:
        """Steps of the day, week or year that a series with this step usually follows."""
        if self.unit == "month":
            return max(1, 12 // self.size)
        if self.unit == "business day":
            return 5
        whole = _DAY if self.size < _DAY else 7 * _DAY if self.size < 7 * _DAY else 364 * _DAY
        return max(1, whole // self.size) if self.size >= 60 else max(1, 3600 // self.size)

    def count(self, start: np.datetime64, times: Times) -> Ints:
        """How many steps each of the times is after the start, rounded down."""
        if self.unit == "second":
            return np.asarray((times - start).astype(np.int64) // self.size)
        if self.unit == "business day":
            return np.asarray(np.busday_count(start.astype("M8[D]"), times.astype("M8[D]")))
        months = times.astype("M8[M]").astype(np.int64) - start.astype("M8[M]").astype(np.int64)
        return np.asarray(months // self.size)

    def times(self, start: np.datetime64, counts: Ints) -> Times:
        """The times so many steps after the start; of a month's last day the last days of other months."""
        if self.unit == "second":
            return np.asarray(start + (counts * self.size).astype("m8[s]"))
        day = start.astype("M8[D]")
        if self.unit == "business day":
            return np.asarray(np.busday_offset(day, counts, roll="forward").astype("M8[s]") + (start - day))
        months = day.astype("M8[M]") + (counts * self.size).astype("m8[M]")
        last = (months + 1).astype("M8[D]") - 1
        within = months.astype("M8[D]") + (day - day.astype("M8[M]").astype("M8[D]"))
        days = last if _ends_month(np.array([day]))[0] else np.minimum(within, last)
        return np.asarray(days.astype("M8[s]") + (start - day))

    @property
    def seconds(self) -> float:
        """Its length, of months and business days on average."""
        return {"second": 1.0, "business day": 7 / 5 * _DAY, "month": 365.2425 / 12 * _DAY}[self.unit] * self.size


def step_of(times: Times, where: str) -> Step:
    """The step of sorted, distinct times: the most common one, of which the others are to be multiples.

    Raises:
        DataError: there are fewer than two times.
    """
    if len(times) < 2:
        raise DataError(f"{where}: a series needs at least two times, this one has {len(times)}")
    gaps = np.diff(times).astype(np.int64)
    days = times.astype("M8[D]")
    same_day = len(np.unique(days - days.astype("M8[M]").astype("M8[D]"))) == 1 or _ends_month(days).all()
    if gaps.min() >= 28 * _DAY and same_day:
        whole: Ints = times.astype("M8[M]").astype(np.int64)
        return Step("month", _most_common(np.diff(whole)))
    size = _most_common(gaps)
    weekday = (days.astype(np.int64) + 3) % 7
    if size == _DAY and len(times) > 5 and (weekday < 5).all() and gaps.max() > _DAY:
        return Step("business day", 1)
    return Step("second", size)


def _most_common(gaps: Ints) -> int:
    sizes, counts = np.unique(gaps, return_counts=True)
    return int(sizes[counts.argmax()])


def _ends_month(days: Any) -> Any:
    return (days + 1).astype("M8[M]") != days.astype("M8[M]")


# Reading and writing ---------------------------------------------------------------------------------------------------


def times_of(values: Sequence[Any], places: Sequence[str]) -> tuple[Times, list[str]]:
    """Times as (n,) seconds, and what was done about time zones.

    Raises:
        DataError: one cannot be read, or some have an offset and others not; its place is named.
    """
    read = [_read(value, place) for value, place in zip(values, places)]
    offsets = {moment.utcoffset() for moment in read}
    if len(offsets) > 1 and None in offsets:
        bare = next(place for moment, place in zip(read, places) if moment.utcoffset() is None)
        raise DataError(
            f"{bare}: this time has no offset from UTC and others have one; write all with it or all without"
        )
    notes = []
    if len(offsets) > 1:
        notes.append("times have different offsets from UTC and were brought to UTC")
        read = [moment.astimezone(UTC) for moment in read]
    elif offsets != {None}:
        notes.append(f"times are on the clock they were written by ({read[0].strftime('UTC%z')})")
    return np.array([moment.replace(tzinfo=None, microsecond=0) for moment in read], dtype="M8[s]"), notes


def texts_of(times: Times) -> list[str]:
    """Times as ISO 8601, dates alone where all begin a day."""
    dates = bool((times == times.astype("M8[D]")).all())
    return [str(text) for text in np.datetime_as_string(times, unit="D" if dates else "s")]


def _read(value: Any, where: str) -> datetime:
    try:
        found = _moment(value)
    except (ValueError, OverflowError, OSError):
        found = None
    if found is None:
        raise DataError(
            f"{where}: the time {str(value)!r:.40} cannot be read; write 2024-03-01, 2024-03-01 14:30, 2024-03, 2024Q1, 2024 "
            "or seconds since 1970, or name another column with data.columns.time"
        )
    return found


def _moment(value: Any) -> datetime | None:
    if isinstance(value, datetime):
        return value
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day)
    if isinstance(value, bool) or value is None:
        return None
    text = str(value).strip()
    if quarter := _QUARTER.fullmatch(text):
        return datetime(int(quarter[1]), 3 * int(quarter[2]) - 2, 1)
    if month := _MONTH.fullmatch(text):
        return datetime(int(month[1]), int(month[2]), 1)
    if _YEAR.fullmatch(text.removesuffix(".0")):
        return datetime(int(float(text)), 1, 1)
    if day := _UNUSUAL.fullmatch(text):
        return datetime(*(int(part) for part in day.groups() if part is not None))  # type: ignore[arg-type]
    try:
        number = float(text)
    except ValueError:
        return datetime.fromisoformat(text)
    if number < _EPOCH:
        return None
    return datetime.fromtimestamp(number / (1000 if number >= _MILLISECONDS else 1), UTC).replace(tzinfo=None)


# The calendar ----------------------------------------------------------------------------------------------------------


def cycles_of(step: Step, steps: int) -> list[str]:
    """The cycles that a series of so many steps has been through at least twice, and that it can tell the phases of."""
    whole = step.seconds * steps
    daily = step.unit != "month" and step.seconds <= 1.5 * _DAY
    lengths = {
        "hour": (_DAY, step.seconds < _DAY),
        "weekday": (7 * _DAY, daily),
        "year": (365.25 * _DAY, step.seconds < 100 * _DAY),
    }
    return [name for name, (length, tells) in lengths.items() if tells and whole >= 2 * length]


def calendar(times: Times, cycles: Sequence[str]) -> NDArray[np.float32]:
    """Where in its cycles each time is: (times, features); sine and cosine of the day and the year, and one weekday of 7."""
    days = times.astype("M8[D]")
    found = [np.zeros((len(times), 0))]
    if "hour" in cycles:
        found.append(_circle((times - days).astype(np.int64) / _DAY))
    if "weekday" in cycles:
        found.append(np.eye(7)[(days.astype(np.int64) + 3) % 7])
    if "year" in cycles:
        found.append(_circle((days - times.astype("M8[Y]").astype("M8[D]")).astype(np.int64) / 365.25))
    return np.concatenate(found, axis=1).astype(np.float32)


def _circle(share: Any) -> Any:
    angles = 2 * np.pi * np.asarray(share)
    return np.stack([np.sin(angles), np.cos(angles)], axis=1)

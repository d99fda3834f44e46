"""Events (a user, an item, a time) become one row for each user: the items in the order of time, the last held out.

Leave-one-out by time (Kang and McAuley 2018, section 4.1): a user's last item is test, the one before it validation. Items
that no training row may hold (`data.split.cold`) are chosen by their hash. What an item is, nobody here knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Mapping
from datetime import UTC, date, datetime, time
from itertools import pairwise
from typing import Any

import xxhash

from formary.data.records import Part, Row
from formary.errors import DataError, RecipeError
from formary.recipe.schema import Split

COLUMNS = ("user", "item", "time")
FEWEST = 2
"""Items of a user that training keeps: of one alone nothing follows."""

_PARTS: tuple[Part, ...] = ("validation", "test")
_EXAMPLES = 3


def name_of(value: Any, column: str, where: str) -> str:
    """A user or an item as its name: numbers without a needless .0, no space around.

    Raises:
        DataError: there is none; the row is called `where`.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    missing = value is None or isinstance(value, float | bool | list | dict | tuple)
    name = "" if missing else str(value).strip()
    if not name:
        said = "is missing" if value is None or name == value == "" else f"holds {value!r:.40}, which is no name"
        raise DataError(
            f"{where}: column '{column}' {said}; complete the row, or map another with data.columns.{column}"
        )
    return name


def moment(value: Any, where: str) -> tuple[float, bool]:
    """A time as a number that grows with it, and whether it was a date (then seconds since 1970; without a zone, UTC).

    Raises:
        DataError: it is neither a number nor an ISO 8601 date.
    """
    if isinstance(value, date):  # as Parquet has them
        value = value if isinstance(value, datetime) else datetime.combine(value, time())
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp(), True
    if not isinstance(value, bool) and value is not None:
        try:
            number = float(value)
            if math.isfinite(number):
                return number, False
        except (TypeError, ValueError):
            try:
                return moment(datetime.fromisoformat(str(value).strip()), where)
            except ValueError:
                pass
    raise DataError(
        f"{where}: column 'time' holds {value!r:.40}, neither a number nor a date such as 2024-05-01T12:30:00; mend the "
        "row, or map another with data.columns.time"
    )


def check(values: Mapping[str, Any], where: str) -> None:
    """Refuse an event without a user, an item or a time.

    Raises:
        DataError: which, and where.
    """
    for column in ("user", "item"):
        name_of(values.get(column), column, where)
    moment(values.get("time"), where)


def told(values: Mapping[str, Any]) -> str:
    """An event, or a user's row, as one line: what it is compared by."""
    if "time" in values:
        return json.dumps([values[column] for column in COLUMNS], ensure_ascii=False, default=str)
    before = " ".join(map(str, values["history"]))
    return f"{values.get('user', '')}: {before}" + (f" → {values['item']}" if values.get("item") is not None else "")


def history(row: Mapping[str, Any], where: str) -> list[str]:
    """The items of a row's history: a list, a text with commas between them, or a JSON list where a name has a comma.

    Raises:
        DataError: it is none of these; the row is called `where`.
    """
    given = row.get("history")
    if isinstance(given, str):
        if given.lstrip().startswith("["):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise DataError(f"{where}: field 'history' is no JSON list ({error})") from None
        else:
            given = [item for item in map(str.strip, given.split(",")) if item]
    if not isinstance(given, list | tuple):
        said = "is missing" if given is None else f"holds {type(given).__name__} {given!r:.40}"
        raise DataError(
            f'{where}: field \'history\' {said}; it is a list of items, the last one newest, such as ["a", "b"], and an '
            "empty one for somebody new"
        )
    return [name_of(item, "history", where) for item in given]


def gathered(rows: Iterator[Row], split: Split | None) -> Generator[tuple[Part, Row], None, list[str]]:
    """One row for each user and part: {"user", "history"} to learn from, {"user", "history", "item"} where an item is held out.

    Args:
        rows: events in any order; those of one user at the same time stay in theirs.
        split: validation and test are held out where their share is above 0; None: every user's last item is.

    Returns:
        sentences on users with too few events and on equal times.

    Raises:
        DataError: a row is no event, or times are numbers in some rows and dates in others.
        RecipeError: the split asks for folds.
    """
    if split is not None and split.folds is not None:
        raise RecipeError("data.split.folds: the events of a user are divided by time, which cannot be done in folds")
    users: dict[str, list[tuple[float, str]]] = {}
    dates: dict[bool, str] = {}
    for row in rows:
        when, is_date = moment(row.values.get("time"), row.origin)
        dates.setdefault(is_date, row.origin)
        user, item = (name_of(row.values.get(column), column, row.origin) for column in ("user", "item"))
        users.setdefault(user, []).append((when, item))
    if len(dates) > 1:
        raise DataError(f"column 'time' holds a date at {dates[True]} and a number at {dates[False]}; make them alike")
    return (yield from _divided(users, split))


def _divided(
    users: dict[str, list[tuple[float, str]]], split: Split | None
) -> Generator[tuple[Part, Row], None, list[str]]:
    held = _PARTS[1:] if split is None else tuple(part for part in _PARTS if getattr(split, part) > 0)
    single, few, ties = [], [], 0
    for user, events in users.items():
        events.sort(key=lambda event: event[0])  # stable: events of one moment stay in order
        ties += sum(one[0] == other[0] for one, other in pairwise(events))
        items = [item for _, item in events]
        if len(items) == 1:
            single.append(user)
            continue
        if split is not None and split.cold:
            yield from _cold(user, items, held, split)
            continue
        keep = 1 if split is None else FEWEST
        enough = len(items) >= keep + len(held)
        if not enough:
            few.append(user)
        ends = [len(items) - len(held) + place for place in range(len(held))] if enough else []
        if split is not None:
            yield "train", _row(user, items[: ends[0] if ends else None])
        for part, end in zip(held, ends):
            yield part, _row(user, items[:end], items[end])
    said = _notes(single, "with one event, after which nothing follows, {} left out")
    said += _notes(
        few, f"with fewer than {FEWEST + len(held)} events, of which none is held out, {{}} in training only"
    )
    if ties:
        said.append(f"{ties:,} events have the time of the user's event before; they stay in the order of the file")
    return said


def _cold(user: str, items: list[str], held: tuple[Part, ...], split: Split) -> Iterator[tuple[Part, Row]]:
    """The rows of a user where some items are kept from training: what is held out are the last of these."""
    parts = [_cold_part(item, split) for item in items]
    warm = [item for item, part in zip(items, parts) if part is None]
    if len(warm) >= FEWEST:
        yield "train", _row(user, warm)
    for wanted in held:
        last = max((place for place, part in enumerate(parts) if part == wanted), default=None)
        before = [item for item, part in zip(items[:last], parts) if part is None] if last is not None else []
        if last is not None and before:
            yield wanted, _row(user, before, items[last])


def _cold_part(item: str, split: Split) -> Part | None:
    """The part whose held-out items an item belongs to: a share of all is for test, as large a one for validation."""
    place = xxhash.xxh3_64_intdigest(f"{split.salt}\0item\0{item}".encode("utf-8", "surrogatepass")) / 2**64
    return "test" if place < split.cold else "validation" if place < 2 * split.cold else None


def _row(user: str, history: list[str], item: str | None = None) -> Row:
    values: dict[str, Any] = {"user": user, "history": history}
    return Row(values if item is None else values | {"item": item}, f"user {user}")


def _notes(users: list[str], said: str) -> list[str]:
    if not users:
        return []
    count = "1 user" if len(users) == 1 else f"{len(users):,} users"
    verb = "is" if len(users) == 1 else "are"
    return [f"{count} {said.format(verb)}: {', '.join(users[:_EXAMPLES])}{' ...' if len(users) > _EXAMPLES else ''}"]

"""What an evaluation found in detail, as titled tables for a page: per class, confusions, worst rows, slices.

Details are nested mappings and lists whose shape says how they are laid out; nothing here knows a task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN = 20  # rows of a table
_FOLDED = 8  # a longer table opens on demand
_LONG = 240  # characters of a cell
_FIGURE = re.compile(r"–|-?[\d.,]+(?: \[-?[\d.,]+, -?[\d.,]+\])?")
_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True)
class Table:
    """One table of cells as text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: bool  # all columns but the first hold numbers

    @property
    def folded(self) -> bool:
        """Whether it is long enough to be opened on demand."""
        return len(self.rows) > _FOLDED


def tables_of(details: Mapping[str, Any]) -> list[Table]:
    """Every part of `details` that can be laid out, in its order; numbers by themselves come together first."""
    single = {name: value for name, value in details.items() if not isinstance(value, Mapping | list | tuple | str)}
    found = [_of_mapping("in numbers", single)] if single else []
    for name, value in details.items():
        if isinstance(value, Mapping) and value:
            rows = {inner: part for inner, part in value.items() if _is_rows(part)}
            found += [_of_list(f"{name}, {inner}", part) for inner, part in rows.items()] or [_of_mapping(name, value)]
        elif _is_rows(value):
            found.append(_of_list(name, value))
    return [table for table in found if table.rows]


def is_figure(cell: str) -> bool:
    """Whether a cell is a number, with its interval or without, or says that there is none."""
    return _FIGURE.fullmatch(cell) is not None


def is_picture(cell: Any) -> bool:
    """Whether a cell is the data URI of a small picture, to be shown as one."""
    return isinstance(cell, str) and _PICTURE.fullmatch(cell) is not None


def _is_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _of_mapping(title: str, value: Mapping[str, Any]) -> Table:
    if value.keys() >= {"labels", "counts"} and isinstance(value["counts"], list | tuple):  # a confusion matrix
        labels = [str(label) for label in value["labels"]]
        rows = [(label, *map(_cell, row)) for label, row in zip(labels, value["counts"])]
        return Table(_words(title), ("true \\ said", *labels), tuple(rows[:_SHOWN]), True)
    inner = list(value.values())
    if inner and all(isinstance(entry, Mapping) for entry in inner):
        columns = list(dict.fromkeys(name for entry in inner for name in entry))
        rows = [(str(name), *(_cell(entry.get(column)) for column in columns)) for name, entry in value.items()]
        return _table(title, ("", *map(_words, columns)), rows)
    return _table(title, (), [(_words(name), _cell(entry)) for name, entry in value.items()])


def _of_list(title: str, value: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(name for entry in value for name in entry))
    rows = [tuple(_cell(entry.get(column)) for column in columns) for entry in value]
    return _table(title, tuple(map(_words, columns)), rows)


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    numbers = bool(rows) and all(_is_number(cell) for row in rows for cell in row[1:])
    return Table(_words(title), columns, tuple(rows[:_SHOWN]), numbers)


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}".rstrip("0").rstrip(".")
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        if {"value", "low", "high"} <= value.keys():
            bounds = value["low"] is not None and value["high"] is not None
            return _cell(value["value"]) + (f" [{_cell(value['low'])}, {_cell(value['high'])}]" if bounds else "")
        return ", ".join(f"{_words(name)} {_cell(inner)}" for name, inner in value.items())[:_LONG]
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))[:_LONG]
    text = str(value)
    return text if len(text) <= _LONG or is_picture(text) else text[: _LONG - 1] + "…"


def _is_number(cell: str) -> bool:
    return cell == "–" or cell.replace(",", "").replace(".", "").lstrip("-").split(" ")[0].isdigit()

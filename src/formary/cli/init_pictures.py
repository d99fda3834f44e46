"""What `formary init` sees of pictures: which column holds them, how large they are, which folders and parts there are.

A few dozen are opened, of the others only their names are read. What follows from it is `recipe.guess_pictures`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from formary.data.arrays import archive_names, parts_of
from formary.data.files import file_of, kind_of
from formary.data.images import SUFFIXES, decoded, is_data_uri
from formary.data.source import Source
from formary.errors import DataError
from formary.recipe.sample import Pictures

_OPENED = 64  # pictures whose pixels are looked at
_SIGNS = (b"\x89PNG", b"\xff\xd8\xff")  # how their files begin
_ROWS = 2000  # of a table among which these are chosen


def with_parts(paths: Sequence[Path]) -> list[Path]:
    """The same files, each archive whose arrays are named by parts replaced by its parts (data.npz/train)."""
    found: list[Path] = []
    for path in paths:
        is_archive = kind_of(path)[0] == "npz" and file_of(path) == path
        parts = parts_of(dict.fromkeys(archive_names(path))) if is_archive else {}
        found += [path / part for part in parts] or [path]
    return found


def folder_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows that pictures in folders are: their paths, and as labels the names of their folders."""
    return [{"image": str(path), "label": path.resolve().parent.name} for path in paths]


def pictures_in(rows: Sequence[Mapping[str, Any]], paths: Sequence[Path], count: int) -> Pictures | None:
    """What is seen of the pictures in some rows; None where no column holds any.

    Args:
        rows: as they stand in the files.
        paths: the files; those in the first are opened, or of pictures in folders some of all.
        count: how many rows the data has.

    Raises:
        DataError: none of those that were opened is a picture. MissingExtra: Pillow is not installed.
    """
    column = _column(rows)
    if column is None:
        return None
    if kind_of(paths[0])[0] == "picture":
        values: list[Any] = [row[column] for row in rows]
    else:
        source = Source([str(paths[0])], required=(), files=(column,))
        values = [row.values.get(column) for row in islice(source, _ROWS)]
    chosen = values[:: max(1, len(values) // _OPENED)][:_OPENED]
    sides, grey, refused = [], True, ""
    for value in chosen:
        try:
            pixels = decoded(value, column)
        except DataError as error:
            refused = refused or str(error)
            continue
        sides.append(max(pixels.shape[:2]))
        grey = grey and bool((pixels == pixels[..., :1]).all())
    if not sides:
        raise DataError(f"{paths[0]}: none of {len(chosen)} pictures can be read; the first: {refused}")
    return Pictures(column, sorted(sides), grey, unreadable=len(chosen) - len(sides), count=count)


def _column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column in which most values are pictures."""
    some = rows[:50]
    names = dict.fromkeys(name for row in some for name in row)
    return next((n for n in names if sum(_is_picture(row.get(n)) for row in some) > 0.5 * len(some)), None)


def _is_picture(value: Any) -> bool:
    if isinstance(value, Mapping):  # as Hugging Face has them
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value.startswith(_SIGNS)
    return is_data_uri(value) or (isinstance(value, str) and value.lower().endswith(SUFFIXES))

"""The first pass over many files, each by itself: rows are read, checked, cleaned of what one row alone shows, and kept.

Any process may do any of the files, and a preparation that was killed goes on with those that are left. What looks at
several rows (duplicates, the split) comes after, in `documents`, and reads the parts in the order of the files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zstandard

from formary import durable
from formary.data.clean import Cleaner, StepCount
from formary.data.files import file_of, kind_of, size_of
from formary.data.records import Row, RowForm
from formary.data.source import Source
from formary.errors import DataError
from formary.recipe import schema

_FOLDER = "parts"
_LARGE = 1 << 28  # bytes of several files from which on one process too keeps parts, to go on after a kill
_FORMAT = 1

Encode = Callable[[Any], str]


def wanted(data: schema.Data, base: Path, *, processes: int) -> bool:
    """Whether the files are to be done one by one: there are several, and either many bytes or several processes."""
    if data.max_rows is not None:  # how many of a file's rows count is known only after the files before it
        return False
    paths = [path for part in _named(data) for path in source_of(data, part, base, RowForm(columns=())).paths]
    paths = [path for path in paths if kind_of(path)[0] != "picture"]  # of one row each: not worth a part
    return len(paths) > 1 and (processes > 1 or sum(map(size_of, paths)) >= _LARGE)


def write_parts(
    data: schema.Data,
    folder: Path,
    *,
    base: Path,
    form: RowForm,
    encode: Encode,
    share: Callable[[Sequence[Any]], Sequence[Any]] = list,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Do those files of the recipe's data that are this process's share and not done yet.

    Args:
        folder: of the documents; the parts lie in it until `remove_parts`.
        form: the columns of the task's rows.
        encode: values of a row as JSON.
        share: of all files, those of this process.
        progress: called with (bytes of the files done, bytes of this process's files).

    Raises:
        DataError: a file cannot be read, or a row is not what it should be.
        StorageError: the disk is full or the folder not writable.
    """
    own = share([(part, number, path) for part in _named(data) for number, path in enumerate(_paths(data, part, base))])
    total, done = sum(size_of(path) for _, _, path in own), 0
    for part, number, path in own:
        place, key = _place(folder, part, number), _key(data, path, form)
        if durable.read_json(place.with_suffix(".json")).get("key") != key or not place.exists():
            _write(data, part, path, place, key, base, form, encode)
        done += size_of(path)
        if progress:
            progress(done, total)


def read_parts(
    source: Source, cleaner: Cleaner, data: schema.Data, part: str, folder: Path, form: RowForm
) -> Iterator[Row]:
    """The rows of all parts of `data.sources`, `validation` or `test`, in the order of the files.

    `source` and `cleaner`, which did not see the files, count as if they had.

    Raises:
        DataError: a part is not there, or not of this file and recipe.
    """
    for number, path in enumerate(source.paths):
        place = _place(folder, part, number)
        about = durable.read_json(place.with_suffix(".json"))
        if about.get("key") != _key(data, path, form) or not place.exists():
            raise DataError(f"{place}: is not what {source.name(path)} gives now; prepare the data again")
        name = source.listed(path)
        cleaner.take_over([StepCount(**count) for count in about["steps"]], about["rows_in"])
        source.rows += about["rows_in"]
        source.rows_by_file[name] = source.rows_by_file.get(name, 0) + about["rows_in"]
        if about["moved"]:
            source.moved[name] = about["moved"]
        with zstandard.open(place, "rt", encoding="utf-8") as stream:
            for line in stream:
                values, origin = json.loads(line)
                yield form.with_text(Row(values, origin))
        source.bytes_done += size_of(path)
    source.check_not_empty()


def remove_parts(folder: Path) -> None:
    """Delete the parts: the documents made of them are there."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def source_of(data: schema.Data, part: str, base: Path, form: RowForm) -> Source:
    """The reader of `data.sources`, `data.validation` or `data.test`."""
    return Source(
        getattr(data, part),
        columns=data.columns,
        documents=data.documents,
        encoding=data.encoding,
        max_rows=data.max_rows,
        required=form.required,
        files=form.files,
        names=data.names,
        base=base,
    )


def _write(
    data: schema.Data, part: str, path: Path, place: Path, key: str, base: Path, form: RowForm, encode: Encode
) -> None:
    source, cleaner = source_of(data, part, base, form), Cleaner(data.clean, form, steps="alone")
    rows = (form.with_text(form.checked(row)) for row in source.rows_of(path))
    with durable.new_file(place) as temporary, zstandard.open(temporary, "wt", encoding="utf-8") as stream:
        for row in cleaner.clean(rows):
            stream.write(encode([row.values, row.origin]) + "\n")
    about = {
        "key": key,
        "rows_in": cleaner.rows_in,
        "steps": [count.as_dict() for count in cleaner.story],
        "moved": source.moved.get(source.name(path), []),
    }
    durable.write_json(place.with_suffix(".json"), about)


def _named(data: schema.Data) -> list[str]:
    return ["sources", *(part for part in ("validation", "test") if getattr(data, part))]


def _paths(data: schema.Data, part: str, base: Path) -> list[Path]:
    return source_of(data, part, base, RowForm(columns=())).paths


def _place(folder: Path, part: str, number: int) -> Path:
    return folder / _FOLDER / f"{part}-{number:06d}.zst"


def _key(data: schema.Data, path: Path, form: RowForm) -> str:
    """What a part depends on: the file (by path, size and time), how it is read, and how single rows are cleaned."""
    stat = file_of(path).stat()
    settings = data.model_dump(include={"columns", "names", "documents", "encoding", "clean"})
    about = [
        _FORMAT,
        str(path.resolve()),
        stat.st_size,
        stat.st_mtime_ns,
        settings,
        form.columns,
        form.telling,
        form.files,
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()

"""Rows for commands whose tasks read files: one picture, a folder of them, an archive, or a table that names them.

What cannot be read is left out, named and counted, as in a run; only where nothing is left it is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from formary.data.files import expand, file_of, kind_of
from formary.data.images import SUFFIXES, is_data_uri
from formary.data.records import Row, label_names
from formary.data.source import Source
from formary.errors import DataError, FormaryError
from formary.tasks.protocol import LabelledTask

_FOLDER = {"label": "@folder"}  # what a picture in a folder is labelled by
_NAMED = 3  # files that a note names


def gives_files(task: LabelledTask, given: str) -> bool:
    """Whether what a command was given is read as files: always, where the task asks for them; else where they are there."""
    if not task.form.files:
        return False
    path, asked = Path(given), set(task.form.files) & set(task.asks)
    return bool(asked) or path.suffix.lower() in SUFFIXES or file_of(path).exists()


def file_rows(
    task: LabelledTask, given: str, *, columns: Mapping[str, str], answers: bool, lines: Iterable[str] = ()
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of what a command was given, and notes on those that are left out.

    Columns and numbers of labels are called as in the data that the model learned from, where nothing else is said.

    Args:
        given: a file, a folder, a part of an archive, the content of a file as a data URI, or - for `lines`, a path in each.
        columns: our name -> the file's.
        answers: whether the rows must have the right answers, or only what the task asks.

    Raises:
        FormaryError: nothing is there, it is of another kind, or none of it can be read; the message says what to give.
    """
    column = task.form.files[0]
    if given == "-":
        rows = [Row({column: line.strip()}, f"line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    elif is_data_uri(given):
        rows = [Row({column: given}, "the data URI")]
    else:
        rows = _read(task, given, columns, answers)
    kept, notes = _readable(task, rows, given)
    if answers:
        _check_labels(task, kept, given)
    return kept, notes


def _read(task: LabelledTask, given: str, columns: Mapping[str, str], answers: bool) -> list[Row]:
    column, origin = task.form.files[0], getattr(task, "origin", None)
    paths = expand([given])
    if other := next((path for path in paths if kind_of(path)[0] == "text"), None):
        raise FormaryError(
            f"{other}: this model reads files ({', '.join(SUFFIXES)}; convert others first), folders of them, .npz and idx "
            f"files, and tables (CSV, JSONL, Parquet) with a column '{column}'"
        )
    in_folders = all(kind_of(path)[0] == "picture" for path in paths)
    asked = () if getattr(task, "asks_any", False) else task.asks
    needed = task.form.columns if answers else tuple(name for name in asked if name in task.form.columns)
    if answers and in_folders and {*task.form.columns} - {column, "label"}:
        raise FormaryError(
            f"{given}: the right answers are missing; name the files in a CSV or JSONL with the columns "
            f"{' and '.join(task.form.columns)}"
        )
    labelled = "label" in task.form.columns or bool(getattr(task, "labels", ()))
    found = dict(_FOLDER) if answers and in_folders and labelled else {}
    if not in_folders and origin is not None:
        head = next(iter(Source([given], required=())), None)
        there = head.values if head else {}
        found = {ours: theirs for ours, theirs in origin.columns.items() if theirs in there}
    try:
        return list(
            Source(
                [given],
                columns=found | dict(columns),
                required=needed,
                files=task.form.files,
                names=origin.names if origin is not None else (),
            )
        )
    except DataError as error:
        raise DataError(str(error).replace("data.columns.", "--column ")) from error


def _readable(task: LabelledTask, rows: Sequence[Row], given: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The values of rows that can be read, and a sentence on the others."""
    unreadable, column = task.form.unreadable, task.form.files[0]
    if unreadable is None:
        return [row.values for row in rows], []
    with ThreadPoolExecutor() as threads:
        given_one = [column in task.asks or row.values.get(column) is not None for row in rows]
        said = [
            reason if there else None
            for there, reason in zip(given_one, threads.map(unreadable, (row.values for row in rows)))
        ]
    # A row of a picture alone is called by its file already.
    reasons = [reason and reason.removeprefix(f"{row.values.get(column)}: ") for row, reason in zip(rows, said)]
    refused = [(row, reason) for row, reason in zip(rows, reasons) if reason]
    if len(refused) == len(rows):
        first = f"{refused[0][0].origin}: {refused[0][1]}" if refused else f"{given}: there are no rows"
        raise DataError(first if len(rows) < 2 else f"none of {len(rows):,} can be read; the first: {first}")
    kept = [row.values for row, reason in zip(rows, reasons) if not reason]
    if not refused:
        return kept, []
    named = "; ".join(f"{row.origin} ({reason})" for row, reason in islice(refused, _NAMED))
    more = f"; and {len(refused) - _NAMED:,} more" if len(refused) > _NAMED else ""
    return kept, [f"{len(refused):,} of {len(rows):,} cannot be read and are left out: {named}{more}"]


def _check_labels(task: LabelledTask, rows: Sequence[Mapping[str, Any]], given: str) -> None:
    """Refuse rows none of whose labels the model knows: every answer would be wrong, and that would say nothing of it."""
    known = getattr(task, "labels", ())
    if not known or getattr(task, "kind", "") == "regression":
        return
    labels = (row.get("label") for row in rows)
    seen = dict.fromkeys(name for label in labels if label is not None for name in label_names(label))
    if seen and not set(seen) & set(known):
        raise DataError(
            f"{given}: none of its labels ({_some(seen)}) is one of the model's ({_some(known)}); files in folders have the "
            "label that their folder is called, others that of the column `label` (--column label=yours)"
        )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")

"""From the recipe's `data` section to train.jsonl, validation.jsonl, test.jsonl and the story of how they came about.

One streaming pass reads, cleans, splits and writes; a second over train.jsonl runs only when rows have to leave it (they
also occur in validation or test) or be added (augmentation). The single steps live in `source`, `clean`, `split`, `augment`.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import numpy as np

from formary import durable
from formary.data.augment import Augmenter
from formary.data.clean import Cleaner, batches
from formary.data.duplicates import NearDuplicates, exact_key
from formary.data.parts import read_parts, remove_parts, source_of, write_parts
from formary.data.records import Part, Row, RowForm, label_names
from formary.data.split import PARTS, assign, by_order, dealt, unit_of
from formary.errors import DataError, RecipeError
from formary.recipe import schema

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes to read)."""

_EXAMPLES = 3
_UNAPPLIED = ("stop_words", "stem", "segment")  # changes of text that a recipe has to ask for


def write_documents(
    data: schema.Data,
    folder: Path,
    *,
    base: Path,
    form: RowForm = RowForm(),  # noqa: B008  # frozen
    progress: Progress | None = None,
    from_parts: bool = False,
) -> dict[str, Any]:
    """Read, clean, split and augment the recipe's data; write one row a line, column `text` first where there is one.

    Rows whose text is composed of other columns (see `RowForm`) are written as they were read: cleaning that drops
    (length, repetition, language, duplicates) judges the composed text, cleaning that changes text is not applied.
    Exact duplicates with another answer are dropped too and counted apart, as "conflicting labels".

    Args:
        data: the recipe's data section.
        folder: gets train.jsonl, validation.jsonl, test.jsonl, and last story.json.
        base: the folder relative to which sources are named.
        form: the columns of the task's rows.
        progress: called as reading goes on.
        from_parts: take the files as `write_parts` left them in `folder`, which is the same and was done before, by
            several processes or with interruptions.

    Returns:
        The story, as in story.json: `files`, `bytes_read`, `rows_read`, `steps` of cleaning with counts and examples,
        `splits` with rows, characters and UTF-8 bytes of text, `duplicates_across_splits`, `augmented`, `warnings`.

    Raises:
        DataError: sources cannot be read, or no training row is left.
        RecipeError: the shares or the group do not make sense, or the rows cannot be masked or augmented as asked.
        StorageError: the disk is full or the folder not writable; nothing half-written is left.
    """
    split = _split_of(data)
    parts = Path(folder) if from_parts else None
    inputs = [
        _Input("sources", data, base, form, parts),
        *(_Input(part, data, base, form, parts) for part in ("validation", "test") if getattr(data, part)),
    ]
    augmenter = Augmenter(data.augment, base, salt=split.salt)
    _check_changes(data, form, augmenter)
    report = _reporter(inputs, progress)

    folder = Path(folder)
    with ExitStack() as stack:
        sinks = {part: stack.enter_context(_sink(folder / f"{part}.jsonl")) for part in PARTS}
        for given in inputs[1:]:
            for _, row in given.gathered(report):
                sinks[given.part].write(row)
            given.check_some_rows_stayed()
        sources = inputs[0]
        if form.gather is not None:
            for part, row in sources.gathered(report, split):
                sinks[part].write(row)
        elif split.by == "order":
            _write_by_order(sources, split, sinks, folder, report)
        elif split.folds is not None:
            _write_by_fold(sources, split, sinks, folder, report)
        else:
            for row in sources.rows(report):
                sinks[assign(row, split)].write(row)
        sources.check_some_rows_stayed()
        finishing = _finish_training(data, sinks, augmenter, form)
        _check_training(sinks, sources, split)
        # A story beside documents that it does not describe would mislead whoever finds them after a crash.
        (folder / "story.json").unlink(missing_ok=True)

    story = {
        "files": [file for given in inputs for file in given.files()],
        "bytes_read": sum(given.source.bytes_done for given in inputs),
        "rows_read": sum(given.cleaner.rows_in for given in inputs),
        "steps": _steps(inputs),
        "splits": {part: sink.counts(form) for part, sink in sinks.items()},
        **finishing,
        "warnings": [
            *_warnings(sinks, split),
            *_unapplied(data, form),
            *(n for given in inputs for n in [*given.source.notes(), *given.gathering_notes]),
        ],
    }
    durable.write_json(folder / "story.json", story)
    remove_parts(folder)
    return story


def prepare_parts(
    data: schema.Data,
    folder: Path,
    *,
    base: Path,
    form: RowForm,
    share: Callable[[Sequence[Any]], Sequence[Any]] = list,
    progress: Progress | None = None,
) -> None:
    """Do this process's share of the files for `write_documents(from_parts=True)`; see `parts.write_parts`."""
    encode = json.JSONEncoder(default=_plain).encode  # ASCII: half characters survive
    write_parts(data, folder, base=base, form=form, encode=encode, share=share, progress=progress)


def read_documents(path: Path, form: RowForm = RowForm()) -> Iterator[Row]:  # noqa: B008  # frozen
    """Stream the rows of a file that `write_documents` wrote; `form` composes their text where it is no column."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            yield form.with_text(Row(json.loads(line), f"{path.name} line {number}"))


# What goes in -------------------------------------------------------------------------------------------------------


class _Input:
    """One list of sources with its own cleaner: duplicates within it are dropped, across lists they are reported."""

    def __init__(self, part: str, data: schema.Data, base: Path, form: RowForm, parts: Path | None) -> None:
        self.part: Any = part
        self.form = form
        self.documents = data.documents
        self.gathering_notes: list[str] = []
        self.source = source_of(data, part, base, form)
        self.cleaner = Cleaner(data.clean, form, steps="left" if parts else "all")
        self._parts = read_parts(self.source, self.cleaner, data, part, parts, form) if parts else None

    def rows(self, report: Callable[[], None]) -> Iterator[Row]:
        return self.cleaner.clean(self._reported(report))

    def gathered(self, report: Callable[[], None], split: schema.Split | None = None) -> Iterator[tuple[Part, Row]]:
        """The task's rows and their parts, where it makes them of many; without a split all are of this input's part."""
        if self.form.gather is None:
            yield from ((self.part, row) for row in self.rows(report))
            return
        gathering = self.form.gather(self.rows(report), split)
        while True:
            try:
                part, row = next(gathering)
            except StopIteration as end:
                self.gathering_notes = list(end.value or ())
                return
            yield part, self.form.with_text(row)

    def is_one_text(self) -> bool:
        """Whether the rows are one text, if need be in pieces: then a split by order may cut anywhere."""
        paths = self.source.paths
        one_file = len(paths) == 1 and self.documents == "file" and self.source.kind(paths[0]) == "text"
        return self.form.one_text and (one_file or self.cleaner.rows_in == 1)

    def check_some_rows_stayed(self) -> None:
        if self.cleaner.rows_out == 0:
            dropped = ", ".join(f"{count.step} {count.dropped:,}" for count in self.cleaner.story if count.dropped)
            example = next((count.examples[0] for count in self.cleaner.story if count.dropped and count.examples), "")
            raise DataError(
                f"data.{self.part}: cleaning dropped all {self.cleaner.rows_in:,} rows ({dropped}), such as {example!r}. "
                "Loosen data.clean"
            )

    def files(self) -> list[dict[str, Any]]:
        found = []
        listed = {self.source.listed(path): path for path in self.source.paths}
        for name, path in listed.items():
            rows = self.source.rows_by_file.get(name, 0)
            entry: dict[str, Any] = {"file": name, "for": self.part, "rows": rows}
            if self.documents == "file" and rows > 1 and self.source.kind(path) == "text":
                entry["cut_into_pieces"] = rows
            found.append(entry)
        return found

    def _reported(self, report: Callable[[], None]) -> Iterator[Row]:
        done = -1
        for row in self.source if self._parts is None else self._parts:
            if self.source.bytes_done != done:
                done = self.source.bytes_done
                report()
            yield row if self._parts else self.form.with_text(self.form.checked(row))
        report()


def _reporter(inputs: list[_Input], progress: Progress | None) -> Callable[[], None]:
    total = sum(given.source.bytes_total for given in inputs)

    def report() -> None:
        if progress is not None:
            progress(sum(given.source.bytes_done for given in inputs), total)

    return report


def _split_of(data: schema.Data) -> schema.Split:
    """The split of `data.sources`: a part that has its own sources gets no share of these."""
    split = data.split
    own = {part: 0.0 for part in ("validation", "test") if getattr(data, part)}
    if split.folds is not None or split.fold is not None:
        _check_folds(data)
        own["validation"] = 0.0
    split = split.model_copy(update=own)
    if split.validation + split.test >= 1:
        raise RecipeError(
            f"data.split: validation ({split.validation}) and test ({split.test}) leave nothing to train on; "
            "together they have to stay below 1"
        )
    if split.by == "order" and split.group is not None:
        raise RecipeError(
            "data.split.group: groups are kept together only by hash; set data.split.by: hash, or leave group out"
        )
    return split


def _check_folds(data: schema.Data) -> None:
    split = data.split
    if split.folds is None or split.fold is None:
        given, missing = ("fold", "folds") if split.folds is None else ("folds", "fold")
        raise RecipeError(
            f"data.split.{given} needs data.split.{missing}: a run has one of K folds as validation; "
            "`formary run RECIPE --folds K` runs all of them"
        )
    if split.fold > split.folds:
        raise RecipeError(f"data.split.fold: there are {split.folds} folds, counted from 1 (got {split.fold})")
    if data.validation:
        raise RecipeError(
            "data.split.folds: every fold is validation once, so data.validation cannot name rows too; put its files "
            "under data.sources and leave it out"
        )


def _check_changes(data: schema.Data, form: RowForm, augmenter: Augmenter) -> None:
    if form.text is None:
        return
    if data.clean.pii == "mask":
        raise RecipeError(
            "data.clean.pii: this task's rows cannot be masked, only kept or dropped; choose drop or keep"
        )
    if augmenter.active and "text" not in form.columns:
        raise RecipeError(
            f"data.augment: rows of {', '.join(form.columns) or 'messages'} cannot be varied, what belongs together in "
            "them would no longer fit; leave out data.augment"
        )


def _unapplied(data: schema.Data, form: RowForm) -> list[str]:
    asked = [name for name in _UNAPPLIED if getattr(data.clean, name) not in (None, "none")]
    return [f"data.clean.{name} was not applied: it would change this task's rows" for name in asked if form.text]


# What comes out -----------------------------------------------------------------------------------------------------


@dataclass
class _Sink:
    """One of the three files while it is written, and what it holds so far."""

    path: Path  # the final name, for messages
    temporary: Path
    stream: IO[bytes]
    rows: int = 0
    chars: int = 0
    bytes: int = 0
    keys: array[int] = field(default_factory=lambda: array("Q"))

    def counts(self, form: RowForm) -> dict[str, int]:
        """What it holds, as the story tells; a text that only names a thing is not counted."""
        return {"rows": self.rows} | ({"chars": self.chars, "bytes": self.bytes} if form.alike else {})

    def write(self, row: Row) -> None:
        text = row.text
        self.rows += 1
        self.chars += len(text)
        self.bytes += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        self.keys.append(exact_key(text) if row.key is None else row.key)
        with durable.naming(self.path):
            self.stream.write(_line(row))


@contextmanager
def _sink(path: Path) -> Iterator[_Sink]:
    with durable.new_file(path) as temporary:
        with durable.naming(path):
            sink = _Sink(path, temporary, open(temporary, "wb", buffering=2**20))  # noqa: SIM115  # closed below
        try:
            yield sink
        finally:
            with durable.naming(path):
                sink.stream.close()  # of training rows this may be the second stream


def _line(row: Row) -> bytes:
    values = row.values
    if "text" in values and next(iter(values)) != "text":
        values = {"text": values["text"], **values}
    try:
        return _encode(values).encode("utf-8", "replace") + b"\n"
    except TypeError as error:
        raise DataError(f"{row.origin}: a column cannot be written as JSON ({error})") from error


def _plain(value: object) -> object:
    """JSON for what Parquet and datasets hold beside plain values."""
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} {str(value)[:40]!r}")


_encode = json.JSONEncoder(ensure_ascii=False, default=_plain).encode


def _write_by_order(
    sources: _Input, split: schema.Split, sinks: dict[Part, _Sink], folder: Path, report: Callable[[], None]
) -> None:
    """Shares of the whole are known only at its end, so rows wait in an unnamed file on disk."""
    rows = chars = 0
    with durable.naming(sinks["train"].path), tempfile.TemporaryFile(dir=folder) as waiting:
        for row in sources.rows(report):
            rows += 1
            chars += len(row.text)
            waiting.write(_encode([row.values, row.origin, row.key]).encode("utf-8", "replace") + b"\n")
        waiting.seek(0)
        again = (sources.form.with_text(Row(*json.loads(line))) for line in waiting)
        as_one = sources.is_one_text()
        ordered = by_order(again, chars if as_one else rows, split, unit="chars" if as_one else "rows")
        for part, row in ordered:
            sinks[part].write(row)


def _write_by_fold(
    sources: _Input, split: schema.Split, sinks: dict[Part, _Sink], folder: Path, report: Callable[[], None]
) -> None:
    """Folds are dealt out when every row is known; until then rows wait in an unnamed file on disk."""
    assert split.folds is not None
    labelled = "label" in sources.form.columns
    units: list[tuple[int, list[str]]] = []
    with durable.naming(sinks["train"].path), tempfile.TemporaryFile(dir=folder) as waiting:
        for row in sources.rows(report):
            if assign(row, split) == "test":
                sinks["test"].write(row)
                continue
            label = row.values.get("label") if labelled else None
            units.append((unit_of(row, split), [] if label is None else label_names(label)))
            waiting.write(_encode([row.values, row.origin, row.key]).encode("utf-8", "replace") + b"\n")
        waiting.seek(0)
        for line, fold in zip(waiting, dealt(units, split.folds)):
            row = sources.form.with_text(Row(*json.loads(line)))
            sinks["validation" if fold == split.fold else "train"].write(row)


# The second pass over the training rows -----------------------------------------------------------------------------


def _finish_training(
    data: schema.Data, sinks: dict[Part, _Sink], augmenter: Augmenter, form: RowForm
) -> dict[str, Any]:
    """Take out training rows that also occur in validation or test, and add variants of those that stay."""
    train, validation, test = (np.array(sinks[part].keys, dtype=np.uint64) for part in PARTS)
    also_in = np.isin(train, np.concatenate([validation, test]))
    # Within data.sources cleaning has already dropped near-duplicates; other sources have not met them.
    near = data.clean.near_duplicates if data.validation or data.test else None
    found: dict[str, Any] = {
        "exact": int(also_in.sum()),
        "near": None if data.clean.near_duplicates is None else 0,
        "validation_in_test": int(np.isin(validation, test).sum()),
        "removed": 0,
        "examples": [],
    }
    added = 0
    if also_in.any() or near is not None or augmenter.active:
        for sink in sinks.values():
            with durable.naming(sink.path):
                sink.stream.flush()
        index = _index(near, [sinks["validation"], sinks["test"]], form) if near is not None else None
        before = sinks["train"]
        second = before.temporary.with_name(before.temporary.name + "-second")
        with durable.naming(before.path):
            stream = open(second, "wb", buffering=2**20)  # noqa: SIM115  # closed by the sink's context
        try:
            after = _Sink(before.path, before.temporary, stream)
            remove = data.split.duplicates == "remove"
            for row in _outside(read_documents(before.temporary, form), also_in, index, found, remove=remove):
                after.write(row)
                for variant in augmenter.copies(row):
                    after.write(form.with_text(variant))
                    added += 1
            with durable.naming(before.path):
                before.stream.close()
                os.replace(second, before.temporary)
        except BaseException:
            stream.close()
            raise
        finally:
            second.unlink(missing_ok=True)
        before.stream, before.rows, before.chars, before.bytes, before.keys = (
            stream,
            after.rows,
            after.chars,
            after.bytes,
            after.keys,
        )
    return {"duplicates_across_splits": found, "augmented": added}


def _outside(
    rows: Iterable[Row],
    also_in: np.ndarray[Any, Any],
    index: NearDuplicates | None,
    found: dict[str, Any],
    *,
    remove: bool,
) -> Iterator[Row]:
    """The training rows that stay; what is found is counted in `found`."""
    at = 0
    for batch in batches(rows):
        exact = also_in[at : at + len(batch)].tolist()
        near = index.find([row.text for row in batch]) if index is not None else [None] * len(batch)
        at += len(batch)
        for row, is_exact, neighbour in zip(batch, exact, near):
            if is_exact or neighbour is not None:
                found["near"] = found["near"] if is_exact else found["near"] + 1
                found["removed"] += remove
                if len(found["examples"]) < _EXAMPLES:
                    found["examples"].append(" ".join(row.text[:400].split())[:80])
                if remove:
                    continue
            yield row


def _index(threshold: float, sinks: list[_Sink], form: RowForm) -> NearDuplicates:
    index = NearDuplicates(threshold)
    for sink in sinks:
        for batch in batches(read_documents(sink.temporary, form)):
            index.add([row.text for row in batch])
    return index


# Judging the result -------------------------------------------------------------------------------------------------


def _check_training(sinks: dict[Part, _Sink], sources: _Input, split: schema.Split) -> None:
    if sinks["train"].rows == 0:
        raise DataError(
            f"data.sources: no training rows are left of {sources.cleaner.rows_out:,} (validation {sinks['validation'].rows:,}, "
            f"test {sinks['test'].rows:,}, the rest also occurs there); more rows are needed, or another data.split"
        )


def _warnings(sinks: dict[Part, _Sink], split: schema.Split) -> list[str]:
    shares = {"validation": split.validation, "test": split.test}
    return [
        f"{part} got no rows: its share is {shares[part]} of few documents. A single text is cut by data.split.by: order; "
        "data.documents: paragraph makes more documents of a file"
        for part in ("validation", "test")
        if shares[part] > 0 and sinks[part].rows == 0
    ]


def _steps(inputs: list[_Input]) -> list[dict[str, Any]]:
    """The cleaning steps, counts summed over the inputs (which all have the same steps)."""
    merged = []
    for counts in zip(*(given.cleaner.story for given in inputs)):
        examples = [example for count in counts for example in count.examples][:_EXAMPLES]
        changed, dropped = sum(count.changed for count in counts), sum(count.dropped for count in counts)
        merged.append({"step": counts[0].step, "changed": changed, "dropped": dropped, "examples": examples})
    return merged

"""Sources become rows: text, JSONL, JSON, CSV, TSV, Parquet, tagged words (each also .gz or .zst), datasets folders, arrays,
pictures.

A row is a dict of named values plus its origin ("data/a.jsonl line 17"), and rows stream: memory does not grow with the file
(a .json file alone is read whole). It judges only whether rows can be read, never what a text says (that is `clean`).
"""

from __future__ import annotations

import codecs
import gzip
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from formary.data.columns import columns_in, filled, is_template
from formary.data.cutting import lines_of, split_text
from formary.data.files import (
    CHUNK,
    checked_encoding,
    expand,
    fingerprint,
    kind_of,
    reading,
    size_of,
    suffix_of,
    unzstd,
)
from formary.data.formats import Placed, json_lines, json_rows, kind_of_value, table_rows, tagged_rows
from formary.data.images import packed
from formary.data.records import Row
from formary.errors import DataError, MissingExtra

__all__ = ["Row", "Source", "expand", "fingerprint", "read"]

_NAMED = ("label", "labels")  # columns whose numbers may have names
_FILE, _FOLDER = "@file", "@folder"  # in place of a column: the file's name without its suffix, its folder's name


def read(
    sources: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    documents: str = "file",
    encoding: str = "utf-8",
    max_rows: int | None = None,
    required: Sequence[str] = ("text",),
    files: Sequence[str] = (),
    base: Path = Path("."),
) -> Iterator[Row]:
    """Stream the rows of `sources`; the arguments are those of `Source`."""
    return iter(
        Source(
            sources,
            columns=columns,
            documents=documents,
            encoding=encoding,
            max_rows=max_rows,
            required=required,
            files=files,
            base=base,
        )
    )


class Source:
    """The rows of some files, read once from beginning to end, and a count of what has been read so far.

    Args:
        sources: files, folders or globs, relative to `base`.
        columns: our name -> the file's name of a column; "@file" is the name of the file itself without its suffix and
            "@folder" that of its folder, for texts that are sorted into files or folders by class.
        documents: how a plain text file becomes documents (see `split_text`).
        encoding: of all but Parquet files and datasets folders; "utf-8" also accepts a byte-order mark.
        max_rows: stop after this many rows.
        required: columns every row must have; a required `text` must be a string (null counts as empty).
        files: columns that hold files: a path counts from the folder of the file that names it and becomes absolute, the
            bytes of a file (also in Hugging Face's form {"bytes": ..., "path": ...}) become a data URI.
        names: what labels are called that are numbers from 0 (columns label and labels).

    Raises (while iterating):
        DataError: a file is missing, empty, damaged, wrongly encoded, or a row is not what it should be.
        MissingExtra: a datasets folder without the `datasets` extra.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        columns: Mapping[str, str] | None = None,
        documents: str = "file",
        encoding: str = "utf-8",
        max_rows: int | None = None,
        required: Sequence[str] = ("text",),
        files: Sequence[str] = (),
        names: Sequence[str] = (),
        base: Path = Path("."),
    ) -> None:
        self.columns = dict(columns or {})
        self.documents = documents
        self._templates = {ours: theirs for ours, theirs in self.columns.items() if is_template(theirs)}
        for ours, template in self._templates.items():
            columns_in(template, ours)
        self.encoding = checked_encoding(encoding)
        self.max_rows = max_rows
        self.required = tuple(required)
        self.files = tuple(files)
        self.names = tuple(names)
        self.base = Path(base)
        self.paths = expand(sources, self.base)
        self.bytes_total = sum(size_of(path) for path in self.paths)
        self.bytes_done = 0
        self.rows = 0
        self.rows_by_file: dict[str, int] = {}
        self._place: dict[str, str] = {}
        self._folder = Path(".")  # of the file that is read
        self.moved: dict[str, list[str]] = {}  # by file, questions with an answer that was not at its offset

    def __iter__(self) -> Iterator[Row]:
        return islice(self._rows(), self.max_rows)

    def name(self, path: Path) -> str:
        """How messages and the story call a file: its path from `base` where it lies below it."""
        try:
            return path.relative_to(self.base).as_posix()
        except ValueError:
            return str(path)

    def kind(self, path: Path) -> str:
        """text, jsonl, json, tagged, csv, parquet, npz, idx, picture or dataset."""
        return kind_of(path)[0]

    def listed(self, path: Path) -> str:
        """What the story counts a file's rows under: itself, or the folder of a picture."""
        return self.name(path.parent) if self.kind(path) == "picture" else self.name(path)

    def notes(self) -> list[str]:
        """Sentences on what was mended in the rows read so far."""
        return [
            f"{name}: {len(places):,} {'answer was' if len(places) == 1 else 'answers were'} not at the given place "
            f"(answer_start); the nearest place in the context that holds the text was taken, first for {places[0]}"
            for name, places in self.moved.items()
            if places
        ]

    def _rows(self) -> Iterator[Row]:
        finished_bytes = 0
        for path in self.paths:
            yield from self.rows_of(path)
            finished_bytes += size_of(path)
            self.bytes_done = finished_bytes
        self.check_not_empty()

    def rows_of(self, path: Path) -> Iterator[Row]:
        """The rows of one of the files; there may be none."""
        readers = {
            "text": self._text_rows,
            "jsonl": self._jsonl_rows,
            "json": self._json_rows,
            "tagged": self._tagged_rows,
            "csv": self._table_rows,
            "parquet": self._parquet_rows,
            "dataset": self._dataset_rows,
            "npz": self._array_rows,
            "idx": self._array_rows,
            "picture": self._picture_rows,
        }
        name, listed = self.name(path), self.listed(path)
        self.rows_by_file.setdefault(listed, 0)
        self._folder = path.parent
        place = {_FILE: path.name.split(".")[0], _FOLDER: path.resolve().parent.name}
        self._place = {column: place[column] for column in self.columns.values() if column in place}
        for row in readers[self.kind(path)](path, name):
            self.rows += 1
            self.rows_by_file[listed] += 1
            yield row

    def check_not_empty(self) -> None:
        """Refuse files that held no row at all.

        Raises:
            DataError: the first of them are named.
        """
        if self.rows == 0:
            names = ", ".join(list(self.rows_by_file)[:3]) + (" ..." if len(self.paths) > 3 else "")
            raise DataError(f"{names}: empty, there are no rows to read")

    # One method per kind of file ------------------------------------------------------------------------------------

    def _text_rows(self, path: Path, name: str) -> Iterator[Row]:
        for column in self.required:
            if column != "text" and self.columns.get(column) not in self._place:
                raise DataError(
                    f"{name}: a plain text file has only the column 'text'; the recipe expects {_listed(self.required)}. "
                    f"Use JSONL, CSV or Parquet for rows with several columns, .conll for words with tags; where texts are sorted "
                    f"into files or folders by {column}, write data.columns: {{{column}: '{_FILE}'}} or '{_FOLDER}'"
                )
        beside = {ours: self._place[theirs] for ours, theirs in self.columns.items() if theirs in self._place}
        for number, document in enumerate(split_text(self._text(path, name, plain=True), self.documents), 1):
            yield Row({"text": document} | beside, f"{name} document {number}")

    def _jsonl_rows(self, path: Path, name: str) -> Iterator[Row]:
        return self._placed(json_lines(self._lines(path, name), name))

    def _json_rows(self, path: Path, name: str) -> Iterator[Row]:
        text = "".join(self._text(path, name, plain=False))
        return self._placed(json_rows(text, name, self.moved.setdefault(name, [])))

    def _tagged_rows(self, path: Path, name: str) -> Iterator[Row]:
        return self._placed(tagged_rows(self._lines(path, name), name))

    def _table_rows(self, path: Path, name: str) -> Iterator[Row]:
        separator = "\t" if suffix_of(path) == ".tsv" else None
        return self._placed(table_rows(self._lines(path, name), name, separator=separator))

    def _parquet_rows(self, path: Path, name: str) -> Iterator[Row]:
        import pyarrow
        import pyarrow.parquet

        number, before = 0, self.bytes_done
        with reading(name), self._seekable(path, name) as stream:
            try:
                table = pyarrow.parquet.ParquetFile(stream)
                for batch in table.iter_batches(batch_size=512):
                    for values in batch.to_pylist():
                        number += 1
                        yield self._row(values, f"{name} row {number}")
                    self.bytes_done = before + size_of(path) * number // max(1, table.metadata.num_rows)
            except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
                raise DataError(f"{name}: not a Parquet file that can be read ({error})") from error

    def _dataset_rows(self, path: Path, name: str) -> Iterator[Row]:
        try:
            import datasets
        except ImportError as error:
            raise MissingExtra("datasets", f"{name}: a Hugging Face datasets folder") from error
        if (path / "dataset_dict.json").exists():
            parts = sorted(part.name for part in path.iterdir() if part.is_dir())
            raise DataError(
                f"{name}: holds the parts {', '.join(parts)}; name the part to read, e.g. {name}/{parts[0] if parts else 'train'} "
                "(and the others in data.validation and data.test)"
            )
        try:
            rows = datasets.load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: not a readable Hugging Face datasets folder ({error})") from error
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        for number, values in enumerate(rows, 1):
            yield self._row(dict(values), f"{name} row {number}")

    def _array_rows(self, path: Path, name: str) -> Iterator[Row]:
        from formary.data.arrays import archive_rows, idx_rows

        rows = archive_rows if self.kind(path) == "npz" else idx_rows
        before = self.bytes_done
        for number, values in enumerate(rows(path, name), 1):
            self.bytes_done = before + size_of(path)  # the file is read whole
            yield self._row(values, f"{name} row {number}")

    def _picture_rows(self, path: Path, name: str) -> Iterator[Row]:
        self.bytes_done += size_of(path)
        yield self._row({"image": str(path.resolve())}, name)

    # What the kinds share -------------------------------------------------------------------------------------------

    def _placed(self, rows: Iterable[Placed]) -> Iterator[Row]:
        for values, origin in rows:
            yield self._row(values, origin)

    def _row(self, values: dict[str, Any], origin: str) -> Row:
        values, mapped = values | self._place, {}
        made = {ours: filled(text, values, ours=ours, origin=origin) for ours, text in self._templates.items()}
        for ours, theirs in self.columns.items():
            if ours in made:
                continue
            if theirs in values:
                if ours != theirs:
                    mapped[ours] = values[theirs]
            elif ours in self.required:
                raise DataError(
                    f"{origin}: column '{theirs}' is missing (data.columns.{ours} names it); "
                    f"this row has {_listed(values)}"
                )
        if mapped:  # all at once, so that columns can change places
            moved = {self.columns[ours] for ours in mapped}
            values = {name: value for name, value in values.items() if name not in moved} | mapped
        values |= made
        for column in self.files:
            if column in values:
                values[column] = self._file(values[column])
        for column in _NAMED if self.names else ():
            if column in values:
                values[column] = self._named(values[column], column, origin)
        for column in self.required:
            if column not in values:
                raise DataError(
                    f"{origin}: column '{column}' is missing; this row has {_listed(values)}. "
                    f"Map another name with data.columns.{column}"
                )
        if "text" in self.required:
            text = values["text"]
            if text is None:
                values["text"] = ""
            elif not isinstance(text, str):
                raise DataError(
                    f"{origin}: column 'text' holds a {kind_of_value(text)} ({str(text)[:40]}), not text. "
                    "Map another column with data.columns.text"
                )
        return Row(values, origin)

    def _file(self, value: Any) -> Any:
        """A value of a column of files as its task reads it."""
        if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return packed(value)
        if isinstance(value, str) and value and not value.startswith("data:"):
            return str((self._folder / value).resolve())
        return value

    def _named(self, value: Any, column: str, origin: str) -> Any:
        """A label that is a number by its name."""
        if isinstance(value, list):
            return [self._named(one, column, origin) for one in value]
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            return value
        if number >= len(self.names):
            raise DataError(
                f"{origin}: column '{column}' holds {number}, and data.names has names for 0 to {len(self.names) - 1}"
            )
        return self.names[number]

    def _lines(self, path: Path, name: str) -> Iterator[str]:
        return lines_of(self._text(path, name, plain=False))

    def _text(self, path: Path, name: str, *, plain: bool) -> Iterator[str]:
        """The decoded text in chunks, newlines as "\\n"; a decoding error names the byte and the line."""
        bytes_decoder = codecs.getincrementaldecoder(self.encoding)()
        decoder = io.IncrementalNewlineDecoder(bytes_decoder, translate=True)
        fed, newlines = 0, 0
        byte_wide = "16" not in self.encoding and "32" not in self.encoding
        try:
            for chunk in self._bytes(path, name):
                if plain and byte_wide and b"\0" in chunk:
                    raise DataError(
                        f"{name}: byte {fed + chunk.index(0)} is zero, so this is not a text file (or data.encoding is not "
                        f"{self.encoding.removesuffix('-sig')} but, say, utf-16)"
                    )
                fed += len(chunk)
                text = decoder.decode(chunk)
                yield text
                newlines += text.count("\n")
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            undecoded: bytes = error.object  # ends where the bytes fed so far end
            position = fed - len(undecoded) + error.start
            newlines += undecoded[: error.start].decode(self.encoding, "ignore").count("\n")
            encoding = self.encoding.removesuffix("-sig")
            raise DataError(
                f"{name} line {newlines + 1}: byte {position} (0x{undecoded[error.start]:02x}) is not {encoding}; "
                "set data.encoding to the file's encoding (old Windows text: cp1252, Chinese: gb18030)"
            ) from error

    def _bytes(self, path: Path, name: str) -> Iterator[bytes]:
        """The decompressed bytes in chunks of about 1 MB; counts the bytes read from disk."""
        before = self.bytes_done
        compression = kind_of(path)[1]
        with reading(name), open(path, "rb") as stream:
            if compression == "zst":
                chunks = unzstd(stream, name)
            else:
                opened: Any = gzip.GzipFile(fileobj=stream) if compression == "gz" else stream
                chunks = iter(lambda: opened.read(CHUNK), b"")
            for chunk in chunks:
                self.bytes_done = before + stream.tell()
                yield chunk

    @contextmanager
    def _seekable(self, path: Path, name: str) -> Iterator[IO[bytes]]:
        """A file that can be read in any order: a compressed one is unpacked into an unnamed temporary file."""
        if kind_of(path)[1] is None:
            with open(path, "rb") as stream:
                yield stream
            return
        with tempfile.TemporaryFile() as stream:
            for chunk in self._bytes(path, name):
                stream.write(chunk)
            stream.seek(0)
            yield stream


def _listed(names: Iterable[str]) -> str:
    names = [str(name) for name in names]
    shown = ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")
    return ("columns " if len(names) > 1 else "column ") + shown if names else "no columns"

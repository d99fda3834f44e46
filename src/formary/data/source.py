"""Raw files become rows: text, JSONL, CSV, Parquet, each also .gz or .zst, and Hugging Face datasets folders.

A row is a dict of named values plus its origin ("data/a.jsonl line 17"), and rows stream: memory does not grow with the file.
It judges only whether a file can be read, never what the text says (that is `clean`) or where it goes (that is `split`).
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import xxhash

from formary.data.formats import json_rows, tagged_rows
from formary.errors import DataError, MissingExtra, RecipeError
from formary.recipe.bundled import located

PIECE_BYTES = 8 * 2**20
"""A plain-text document longer than this (UTF-8) is cut at paragraph ends into pieces of at most this size."""

_CHUNK = 2**20
_LOOKAHEAD = 4096  # characters that must follow a document boundary before it is trusted while more text may come
_MAX_FIELD = 2**28  # bytes of one CSV field: an unclosed quote ends here instead of swallowing a whole disk

_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".conll": "tagged",
    ".bio": "tagged",
    ".iob": "tagged",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_UNREADABLE = {
    ".pdf",
    ".doc",
    ".docx",
    ".xls",
    ".xlsx",
    ".zip",
    ".tar",
    ".7z",
    ".rar",
    ".bz2",
    ".xz",
    ".png",
    ".jpg",
    ".jpeg",
}
_NOT_DATA = re.compile(r"(readme|license|licence|copying|changelog)\b", re.IGNORECASE)
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_LEADING_BLANK_LINES = re.compile(r"\A(?:[ \t]*\n)+")


@dataclass(slots=True)
class Row:
    """One row: its values by column name, where it came from, and (once asked for) the hash of its folded text."""

    values: dict[str, Any]
    origin: str
    key: int | None = None


def read(
    sources: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    documents: str = "file",
    encoding: str = "utf-8",
    max_rows: int | None = None,
    required: Sequence[str] = ("text",),
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
            base=base,
        )
    )


def expand(sources: Sequence[str], base: Path = Path(".")) -> list[Path]:
    """The files behind `sources` (files, folders, globs), each once, in the given order and sorted within a source.

    A folder gives its text and table files, not hidden ones nor a README or LICENSE; a Hugging Face datasets folder
    is one path. A glob (`**` descends) gives what it matches.

    Raises:
        DataError: a source matches nothing.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = located(source, Path(base))
        matches = _matches(path)
        if not matches:
            raise DataError(_nothing_found(source, path))
        found.update(dict.fromkeys(matches))
    if not found:
        raise DataError("data.sources is empty: name at least one file, folder or glob")
    return list(found)


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash (32 hexadecimal digits) of the names, sizes and contents of `paths`, in order."""
    digest = xxhash.xxh3_128()
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(path.parent).as_posix()
            with _reading(str(file)), open(file, "rb") as stream:
                digest.update(f"{len(name)}:{name}:{os.fstat(stream.fileno()).st_size}:".encode())
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()


def split_text(chunks: Iterable[str], documents: str) -> Iterator[str]:
    """Cut a stream of text into documents.

    Args:
        chunks: the text in pieces of any size; newlines are "\\n".
        documents: "file" (all of it, unchanged), "line" (each line that is not blank), "paragraph" (separated by blank
            lines), or a regular expression whose match at a line start begins a document.

    Yields:
        Documents of at most PIECE_BYTES; a longer one is cut, at a paragraph end where it has one.

    Raises:
        RecipeError: the regular expression is not valid.
    """
    if documents == "file":
        return _whole(chunks)
    if documents == "line":
        return _by_line(chunks)
    if documents == "paragraph":
        return _by_boundary(chunks, _BLANK_LINES, begins=False)
    try:
        pattern = re.compile(f"^(?:{documents})", re.MULTILINE)
    except re.error as error:
        raise RecipeError(
            f"data.documents: {documents!r} is neither file, line or paragraph nor a valid regular expression ({error})"
        ) from error
    return _by_boundary(chunks, pattern, begins=True)


class Source:
    """The rows of some files, read once from beginning to end, and a count of what has been read so far.

    Args:
        sources: files, folders or globs, relative to `base`.
        columns: our name -> the file's name of a column.
        documents: how a plain text file becomes documents (see `split_text`).
        encoding: of text, JSONL and CSV files; "utf-8" also accepts a byte-order mark.
        max_rows: stop after this many rows.
        required: columns every row must have; a required `text` must be a string (null counts as empty).

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
        base: Path = Path("."),
    ) -> None:
        self.columns = dict(columns or {})
        self.documents = documents
        self.encoding = _checked_encoding(encoding)
        self.max_rows = max_rows
        self.required = tuple(required)
        self.base = Path(base)
        self.paths = expand(sources, self.base)
        self.bytes_total = sum(_size(path) for path in self.paths)
        self.bytes_done = 0
        self.rows = 0
        self.rows_by_file: dict[str, int] = {}

    def __iter__(self) -> Iterator[Row]:
        return islice(self._rows(), self.max_rows)

    def name(self, path: Path) -> str:
        """How messages and the story call a file: its path from `base` where it lies below it."""
        try:
            return path.relative_to(self.base).as_posix()
        except ValueError:
            return str(path)

    def kind(self, path: Path) -> str:
        """text, jsonl, json, tagged, csv, parquet or dataset."""
        return _kind(path)[0]

    def _rows(self) -> Iterator[Row]:
        readers = {
            "text": self._text_rows,
            "jsonl": self._jsonl_rows,
            "json": self._json_rows,
            "tagged": self._tagged_rows,
            "csv": self._csv_rows,
            "parquet": self._parquet_rows,
            "dataset": self._dataset_rows,
        }
        finished_bytes = 0
        for path in self.paths:
            name = self.name(path)
            self.rows_by_file[name] = 0
            for row in readers[self.kind(path)](path, name):
                self.rows += 1
                self.rows_by_file[name] += 1
                yield row
            finished_bytes += _size(path)
            self.bytes_done = finished_bytes
        if self.rows == 0:
            names = ", ".join(list(self.rows_by_file)[:3]) + (" ..." if len(self.paths) > 3 else "")
            raise DataError(f"{names}: empty, there are no rows to read")

    # One method per kind of file ------------------------------------------------------------------------------------

    def _text_rows(self, path: Path, name: str) -> Iterator[Row]:
        for column in self.required:
            if column != "text":
                raise DataError(
                    f"{name}: a plain text file has only the column 'text'; the recipe expects {_listed(self.required)}. "
                    "Use JSONL, CSV or Parquet for rows with several columns"
                )
        for number, document in enumerate(split_text(self._text(path, name, plain=True), self.documents), 1):
            yield Row({"text": document}, f"{name} document {number}")

    def _jsonl_rows(self, path: Path, name: str) -> Iterator[Row]:
        loads = json.loads
        for number, line in enumerate(self._lines(path, name), 1):
            if not line or line.isspace():
                continue
            try:
                values = loads(line)
                if not isinstance(values, dict):
                    raise ValueError(f'a row is an object like {{"text": ...}}, this is a {_kind_of_value(values)}')
            except (ValueError, RecursionError) as error:
                hint = ""
                if number == 1 and line.lstrip().startswith("["):
                    hint = "; a JSON array has to be turned into one object a line (jq -c '.[]')"
                raise DataError(f"{name} line {number}: not a row of JSON ({error}){hint}") from error
            if "\\ud" in line or "\\uD" in line:  # half a character, as from text cut in the middle of an emoji
                values = _without_half_characters(values)
            yield self._row(values, f"{name} line {number}")

    def _json_rows(self, path: Path, name: str) -> Iterator[Row]:
        """A whole JSON document; a file of one object a line is read as that."""
        text = "".join(self._text(path, name, plain=False))
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            yield from self._jsonl_rows(path, name)
            return
        for values, origin in json_rows(value, name):
            yield self._row(values, origin)

    def _tagged_rows(self, path: Path, name: str) -> Iterator[Row]:
        for values, origin in tagged_rows(self._lines(path, name), name):
            yield self._row(values, origin)

    def _csv_rows(self, path: Path, name: str) -> Iterator[Row]:
        csv.field_size_limit(_MAX_FIELD)
        lines = (line + "\n" for line in self._lines(path, name))
        first = next(lines, "")
        if not first.strip():
            return
        delimiter = max(",\t;|", key=first.count)
        reader = csv.reader(_chain(first, lines), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        number = 1
        try:
            for fields in reader:
                if header is None:
                    header = [field.strip() for field in fields]
                elif len(fields) == len(header):
                    yield self._row(dict(zip(header, fields)), f"{name} line {number}")
                elif fields:
                    raise DataError(
                        f"{name} line {number}: {len(fields)} fields, but the header (line 1) has {len(header)}"
                    )
                number = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{name} line {number}: not valid CSV ({error}); a quote may be open") from error

    def _parquet_rows(self, path: Path, name: str) -> Iterator[Row]:
        import pyarrow
        import pyarrow.parquet

        number, before = 0, self.bytes_done
        with _reading(name), self._seekable(path, name) as stream:
            try:
                table = pyarrow.parquet.ParquetFile(stream)
                for batch in table.iter_batches(batch_size=512):
                    for values in batch.to_pylist():
                        number += 1
                        yield self._row(values, f"{name} row {number}")
                    self.bytes_done = before + _size(path) * number // max(1, table.metadata.num_rows)
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
        for number, values in enumerate(rows, 1):
            yield self._row(dict(values), f"{name} row {number}")

    # What the kinds share -------------------------------------------------------------------------------------------

    def _row(self, values: dict[str, Any], origin: str) -> Row:
        for ours, theirs in self.columns.items():
            if theirs in values:
                if ours != theirs:
                    values[ours] = values.pop(theirs)
            elif ours in self.required:
                raise DataError(
                    f"{origin}: column '{theirs}' is missing (data.columns.{ours} names it); "
                    f"this row has {_listed(values)}"
                )
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
                    f"{origin}: column 'text' holds a {_kind_of_value(text)} ({str(text)[:40]}), not text. "
                    "Map another column with data.columns.text"
                )
        return Row(values, origin)

    def _lines(self, path: Path, name: str) -> Iterator[str]:
        return _lines_of(self._text(path, name, plain=False))

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
        compression = _kind(path)[1]
        with _reading(name), open(path, "rb") as stream:
            if compression == "zst":
                chunks = _unzstd(stream, name)
            else:
                opened: Any = gzip.GzipFile(fileobj=stream) if compression == "gz" else stream
                chunks = iter(lambda: opened.read(_CHUNK), b"")
            for chunk in chunks:
                self.bytes_done = before + stream.tell()
                yield chunk

    @contextmanager
    def _seekable(self, path: Path, name: str) -> Iterator[IO[bytes]]:
        """A file that can be read in any order: a compressed one is unpacked into an unnamed temporary file."""
        if _kind(path)[1] is None:
            with open(path, "rb") as stream:
                yield stream
            return
        with tempfile.TemporaryFile() as stream:
            for chunk in self._bytes(path, name):
                stream.write(chunk)
            stream.seek(0)
            yield stream


# Finding files ------------------------------------------------------------------------------------------------------


def _matches(path: Path) -> list[Path]:
    if _is_dataset(path):
        return [path]
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.is_file() and _is_data(file.relative_to(path)))
        return sorted(files)
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        matched = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        return [file for file in matched if file.is_file() or _is_dataset(file)]
    return []


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and not _NOT_DATA.match(path.name) and _suffix(path) in _KINDS


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (
        (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    )


def _nothing_found(source: str, path: Path) -> str:
    if path.is_dir():
        kinds = ", ".join(_KINDS)
        return (
            f"{source}: the folder has no files of a known kind ({kinds}, each also .gz or .zst); a glob takes any file"
        )
    if glob.has_magic(source):
        return f"{source}: no files match (looked in {path.parent.absolute()}); ** descends into folders"
    return f"{source}: no such file or folder (looked for {path.absolute()})"


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSIONS else suffix


def _kind(path: Path) -> tuple[str, str | None]:
    """(a kind of file as in `Source.kind`; gz, zst or None); a file of another suffix is taken for plain text."""
    if path.is_dir():
        return "dataset", None
    suffix = _suffix(path)
    if suffix in _UNREADABLE:
        raise DataError(f"{path}: {suffix} files cannot be read; turn it into text, JSONL, CSV or Parquet first")
    return _KINDS.get(suffix, "text"), _COMPRESSIONS.get(path.suffix.lower())


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    with _reading(str(path)):
        return sum(file.stat().st_size for file in files)


# Reading bytes ------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Word the system's and the decompressors' errors."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: the gz file is cut off or damaged ({error}); copy or download it again") from error
    except OSError as error:
        raise DataError(f"{name}: could not be read ({error.strerror or error})") from error


def _unzstd(stream: IO[bytes], name: str) -> Iterator[bytes]:
    import zstandard

    # Frames are driven by hand because zstandard's own stream reader ends silently where a file is cut off.
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    inside = False
    try:
        while chunk := stream.read(2**16):
            while chunk:
                inside = True
                yield frame.decompress(chunk)
                chunk = b""
                if frame.eof:
                    chunk, frame, inside = frame.unused_data, decompressor.decompressobj(), False
    except zstandard.ZstdError as error:
        raise DataError(f"{name}: not a readable zst file ({error})") from error
    if inside:
        raise DataError(f"{name}: the zst file is cut off; copy or download it again")


def _checked_encoding(encoding: str) -> str:
    try:
        b"".decode(encoding)
        name = codecs.lookup(encoding).name
        codecs.getincrementaldecoder(name)
    except LookupError as error:
        raise RecipeError(
            f"data.encoding: '{encoding}' is not a known text encoding; examples: utf-8, gb18030, cp1252"
        ) from error
    return "utf-8-sig" if name == "utf-8" else name


# Cutting text -------------------------------------------------------------------------------------------------------


def _lines_of(chunks: Iterable[str]) -> Iterator[str]:
    """Lines without their newline; a long line is assembled once, not once per chunk."""
    begun: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun)
            begun = [others.pop()]
            yield from others
    if last := "".join(begun):
        yield last


def _whole(chunks: Iterable[str]) -> Iterator[str]:
    buffer = ""
    for chunk in chunks:
        pieces, buffer = _pieces(buffer + chunk)
        yield from pieces
    if buffer:
        yield buffer


def _by_line(chunks: Iterable[str]) -> Iterator[str]:
    for line in _lines_of(chunks):
        if line and not line.isspace():
            pieces, rest = _pieces(line)
            yield from pieces
            yield rest


def _by_boundary(chunks: Iterable[str], boundary: re.Pattern[str], *, begins: bool) -> Iterator[str]:
    """Documents between the matches of `boundary`, which either begin a document or (begins=False) are left out."""
    buffer, scanned = "", 0
    for chunk, last in _with_last(chunks):
        buffer += chunk
        trusted = len(buffer) if last else len(buffer) - _LOOKAHEAD
        start = 0
        for match in boundary.finditer(buffer, scanned):
            if match.end() > trusted:
                break
            if match.start() == 0 and begins:
                continue
            yield from _tidied(buffer[start : match.start()])
            start = match.start() if begins else match.end()
        scanned = max(0, trusted - start) if begins else 0
        pieces, buffer = _pieces(buffer[start:])
        for piece in pieces:
            scanned = max(0, scanned - len(piece))
            yield from _tidied(piece)
    yield from _tidied(buffer)


def _tidied(document: str) -> Iterator[str]:
    document = _LEADING_BLANK_LINES.sub("", document).rstrip("\n")
    if document and not document.isspace():
        yield document


def _pieces(text: str) -> tuple[list[str], str]:
    """Cut what exceeds PIECE_BYTES off the front, at a paragraph end, else a line end, else a space, else anywhere."""
    pieces = []
    while len(text) * (1 if text.isascii() else 4) > PIECE_BYTES:
        window = text[:PIECE_BYTES]
        if not text.isascii():
            window = window.encode()[:PIECE_BYTES].decode("utf-8", "ignore")
        if len(window) == len(text):
            break
        ends = (window.rfind(mark) + len(mark) if mark in window else 0 for mark in ("\n\n", "\n", " "))
        cut = next((end for end in ends if end), len(window))
        pieces.append(text[:cut])
        text = text[cut:]
    return pieces, text


def _with_last(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    for chunk in chunks:
        yield chunk, False
    yield "", True


# Small parts --------------------------------------------------------------------------------------------------------


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _listed(names: Iterable[str]) -> str:
    names = [str(name) for name in names]
    shown = ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")
    return ("columns " if len(names) > 1 else "column ") + shown if names else "no columns"


def _kind_of_value(value: object) -> str:
    names = {
        bool: "true/false value",
        int: "number",
        float: "number",
        list: "list",
        dict: "object",
        str: "string",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _without_half_characters(value: Any) -> Any:
    """Replace surrogates without their partner, which no file can hold, by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_without_half_characters(key): _without_half_characters(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_half_characters(item) for item in value]
    return value

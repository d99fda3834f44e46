"""Which files there are behind a source, of which kind each is, and their bytes, unpacked, with errors that name the file.

A kind follows from the name alone (rows.jsonl.gz is JSONL). What a kind's bytes mean is `source`'s and `formats`' business.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import xxhash

from formary.errors import DataError, RecipeError
from formary.recipe.bundled import located

CHUNK = 2**20
"""Bytes that are read at once."""

_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_CODECS = (".brotli", ".snappy", ".lz4")  # of Parquet's pages: its reader unpacks them
_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".conll": "tagged",
    ".conllu": "tagged",
    ".bio": "tagged",
    ".iob": "tagged",
    ".iob2": "tagged",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".npz": "npz",
    ".png": "picture",
    ".jpg": "picture",
    ".jpeg": "picture",
}
_TABLES = {"jsonl", "json", "tagged", "csv", "parquet", "npz"}
ALTERNATIVES = " | "
"""Between the places of a source of which the first that is there counts."""
IDX = re.compile(r"(images)([-.])idx\d-ubyte(?=(?:\.gz)?$)", re.IGNORECASE)
"""In the name of a file of pictures as MNIST has them (train-images-idx3-ubyte.gz)."""
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
}
_NOT_DATA = re.compile(r"(readme|license|licence|copying|changelog)\b", re.IGNORECASE)


def expand(sources: Sequence[str], base: Path = Path(".")) -> list[Path]:
    """The files behind `sources` (files, folders, globs), each once, in the given order and sorted within a source.

    A folder gives its text and table files, not hidden ones, nor those of Spark's own (_SUCCESS, .crc), nor a README or
    LICENSE; of a folder of pictures (more of them than texts, and no tables that would name them) the pictures. A Hugging
    Face datasets folder is one path, and so is a part of an archive (data.npz/train). A glob (`**` descends) gives what it
    matches; of "this | that" the first that is there counts.

    Raises:
        DataError: a source matches nothing.
    """
    found: dict[Path, None] = {}
    for source in sources:
        matches: list[Path] = []
        alternatives = [alternative.strip() for alternative in source.split(ALTERNATIVES)]
        for alternative in alternatives:
            try:
                path = located(alternative, Path(base))
            except RecipeError:  # a package that is not installed
                if alternative == alternatives[-1]:
                    raise
                continue
            if matches := _matches(path):
                break
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
        whole = file_of(path)
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [whole]
        files += [labels] if (labels := labels_beside(path)) else []
        for file in files:
            name = file.relative_to(whole.parent).as_posix()
            with reading(str(file)), open(file, "rb") as stream:
                digest.update(f"{len(name)}:{name}:{os.fstat(stream.fileno()).st_size}:".encode())
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()


# Finding files ------------------------------------------------------------------------------------------------------


def _matches(path: Path) -> list[Path]:
    if _is_dataset(path):
        return [path]
    if path.is_dir():
        if (path / "_temporary").is_dir() and not (path / "_SUCCESS").exists():
            raise DataError(
                f"{path}: Spark has not finished writing it (there is _temporary and no _SUCCESS); wait for it, or write it "
                "again; a glob such as part-* takes the files that are there"
            )
        files = sorted(file for file in path.rglob("*") if file.is_file() and _is_data(file.relative_to(path)))
        pictures = [file for file in files if kind_of(file)[0] == "picture"]
        others = [file for file in files if kind_of(file)[0] != "picture"]
        tables = any(kind_of(file)[0] in _TABLES for file in others)
        return others if tables or len(others) > len(pictures) else pictures
    if file_of(path).exists():
        return [path]
    if glob.has_magic(str(path)):
        matched = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        return [file for file in matched if file.is_file() or _is_dataset(file)]
    return []


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)  # Spark's own: _SUCCESS, _temporary, .part-0.crc
    known = suffix_of(path) in _KINDS or IDX.search(path.name)
    return not hidden and not _NOT_DATA.match(path.name) and bool(known)


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


def suffix_of(path: Path) -> str:
    """The suffix that tells the kind, in lower case: .jsonl of rows.JSONL.gz, .parquet of rows.parquet.brotli."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    named = suffix in _COMPRESSIONS or (inner == ".parquet" and suffix in _CODECS)
    return inner if named else suffix


def file_of(path: Path) -> Path:
    """The file that is read for a path: itself, or the archive of which it names a part (data.npz of data.npz/train)."""
    return path.parent if path.parent.suffix.lower() == ".npz" and path.parent.is_file() else path


def labels_beside(path: Path) -> Path | None:
    """The file of labels that belongs to a file of idx pictures, where there is one."""
    if not IDX.search(path.name):
        return None
    labels = path.with_name(IDX.sub(lambda match: f"labels{match[2]}idx1-ubyte", path.name))
    return labels if labels.is_file() else None


def kind_of(path: Path) -> tuple[str, str | None]:
    """(text, jsonl, json, tagged, csv, parquet, npz, idx, picture or dataset; gz, zst or None).

    A file of another suffix is taken for plain text.
    """
    if path.is_dir():
        return "dataset", None
    if file_of(path) != path:
        return "npz", None
    if IDX.search(path.name):
        return "idx", _COMPRESSIONS.get(path.suffix.lower())
    suffix = suffix_of(path)
    if suffix in _UNREADABLE:
        raise DataError(f"{path}: {suffix} files cannot be read; turn it into text, JSONL, CSV or Parquet first")
    return _KINDS.get(suffix, "text"), _COMPRESSIONS.get(path.suffix.lower())


def size_of(path: Path) -> int:
    """Bytes on disk, of a folder those of all its files."""
    files = path.rglob("*") if path.is_dir() else [file_of(path)]
    with reading(str(path)):
        return sum(file.stat().st_size for file in files)


# Reading bytes ------------------------------------------------------------------------------------------------------


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Word the system's and the decompressors' errors."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: the gz file is cut off or damaged ({error}); copy or download it again") from error
    except OSError as error:
        raise DataError(f"{name}: could not be read ({error.strerror or error})") from error


def unzstd(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """The unpacked bytes of a .zst file, in chunks."""
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


def checked_encoding(encoding: str) -> str:
    """Python's name of an encoding; utf-8 becomes the one that takes a byte-order mark too.

    Raises:
        RecipeError: there is no such encoding.
    """
    try:
        b"".decode(encoding)
        name = codecs.lookup(encoding).name
        codecs.getincrementaldecoder(name)
    except LookupError as error:
        raise RecipeError(
            f"data.encoding: '{encoding}' is not a known text encoding; examples: utf-8, gb18030, cp1252"
        ) from error
    return "utf-8-sig" if name == "utf-8" else name

"""Writing that survives a crash: a file or folder appears whole under its name, or not at all.

Everything is written under a temporary name in the same folder, flushed to the disk (fsync), then renamed.
A full disk or a kill leaves the old content (or nothing) and no half-written file under the final name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from formary.errors import StorageError

_TEMPORARY = ".writing-"
_REPLACED = ".writing-over-"  # a folder on its way out; it is all there is if a kill comes before the new one's rename
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOTHING_LEFT = "nothing half-written was left"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it becomes `path`, on any error it is removed.

    Raises:
        StorageError: the disk is full or the place is not writable.
    """
    path = Path(path)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise _storage_error(path, error) from error
    finally:
        with suppress(OSError):  # what cannot be removed was never written, or stays for `remove_leftovers`
            temporary.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it replaces `path` as a whole, on any error it is removed.

    Raises:
        StorageError: the disk is full or the place is not writable.
    """
    path = Path(path)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    old = path.with_name(f"{_REPLACED}{os.getpid()}-{path.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _flush(file)
        _flush(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise _storage_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(old, path)


@contextmanager
def naming(path: Path, *, left: str = _NOTHING_LEFT) -> Iterator[None]:
    """Name `path` in the system's errors: of several open files it is the one that could not be written.

    Args:
        path: the file's final name.
        left: what is left after the error, in words.

    Raises:
        StorageError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise _storage_error(Path(path), error, left) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 so that `path` holds all of it or what it held before."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; {} where there is none that can be read."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, durably."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder`, and put back what it had only begun to replace."""
    for old in Path(folder).glob(f"{_REPLACED}*"):
        _put_back(old, old.with_name(old.name.removeprefix(_REPLACED).partition("-")[2]))
    for leftover in Path(folder).glob(f"{_TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(path: Path, error: OSError, left: str = _NOTHING_LEFT) -> StorageError:
    advice = "; free some space and give the same command again" if error.errno in _FULL else ""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        file = next((place for place in path.parents if place.is_file()), None)
        reason = reason if file is None else f"{file} is a file, not a folder"
    return StorageError(f"{path}: could not be written ({reason}); {left}{advice}")

"""Arrays in files become rows: NumPy's .npz archives, and the idx files in which MNIST and its followers are published.

Arrays of equal length are columns. What has the shape of pictures (8-bit, three or four dimensions) becomes pictures, an
array `names` gives integer labels their names. Nothing is unpickled.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.data.files import file_of, labels_beside, reading
from formary.data.images import data_uri
from formary.errors import DataError

Values = dict[str, Any]

_NAMED = ("y", "label", "labels", "target")  # columns whose integers an array `names` names
_PARTS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_PART = re.compile(rf"({'|'.join(_PARTS)})_(.+)|(.+)_({'|'.join(_PARTS)})")
_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def archive_rows(path: Path, name: str) -> Iterator[Values]:
    """The rows of an .npz archive, or of one part of it: data.npz/train has the arrays x_train, y_train, ... as x, y, ...

    Raises:
        DataError: it is damaged, holds Python objects or no arrays of equal length, or has parts and none was named.
    """
    arrays, names = _part(path, name)
    yield from _rows(arrays, names, name)


def row_count(path: Path, name: str) -> int:
    """How many rows an archive, a part of it or an idx file has; no picture is unpacked.

    Raises:
        DataError: as for the rows.
    """
    if file_of(path).suffix.lower() != ".npz":
        return len(_idx(path, name))
    return _length(_part(path, name)[0], name)


def _part(path: Path, name: str) -> tuple[dict[str, NDArray[Any]], list[Any] | None]:
    """The arrays of an archive or of one part of it, and the names of labels."""
    file = file_of(path)
    arrays = _archive(file, name)
    names = arrays.pop("names", None)
    parts = parts_of(arrays)
    if file != path:
        part = _PARTS.get(path.name, path.name)
        if part not in parts:
            known = f"parts {', '.join(parts)}" if parts else "no parts (arrays such as x_train)"
            raise DataError(f"{name}: there is no part '{path.name}' in it, {known}")
        arrays = {short: arrays[long] for long, short in parts[part].items()}
    elif parts and all(any(array in held for held in parts.values()) for array in arrays):
        first = next(iter(parts))
        raise DataError(
            f"{name}: holds the parts {', '.join(parts)}; name the part to read, e.g. {name}/{first} "
            "(and the others in data.validation and data.test)"
        )
    return arrays, None if names is None else names.tolist()


def parts_of(arrays: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """By part of an archive, its arrays' names and what they are called without the part: {"test": {"x_test": "x"}}."""
    found: dict[str, dict[str, str]] = {}
    for name in arrays:
        if match := _PART.fullmatch(name):
            part = _PARTS[match[1] or match[4]]
            found.setdefault(part, {})[name] = match[2] or match[3]
    return dict(sorted(found.items(), key=lambda one: list(_PARTS.values()).index(one[0])))


def archive_names(path: Path) -> list[str]:
    """The names of an archive's arrays, without reading them; [] where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [entry.removesuffix(".npy") for entry in archive.namelist()]
    except (OSError, zipfile.BadZipFile):
        return []


def idx_rows(path: Path, name: str) -> Iterator[Values]:
    """The rows of a file of idx pictures, with `label` from the file of labels beside it, where there is one.

    Raises:
        DataError: it is damaged, or the labels are not as many as the pictures.
    """
    arrays = {"image": _idx(path, name)}
    if arrays["image"].ndim not in (3, 4):
        raise DataError(f"{name}: holds {arrays['image'].ndim - 1} dimensions an entry; pictures have two or three")
    if labels := labels_beside(path):
        arrays["label"] = _idx(labels, labels.name)
        if len(arrays["label"]) != len(arrays["image"]):
            raise DataError(
                f"{name}: {len(arrays['image']):,} pictures, and {labels.name} has {len(arrays['label']):,}"
            )
    yield from _rows(arrays, None, name)


def _archive(path: Path, name: str) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    entry = ""
    try:
        with reading(name), zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                with archive.open(entry) as stream:
                    found[entry.removesuffix(".npy")] = np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, MemoryError, zipfile.BadZipFile, NotImplementedError, RuntimeError, SyntaxError) as error:
        inside = f" (array {entry.removesuffix('.npy')})" if entry else ""
        reason = "Python objects, which are not unpickled" if "pickle" in str(error).lower() else str(error)
        raise DataError(f"{name}{inside}: not an .npz archive of arrays that can be read ({reason})") from error
    return found


def _length(arrays: Mapping[str, NDArray[Any]], name: str) -> int:
    """How many rows arrays make: of pictures as many as there are, else what most arrays have."""
    lengths = Counter(len(array) for array in arrays.values() if array.ndim)
    if not lengths:
        raise DataError(f"{name}: holds no arrays; rows need arrays of equal length, one a column")
    pictures = [len(array) for array in arrays.values() if _is_pictures(array)]
    return pictures[0] if pictures else max(lengths, key=lambda count: (lengths[count], count))


def _rows(arrays: Mapping[str, NDArray[Any]], names: list[Any] | None, name: str) -> Iterator[Values]:
    length = _length(arrays, name)
    columns = {column: array for column, array in arrays.items() if array.ndim and len(array) == length}
    for place in range(length):
        yield {column: _value(array, place, names if column in _NAMED else None) for column, array in columns.items()}


def _is_pictures(array: NDArray[Any]) -> bool:
    """Whether it is (rows, height, width) or (rows, height, width, channels) of 8 bits."""
    return array.dtype == np.uint8 and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3)))


def _value(array: NDArray[Any], place: int, names: list[Any] | None) -> Any:
    if _is_pictures(array):
        return data_uri(array[place])
    value = array[place].tolist()
    return value if names is None else _name(value, names)


def _name(value: Any, names: list[Any]) -> Any:
    if isinstance(value, list):
        return [_name(one, names) for one in value]
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)
    return names[value] if known else value


def _idx(path: Path, name: str) -> NDArray[Any]:
    """An array as Yann LeCun's MNIST stores it: two zeros, a type, the dimensions, their sizes, the numbers."""
    with reading(name), open(path, "rb") as stream:
        opened: Any = gzip.GzipFile(fileobj=stream) if path.suffix == ".gz" else stream
        head = opened.read(4)
        kind = _IDX_TYPES.get(head[2]) if len(head) == 4 and head[:2] == b"\0\0" else None
        if kind is None:
            raise DataError(f"{name}: not an idx file (it begins with {head.hex() or 'nothing'})")
        sizes = opened.read(4 * head[3])
        shape = struct.unpack(f">{len(sizes) // 4}I", sizes[: len(sizes) // 4 * 4])
        content = opened.read()
    wanted = math.prod(shape) * np.dtype(kind).itemsize
    if len(shape) != head[3] or len(content) != wanted:
        raise DataError(f"{name}: cut off or damaged, {len(content):,} bytes of numbers instead of {wanted:,}")
    return np.frombuffer(content, dtype=kind).reshape(shape)

"""Arrays of .npz and idx files become rows; damaged ones, and those that would run code, are refused by name."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.images import decoded
from formary.data.source import Source, expand, read
from formary.errors import DataError

_RNG = np.random.default_rng(1)
_PICTURES = _RNG.integers(0, 256, (3, 4, 5), dtype=np.uint8)


def _rows(folder, *sources, **options):
    return [row.values for row in read(sources, base=folder, required=(), **options)]


def _idx(path, array, *, cut=0):
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    content = content[: len(content) - cut]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_arrays_of_equal_length_are_columns_and_names_name_labels(tmp_path):
    boxes = _RNG.random((3, 2, 4)).astype(np.float32)
    np.savez(
        tmp_path / "a.npz",
        image=_PICTURES,
        y=np.array([1, 0, -1]),
        labels=np.array([[0, 1], [1, -1], [0, 0]]),
        boxes=boxes,
        caption=np.array(["one", "two", "three"]),
        names=np.array(["cat", "dog"]),
        version=np.array(3),
    )
    rows = _rows(tmp_path, "a.npz")
    assert [row["y"] for row in rows] == ["dog", "cat", -1]
    assert rows[1]["labels"] == ["dog", -1] and rows[2]["caption"] == "three"
    assert np.allclose(rows[2]["boxes"], boxes[2])
    assert set(rows[0]) == {"image", "y", "labels", "boxes", "caption"}
    for row, picture in zip(rows, _PICTURES, strict=True):
        assert np.array_equal(decoded(row["image"], "row", channels=1)[..., 0], picture)


def test_a_part_of_an_archive_is_named_like_a_file_in_it(tmp_path):
    np.savez_compressed(
        tmp_path / "a.npz",
        x_train=_PICTURES,
        y_train=np.array([0, 1, 0]),
        test_x=_PICTURES[:2],
        test_y=np.array([1, 1]),
        names=np.array(["cat", "dog"]),
    )
    assert len(_rows(tmp_path, "a.npz/train")) == 3
    assert [row["y"] for row in _rows(tmp_path, "a.npz/test")] == ["dog", "dog"]
    with pytest.raises(
        DataError, match=r"a\.npz: holds the parts train, test; name the part to read, e\.g\. a\.npz/train"
    ):
        _rows(tmp_path, "a.npz")
    with pytest.raises(DataError, match=r"there is no part 'val' in it, parts train, test"):
        _rows(tmp_path, "a.npz/val")


def test_pictures_of_three_channels_keep_their_colours(tmp_path):
    colours = _RNG.integers(0, 256, (2, 3, 3, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", image=colours, y=np.arange(2))
    assert np.array_equal(decoded(_rows(tmp_path, "a.npz")[1]["image"], "row"), colours[1])


def test_an_archive_with_python_objects_is_refused_and_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    np.savez(tmp_path / "a.npz", x=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match=r"a\.npz \(array x\): .*Python objects, which are not unpickled"):
        _rows(tmp_path, "a.npz")
    assert not (tmp_path / "ran").exists()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 600), st.binary(max_size=20))
def test_a_damaged_archive_is_named(tmp_path_factory, kept, noise):
    folder = tmp_path_factory.mktemp("npz")
    np.savez_compressed(folder / "whole.npz", x=_PICTURES, y=np.arange(3))
    (folder / "a.npz").write_bytes((folder / "whole.npz").read_bytes()[:kept] + noise)
    try:
        _rows(folder, "a.npz")
    except DataError as error:
        assert str(error).startswith("a.npz")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_pictures_find_their_labels(tmp_path, suffix):
    _idx(tmp_path / f"train-images-idx3-ubyte{suffix}", _PICTURES)
    _idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", np.array([2, 0, 1], dtype=np.uint8))
    rows = _rows(tmp_path, f"train-images-idx3-ubyte{suffix}")
    assert [row["label"] for row in rows] == [2, 0, 1]
    assert np.array_equal(decoded(rows[2]["image"], "row", channels=1)[..., 0], _PICTURES[2])
    named = _rows(tmp_path, ".") if suffix == "" else _rows(tmp_path, "*images*")
    assert len(named) == 3
    source = Source([f"train-images-idx3-ubyte{suffix}"], base=tmp_path, required=(), names=["a", "b", "c"])
    assert [row.values["label"] for row in source] == ["c", "a", "b"]
    source = Source([f"train-images-idx3-ubyte{suffix}"], base=tmp_path, required=(), names=["a", "b"])
    with pytest.raises(DataError, match=r"holds 2, and data\.names has names for 0 to 1"):
        list(source)


def test_damaged_idx_files_are_named(tmp_path):
    path = tmp_path / "a-images-idx3-ubyte"
    _idx(path, _PICTURES, cut=7)
    with pytest.raises(DataError, match=r"a-images-idx3-ubyte: cut off or damaged, 53 bytes of numbers instead of 60"):
        _rows(tmp_path, path.name)
    path.write_bytes(b"PNG?")
    with pytest.raises(DataError, match="not an idx file"):
        _rows(tmp_path, path.name)
    _idx(path, _PICTURES)
    _idx(tmp_path / "a-labels-idx1-ubyte", np.zeros(2, dtype=np.uint8))
    with pytest.raises(DataError, match="3 pictures, and a-labels-idx1-ubyte has 2"):
        _rows(tmp_path, path.name)


def test_of_alternatives_the_first_that_is_there_is_read(tmp_path):
    np.savez(tmp_path / "b.npz", x=np.arange(2))
    assert [path.name for path in expand(["a.npz | b.npz"], tmp_path)] == ["b.npz"]
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    assert len(_rows(tmp_path, "a.npz | b.npz")) == 3
    with pytest.raises(DataError, match="no such file"):
        expand(["c.npz | d.npz"], tmp_path)

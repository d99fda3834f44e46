"""Pictures in folders, named in tables and inside of Parquet; those that cannot be read are left out and counted."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from formary.data.documents import write_documents
from formary.data.images import is_data_uri
from formary.data.records import RowForm
from formary.data.source import expand, fingerprint, read
from formary.errors import DataError
from formary.recipe import schema

_RNG = np.random.default_rng(2)


def _picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(path)
    return path


def _rows(folder, *sources, **options):
    return [row.values for row in read(sources, base=folder, required=("image",), files=("image",), **options)]


def test_pictures_in_folders_are_rows_and_their_folders_labels(tmp_path):
    for name in ("cats/a.png", "cats/b.jpg", "dogs/c.jpeg", "dogs/.hidden.png", "README.md"):
        if name.endswith("md"):
            (tmp_path / name).write_text("about")
        else:
            _picture(tmp_path / name)
    rows = _rows(tmp_path, ".", columns={"label": "@folder"})
    assert [row["label"] for row in rows] == ["cats", "cats", "dogs"]
    assert rows[2]["image"] == str((tmp_path / "dogs/c.jpeg").resolve())


def test_pictures_that_a_table_names_are_not_rows_of_their_own(tmp_path):
    _picture(tmp_path / "pictures/a.png")
    (tmp_path / "rows.csv").write_text("image,label\npictures/a.png,cat\n")
    assert [path.name for path in expand(["."], tmp_path)] == ["rows.csv"]


def test_texts_among_a_few_pictures_stay_texts(tmp_path):
    _picture(tmp_path / "cover.png")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words")
    assert [path.name for path in expand(["."], tmp_path)] == ["a.txt", "b.txt"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_paths_count_from_the_file_that_names_them(tmp_path, kind, monkeypatch):
    path = _picture(tmp_path / "data/deep/a.png")
    table = tmp_path / f"data/rows.{kind}"
    table.write_text(
        "photo,label\ndeep/a.png,x\n" if kind == "csv" else json.dumps({"photo": "deep/a.png", "label": "x"})
    )
    monkeypatch.chdir(tmp_path / "data/deep")
    (row,) = _rows(tmp_path, f"data/rows.{kind}", columns={"image": "photo"})
    assert row == {"image": str(path.resolve()), "label": "x"}


def test_parquet_holds_pictures_as_hugging_face_writes_them(tmp_path):
    path = _picture(tmp_path / "a.png")
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": "a.png"}},
        {"image": {"bytes": None, "path": "a.png"}},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = _rows(tmp_path, "rows.parquet")
    assert is_data_uri(first["image"]) and second["image"] == str(path.resolve())
    plain = pyarrow.Table.from_pylist([{"image": path.read_bytes()}])
    pyarrow.parquet.write_table(plain, tmp_path / "plain.parquet")
    assert is_data_uri(_rows(tmp_path, "plain.parquet")[0]["image"])


def test_a_changed_picture_changes_the_fingerprint(tmp_path):
    _picture(tmp_path / "a/x.png")
    before = fingerprint(expand(["a"], tmp_path))
    _picture(tmp_path / "a/x.png")
    assert fingerprint(expand(["a"], tmp_path)) != before


def _form():
    from formary.tasks.pictures import named, unreadable

    return RowForm(columns=("image", "label"), text=named, files=("image",), unreadable=unreadable, alike=False)


def test_pictures_that_cannot_be_read_are_named_and_counted(tmp_path):
    for number in range(20):
        _picture(tmp_path / f"in/{'ab'[number % 2]}/{number}.png")
    whole = (tmp_path / "in/a/0.png").read_bytes()
    (tmp_path / "in/a/0.png").write_bytes(whole[:60])
    (tmp_path / "in/b/1.png").write_text("not a picture")
    data = schema.Data(sources=["in"], columns={"label": "@folder"})
    story = write_documents(data, tmp_path / "out", base=tmp_path, form=_form())
    (step,) = [step for step in story["steps"] if step["step"] == "unreadable"]
    assert step["dropped"] == 2 and "0.png" in step["examples"][0]
    assert sum(split["rows"] for split in story["splits"].values()) == 18
    assert [(file["file"], file["rows"]) for file in story["files"]] == [("in/a", 10), ("in/b", 10)]


def test_only_unreadable_pictures_are_an_error_that_names_one(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "rows.csv").write_text("image,label\na.png,x\nb.png,y\n")
    data = schema.Data(sources=["rows.csv"])
    with pytest.raises(
        DataError, match=r"dropped all 2 rows \(unreadable 2\), such as .*a\.png: there is no such file"
    ):
        write_documents(data, tmp_path / "out", base=tmp_path, form=_form())


def test_the_same_picture_under_two_names_is_a_duplicate(tmp_path):
    for number in range(8):
        _picture(tmp_path / f"in/{'ab'[number % 2]}/{number}.png")
    (tmp_path / "in/a/again.png").write_bytes((tmp_path / "in/a/0.png").read_bytes())
    (tmp_path / "in/a/other.png").write_bytes((tmp_path / "in/b/1.png").read_bytes())
    data = schema.Data(sources=["in"], columns={"label": "@folder"})
    story = write_documents(data, tmp_path / "out", base=tmp_path, form=_form())
    dropped = {step["step"]: step["dropped"] for step in story["steps"]}
    assert dropped["duplicates"] == 1 and dropped["conflicting labels"] == 1

"""`formary init` on pictures: it finds them in folders, tables, archives and idx files, and what it writes runs."""

import csv
import gzip
import json
import struct

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from formary.cli import init as module
from formary.cli.main import app
from formary.pipeline.run import run
from formary.recipe import read

_RNG = np.random.default_rng(3)
_CLASSES = ("bag", "coat", "shoe")
_TINY = ["train.steps=2", "model.size=1x32", "evaluate.bootstrap=100", "machine.threads=1", "machine.precision=float32"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_speed", lambda: 100.0)
    return tmp_path


def formary(*arguments):
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def picture(number, grey=True):
    """A picture whose level tells its class."""
    shape = (12, 12) if grey else (12, 12, 3)
    return (_RNG.integers(0, 60, shape) + 60 * (number % 3)).astype(np.uint8)


def saved(path, number, grey=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number, grey)).save(path)
    return path


def folders(root, count=60, grey=True):
    for number in range(count):
        saved(root / _CLASSES[number % 3] / f"{number}.png", number, grey)


def idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def make_folders(here):
    folders(here / "clothes")
    return "clothes"


def make_folders_by_part(here):
    folders(here / "clothes/train")
    folders(here / "clothes/test", 12)
    return "clothes"


def make_csv(here):
    folders(here / "in")
    with (here / "rows.csv").open("w", newline="") as file:
        rows = [[path.relative_to(here), path.parent.name, 1.5] for path in sorted((here / "in").rglob("*.png"))]
        csv.writer(file).writerows([["file", "kind", "weight"], *rows])
    return "rows.csv"


def make_jsonl(here):
    folders(here / "deep/in")
    rows = [
        {"photo": f"in/{p.parent.name}/{p.name}", "label": p.parent.name} for p in (here / "deep/in").rglob("*.png")
    ]
    (here / "deep/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "deep/rows.jsonl"


def make_npz(here):
    pictures, labels = np.stack([picture(n) for n in range(72)]), np.arange(72) % 3
    parts = {"x_train": pictures[:60], "y_train": labels[:60], "x_test": pictures[60:], "y_test": labels[60:]}
    np.savez_compressed(here / "clothes.npz", **parts, names=np.array(_CLASSES))
    return "clothes.npz"


def make_plain_npz(here):
    np.savez(here / "clothes.npz", x=np.stack([picture(n) for n in range(60)]), y=np.arange(60) % 3)
    return "clothes.npz"


def make_idx(here):
    for part, count in (("train", 60), ("t10k", 12)):
        idx(here / f"{part}-images-idx3-ubyte.gz", np.stack([picture(n) for n in range(count)]))
        idx(here / f"{part}-labels-idx1-ubyte.gz", (np.arange(count) % 3).astype(np.uint8))
    return "train-images-idx3-ubyte.gz"


def make_parquet(here):
    folders(here / "in")
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": _CLASSES.index(path.parent.name)}
        for path in (here / "in").rglob("*.png")
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), here / "rows.parquet")
    return "rows.parquet"


def make_captions(here):
    with (here / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["picture", "text"])
        for number in range(60):
            saved(here / f"{number}.png", number)
            rows.writerow([f"{number}.png", f"a {_CLASSES[number % 3]} that lies beside box number {number}"])
    return "rows.csv"


MADE = [
    make_folders, make_folders_by_part, make_csv, make_jsonl, make_npz, make_plain_npz, make_idx, make_parquet, make_captions,
]  # fmt: skip


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__.removeprefix("make_"))
def test_what_is_written_runs(here, make):
    data = make(here)
    result = formary(data, "--out", "recipe.yaml")
    assert result.exit_code == 0, result.output
    recipe = read(here / "recipe.yaml")
    captions = make is make_captions
    assert recipe.task == ("caption" if captions else "classify_image")
    assert recipe.model.switches["channels"] == 1 and recipe.model.switches["image_size"] == 12
    given = make in (make_folders_by_part, make_npz, make_idx)
    assert bool(recipe.data.test) == given and (recipe.data.split.test == 0.0) == given
    done = run(here / "recipe.yaml", overrides=_TINY, folder=here / "run", console=Console(quiet=True))
    story = json.loads((here / "run/data/documents/story.json").read_text())
    rows = {part: counts["rows"] for part, counts in story["splits"].items()}
    assert sum(rows.values()) == (72 if given else 60) and min(rows.values()) > 0
    assert done.metrics and done.report.exists()


def test_pictures_and_texts_are_matched_where_that_is_asked_for(here):
    result = formary(make_captions(here), "--task", "match_image_text")
    assert result.exit_code == 0, result.output
    recipe = read(here / "recipe.yaml")
    assert recipe.task == "match_image_text" and recipe.data.columns == {"image": "picture"}
    tiny = [*_TINY, "model.switches.shared_width=16"]
    done = run(here / "recipe.yaml", overrides=tiny, folder=here / "run", console=Console(quiet=True))
    assert {"text_retrieval_mrr", "image_retrieval_mrr"} <= {metric["metric"] for metric in done.metrics}


def scenes(here, count=60):
    """Pictures of one or two light squares: their left, top, right and bottom, and what they are called."""
    found = []
    for number in range(count):
        pixels = picture(number)
        pixels[1:5, 2:7] = 250
        corners, names = [[2, 1, 7, 5]], [_CLASSES[number % 3]]
        if number % 2:
            pixels[7:11, 6:11] = 200
            corners, names = [*corners, [6, 7, 11, 11]], [*names, "hat"]
        Image.fromarray(pixels).save(here / f"{number}.png")
        found.append((f"{number}.png", corners, names))
    return found


def make_coco(here):
    categories = [{"id": 7 + place, "name": name} for place, name in enumerate((*_CLASSES, "hat"))]
    ids = {one["name"]: one["id"] for one in categories}
    images, annotations = [], []
    for number, (path, corners, names) in enumerate(scenes(here)):
        images.append({"id": number, "file_name": path, "width": 12, "height": 12})
        for (left, top, right, bottom), name in zip(corners, names):
            box = [left, top, right - left, bottom - top]
            one = {"id": len(annotations), "image_id": number, "category_id": ids[name], "bbox": box}
            annotations.append(one | {"area": box[2] * box[3], "iscrowd": 0})
    written = {"images": images, "annotations": annotations, "categories": categories}
    (here / "instances.json").write_text(json.dumps(written))
    return "instances.json"


def make_boxed_rows(here):
    rows = [{"photo": path, "where": corners, "what": names} for path, corners, names in scenes(here)]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "rows.jsonl"


@pytest.mark.parametrize("make", [make_coco, make_boxed_rows], ids=lambda make: make.__name__.removeprefix("make_"))
def test_things_in_pictures_are_found_where_boxes_are_given(here, make):
    result = formary(make(here), "--out", "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert "up to 2 things in a picture, of 4 kinds: bag, coat, hat, shoe" in result.output
    recipe = read(here / "recipe.yaml")
    assert recipe.task == "detect" and recipe.model.switches["detection_tokens"] > 2
    assert ("corners" in recipe.data.columns) == (make is make_boxed_rows)
    done = run(here / "recipe.yaml", overrides=_TINY, folder=here / "run", console=Console(quiet=True))
    assert {"map@50", "map@50:95"} <= {metric["metric"] for metric in done.metrics}


def test_boxes_are_missed_where_they_are_asked_for(here):
    folders(here / "in", 12)
    result = formary("in", "--task", "detect")
    assert result.exit_code == 2 and "no columns hold lists of boxes" in result.output


def test_every_value_has_its_reason(here):
    formary(make_captions(here), "--out", "captions.yaml")
    formary(here / "rows.csv", "--task", "match_image_text", "--out", "matches.yaml")
    formary(make_coco(here), "--out", "boxes.yaml")
    formary(make_folders_by_part(here), "--out", "labels.yaml")
    for name in ("captions.yaml", "matches.yaml", "boxes.yaml", "labels.yaml"):
        before = ""
        for line in (here / name).read_text().splitlines():
            value = "" if line.lstrip().startswith("#") else line.partition(": ")[2]
            assert not value or "  # " in line or before.lstrip().startswith("#"), line
            before = line


def test_colours_and_sizes_are_seen(here):
    folders(here / "in", 30, grey=False)
    for number in range(30, 60):
        Image.new("RGB", (300, 200 + number), (number, 0, 0)).save(here / f"in/bag/{number}.jpg")
    result = formary("in")
    switches = read(here / "recipe.yaml").model.switches
    assert switches["channels"] == 3 and switches["image_size"] % switches["patch_size"] == 0
    assert "12 to 300 pixels, in colour" in result.output


def test_parts_of_an_archive_are_found_from_one_of_them(here):
    make_npz(here)
    formary("clothes.npz/train")
    data = read(here / "recipe.yaml").data
    assert data.sources == ["clothes.npz/train"] and data.test == ["clothes.npz/test"]


def test_the_idx_files_of_a_folder_are_found(here):
    make_idx(here)
    formary(here)
    data = read(here / "recipe.yaml").data
    assert [path.rpartition("/")[2][:5] for path in (*data.sources, *data.test)] == ["train", "t10k-"]


def test_of_labels_and_texts_labels_are_taken_unless_the_other_is_asked_for(here):
    make_captions(here)
    lines = (here / "rows.csv").read_text().splitlines()
    told = [f"{line},{'class' if number == 0 else _CLASSES[number % 3]}" for number, line in enumerate(lines)]
    (here / "rows.csv").write_text("\n".join(told))
    formary("rows.csv")
    assert read(here / "recipe.yaml").data.columns == {"image": "picture", "label": "class"}
    formary("rows.csv", "--task", "caption", "--out", "captions.yaml")
    assert read(here / "captions.yaml").task == "caption"


def test_a_few_broken_pictures_are_said_and_do_no_harm(here):
    folders(here / "in", 30)
    (here / "in/bag/0.png").write_bytes(b"\x89PNG broken")
    result = formary("in")
    assert result.exit_code == 0 and "1 of the 30 cannot be read" in result.output


def test_only_broken_pictures_are_refused_by_the_first_one(here):
    for name in ("a/1.png", "b/2.png"):
        (here / "in" / name).parent.mkdir(parents=True)
        (here / "in" / name).write_text("no picture")
    result = formary("in")
    assert result.exit_code == 2 and "none of 2 pictures can be read" in result.output and "1.png" in result.output


def test_pictures_of_which_nothing_is_said_are_refused_with_what_to_do(here):
    folders(here / "in", 9)
    result = formary("in/bag")
    assert result.exit_code == 2 and "a folder for each class" in result.output


def test_a_table_that_names_no_pictures_stays_what_it_was(here):
    rows = [
        {"text": f"The {n}th guest is .png and much more is said of this.", "label": "ab"[n % 2]} for n in range(60)
    ]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    formary("rows.jsonl")
    assert read(here / "recipe.yaml").task == "classify"

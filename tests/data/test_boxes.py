"""Boxes in rows are read in either form, COCO's files become rows and results become COCO's; what is impossible is named."""

import json

import numpy as np
import pytest

from formary.data.boxes import boxes_of, coco_results
from formary.data.source import read
from formary.errors import DataError

ROW = {"boxes": [[1, 2, 3, 4], [5, 6, 2, 2.5]], "labels": ["cat", 7]}
COCO = {
    "images": [{"id": 17, "file_name": "a.png"}, {"id": 5, "file_name": "b.png"}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 44, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 17, "category_id": 44, "bbox": [1, 2, 3, 4], "iscrowd": 0},
        {"id": 2, "image_id": 17, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
    ],
}


def test_both_forms_say_the_same():
    found = boxes_of(ROW, "row 1")
    assert found.corners.tolist() == [[1, 2, 4, 6], [5, 6, 7, 8.5]] and found.labels == ("cat", "7")
    again = boxes_of({"corners": found.corners.tolist(), "labels": ["cat", "7"]}, "row 1")
    assert np.array_equal(again.corners, found.corners) and not found.crowd.any()


def test_what_fills_up_rows_of_arrays_is_no_box():
    found = boxes_of({"boxes": [[1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 0, 0]], "labels": ["cat", -1, None]}, "row 1")
    assert found.labels == ("cat",) and found.corners.shape == (1, 4)
    assert boxes_of({"boxes": [], "labels": []}, "row 1").corners.shape == (0, 4)


def test_what_sticks_out_by_less_than_a_pixel_is_cut():
    found = boxes_of({"boxes": [[-0.5, 2, 10.9, 4]], "labels": ["cat"]}, "row 1", size=(10, 6))
    assert found.corners.tolist() == [[0, 2, 10, 6]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"labels": []}, "row 4: there is neither a field 'boxes'.*data.columns.corners"),
        ({"boxes": [[1, 2, 3, 4]], "labels": []}, "row 4: 'boxes' and 'labels' are two lists of the same length, not 1 and 0"),
        ({"boxes": [[1, 2, 3, 4]]}, "not 1 and nothing"),
        ({"boxes": [[1, 2, 3, 4]], "labels": [["a", "b"]]}, "row 4: a label is a name or a number, not .'a', 'b'"),
        ({"boxes": [[1, 2, 3]], "labels": ["a"]}, "row 4, box 1: a box is four numbers"),
        ({"boxes": [[1, 2, 3, "x"]], "labels": ["a"]}, "row 4, box 1: a box is four numbers"),
        ({"boxes": [[1, 2, 0, 4]], "labels": ["a"]}, r"row 4, box 1: \[1, 2, 0, 4\] has no area \(x, y, width, height\)"),
        ({"boxes": [[1, 2, 3, float("nan")]], "labels": ["a"]}, "has no area"),
        ({"corners": [[5, 2, 3, 4]], "labels": ["a"]}, r"has no area \(left, top, right, bottom\)"),
        ({"boxes": [[1, 2, 3, 4], [-3, 2, 3, 4]], "labels": ["a", "b"]}, r"row 4, box 2: \[-3, 2, 3, 4\] lies outside"),
        ({"boxes": [[6, 2, 8, 4]], "labels": ["a"]}, "of the picture of 10 x 8 pixels; if its numbers are left, top"),
        ({"corners": [[6, 2, 14, 4]], "labels": ["a"]}, "of the picture of 10 x 8 pixels$"),
    ],
)  # fmt: skip
def test_impossible_boxes_are_named(row, said):
    with pytest.raises(DataError, match=said):
        boxes_of(row, "row 4", size=(10, 8))


def test_a_coco_file_gives_a_row_for_each_picture(tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps(COCO))
    rows = [row.values for row in read([str(tmp_path / "instances.json")], required=(), files=("image",))]
    assert rows[0] == {
        "id": 17, "image": str(tmp_path / "a.png"), "boxes": [[1, 2, 3, 4], [0, 0, 9, 9]], "labels": ["dog", "cat"],
        "category_ids": [44, 3], "crowd": [False, True],
    }  # fmt: skip
    assert rows[1]["boxes"] == [] and boxes_of(rows[0], "row").categories == (44, 3)
    assert boxes_of(rows[0], "row").crowd.tolist() == [False, True]


def test_pictures_of_a_coco_file_may_lie_elsewhere(tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps(COCO))
    read_ = read([str(tmp_path / "instances.json")], columns={"image": "train/{image}"}, required=(), files=("image",))
    assert next(read_).values["image"] == str(tmp_path / "train" / "a.png")


def test_a_coco_file_without_annotations_asks_only(tmp_path):
    asked = {name: value for name, value in COCO.items() if name != "annotations"}
    (tmp_path / "test.json").write_text(json.dumps(asked))
    (row, _) = (row.values for row in read([str(tmp_path / "test.json")], required=(), files=("image",)))
    assert row == {"id": 17, "image": str(tmp_path / "a.png")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotations": [{"id": 8, "image_id": 1, "category_id": 3, "bbox": [1, 1, 1, 1]}]}, "annotation 8: there is no 1 among the file's images"),
        ({"annotations": [{"image_id": 5, "category_id": 1, "bbox": [1, 1, 1, 1]}]}, "annotation 1: there is no 1 among the file's categories"),
        ({"annotations": [{"image_id": 5, "category_id": 3}]}, "annotation 1: has no 'bbox'"),
        ({"annotations": [7]}, "annotation 1: has no 'image_id'"),
        ({"images": [{"id": 2}], "annotations": []}, "image 2: has no 'file_name'"),
        ({"categories": [{"id": 2}]}, "category 1: has no 'name'"),
    ],
)  # fmt: skip
def test_what_is_missing_in_a_coco_file_is_named(tmp_path, change, said):
    (tmp_path / "bad.json").write_text(json.dumps({**COCO, **change}))
    with pytest.raises(DataError, match=f"bad.json {said}"):
        list(read([str(tmp_path / "bad.json")], required=()))


def test_results_are_as_coco_wants_them():
    found = {"boxes": [{"label": "dog", "score": 0.5, "box": [1.0, 2.0, 3.0, 4.0]}]}
    results = coco_results([{"id": 17}, {}], [found, found], {"dog": 44})
    assert results[0] == {"image_id": 17, "category_id": 44, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}
    assert results[1]["image_id"] == 2

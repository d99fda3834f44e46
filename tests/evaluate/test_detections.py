"""Boxes found in pictures are scored as pycocotools scores them, on whatever is found and whatever there is to find."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.boxes import Boxes
from formary.data.images import data_uri
from formary.errors import DataError
from formary.evaluate import detections
from formary.recipe.schema import Evaluate

NAMES = ("cat", "dog", "owl")
QUICK = Evaluate(bootstrap=100)


def drawn(seed, pictures=6, crowds=True):
    """Rows and answers by chance: boxes near the true ones and elsewhere, scores that are often equal."""
    rng = np.random.default_rng(seed)
    rows, answers = [], []
    for _ in range(pictures):
        count = int(rng.integers(0, 5))
        boxes = np.concatenate([rng.integers(0, 30, (count, 2)), rng.integers(4, 30, (count, 2))], axis=1).astype(float)
        labels = rng.choice(NAMES, count).tolist()
        row = {"boxes": boxes.tolist(), "labels": labels}
        row["crowd"] = (rng.random(count) < 0.2 * crowds).tolist()
        found = []
        for box, label in zip(boxes, labels):
            for _ in range(int(rng.integers(0, 3))):
                near = np.maximum(box + rng.normal(0, 2, 4), 0.5)
                found.append((str(rng.choice(NAMES)) if rng.random() < 0.2 else label, near))
        for _ in range(int(rng.integers(0, 3))):
            found.append((str(rng.choice(NAMES)), rng.uniform(1, 30, 4)))
        answers.append({
            "boxes": [{"label": label, "box": box.tolist(), "score": float(rng.integers(1, 8)) / 8} for label, box in found]
        })  # fmt: skip
        rows.append(row)
    return rows, answers


def oracle(rows, answers):
    """precision (thresholds, recalls, labels) and the summary of pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = {name: number for number, name in enumerate(NAMES, 1)}
    annotations = [
        {"image_id": n, "category_id": numbers[label], "bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
        for n, row in enumerate(rows, 1)
        for box, label, crowd in zip(row["boxes"], row["labels"], row["crowd"])
    ]
    results = [
        {"image_id": n, "category_id": numbers[box["label"]], "bbox": box["box"], "score": box["score"]}
        for n, answer in enumerate(answers, 1)
        for box in answer["boxes"]
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": n} for n in range(1, len(rows) + 1)],
            "annotations": [{**one, "id": n} for n, one in enumerate(annotations, 1)],
            "categories": [{"id": number, "name": name} for name, number in numbers.items()],
        }
        truth.createIndex()
        measured = COCOeval(truth, truth.loadRes(results) if results else COCO(), "bbox")
        measured.params.imgIds = sorted(truth.getImgIds())
        measured.params.catIds = sorted(truth.getCatIds())
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return measured


def ours(rows, answers):
    entries = detections.metrics(rows, {"model": answers}, settings=QUICK, where="test")
    return {entry["metric"]: entry["model"] for entry in entries}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_every_figure_is_that_of_pycocotools(seed, crowds):
    rows, answers = drawn(seed, crowds=crowds)
    told = [label for row in rows for label, crowd in zip(row["labels"], row["crowd"]) if not crowd]
    if not told or not any(answer["boxes"] for answer in answers):
        return
    measured, metrics = oracle(rows, answers), ours(rows, answers)
    expected = dict(zip(("map@50:95", "map@50", "map@75"), measured.stats[:3])) | {"ar@100": measured.stats[8]}
    for name, value in expected.items():
        assert metrics[name]["value"] == pytest.approx(value, abs=1e-9), name
    by_label = {entry["label"]: entry for entry in detections.classes_of(rows, answers)}
    for number, name in enumerate(NAMES):
        precision = measured.eval["precision"][:, :, number, 0, 2]
        if (precision > -1).any():
            assert by_label[name]["ap"] == pytest.approx(precision.mean(), abs=1e-9)
            assert by_label[name]["ap50"] == pytest.approx(precision[0].mean(), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_a_picture_drawn_twice_counts_as_two_pictures(seed):
    rows, answers = drawn(seed, pictures=5, crowds=False)
    if not any(row["labels"] for row in rows):
        return
    weights = np.random.default_rng(seed).integers(0, 3, 5)
    many = [n for n, times in enumerate(weights) for _ in range(times)]
    if not any(rows[n]["labels"] for n in many):
        return
    distinct = [{**answer, "boxes": [{**box, "score": box["score"] + n / 1e3 + m / 1e5} for m, box in enumerate(answer["boxes"])]}
                for n, answer in enumerate(answers)]  # fmt: skip
    found = detections.found_of(detections.truths_of(rows), distinct)
    again = detections.found_of(detections.truths_of([rows[n] for n in many]), [distinct[n] for n in many])
    for label, at_thresholds in again.items():
        for one, whole in zip(at_thresholds, found[label]):
            ones = np.ones((1, len(many)))
            assert whole.precision(weights[None].astype(float)) == pytest.approx(one.precision(ones), abs=1e-9)
            assert whole.recall(weights[None].astype(float)) == pytest.approx(one.recall(ones))


def test_intervals_hold_the_value_and_perfect_answers_are_one():
    rows, answers = drawn(3, pictures=30, crowds=False)
    for metric in ours(rows, answers).values():
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1 and metric["low"] < metric["high"]
    perfect = [
        {"boxes": [{"label": label, "box": box, "score": 0.9} for label, box in zip(row["labels"], row["boxes"])]}
        for row in rows
    ]
    assert [metric["value"] for metric in ours(rows, perfect).values()] == pytest.approx([1.0] * 4)


def test_pictures_without_boxes_alone_cannot_be_measured():
    with pytest.raises(DataError, match="no picture has a box"):
        detections.metrics([{"boxes": [], "labels": []}], {"model": [{"boxes": []}]}, settings=QUICK, where="test")


def test_every_kind_of_error_is_told():
    truth = Boxes(np.array([[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60.0]]), NAMES, np.zeros(3, dtype=bool))
    found = [
        {"label": "cat", "box": [0, 0, 10, 10], "score": 0.9},
        {"label": "cat", "box": [0, 0, 10, 9], "score": 0.8},
        {"label": "cat", "box": [20, 20, 20, 20], "score": 0.7},
        {"label": "owl", "box": [50, 50, 10, 4], "score": 0.6},
        {"label": "owl", "box": [80, 80, 5, 5], "score": 0.6},
    ]
    kinds, missed = detections.errors_of(truth, found)
    assert kinds == ["right", "found twice", "wrong label", "badly placed", "nothing there"] and missed == 1


def test_the_baseline_finds_what_was_commonest_wherever_it_is_asked():
    picture = data_uri(np.zeros((40, 80), dtype=np.uint8))
    often = {"image": picture, "boxes": [[8, 8, 20, 16]], "labels": ["dog"]}
    seldom = {"image": picture, "boxes": [[40, 0, 40, 40]], "labels": ["cat"]}
    larger = {"image": data_uri(np.zeros((80, 160), dtype=np.uint8))}
    (answer,) = detections.baselines([often, often, seldom], [larger])["commonest boxes"]
    first, second = answer["boxes"]
    assert first == {"label": "dog", "score": pytest.approx(2 / 3), "box": pytest.approx([16, 16, 40, 32])}
    assert second["label"] == "cat" and second["score"] == pytest.approx(1 / 3)


def test_details_show_the_worst_pictures_first():
    picture = data_uri(np.zeros((40, 80), dtype=np.uint8))
    rows = [{"image": picture, "boxes": [[8, 8, 20, 16]], "labels": ["dog"]} for _ in range(3)]
    right = {"label": "dog", "box": [8, 8, 20, 16], "score": 0.9}
    answers = [{"boxes": [right]}, {"boxes": [{**right, "label": "cat"}]}, {"boxes": [{**right, "score": 0.2}]}]
    details = detections.details(rows, answers)
    assert [scene["row"] for scene in details["scenes"]] == [2, 3, 1] and details["scenes"][0]["size"] == (80, 40)
    assert details["box_errors"] == {"right": 1, "wrong label": 1, "missed": 1}
    assert details["classes"][0]["label"] == "dog" and details["classes"][0]["boxes"] == 3

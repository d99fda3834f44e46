"""Things in pictures are found: a tiny YOLOS learns its scenes, matching is the best there is, bad rows are named."""

import itertools
import json

import numpy as np
import pytest
import torch

from formary.data.images import data_uri
from formary.data.tokenizer import wordless
from formary.errors import DataError, RecipeError
from formary.evaluate import detections
from formary.model.topologies import build, with_head
from formary.recipe.presets import preset
from formary.recipe.schema import Recipe
from formary.tasks.detect import Detect
from formary.tasks.matching import centred, cornered, generalised_iou, lying, matched
from formary.tasks.reading import RowBatches


def _rows(count=12, side=16):
    """A bright or a grey square somewhere, or one of each."""
    rng = np.random.default_rng(4)
    rows = []
    for number in range(count):
        picture = rng.integers(0, 30, (side, side, 1), dtype=np.uint8)
        boxes, labels = [], []
        for shade, label, half in ((250, "bright", 0), (120, "grey", side // 2)):
            if number % 3 != (0 if label == "bright" else 1):
                left, top = int(rng.integers(0, 3)) + half, int(rng.integers(0, side - 6))
                picture[top : top + 5, left : left + 5] = shade
                boxes.append([left, top, 5, 5])
                labels.append(label)
        rows.append({"image": data_uri(picture), "boxes": boxes, "labels": labels})
    return rows


def _recipe(switches=None, **train):
    switches = {"image_size": 16, "patch_size": 4, "channels": 1, "detection_tokens": 4, **(switches or {})}
    return Recipe.model_validate(
        {
            "name": "t",
            "task": "detect",
            "data": {"sources": ["x"]},
            "model": {"preset": "yolos-mini", "size": "2x32", "switches": switches},
            "train": {"batch": 4, **train},
        }
    )


def _task(rows, recipe=None):
    return Detect.learn(recipe or _recipe(), wordless(), rows, start=None)


def test_a_tiny_model_finds_what_it_learned(learned):
    rows = _rows()
    task = _task(rows)
    answers = task.predict(learned(task, rows, steps=420, clip=1.0), rows)
    found = detections.found_of(detections.truths_of(rows), answers)
    assert all(at[0].precision(np.ones((1, len(rows))))[0] > 0.9 for at in found.values())
    first = answers[0]["boxes"]
    assert [box["score"] for box in first] == sorted((box["score"] for box in first), reverse=True)
    assert all(box["box"][0] + box["box"][2] <= 16.01 and min(box["box"]) >= 0 for box in first)


@pytest.mark.parametrize("between", [False, True])
def test_the_task_of_the_saved_model_finds_the_same(learned, tmp_path, between):
    from formary.hub.checkpoint import save
    from formary.infer.loaded import load

    rows = _rows()
    task = _task(rows, _recipe({"layer_positions": between}))
    network = learned(task, rows, steps=3)
    save(tmp_path, network, formary={"task": "detect", "settings": task.settings()})
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "yolos"
    again = load(tmp_path).predict(rows, precision="float32")
    for old, new in zip(task.predict(network, rows), again, strict=True):
        assert [box["label"] for box in old["boxes"]] == [box["label"] for box in new["boxes"]]
        for one, other in zip(old["boxes"], new["boxes"]):
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)
            assert one["box"] == pytest.approx(other["box"], abs=0.02)


def test_boxes_are_in_the_pixels_of_each_picture(learned):
    rows = _rows()
    task = _task(rows)
    network = learned(task, rows, steps=3)
    from formary.data.images import decoded, fitted

    small = decoded(rows[0]["image"], "row", channels=1)
    large = {"image": data_uri(np.kron(small[..., 0], np.ones((2, 3), np.uint8)))}
    assert np.array_equal(
        fitted(decoded(large["image"], "row", channels=1), 16), task.examples([large], targets=False)[0].inputs
    )
    box = task.predict(network, [large])[0]["boxes"][0]["box"]
    assert box[0] + box[2] <= 48.01 and box[1] + box[3] <= 32.01


def test_matching_is_the_cheapest_of_all_assignments():
    rows = _rows(6)
    task = _task(rows)
    batch = task.collate(task.examples(rows, targets=True))
    generator = torch.Generator().manual_seed(3)
    logits, boxes = torch.randn(6, 4, 3, generator=generator), torch.rand(6, 4, 4, generator=generator)
    pictures, tokens, places = matched(logits, boxes, batch["boxes"], batch["labels"], weights=task.objective)

    def cost(picture, token, place):
        true, said = batch["boxes"][picture, place], boxes[picture, token]
        overlap = generalised_iou(cornered(said), cornered(true))
        sure = logits[picture, token].softmax(0)[batch["labels"][picture, place]]
        return float(5 * (said - true).abs().sum() - 2 * overlap - sure)

    for picture, row in enumerate(rows):
        own = [(int(t), int(p)) for n, t, p in zip(pictures, tokens, places) if n == picture]
        assert sorted(place for _, place in own) == list(range(len(row["labels"])))
        best = min(
            sum(cost(picture, token, place) for place, token in enumerate(chosen))
            for chosen in itertools.permutations(range(4), len(row["labels"]))
        )
        assert sum(cost(picture, *pair) for pair in own) == pytest.approx(best, abs=1e-5)


def test_the_loss_is_that_of_transformers():
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    rows = _rows(6)
    task = _task(rows)
    network = build(task.model_config(), seed=3).eval()
    batch = task.collate(task.examples(rows, targets=True))
    logits, boxes = network.head(network(batch["pixels"]))
    loss, count = task.loss(network, batch)
    known = [(n >= 0).nonzero()[:, 0] for n in batch["labels"]]
    targets = [{"class_labels": n[k], "boxes": b[k]} for n, b, k in zip(batch["labels"], batch["boxes"], known)]
    oracle = ImageLoss(HungarianMatcher(1, 5, 2), 2, 0.1, ["labels", "boxes"])(
        {"logits": logits, "pred_boxes": boxes}, targets
    )
    boxed = int(count)
    weighed = boxed + 0.1 * (logits.shape[0] * logits.shape[1] - boxed)  # they divide cross-entropy by all weights
    expected = oracle["loss_ce"] * weighed + boxed * (5 * oracle["loss_bbox"] + 2 * oracle["loss_giou"])
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)


def test_patches_learn_what_they_lie_in_while_a_network_trains():
    rows = [{**_rows(1)[0], "boxes": [[0, 0, 8, 8], [4, 4, 4, 4]], "labels": ["bright", "grey"]}]
    task = _task(rows)
    batch = task.collate(task.examples(rows, targets=True))
    pictures, patches, places = lying(batch["boxes"], batch["labels"], side=4)
    assert patches.tolist() == [0, 1, 4, 5] and places.tolist() == [0, 0, 0, 1] and not pictures.any()
    network = build(task.model_config(), seed=3)
    plain = task.loss(network.eval(), batch)[0]
    assert task.loss(network.train(), batch)[0] > plain
    without = _task(rows, _recipe(objective={"patches": 0.0}))
    torch.testing.assert_close(without.loss(network, batch)[0], plain)


def test_boxes_come_and_go_between_both_forms():
    corners = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0]])
    torch.testing.assert_close(cornered(centred(corners)), corners)
    assert generalised_iou(corners[1], corners[1]).item() == pytest.approx(1.0)
    apart = generalised_iou(torch.tensor([0.0, 0, 0.1, 0.1]), torch.tensor([0.9, 0.9, 1.0, 1.0]))
    assert apart.item() == pytest.approx(-0.98, abs=1e-5)


def test_pictures_without_anything_teach_to_say_nothing():
    rows = [*_rows(3), {"image": _rows(1)[0]["image"], "boxes": [], "labels": []}]
    task = _task(rows)
    network = build(task.model_config(), seed=1)
    batch = task.collate(task.examples(rows[3:], targets=True))
    loss, count = task.loss(network, batch)
    assert int(count) == 1 and torch.isfinite(loss) and loss > 0


def test_what_a_step_learns_is_a_function_of_the_step():
    rows = _rows()
    recipe = _recipe(augment={"crop": 2, "flip": True, "mosaic": 0.5})
    first, second = (
        RowBatches(task, task.examples(rows, targets=True), recipe.train)
        for task in (_task(rows, recipe), _task(rows, recipe))
    )
    for step in (3, 0, 7):
        one, other = first.batch(step), second.batch(step)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_encoder_of_pictures_becomes_a_detector_and_keeps_what_it_learned():
    rows = _rows()
    switches = {"image_size": 16, "patch_size": 4, "channels": 1}
    start = build(preset("vit-mini", vocab_size=0, context=17, size="2x32", switches=switches), seed=3)
    task = Detect.learn(_recipe({"detection_tokens": 5}), wordless(), rows, start=start.config)
    network = with_head(start, task.head(start.config), seed=4)
    assert network.config.context == 22 and network.config.image_mean == (0.5,)
    torch.testing.assert_close(network.embedder.positions[:, :17], start.embedder.positions)
    torch.testing.assert_close(
        network.transformer.blocks[1].ffn.input.weight, start.transformer.blocks[1].ffn.input.weight
    )
    task.predict(network, rows[:1])


def test_bad_rows_and_recipes_are_named(tmp_path):
    rows = _rows(3)
    task = _task(rows)
    outside = {**rows[0], "boxes": [[14, 2, 5, 5]], "labels": ["bright"]}
    with pytest.raises(
        DataError, match=r"row 2 \(id 7\), box 1: \[14, 2, 5, 5\] lies outside of the picture of 16 x 16"
    ):
        task.examples([rows[0], {**outside, "id": 7}], targets=True)
    with pytest.raises(DataError, match=r"photos.csv line 3, box 1: .* lies outside"):
        task.form.check(outside, "photos.csv line 3")
    with pytest.raises(DataError, match=r"row 1: field 'image': .*none\.png: there is no such file"):
        task.predict(None, [{"image": str(tmp_path / "none.png")}])
    with pytest.raises(DataError, match="no training row has a box"):
        _task([{**rows[0], "boxes": [], "labels": []}])
    with pytest.raises(RecipeError, match=r"model\.switches\.detection_tokens"):
        _task(rows, _recipe({"detection_tokens": 0}))


def test_unknown_labels_and_too_many_boxes_are_noted():
    rows = _rows(3)
    task = _task(rows, _recipe({"detection_tokens": 1}))
    task.examples([{**rows[2], "labels": ["bright", "red"][: len(rows[2]["labels"])]}], targets=True)
    notes = " ".join(task.notes())
    assert "labels that no training row has count as missed: 'red' (1)" in notes
    assert "1 pictures have more boxes than the 1 detection tokens" in notes

"""Pictures get labels: a tiny ViT learns what rows teach, changes are a function of the step, bad rows are named."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.augment_images import partners, varied
from formary.data.images import data_uri
from formary.data.tokenizer import wordless
from formary.errors import DataError, RecipeError
from formary.model.topologies import build
from formary.recipe.schema import AugmentImages, Recipe
from formary.tasks.classify_image import ClassifyImage
from formary.tasks.reading import RowBatches

_RNG = np.random.default_rng(4)


def _rows(count=24, side=8, channels=3):
    """Pictures that are bright above (label up) or below."""
    rows = []
    for number in range(count):
        picture = _RNG.integers(0, 60, (side, side, channels), dtype=np.uint8)
        half = slice(0, side // 2) if number % 2 else slice(side // 2, side)
        picture[half] += 150
        rows.append({"image": data_uri(picture), "label": "up" if number % 2 else "down"})
    return rows


def _recipe(switches=None, **train):
    return Recipe.model_validate(
        {
            "name": "t",
            "task": "classify_image",
            "data": {"sources": ["x"]},
            "model": {
                "preset": "vit-mini",
                "size": "1x16",
                "switches": {"image_size": 8, "patch_size": 4, **(switches or {})},
            },
            "train": {"batch": 8, **train},
        }
    )


def _task(rows, recipe=None):
    return ClassifyImage.learn(recipe or _recipe(), wordless(), rows, start=None)


@pytest.mark.parametrize("switches", [{}, {"channels": 1}, {"class_tokens": 0}, {"pooling": "mean"}])
def test_a_tiny_model_learns_its_rows_and_says_so(learned, switches):
    rows = _rows()
    task = _task(rows, _recipe(switches))
    network = learned(task, rows)
    answers = task.predict(network, rows)
    assert [answer["label"] for answer in answers] == [row["label"] for row in rows]
    assert network.config.context == 4 + network.config.class_tokens
    assert network.config.image_mean == task.pictures.mean and len(task.pictures.mean) == network.config.channels


def test_the_task_of_the_saved_model_gives_the_same_answers(learned, tmp_path):
    from formary.hub.checkpoint import save
    from formary.infer.loaded import load

    rows = _rows()
    task = _task(rows, _recipe({"channels": 1}))
    network = learned(task, rows, steps=3)
    save(tmp_path, network, formary={"task": "classify_image", "settings": task.settings()})
    again = load(tmp_path).predict(rows, precision="float32")
    for old, new in zip(task.predict(network, rows), again, strict=True):
        assert old["probabilities"] == pytest.approx(new["probabilities"], abs=1e-5)


def test_several_labels_and_numbers_are_learned_too(learned):
    rows = _rows()
    several = [{**row, "label": [row["label"], "bright"]} for row in rows]
    task = _task(several)
    assert task.kind == "multi"
    assert task.predict(learned(task, several), several[:1])[0]["labels"] == ["bright", "down"]
    numbers = [{**row, "label": 2.5 if row["label"] == "up" else -1.5} for row in rows]
    task = _task(numbers)
    network = learned(task, numbers, steps=120)
    task.finish(network)
    assert task.predict(network, numbers[:2])[0]["value"] == pytest.approx(-1.5, abs=0.5)


def test_what_a_step_learns_is_a_function_of_the_step():
    rows = _rows()
    augment = {"crop": 2, "flip": True, "operations": 2, "erase": 0.3, "mixup": 0.4}
    recipe = _recipe(augment=augment)
    first, second = (
        RowBatches(task, task.examples(rows, targets=True), recipe.train)
        for task in (_task(rows, recipe), _task(rows, recipe))
    )
    for step in (3, 0, 7):
        one, other = first.batch(step), second.batch(step)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(first.batch(0)["pixels"], first.batch(3)["pixels"])
    assert first.batch(0)["targets"].shape == (8, 2)
    assert torch.allclose(first.batch(0)["targets"].sum(dim=1), torch.ones(8))


def test_mixed_targets_weigh_as_their_shares():
    rows = _rows(4)
    task = _task(rows)
    network = build(task.model_config(), seed=1).eval()
    batch = task.collate(task.examples(rows, targets=True))
    whole, count = task.loss(network, batch)
    soft = torch.nn.functional.one_hot(batch["targets"], 2).float()
    same, same_count = task.loss(network, {**batch, "targets": soft})
    assert float(whole.detach()) == pytest.approx(float(same.detach()), rel=1e-5) and int(count) == int(same_count) == 4


def test_without_augmentation_a_training_batch_is_a_batch():
    rows = _rows(6)
    task = _task(rows)
    examples = task.examples(rows, targets=True)
    plain, changed = task.collate(examples), task.training_batch(examples, 5)
    assert all(torch.equal(plain[name], changed[name]) for name in plain)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(4, 12), st.integers(4, 12), st.sampled_from([1, 3]), st.integers(0, 6), st.booleans(),
    st.integers(0, 3), st.floats(0, 1), st.floats(0, 0.99), st.integers(0, 2**32),
)  # fmt: skip
def test_changed_pictures_are_pictures_of_the_same_size(
    count, height, width, channels, crop, flip, operations, strength, erase, seed
):
    pictures = _RNG.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    before = pictures.copy()
    asked = AugmentImages(crop=crop, flip=flip, operations=operations, strength=strength, erase=erase)
    changed = varied(pictures, asked, np.random.default_rng(seed))
    assert changed.shape == pictures.shape and changed.dtype == np.uint8
    assert np.array_equal(pictures, before)
    again = varied(pictures, asked, np.random.default_rng(seed))
    assert np.array_equal(changed, again)


def test_operations_of_no_strength_change_nothing_but_a_rounding():
    pictures = _RNG.integers(0, 256, (200, 6, 6, 3), dtype=np.uint8)
    changed = varied(pictures, AugmentImages(operations=1, strength=0.0), np.random.default_rng(0))
    assert np.abs(changed.astype(int) - pictures).max() <= 1
    strong = varied(pictures, AugmentImages(operations=1, strength=1.0), np.random.default_rng(0))
    assert (strong != pictures).any(axis=(1, 2, 3)).mean() > 0.7


def test_a_crop_moves_and_a_flip_mirrors():
    pictures = np.arange(36, dtype=np.uint8).reshape(1, 6, 6, 1).repeat(64, axis=0)
    flipped = varied(pictures, AugmentImages(flip=True), np.random.default_rng(0))
    mirrored = (flipped == pictures[:, :, ::-1]).all(axis=(1, 2, 3))
    assert 10 < mirrored.sum() < 54 and (flipped[~mirrored] == pictures[~mirrored]).all()
    moved = varied(pictures, AugmentImages(crop=2), np.random.default_rng(0))
    bordered = np.pad(pictures[0, :, :, 0], 2)
    windows = [bordered[a : a + 6, b : b + 6] for a in range(5) for b in range(5)]
    assert all(any(np.array_equal(one[..., 0], window) for window in windows) for one in moved)


@given(st.integers(1, 50), st.floats(0.05, 4.0))
def test_a_picture_keeps_the_larger_share_when_mixed(count, alpha):
    others, shares = partners(count, alpha, np.random.default_rng(1))
    assert sorted(others) == list(range(count)) and (shares >= 0.5).all() and (shares <= 1).all()


def test_features_for_a_baseline_are_the_pixels():
    rows = _rows(4, side=8)
    task = _task(rows)
    features = task.features(rows)
    assert features.shape == (4, 8 * 8 * 3)
    assert np.allclose(features[0].reshape(8, 8, 3) * 255, task.examples(rows, targets=False)[0].inputs)


def test_bad_rows_and_recipes_are_named(tmp_path):
    rows = _rows(4)
    task = _task(rows)
    with pytest.raises(DataError, match=r"row 2: field 'label' is missing; complete the row"):
        task.examples([rows[0], {"image": rows[0]["image"]}], targets=True)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    with pytest.raises(DataError, match=r"row 1: field 'image': .*cut\.png"):
        task.predict(None, [{"image": str(tmp_path / "cut.png")}])
    with pytest.raises(RecipeError, match="image_size 9 pixels are not cut into whole patches of patch_size 4"):
        _task(rows, _recipe({"image_size": 9}))
    with pytest.raises(DataError, match="every training row has the label 'up'"):
        _task([row for row in rows if row["label"] == "up"])

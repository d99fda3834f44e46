"""Bits per pixel of models and of what needs no network."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from formary.errors import DataError
from formary.evaluate import pictures
from formary.recipe.schema import Evaluate

QUICK = Evaluate(bootstrap=100)


def codes(values: object) -> pictures.Codes:
    return np.asarray(values, dtype=np.uint16)


@settings(deadline=None, max_examples=40)
@given(
    arrays.arrays(np.uint16, (12, 3, 2), elements=st.integers(0, 2)),
    st.sampled_from([pictures.places, pictures.markov]),
)
def test_a_baseline_gives_each_picture_a_share_of_one(training: np.ndarray, baseline: object) -> None:
    every = np.stack(np.meshgrid(*[range(3)] * 6, indexing="ij"), axis=-1).reshape(-1, 3, 2).astype(np.uint16)
    bits = baseline(training, every, 3)  # type: ignore[operator]
    assert np.exp2(-bits).sum() == pytest.approx(1.0)


def test_each_place_has_its_own_colours() -> None:
    training = codes([[[0, 1]]] * 8)
    # One count more for each of two colours: 9 of 10 for what was always there, 1 of 10 for what never was.
    bits = pictures.places(training, codes([[[0, 1]], [[1, 1]]]), 2)
    assert bits == pytest.approx([-2 * np.log2(0.9), -np.log2(0.1) - np.log2(0.9)])


def test_markov_knows_the_left_and_the_upper_pixel() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, (200, 6, 6))
    first[:, 1:, 1:] = 0
    for row in range(1, 6):
        for column in range(1, 6):
            first[:, row, column] = first[:, row - 1, column] ^ first[:, row, column - 1]
    bits = pictures.markov(codes(first[:150]), codes(first[150:]), 2)
    # 11 pixels at the edges are coins; whether an edge is meant the context tells, so the others cost next to nothing.
    assert bits.mean() == pytest.approx(11, abs=0.5)
    assert pictures.places(codes(first[:150]), codes(first[150:]), 2).mean() > 30


def test_metrics_compare_by_pictures_and_less_is_better() -> None:
    rows = [{"image": "a", "label": "shoe"}] * 20 + [{"image": "b", "label": "bag"}] * 20
    rng = np.random.default_rng(1)
    bits = 100 + 10 * rng.random(40) + np.repeat([0, 50], 20)
    answers = {
        "model": [{"bits": float(b), "pixels": 50} for b in bits],
        "other": [{"bits": float(b + 30), "pixels": 50} for b in bits],
    }
    (entry,) = pictures.metrics(rows, answers, colours=4, settings=QUICK, where="test")
    assert entry["metric"] == "bits_per_dimension" and "4 colours" in entry["protocol"]
    assert entry["model"]["value"] == pytest.approx(bits.mean() / 50)
    assert entry["verdicts"] == {"other": "better"}
    found = pictures.details(rows, answers["model"])
    assert found["worst"][0]["row"] == int(bits.argmax()) + 1 and found["worst"][0]["label"] == "bag"
    assert found["slices"][0]["slice"] == "bag" and found["slices"][0]["below"]


def test_no_pictures_are_refused() -> None:
    with pytest.raises(DataError, match="no pictures to measure"):
        pictures.metrics([], {"model": []}, colours=4, settings=QUICK, where="test")

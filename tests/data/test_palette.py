"""A few colours stand for all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from formary.data.palette import Palette
from formary.errors import DataError


def grey(values: object) -> np.ndarray:
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, axis=-1)


def test_pictures_of_few_colours_keep_them_all_from_dark_to_light() -> None:
    picture = np.array([[[255, 255, 255], [200, 0, 0]], [[0, 0, 0], [0, 200, 0]]], dtype=np.uint8)
    palette = Palette.learned([picture], 16, seed=1)
    assert palette.names == ["#000000", "#c80000", "#00c800", "#ffffff"]
    assert palette.nearest(picture).tolist() == [[3, 1], [0, 2]]


def test_of_many_colours_the_asked_number_is_left_near_those_that_are_there() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([10, 90, 240])
    picture = grey(rng.choice(centres, (60, 60)) + rng.integers(-3, 4, (60, 60)))
    palette = Palette.learned([picture], 3, seed=1)
    assert len(palette) == 3 and np.abs(palette.colours[:, 0].astype(int) - centres).max() <= 1
    assert palette.names == Palette.learned([picture], 3, seed=1).names


def test_its_names_are_all_of_it() -> None:
    palette = Palette.learned([grey(np.arange(256).reshape(16, 16))], 9, seed=3)
    assert np.array_equal(Palette.of_names(palette.names).colours, palette.colours)


def test_without_pictures_there_are_no_colours() -> None:
    with pytest.raises(DataError, match=r"data\.sources: there are no training pictures"):
        Palette.learned([], 4, seed=1)


@settings(deadline=None, max_examples=40)
@given(
    arrays.arrays(np.uint8, (5, 7, 3), elements=st.integers(0, 255)),
    arrays.arrays(np.uint8, (6, 3), elements=st.integers(0, 255), unique=False),
)
def test_every_pixel_gets_a_colour_that_none_is_nearer_than(picture: np.ndarray, colours: np.ndarray) -> None:
    palette = Palette(np.unique(colours, axis=0))
    for _ in range(2):  # looked up, then remembered
        found = palette.colours[palette.nearest(picture)].astype(int)
        distance = ((picture[:, :, None].astype(int) - palette.colours.astype(int)) ** 2).sum(axis=-1)
        assert np.array_equal(((found - picture) ** 2).sum(axis=-1), distance.min(axis=-1))

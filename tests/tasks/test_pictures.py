"""Rows with pictures become pixels of one size, scaled as a model reads them."""

import dataclasses

import numpy as np
import pytest
import torch

from formary.data.images import data_uri
from formary.errors import DataError
from formary.model.config import ModelConfig, TransformerConfig
from formary.tasks.pictures import PictureReader, spread

_RNG = np.random.default_rng(5)


def _rows(count, shape=(6, 8, 3)):
    return [{"image": data_uri(_RNG.integers(0, 256, shape, dtype=np.uint8))} for _ in range(count)]


def test_pictures_of_any_size_become_one_batch():
    reader = PictureReader(4, 1, (0.5,), (0.25,))
    pictures = reader.read([*_rows(2), *_rows(1, (4, 4, 1))], "row")
    assert [picture.shape for picture in pictures] == [(4, 4, 1)] * 3
    batch = reader.pixels(pictures)
    assert batch.shape == (3, 1, 4, 4) and batch.dtype == torch.float32
    expected = (np.stack(pictures).transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25
    assert np.allclose(batch, expected, atol=1e-6)


def test_many_rows_keep_their_order():
    values = [np.full((2, 2, 1), number % 256, dtype=np.uint8) for number in range(1500)]
    pictures = PictureReader(2, 1, (0.0,), (1.0,)).read([{"image": data_uri(value)} for value in values], "row")
    assert np.array_equal(np.stack(pictures), np.stack(values))


def test_a_row_without_its_picture_is_named():
    rows = [*_rows(1), {"picture": "a.png"}]
    with pytest.raises(DataError, match=r"training row 2: field 'image' is missing.*data\.columns\.image"):
        PictureReader(4).read(rows, "training row")
    with pytest.raises(DataError, match=r"row 1: field 'image': /nowhere\.png: there is no such file"):
        PictureReader(4).read([{"image": "/nowhere.png"}], "row")


def test_the_spread_of_pictures_is_that_of_all_their_pixels():
    pictures = [_RNG.integers(0, 256, (3, 5, 3), dtype=np.uint8) for _ in range(7)]
    mean, std = spread(pictures)
    whole = np.concatenate([picture.reshape(-1, 3) for picture in pictures]) / 255
    assert np.allclose(mean, whole.mean(axis=0)) and np.allclose(std, whole.std(axis=0))
    assert spread([np.full((2, 2, 1), 255, dtype=np.uint8)]) == ((1.0,), (1.0,))


def test_what_a_reader_settles_makes_it_again():
    stack = TransformerConfig(layers=1, width=8, heads=1, causal=False, context=5)
    config = ModelConfig("encoder", stack, 0, head="none", image_size=8, patch_size=4, channels=1)
    reader = PictureReader(8, 1, (0.2,), (0.3,), positions=5)
    settled = dataclasses.replace(config, image_mean=reader.mean, image_std=reader.std)
    assert PictureReader.of_config(settled) == reader
    assert PictureReader.of_config(dataclasses.replace(config, channels=3)).std == (0.5, 0.5, 0.5)

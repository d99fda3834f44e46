"""Pictures change while a detector learns, and their boxes with them: whatever is drawn, boxes are around what they were."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.augment_boxes import varied
from formary.recipe.schema import AugmentImages

SIDE = 32


def scenes(seed, count=6):
    """Black pictures with grey rectangles, each of its own shade, and their boxes; labels are the shades."""
    rng = np.random.default_rng(seed)
    pictures, found = np.zeros((count, SIDE, SIDE, 1), dtype=np.uint8), []
    shade = 0
    for picture in pictures:
        corners, labels = [], []
        for column in range(0, SIDE, 16):
            for row in range(0, SIDE, 16):
                if rng.random() < 0.6:
                    shade += 7
                    (left, top), (wide, high) = rng.integers(2, 5, 2), rng.integers(6, 10, 2)
                    left, top = left + column, top + row
                    picture[top : top + high, left : left + wide] = 20 + shade % 230
                    corners.append([left, top, left + wide, top + high])
                    labels.append(20 + shade % 230)
        found.append((np.array(corners, np.float32).reshape(-1, 4) / SIDE, np.array(labels, np.int64)))
    return pictures, found


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
def test_boxes_stay_around_what_they_were_around(seed, crop, flip, mosaic):
    pictures, known = scenes(seed)
    asked = AugmentImages(crop=crop, flip=flip, mosaic=mosaic)
    before = pictures.copy()
    changed, found = varied(pictures, known, asked, np.random.default_rng(seed))
    assert changed.shape == pictures.shape and changed.dtype == np.uint8 and np.array_equal(before, pictures)
    for picture, (corners, labels) in zip(changed, found):
        assert len(corners) == len(labels) and corners.dtype == np.float32
        for (left, top, right, bottom), shade in zip(np.round(corners * SIDE).astype(int), labels):
            assert 0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE
            assert (picture[top:bottom, left:right] == shade).all()
    again, _ = varied(pictures, known, asked, np.random.default_rng(seed))
    assert np.array_equal(changed, again)


def test_nothing_asked_changes_nothing():
    pictures, known = scenes(1)
    changed, found = varied(pictures, known, AugmentImages(), np.random.default_rng(0))
    assert np.array_equal(changed, pictures) and all(a is b for (a, _), (b, _) in zip(found, known))


def test_a_mosaic_has_things_of_several_pictures():
    pictures, known = scenes(2, count=12)
    _, found = varied(pictures, known, AugmentImages(mosaic=1.0), np.random.default_rng(0))
    mixed = [set(labels.tolist()) - set(own.tolist()) for (_, labels), (_, own) in zip(found, known)]
    assert sum(bool(strange) for strange in mixed) >= 8


def test_what_is_cut_off_too_far_has_no_box():
    picture = np.zeros((1, SIDE, SIDE, 1), dtype=np.uint8)
    edge = (np.array([[0, 0, 0.125, 1]], np.float32), np.array([3]))
    counts = {len(varied(picture, [edge], AugmentImages(crop=3), np.random.default_rng(n))[1][0][1]) for n in range(30)}
    assert counts == {0, 1}

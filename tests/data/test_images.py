"""Pictures of every kind become upright 8-bit pixels; what cannot be read is named."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from formary.data.images import data_uri, decoded, fitted, is_data_uri, packed
from formary.errors import DataError

_RNG = np.random.default_rng(3)
_COLOURS = _RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def _file(folder, picture, name="a.png", **options):
    picture.save(folder / name, **options)
    return str(folder / name)


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)), st.booleans())
def test_a_data_uri_holds_the_same_pixels(grey, coloured):
    image = np.stack([grey, grey // 2, 255 - grey], axis=2) if coloured else grey[..., None]
    uri = data_uri(image)
    assert is_data_uri(uri)
    assert np.array_equal(decoded(uri, "row 1", channels=image.shape[2], paths=False), image)


def test_a_file_is_read_as_pillow_reads_it(tmp_path):
    path = _file(tmp_path, Image.fromarray(_COLOURS), "a.jpg", quality=90)
    assert np.array_equal(decoded(path, "row 1"), np.array(Image.open(path)))
    assert np.array_equal(decoded(packed((tmp_path / "a.jpg").read_bytes()), "row 1"), np.array(Image.open(path)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_converted(tmp_path, mode, channels):
    picture = Image.fromarray(_COLOURS).convert(mode)
    path = _file(tmp_path, picture, "a.jpg" if mode == "CMYK" else "a.png")
    image = decoded(path, "row 1", channels=channels)
    assert image.shape == (5, 7, channels) and image.dtype == np.uint8
    expected = np.array(Image.open(path).convert("RGB" if channels == 3 else "L"))
    assert np.abs(image.reshape(expected.shape).astype(int) - expected).max() <= 1


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    deep = np.array([[0, 255, 256], [32768, 65279, 65535]], dtype=np.uint16)
    path = _file(tmp_path, Image.fromarray(deep))
    assert decoded(path, "row 1", channels=1)[..., 0].tolist() == [[0, 0, 1], [128, 254, 255]]


def test_what_is_transparent_shows_white(tmp_path):
    clear = np.zeros((2, 2, 4), dtype=np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    image = decoded(_file(tmp_path, Image.fromarray(clear)), "row 1")
    assert image[0, 0].tolist() == [10, 20, 30] and image[1, 1].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    image = decoded(_file(tmp_path, palette, "p.png", transparency=0), "row 1")
    assert image[0].tolist() == [[255, 255, 255], [200, 0, 0]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_may_have_been_held_in_any_way(tmp_path, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _file(tmp_path, Image.fromarray(_COLOURS), exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(path)))
    assert np.array_equal(decoded(path, "row 1"), expected)


def test_a_picture_that_would_unpack_to_gigabytes_is_refused_before_it_does(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for side, said in ((8001, "8,001 x 8,001 pixels"), (10**6, "million")):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        (tmp_path / "bomb.png").write_bytes(content)
        with pytest.raises(DataError, match=rf"row 4: .*bomb\.png: .*{said}"):
            decoded(str(tmp_path / "bomb.png"), "row 4")


@given(st.integers(0, 400), st.sampled_from(["PNG", "JPEG"]))
def test_a_cut_off_picture_is_named_and_never_a_traceback(kept, kind):
    held = io.BytesIO()
    Image.fromarray(_RNG.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(held, kind)
    with pytest.raises(DataError, match="row 2: field 'image'"):
        decoded(packed(held.getvalue()[:kept]), "row 2: field 'image'")


@given(st.binary(max_size=60), st.integers(0, 300))
def test_damaged_bytes_give_pixels_or_an_error_that_names_the_row(noise, place):
    held = io.BytesIO()
    Image.fromarray(_COLOURS).save(held, "PNG")
    content = bytearray(held.getvalue())
    content[place : place + len(noise)] = noise
    try:
        assert decoded(packed(bytes(content)), "row 9").shape[2] == 3
    except DataError as error:
        assert str(error).startswith("row 9: ")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("/nowhere/a.png", "there is no such file"),
        (None, "empty"),
        (3, "int 3"),
        ("data:image/png;base64,???", "does not hold base64"),
        ("data:image/gif;base64,AAAA", "data:image/png;base64"),
        ("data:image/png;base64," + base64.b64encode(b"GIF89a").decode(), "not a PNG or JPEG"),
    ],
)
def test_what_is_no_picture_is_said(value, said):
    with pytest.raises(DataError, match=said):
        decoded(value, "row 1")


def test_a_path_is_not_followed_where_others_sent_it(tmp_path):
    path = _file(tmp_path, Image.fromarray(_COLOURS))
    with pytest.raises(DataError, match="send the picture itself"):
        decoded(path, "inputs[0].image", paths=False)


def test_other_formats_are_not_opened(tmp_path):
    path = _file(tmp_path, Image.fromarray(_COLOURS), "a.gif")
    with pytest.raises(DataError, match="not a PNG or JPEG"):
        decoded(path, "row 1")


def test_pictures_are_fitted_as_pillow_resizes_them():
    expected = np.array(Image.fromarray(_COLOURS).resize((4, 4), Image.Resampling.BILINEAR))
    assert np.array_equal(fitted(_COLOURS, 4), expected)
    assert fitted(_COLOURS[..., :1], 6).shape == (6, 6, 1)
    square = np.zeros((3, 3, 3), dtype=np.uint8)
    assert fitted(square, 3) is square


@pytest.mark.parametrize("shape", [(6, 10, 3), (11, 4, 1), (5, 5, 3)])
def test_the_middle_of_a_picture_is_cut_out_as_clip_does(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    side = min(shape[:2])
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    middle = image[top : top + side, left : left + side]
    assert np.array_equal(fitted(image, side, cut=True), middle)
    assert np.array_equal(fitted(image, 8, cut=True), fitted(middle, 8))


def test_a_large_picture_is_shown_small():
    image = decoded(data_uri(np.zeros((100, 50, 3), dtype=np.uint8), longest=20), "row 1")
    assert image.shape == (20, 10, 3)

"""Pictures in rows become pixels, and pixels become a value of a row again: PNG and JPEG, read through Pillow.

A value is the path of a file or a data URI. Whatever stands in a file, its pixels are 8 bits a channel, upright, and of as
many channels as a model reads. How a task reads pictures of one size is `tasks.pictures`' business.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.errors import DataError, MissingExtra

Pixels = NDArray[np.uint8]
"""(height, width, channels)"""

MOST_PIXELS = 64_000_000
"""A picture of more is refused before it is unpacked: a few kilobytes can pretend to be gigabytes."""

SUFFIXES = (".png", ".jpg", ".jpeg")
"""Of the files that hold pictures."""

_FORMATS = ("PNG", "JPEG")
_DATA_URI = re.compile(r"data:image/(?:png|jpe?g);base64,", re.IGNORECASE)
_MODES = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112  # of EXIF: how the camera was held, 1 to 8
_WHITE = 255


def decoded(value: Any, where: str, *, channels: int = 3, paths: bool = True, most_pixels: int = MOST_PIXELS) -> Pixels:
    """The pixels of a picture, (height, width, channels).

    Grey, palette, CMYK and 16-bit pictures are converted; what is transparent shows white; a camera's orientation is
    followed.

    Args:
        value: the path of a PNG or JPEG file, or its content as a data URI (data:image/png;base64,...).
        where: what errors call it, such as "row 3: field 'image'".
        channels: 3 for colours, 1 for grey.
        paths: whether a path is followed; not where the value was sent by others.
        most_pixels: a picture of more is refused before it is unpacked.

    Raises:
        DataError: there is no such file, it is damaged or of another format, or it has too many pixels.
        MissingExtra: Pillow is not installed.
    """
    if not isinstance(value, str) or not value:
        named = "the path of a PNG or JPEG file or a data URI" if paths else "a data URI (data:image/png;base64,...)"
        raise DataError(f"{where}: a picture is {named}, not {_kind(value)}")
    inside = _DATA_URI.match(value)
    if inside:
        return _decoded(_content(value, inside.end(), where), where, channels, most_pixels)
    if not paths or value.startswith("data:"):
        raise DataError(
            f"{where}: send the picture itself, as data:image/png;base64,... or data:image/jpeg;base64,... "
            f"(this begins with {value[:30]!r})"
        )
    return _decoded(Path(value), f"{where}: {value}", channels, most_pixels)


def size_of(value: Any, where: str) -> tuple[int, int]:
    """Width and height of a picture, upright, in pixels; of its content only the beginning is read.

    Raises:
        DataError: as `decoded`, as far as the beginning tells.
    """
    inside = _DATA_URI.match(value) if isinstance(value, str) else None
    source = _content(value, inside.end(), where) if inside else Path(str(value))
    with _opened(source, where) as picture:
        width, height = picture.size
        return (height, width) if picture.getexif().get(_ORIENTATION) in (5, 6, 7, 8) else (width, height)


def fitted(image: Pixels, size: int, *, cut: bool = False) -> Pixels:
    """A picture stretched or shrunk to a square of `size` pixels, (size, size, channels), bilinearly as ViT's are.

    Args:
        cut: take the square in the middle instead of stretching, as CLIP's are.
    """
    if image.shape[:2] == (size, size):
        return image
    if cut:
        height, width = image.shape[:2]
        side = min(height, width)
        image = image[(height - side) // 2 :][:side, (width - side) // 2 :][:, :side]
    return _pixels(_picture(image).resize((size, size), _pillow().Resampling.BILINEAR), image.shape[2])


def data_uri(image: NDArray[Any], *, longest: int | None = None) -> str:
    """A picture as a value of a row, or of a page: a PNG as a data URI.

    Args:
        image: (height, width), (height, width, 1) or (height, width, 3), uint8.
        longest: side in pixels to which a larger picture is shrunk.
    """
    picture, held = _picture(image), io.BytesIO()
    if longest is not None:
        picture.thumbnail((longest, longest))
    picture.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def packed(content: bytes) -> str:
    """The bytes of a PNG or JPEG file as a data URI; what they hold is not looked at."""
    kind = "jpeg" if content[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def is_data_uri(value: Any) -> bool:
    """Whether a value holds a picture itself, and not the name of its file."""
    return isinstance(value, str) and _DATA_URI.match(value) is not None


def _content(value: str, start: int, where: str) -> io.BytesIO:
    try:
        return io.BytesIO(base64.b64decode(value[start:], validate=True))
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the data URI does not hold base64 ({error})") from error


def _decoded(source: Path | io.BytesIO, name: str, channels: int, most_pixels: int) -> Pixels:
    with _opened(source, name, most_pixels) as picture:
        picture.load()
        return _pixels(_upright(picture), channels)


@contextmanager
def _opened(source: Path | io.BytesIO, name: str, most_pixels: int = MOST_PIXELS) -> Iterator[Any]:
    """A picture of which only the beginning was read; whatever goes wrong with it is worded."""
    pillow = _pillow()
    try:
        with pillow.open(source, formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > most_pixels:
                raise DataError(_too_large(name, f"{width:,} x {height:,} pixels", most_pixels))
            yield picture
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no such file") from error
    except pillow.DecompressionBombError as error:
        raise DataError(_too_large(name, "its pixels", most_pixels)) from error
    except pillow.UnidentifiedImageError as error:
        raise DataError(f"{name}: not a PNG or JPEG picture, or damaged where it begins") from error
    except Exception as error:  # Pillow's readers raise nearly anything on bytes that are not what they should be
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{name}: the picture cannot be read ({reason}); it may be cut off or damaged") from error


def _too_large(name: str, size: str, most: int) -> str:
    allowed = f"{most // 10**6} million" if most >= 10**6 else f"{most:,}"
    return f"{name}: {size} are more than the {allowed} that are read; make the picture smaller"


def _upright(picture: Any) -> Any:
    """As it was seen, whichever way the camera was held."""
    turns = _pillow().Transpose
    how = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    try:
        turn = how.get(picture.getexif().get(_ORIENTATION))
    except Exception:  # broken notes of a camera do not spoil a picture
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _pixels(picture: Any, channels: int) -> Pixels:
    if picture.mode.startswith("I"):  # 16 bits, of which the upper 8 are kept
        deep = np.asarray(picture).astype(np.int64).clip(0, 2**16 - 1)
        picture = _pillow().fromarray((deep >> 8).astype(np.uint8))
    if "A" in picture.mode or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        ground = _pillow().new("RGBA", seen.size, (_WHITE,) * 4)
        picture = _pillow().alpha_composite(ground, seen).convert("RGB")
    pixels = np.array(picture.convert(_MODES[channels]), dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels)


def _picture(image: NDArray[Any]) -> Any:
    flat = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    return _pillow().fromarray(np.ascontiguousarray(flat, dtype=np.uint8))


@cache
def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("vision", "reading pictures") from error
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # below its limit ours is lower
    return Image


def _kind(value: Any) -> str:
    return "empty" if value in (None, "") else f"{type(value).__name__} {value!r:.40}"

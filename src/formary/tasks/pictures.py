"""How tasks read pictures: decoded, fitted to one size, and as a batch of pixels scaled as a model expects them.

Shared by the tasks whose rows have pictures, as `tasks.reading` is by those with texts. Between reading and a batch pictures
stay 8-bit numbers, a quarter of the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from formary.data.augment_images import varied
from formary.data.images import Pixels, data_uri, decoded, fitted, is_data_uri
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError
from formary.model.config import ModelConfig, Topology
from formary.recipe.schema import AugmentImages, Recipe, Train
from formary.tasks.models import picture_config
from formary.tasks.protocol import Example, Row

SENT = "sent_size"
"""Column in which a row says how large its picture was, where it was made small on its way."""

_MEASURED = 2000
_THUMBNAIL = 96  # pixels of a picture's longer side in a report
_MOST_NUMBERS = 60_000_000  # that a baseline looks at: of more rows it sees smaller pictures
_LARGEST = 32  # side in pixels of what a baseline sees
_TOGETHER = 1024  # pictures that are decoded at a time, by several threads


@dataclass(frozen=True)
class PictureReader:
    """Reads pictures for models of one size of input.

    Args:
        size: side of the square that a model reads, in pixels.
        channels: 3 for colours, 1 for grey.
        mean, std: by channel, of pixels from 0 to 1: what is taken off and what the rest is divided by.
        column: of the rows, that holds the picture.
        positions: vectors that a model makes of a picture.
        cut: whether the square in the middle is read of a picture, which is else stretched to a square.
    """

    size: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    column: str = "image"
    positions: int = 0
    cut: bool = False

    @classmethod
    def of_config(cls, config: ModelConfig) -> Self:
        """The reader for a model; what it does not say of the scale of pixels is 0.5, as for Google's ViT."""
        assert config.image_size is not None
        half = (0.5,) * config.channels
        positions = (config.encoder or config.transformer).context
        return cls(
            config.image_size,
            config.channels,
            config.image_mean or half,
            config.image_std or half,
            positions=positions,
            cut=config.image_cut,
        )

    @classmethod
    def learned(
        cls, recipe: Recipe, tokenizer: Tokenizer, topology: Topology, rows: Sequence[Row], start: ModelConfig | None
    ) -> Self:
        """The reader of the model that a recipe trains: a loaded one's own, else one measured on the training rows."""
        if start is not None:
            return cls.of_config(start)
        return cls.of_config(picture_config(recipe, tokenizer, topology)).measured(rows, "training row")

    def measured(self, rows: Sequence[Row], where: str) -> Self:
        """The same reader with the mean and spread of these rows' pixels (of 2,000 of them, where there are more)."""
        chosen = [rows[place * len(rows) // _MEASURED] for place in range(_MEASURED)] if len(rows) > _MEASURED else rows
        mean, std = spread(self.read(chosen, where))
        return replace(self, mean=mean, std=std)

    def read(self, rows: Sequence[Row], where: str) -> list[Pixels]:
        """The pictures of rows, each (size, size, channels).

        Raises:
            DataError: a row has no picture, or one that cannot be read; it is called `where` and its number, from 1.
        """
        return [picture for picture, _ in self.sized(rows, where)]

    def read_at(self, rows: Sequence[Row], places: Sequence[str]) -> list[Pixels]:
        """The same, each row called its place in errors."""
        return [picture for picture, _ in self._sized(rows, places)]

    def sized(self, rows: Sequence[Row], where: str) -> list[tuple[Pixels, tuple[int, int]]]:
        """The same with the width and height that each picture had, in pixels."""
        return self._sized(rows, [f"{where} {number}" for number in range(1, len(rows) + 1)])

    def _sized(self, rows: Sequence[Row], places: Sequence[str]) -> list[tuple[Pixels, tuple[int, int]]]:
        found: list[tuple[Pixels, tuple[int, int]]] = []
        with ThreadPoolExecutor() as threads:
            for start in range(0, len(rows), _TOGETHER):
                stop = start + _TOGETHER
                found += threads.map(self._one, rows[start:stop], places[start:stop])
        return found

    def one(self, row: Row, place: str) -> Pixels:
        """The picture of a row, (size, size, channels); in errors the row is called `place`."""
        return self._one(row, place)[0]

    def _one(self, row: Row, place: str) -> tuple[Pixels, tuple[int, int]]:
        if self.column not in row:
            raise DataError(
                f"{place}: field '{self.column}' is missing; map another column with data.columns.{self.column}"
            )
        place = f"{place}: field '{self.column}'"
        whole = decoded(row[self.column], place, channels=self.channels)
        return fitted(whole, self.size, cut=self.cut), tuple(row.get(SENT) or (whole.shape[1], whole.shape[0]))

    def received(
        self, values: Sequence[Any], places: Sequence[str], *, most_pixels: int
    ) -> list[tuple[str, tuple[int, int]]]:
        """Pictures that others sent, checked and of the size that is read, as small data URIs; paths are refused.

        With each comes the width and height that it was sent with, for `SENT`.

        Args:
            values: data URIs.
            places: what errors call each.
            most_pixels: of all of them together, so that a few kilobytes cannot ask for gigabytes.

        Raises:
            DataError: one is no picture, is broken, or has too many pixels.
        """
        found = []
        for value, place in zip(values, places, strict=True):
            picture = decoded(value, place, channels=self.channels, paths=False, most_pixels=most_pixels)
            most_pixels -= picture.shape[0] * picture.shape[1]
            found.append((data_uri(fitted(picture, self.size, cut=self.cut)), (picture.shape[1], picture.shape[0])))
        return found

    def flat(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """(rows, numbers) from 0 to 1, of large pictures or very many those of shrunk ones, for a baseline to look at."""
        side = min(self.size, _LARGEST)
        while side > 4 and len(rows) * side * side * self.channels > _MOST_NUMBERS:
            side //= 2
        small = np.stack([fitted(picture, side).reshape(-1) for picture in self.read(rows, "row")])
        return small.astype(np.float32) / np.float32(255)

    def changed(self, examples: Sequence[Example], augment: AugmentImages, rng: np.random.Generator) -> Tensor:
        """The pixels of examples' pictures (batch, channels, size, size), changed as `train.augment` says."""
        return self.pixels(list(varied(np.stack([example.inputs for example in examples]), augment, rng)))

    def pixels(self, pictures: Sequence[Pixels]) -> Tensor:
        """Pictures as a network reads them: (batch, channels, size, size), mean taken off and divided by std."""
        whole = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
        mean, std = (torch.tensor(of).view(1, -1, 1, 1) for of in (self.mean, self.std))
        return (whole / 255 - mean) / std


@dataclass(frozen=True)
class Origin:
    """How the data that a model learned from called things, so that later data of the same make needs no telling.

    Args:
        columns: our name -> theirs.
        names: what labels are called that are numbers.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Self:
        return cls(dict(recipe.data.columns), tuple(recipe.data.names))

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> Self:
        return cls(dict(settings.get("columns", {})), tuple(settings.get("names", ())))

    def settings(self) -> dict[str, Any]:
        """For the model's folder; nothing where nothing was said."""
        said = {"columns": dict(self.columns), "names": list(self.names)}
        return {name: value for name, value in said.items() if value}


def picture_rng(train: Train, step: int) -> np.random.Generator:
    """What the changes to the pictures of a training step are drawn from: the same whenever it is done."""
    return np.random.default_rng([train.seed, step, 11])


def spread(pictures: Iterable[Pixels]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over pictures, of pixels from 0 to 1; a constant one deviates by 1."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for picture in pictures:
        flat = picture.reshape(-1, picture.shape[-1]).astype(np.float64) / 255
        count, total, squares = count + len(flat), total + flat.sum(axis=0), squares + (flat**2).sum(axis=0)
    mean = total / max(1, count)
    std = np.sqrt(np.maximum(squares / max(1, count) - mean**2, 0.0))
    return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())


def thumbnail(row: Row, column: str = "image") -> str:
    """The picture of a row, small, as a data URI."""
    return data_uri(decoded(row[column], "row"), longest=_THUMBNAIL)


def worded(row: Row, column: str = "image") -> str:
    """What stands for a picture where a line is written about it: its path, from the current folder if it lies in it."""
    value = row.get(column)
    if not isinstance(value, str) or is_data_uri(value):
        return "a picture"
    here = Path.cwd()
    return str(Path(value).relative_to(here)) if Path(value).is_relative_to(here) else value


def named(row: Mapping[str, Any]) -> str:
    """What stands for a row with a picture where rows are compared: the hash of the picture's file (`RowForm.text`)."""
    value = row["image"]
    content = value.encode() if is_data_uri(value) else _content(str(value))
    return f"picture {xxhash.xxh3_128_hexdigest(content)}"


def unreadable(row: Mapping[str, Any]) -> str | None:
    """Why the picture of a row cannot be read; None where it can (`RowForm.unreadable`)."""
    try:
        decoded(row.get("image"), "the picture")
    except DataError as error:
        return str(error).removeprefix("the picture: ")
    return None


@lru_cache(maxsize=1)
def _content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # it is left out as unreadable
        return path.encode()

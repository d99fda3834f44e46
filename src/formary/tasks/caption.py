"""Captions of pictures: an encoder reads patches, a decoder with cross-attention writes (Vinyals et al. 2015; Li et al. 2023).

How a text is written, cut and scored is `translate`'s; here is only what is read instead of a source text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from formary.data import tokenizer as tokenizers
from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError, RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.heads import LanguageHead
from formary.model.topologies import EncoderDecoder, Network
from formary.recipe.schema import Recipe
from formary.tasks.cross_entropy import IGNORED, cross_entropy
from formary.tasks.models import picture_config
from formary.tasks.pictures import Origin, PictureReader, named, picture_rng, thumbnail, unreadable, worded
from formary.tasks.protocol import Batch, Example, Prompt, Row, Source
from formary.tasks.reading import padded, place_of, text_of
from formary.tasks.translate import Translate

NO_SOURCE = "a picture"
"""What stands for a picture where texts are compared."""


class Caption(Translate):
    """A text for a picture."""

    name = "caption"
    embedder: ClassVar[str] = "patches"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder_decoder",)
    form: ClassVar[RowForm] = RowForm(
        columns=("image", "caption"), text=named, files=("image",), unreadable=unreadable, alike=False
    )
    augments: ClassVar[tuple[str, ...]] = ("crop", "flip", "operations", "erase")
    asks: ClassVar[tuple[str, ...]] = ("image",)
    pictures: PictureReader
    origin: Origin

    @classmethod
    def vocabulary(cls, recipe: Recipe, rows: Sequence[Row]) -> Tokenizer:
        """The recipe's tokenizer, of the captions alone."""
        captions = (text_of(row, "caption", f"training row {number}") for number, row in enumerate(rows, 1))
        return tokenizers.train(captions, recipe.data.tokenizer, task="denoise")

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        task = super().learn(recipe, tokenizer, rows, start=start)
        task.pictures = PictureReader.learned(recipe, tokenizer, "encoder_decoder", rows, start)
        task.origin = Origin.of_recipe(recipe)
        return task

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        task = super().of_model(config, tokenizer, settings)
        task.pictures = PictureReader.of_config(config)
        task.origin = Origin.of_settings(settings)
        return task

    def settings(self) -> dict[str, Any]:
        return super().settings() | self.origin.settings()

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(picture_config(self.recipe, self.tokenizer, "encoder_decoder"))

    def head(self, config: ModelConfig) -> ModelConfig:
        if config.embedder != "patches" or config.encoder is None:
            raise RecipeError("model: task caption needs an encoder-decoder whose encoder reads pictures")
        config = super().head(config)
        return dataclasses.replace(config, image_mean=self.pictures.mean, image_std=self.pictures.std)

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        pictures = self.pictures.read(rows, where)
        if not targets:
            return [Example(picture, row=number) for number, picture in enumerate(pictures)]
        places = [place_of(row, f"{where} {number}") for number, row in enumerate(rows, 1)]
        written = self._targets([text_of(row, "caption", place) for row, place in zip(rows, places)])
        return [
            Example(picture, target=target, row=number)
            for number, (picture, target) in enumerate(zip(pictures, written))
        ]

    def collate(self, examples: Sequence[Example]) -> Batch:
        pixels = self.pictures.pixels([example.inputs for example in examples])
        written = all(example.target is not None for example in examples)
        return {"pixels": pixels} | (self._captions(examples) if written else {})

    def training_batch(self, examples: Sequence[Example], step: int) -> Batch:
        """What a training step learns from: the pictures changed as `train.augment` says, the same at every resume."""
        assert self.recipe is not None
        train = self.recipe.train
        pixels = self.pictures.changed(examples, train.augment, picture_rng(train, step))
        return {"pixels": pixels} | self._captions(examples)

    def _captions(self, examples: Sequence[Example]) -> Batch:
        """What the decoder reads and what it is to write, each (batch, longest)."""
        pad, start = self.tokenizer.pad_id or 0, self.start_id
        assert start is not None
        begun = [np.insert(example.target[:-1], 0, start) for example in examples]
        targets = padded([example.target for example in examples], IGNORED)
        return {"decoder_tokens": padded(begun, pad), "targets": targets}

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the caption's tokens and its end."""
        assert isinstance(network, EncoderDecoder) and isinstance(network.head, LanguageHead)
        hidden = network(batch["pixels"], batch["decoder_tokens"])
        smoothing = self.smoothing if network.training else 0.0
        return cross_entropy(network.head, hidden, batch["targets"], smoothing=smoothing)

    def prompt(self, row: Row, where: str) -> Prompt:
        picture = self.pictures.one(row, where)
        return Source(self.pictures.pixels([picture])[0], self.pictures.positions)

    def pair(self, row: Row) -> dict[str, Any]:
        """A row as the measures of texts take it."""
        caption = row.get("caption")
        if caption is not None and not isinstance(caption, str):
            raise DataError(f"field 'caption' holds {type(caption).__name__} {caption!r:.40}, not a text")
        return {"source": NO_SOURCE, "target": caption}

    def worded(self, row: Row) -> str:
        """What stands for a row in a line of text."""
        return worded(row)

    def thumbnail(self, row: Row) -> str:
        """The picture of a row, small, as a data URI."""
        return thumbnail(row)

"""Classification of pictures: one label, several labels, or a number (ViT, Dosovitskiy et al. 2021; DeiT, Touvron et al. 2021).

What an answer is, its loss and its form are `classify`'s; here is how pictures are read, and changed while they are learned.
The label is read from a class token, as in the checkpoints of Hugging Face, or from the mean over all patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from formary.data.augment_images import partners
from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer, wordless
from formary.model.config import ModelConfig, Topology
from formary.recipe.schema import Recipe
from formary.tasks.classify import Classify, label_of
from formary.tasks.models import picture_config, with_label_head
from formary.tasks.pictures import Origin, PictureReader, named, picture_rng, thumbnail, unreadable, worded
from formary.tasks.protocol import Batch, Example, Row


class ClassifyImage(Classify):
    """One label, several, or a number for each picture."""

    name = "classify_image"
    embedder: ClassVar[str] = "patches"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder",)
    features_are: ClassVar[str] = "pixels"
    form: ClassVar[RowForm] = RowForm(
        columns=("image", "label"),
        text=named,
        files=("image",),
        unreadable=unreadable,
        alike=False,
        check=lambda row, where: label_of(row, where),
    )
    augments: ClassVar[tuple[str, ...]] = ("crop", "flip", "operations", "erase", "mixup")
    asks: ClassVar[tuple[str, ...]] = ("image",)
    pictures: PictureReader
    origin: Origin

    @classmethod
    def vocabulary(cls, recipe: Recipe, rows: Sequence[Row]) -> Tokenizer:
        """No words are read."""
        return wordless()

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        task = super().learn(recipe, tokenizer, rows, start=start)
        task.pictures = PictureReader.learned(recipe, tokenizer, "encoder", rows, start)
        task.origin = Origin.of_recipe(recipe)
        return task

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        task = super().of_model(config, tokenizer, settings)
        task.pictures = PictureReader.of_config(config)
        task.origin = Origin.of_settings(settings)
        return task

    def settings(self) -> dict[str, Any]:
        return self.origin.settings()

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(picture_config(self.recipe, self.tokenizer, "encoder"))

    def head(self, config: ModelConfig) -> ModelConfig:
        asked = self.recipe.model.switches.get("pooling") if self.recipe else None
        return dataclasses.replace(
            with_label_head(config, self.tokenizer, self.name, head="classify", labels=self.labels),
            problem=self.kind,
            pooling=asked or ("first" if config.class_tokens else "mean"),
            image_mean=self.pictures.mean,
            image_std=self.pictures.std,
        )

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        answers = [self._target(row, f"{where} {n}") if targets else None for n, row in enumerate(rows, 1)]
        pictures = self.pictures.read(rows, where)
        return [Example(picture, None, answer, row=n) for n, (picture, answer) in enumerate(zip(pictures, answers))]

    def collate(self, examples: Sequence[Example]) -> Batch:
        pixels = self.pictures.pixels([example.inputs for example in examples])
        return {"pixels": pixels} | self._targets(examples)

    def training_batch(self, examples: Sequence[Example], step: int) -> Batch:
        """What a training step learns from: the pictures changed as `train.augment` says, the same at every resume."""
        assert self.recipe is not None
        augment, rng = self.recipe.train.augment, picture_rng(self.recipe.train, step)
        batch = {"pixels": self.pictures.changed(examples, augment, rng)} | self._targets(examples)
        if augment.mixup and len(examples) > 1:
            others, own = partners(len(examples), augment.mixup, rng)
            share, order = torch.from_numpy(own), torch.from_numpy(others)
            targets = batch["targets"]
            if self.kind == "single":
                targets = F.one_hot(targets, len(self.labels)).float()
            for name, values in (("pixels", batch["pixels"]), ("targets", targets)):
                kept = share.view(-1, *[1] * (values.dim() - 1))
                batch[name] = kept * values + (1 - kept) * values[order]
        return batch

    def features(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """(rows, numbers): the pixels, of large pictures or very many shrunk ones, for a baseline to learn from."""
        return self.pictures.flat(rows)

    def worded(self, row: Row) -> str:
        """What stands for a row in a line of text."""
        return worded(row)

    def thumbnail(self, row: Row) -> str:
        """The picture of a row, small, as a data URI."""
        return thumbnail(row)

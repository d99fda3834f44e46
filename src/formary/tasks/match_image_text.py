"""Pictures and texts that belong together get vectors that point the same way (CLIP, Radford et al. 2021).

Learned from pairs by contrast with the rest of the batch, both ways (section 2.3). So texts are found for pictures, pictures
for texts, and classes by texts that name them, which no picture was ever labelled with (section 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from formary.data import tokenizer as tokenizers
from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError, RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.topologies import Network, TwoTowers
from formary.recipe.schema import Recipe
from formary.tasks.embed import check_contrast, contrast, same_rows
from formary.tasks.models import context_of, picture_config
from formary.tasks.pictures import Origin, PictureReader, named, picture_rng, thumbnail, unreadable, worded
from formary.tasks.protocol import Answer, Answers, Batch, Example, Precision, Progress, Row
from formary.tasks.reading import Reader, collated, outputs, text_of

_POOLINGS = ("first", "mean", "last")


class MatchImageText:
    """A vector for each picture and each text, in one space."""

    name = "match_image_text"
    embedder: ClassVar[str] = "patches"
    topologies: ClassVar[tuple[Topology, ...]] = ("two_towers",)
    form: ClassVar[RowForm] = RowForm(
        columns=("image", "text"), text=named, files=("image",), unreadable=unreadable, alike=False
    )
    augments: ClassVar[tuple[str, ...]] = ("crop", "flip", "operations", "erase")
    asks: ClassVar[tuple[str, ...]] = ("text",)
    asks_any: ClassVar[bool] = True  # a row may have a picture, a text, or both
    answers: ClassVar[Answers] = "retrieval"
    contrasts: ClassVar[bool] = True  # the rows of a forward pass with one another, so pieces of a batch teach less

    def __init__(
        self,
        tokenizer: Tokenizer,
        pictures: PictureReader,
        *,
        context: int,
        origin: Origin,
        recipe: Recipe | None = None,
    ) -> None:
        self.tokenizer, self.pictures, self.context = tokenizer, pictures, context
        self.origin, self.recipe = origin, recipe
        self.reader = Reader(tokenizer, context)

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return "masked_lm"

    @classmethod
    def vocabulary(cls, recipe: Recipe, rows: Sequence[Row]) -> Tokenizer:
        """The recipe's tokenizer, of the texts alone."""
        texts = (text_of(row, "text", f"training row {number}") for number, row in enumerate(rows, 1))
        return tokenizers.train(texts, recipe.data.tokenizer, task="masked_lm")

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        check_contrast(recipe, rows)
        train, pooling = recipe.train, recipe.model.switches.get("pooling", "last")
        if pooling not in _POOLINGS:
            raise RecipeError(f"model.switches.pooling: one of {', '.join(_POOLINGS)}, not {pooling!r}")
        pictures = PictureReader.learned(recipe, tokenizer, "two_towers", rows, start)
        context = train.context if start is None else min(train.context, start.context)
        return cls(tokenizer, pictures, context=context, origin=Origin.of_recipe(recipe), recipe=recipe)

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        _check(config)
        context, origin = context_of(config, settings), Origin.of_settings(settings)
        return cls(tokenizer, PictureReader.of_config(config), context=context, origin=origin)

    def settings(self) -> dict[str, Any]:
        return {"context": self.context} | self.origin.settings()

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(picture_config(self.recipe, self.tokenizer, "two_towers"))

    def head(self, config: ModelConfig) -> ModelConfig:
        _check(config)
        tokens = self.tokenizer  # of a text's end the id tells transformers which token's vector is the text's
        return dataclasses.replace(
            config,
            image_mean=self.pictures.mean,
            image_std=self.pictures.std,
            bos_id=_first(config.bos_id, tokens.bos_id, tokens.cls_id),
            eos_id=_first(config.eos_id, tokens.eos_id, tokens.sep_id),
            pad_id=_first(config.pad_id, tokens.pad_id),
        )

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        """One example for each row, its picture; its target is the text's tokens."""
        pictures = self.pictures.read(rows, where)
        if not targets:
            return [Example(picture, row=number) for number, picture in enumerate(pictures)]
        read = self.reader.read([text_of(row, "text", f"{where} {number}") for number, row in enumerate(rows, 1)])
        return [
            Example(picture, target=text.tokens, row=number)
            for number, (picture, text) in enumerate(zip(pictures, read))
        ]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pictures with their texts, where they have any, or texts alone."""
        if examples[0].inputs.ndim == 1:
            return collated(examples, self.tokenizer.pad_id)
        batch = {"pixels": self.pictures.pixels([example.inputs for example in examples])}
        return batch if examples[0].target is None else batch | self._texts(examples)

    def training_batch(self, examples: Sequence[Example], step: int) -> Batch:
        """What a training step learns from: the pictures changed as `train.augment` says, the same at every resume."""
        assert self.recipe is not None
        train = self.recipe.train
        pixels = self.pictures.changed(examples, train.augment, picture_rng(train, step))
        return {"pixels": pixels} | self._texts(examples)

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of finding a picture's text among those of the batch, and a text's picture; their mean.

        A text that occurs twice is no contrast to itself.
        """
        assert isinstance(network, TwoTowers)
        seen, read, scale = network(batch["pixels"], batch["tokens"], mask=batch["mask"])
        scores = (seen @ read.T).float() * scale
        return contrast(scores, same_rows(batch["tokens"])), torch.tensor(len(scores))

    def predict(
        self,
        network: Network,
        rows: Sequence[Row],
        *,
        precision: Precision = nullcontext,
        targets: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Answer]:
        """{"image_vector", "text_vector", "similarity"} of each row: of what it has, each of length 1; their cosine.

        A row with `candidates`, a list of texts, gets {"label", "probability", "probabilities"} of its picture instead: the
        softmax of the similarities as the model learned to scale them (Radford et al. 2021, section 3.1.2).
        """
        assert isinstance(network, TwoTowers)
        places = [f"row {number}" for number in range(1, len(rows) + 1)]
        offered = [_candidates(row, place) for row, place in zip(rows, places)]
        shown = [n for n, row in enumerate(rows) if row.get("image") is not None or targets or offered[n]]
        texts = [n for n, row in enumerate(rows) if not offered[n] and ("text" in row or targets or n not in shown)]
        asked = dict.fromkeys(label for labels in offered for label in labels)
        asked |= dict.fromkeys(text_of(rows[number], "text", places[number]) for number in texts)
        seen = self.pictures.read_at([rows[number] for number in shown], [places[number] for number in shown])
        pictures = [Example(picture, row=place) for place, picture in enumerate(seen)]
        read = self.reader.read(list(asked))
        known = [Example(text.tokens, text.types, row=number) for number, text in enumerate(read)]

        def answer(network: Network, batch: Batch) -> list[list[float]]:
            return self._vectors(network, batch).tolist()

        of_picture = outputs(self, network, pictures, answer, precision=precision, progress=progress)
        of_text = dict(zip(asked, outputs(self, network, known, answer, precision=precision, progress=progress)))
        found: list[Answer] = [{} for _ in rows]
        for number, vector in zip(shown, of_picture):
            if offered[number]:
                texts_of = {label: of_text[label] for label in offered[number]}
                found[number] = _chosen(vector, texts_of, float(network.scale.detach()))
            else:
                found[number]["image_vector"] = vector
        for number in texts:
            found[number]["text_vector"] = of_text[rows[number]["text"]]
        for answered in found:
            if len(answered) == 2:
                answered["similarity"] = float(np.dot(answered["image_vector"], answered["text_vector"]))
        return found

    def features(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """(rows, numbers): the pixels, for a baseline that looks for the most similar picture."""
        return self.pictures.flat(rows)

    def zero_shot(self, template: str, labels: Sequence[str]) -> ZeroShot:
        """This task as a classifier by texts: the template with each label in the place of `{label}`."""
        if "{label}" not in template:
            raise DataError(f"the text {template!r} has no place for the label: write {{label}} where it stands")
        task = ZeroShot(self.tokenizer, self.pictures, context=self.context, origin=self.origin)
        task.labels = tuple(labels)
        task.texts = {template.replace("{label}", label): label for label in task.labels}
        return task

    def worded(self, row: Row) -> str:
        """What stands for a row in a line of text."""
        return worded(row) if row.get("image") is not None else str(row.get("text"))

    def thumbnail(self, row: Row) -> str:
        """The picture of a row, small, as a data URI."""
        return thumbnail(row)

    def notes(self) -> list[str]:
        return self.reader.notes()

    def _texts(self, examples: Sequence[Example]) -> Batch:
        return collated([Example(example.target) for example in examples], self.tokenizer.pad_id)

    def _vectors(self, network: Network, batch: Batch) -> Tensor:
        """(batch, shared_width) of length 1, in float32."""
        assert isinstance(network, TwoTowers)
        if "pixels" in batch:
            return F.normalize(network.encode(batch["pixels"]).float(), dim=-1)
        return F.normalize(network.encode_text(batch["tokens"], mask=batch["mask"]).float(), dim=-1)


class ZeroShot(MatchImageText):
    """The labels of pictures by texts that name them, none of which the model was trained to tell."""

    form: ClassVar[RowForm] = RowForm(
        columns=("image", "label"), text=named, files=("image",), unreadable=unreadable, alike=False
    )
    asks: ClassVar[tuple[str, ...]] = ("image",)
    asks_any: ClassVar[bool] = False
    answers: ClassVar[Answers] = "labels"
    kind = "single"
    labels: tuple[str, ...] = ()
    texts: Mapping[str, str]  # the label that each names

    def predict(
        self,
        network: Network,
        rows: Sequence[Row],
        *,
        precision: Precision = nullcontext,
        targets: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Answer]:
        """{"label", "probability", "probabilities"} of each row's picture."""
        asked = [{"image": row["image"], "candidates": list(self.texts)} for row in rows]
        answers = super().predict(network, asked, precision=precision, progress=progress)
        return [
            {
                "label": self.texts[answer["label"]],
                "probability": answer["probability"],
                "probabilities": {self.texts[text]: share for text, share in answer["probabilities"].items()},
            }
            for answer in answers
        ]


def _check(config: ModelConfig) -> None:
    if config.topology != "two_towers" or config.embedder != "patches":
        raise RecipeError(
            "model: task match_image_text needs two towers, one for pictures and one for texts, such as CLIP's"
        )


def _first(*given: int | None) -> int | None:
    return next((number for number in given if number is not None), None)


def _candidates(row: Row, place: str) -> list[str]:
    """The texts that a row offers for its picture; none where it offers nothing.

    Raises:
        DataError: they are not a list of two or more different texts.
    """
    given = row.get("candidates")
    if given is None:
        return []
    texts = isinstance(given, Iterable) and not isinstance(given, str) and all(isinstance(x, str) for x in given)
    if not texts or len(set(given)) < 2:
        raise DataError(f"{place}: field 'candidates' must be a list of two or more different texts, not {given!r:.80}")
    return list(dict.fromkeys(given))


def _chosen(vector: Sequence[float], texts: Mapping[str, Sequence[float]], scale: float) -> Answer:
    similar = torch.tensor(list(texts.values())) @ torch.tensor(vector)
    shares = dict(zip(texts, (similar * scale).softmax(dim=0).tolist()))
    best = max(shares, key=shares.__getitem__)
    return {"label": best, "probability": shares[best], "probabilities": shares}

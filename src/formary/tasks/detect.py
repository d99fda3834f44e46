"""Things in pictures: what they are and where (YOLOS, Fang et al. 2021; DETR, Carion et al. 2020).

Each detection token says a label, or nothing, and a box. Which token learns which box is found anew at every step: the
pairs that agree best with what the tokens say, each box once (Carion et al., section 3.1). Tokens that got no box learn to
say nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from formary.data.augment_boxes import Scene, varied
from formary.data.boxes import Boxes, boxes_of, coco_results
from formary.data.images import size_of
from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer, wordless
from formary.errors import DataError, RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.heads import DetectionHead
from formary.model.topologies import Encoder, Network
from formary.recipe.schema import Objective, Recipe
from formary.tasks.matching import NONE, centred, cornered, generalised_iou, lying, matched
from formary.tasks.models import picture_config
from formary.tasks.pictures import Origin, PictureReader, named, picture_rng, thumbnail, unreadable, worded
from formary.tasks.protocol import Answer, Answers, Batch, Example, Precision, Progress, Row
from formary.tasks.reading import outputs, place_of

MOST = 100
"""Boxes that an answer has at most, as many as COCO's metrics look at."""

_LEAST_SCORE = 0.001  # of a box in an answer


def _checked(row: Row, where: str) -> Boxes | None:
    """The boxes of a row, of whose picture only the beginning is looked at; None where it cannot be read."""
    try:
        size = size_of(row.get("image"), where)
    except DataError:  # it is left out as unreadable
        return None
    return boxes_of(row, where, size=size)


class Detect:
    """A label and a box for each thing in a picture."""

    name = "detect"
    embedder: ClassVar[str] = "patches"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder",)
    form: ClassVar[RowForm] = RowForm(
        columns=("image", "labels"), text=named, files=("image",), unreadable=unreadable, alike=False, check=_checked
    )
    augments: ClassVar[tuple[str, ...]] = ("crop", "flip", "mosaic")
    asks: ClassVar[tuple[str, ...]] = ("image",)
    answers: ClassVar[Answers] = "boxes"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        pictures: PictureReader,
        labels: Sequence[str],
        tokens: int,
        categories: Mapping[str, int] | None = None,
        origin: Origin | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.tokenizer, self.pictures, self.recipe = tokenizer, pictures, recipe
        self.labels, self.tokens = tuple(labels), tokens
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        self.categories = {label: number for number, label in enumerate(self.labels, 1)} | dict(categories or {})
        self.objective = recipe.train.objective if recipe else Objective()
        self.origin = origin or Origin()
        self.unseen: Counter[str] = Counter()
        self.crowded = 0  # pictures with more boxes than tokens

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return "masked_lm"

    @classmethod
    def vocabulary(cls, recipe: Recipe, rows: Sequence[Row]) -> Tokenizer:
        """No words are read."""
        return wordless()

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        known = [boxes_of(row, f"training row {number}") for number, row in enumerate(rows, 1)]
        labels = sorted({label for boxes in known for label in boxes.labels})
        if not labels:
            raise DataError("data.sources: no training row has a box, so there is nothing to learn to find")
        config = start or picture_config(recipe, tokenizer, "encoder")
        tokens = recipe.model.switches.get("detection_tokens") or config.detection_tokens
        if not tokens:
            raise RecipeError(
                "model.switches.detection_tokens: say how many things a picture can have at most (100 in YOLOS); "
                "preset yolos-mini has 20"
            )
        return cls(
            tokenizer,
            pictures=PictureReader.learned(recipe, tokenizer, "encoder", rows, start),
            labels=labels,
            tokens=tokens,
            categories={label: n for boxes in known for label, n in zip(boxes.labels, boxes.categories)},
            origin=Origin.of_recipe(recipe),
            recipe=recipe,
        )

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        numbered = {label: number for number, label in enumerate(config.labels)}  # as in COCO's own checkpoints
        return cls(
            tokenizer,
            pictures=PictureReader.of_config(config),
            labels=config.labels,
            tokens=config.detection_tokens,
            categories=settings.get("categories", numbered),
            origin=Origin.of_settings(settings),
        )

    def settings(self) -> dict[str, Any]:
        return {"categories": self.categories, **self.origin.settings()}

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(picture_config(self.recipe, self.tokenizer, "encoder"))

    def head(self, config: ModelConfig) -> ModelConfig:
        if config.embedder != "patches" or config.topology != "encoder":
            raise RecipeError("model: task detect needs an encoder that reads pictures, such as ViT or YOLOS")
        added = self.tokens - config.detection_tokens
        return dataclasses.replace(
            config,
            transformer=dataclasses.replace(config.transformer, context=config.context + added),
            head="detect",
            labels=self.labels,
            pooler=False,
            detection_tokens=self.tokens,
            image_mean=self.pictures.mean,
            image_std=self.pictures.std,
        )

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        found = []
        for number, (row, (picture, size)) in enumerate(zip(rows, self.pictures.sized(rows, where))):
            place = place_of(row, f"{where} {number + 1}")
            target = self._target(boxes_of(row, place, size=size), size) if targets else None
            found.append(Example(picture, target=target, row=number, memory=size))
        return found

    def _target(self, boxes: Boxes, size: tuple[int, int]) -> Scene:
        self.unseen.update(label for label in boxes.labels if label not in self.numbers)
        self.crowded += len(boxes.labels) > self.tokens
        taken = [n for n, label in enumerate(boxes.labels) if label in self.numbers and not boxes.crowd[n]]
        shares = (boxes.corners[taken] / np.array([*size, *size])).astype(np.float32)
        return shares, np.array([self.numbers[boxes.labels[n]] for n in taken], dtype=np.int64)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return self._batch([example.inputs for example in examples], [example.target for example in examples])

    def training_batch(self, examples: Sequence[Example], step: int) -> Batch:
        """What a training step learns from: pictures changed with their boxes, the same at every resume."""
        assert self.recipe is not None
        augment, rng = self.recipe.train.augment, picture_rng(self.recipe.train, step)
        pictures = np.stack([example.inputs for example in examples])
        changed, scenes = varied(pictures, [example.target for example in examples], augment, rng)
        return self._batch(list(changed), scenes)

    def _batch(self, pictures: list[Any], scenes: Sequence[Scene | None]) -> Batch:
        """Pixels, and where there are targets boxes (batch, most, 4) as the head says them and labels (batch, most)."""
        batch = {"pixels": self.pictures.pixels(pictures)}
        known = [scene for scene in scenes if scene is not None]
        if len(known) < len(pictures):
            return batch
        most = max(1, *(len(labels) for _, labels in known))
        boxes = torch.full((len(known), most, 4), 0.5)
        numbers = torch.full((len(known), most), NONE)
        for place, (corners, labels) in enumerate(known):
            boxes[place, : len(labels)] = centred(torch.from_numpy(corners))
            numbers[place, : len(labels)] = torch.from_numpy(labels)
        return batch | {"boxes": boxes, "labels": numbers}

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of each box: cross-entropy, L1 and generalised IoU of its token, and what the others say that should say nothing.

        A token that should say nothing weighs `train.objective.nothing` (Carion et al. 2020, eq. 2 and appendix A.2). While
        it learns, the head reads patches too, each of which should say what it lies in: much more is told of each picture,
        and what tokens look for stands in the patches in the head's own terms.
        """
        assert isinstance(network, Encoder) and isinstance(network.head, DetectionHead)
        hidden = network(batch["pixels"])
        logits, boxes = network.head(hidden)
        total = self._cost(
            logits.float(),
            boxes.float(),
            batch,
            *matched(logits.float(), boxes.float(), batch["boxes"], batch["labels"], weights=self.objective),
        )
        count = (batch["labels"] != NONE).sum().clamp(min=1)
        if network.training and self.objective.patches:
            first = network.config.class_tokens
            logits, boxes = network.head.said(hidden[:, first : -self.tokens])
            rows, patches, places = lying(batch["boxes"], batch["labels"], side=math.isqrt(logits.shape[1]))
            cost = self._cost(logits.float(), boxes.float(), batch, rows, patches, places)
            total = total + self.objective.patches * cost * count / max(1, len(rows))
        return total, count

    def _cost(
        self, logits: Tensor, boxes: Tensor, batch: Batch, rows: Tensor, vectors: Tensor, places: Tensor
    ) -> Tensor:
        """The summed loss when these vectors of these pictures should say the boxes in these places, all others nothing."""
        right = torch.full(logits.shape[:2], len(self.labels), device=logits.device)
        right[rows, vectors] = batch["labels"][rows, places]
        weights = logits.new_ones(logits.shape[-1])
        weights[-1] = self.objective.nothing
        total = F.cross_entropy(logits.transpose(1, 2), right, weight=weights, reduction="sum")
        said, true = boxes[rows, vectors], batch["boxes"][rows, places]
        total = total + self.objective.box_l1 * (said - true).abs().sum()
        return total + self.objective.box_giou * (1 - generalised_iou(cornered(said), cornered(true))).sum()

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
        """For each picture {"boxes": [{"label", "score", "box": [x, y, width, height]}]} in its pixels, the surest first.

        A token that is not sure of its label is there with each label, as in Deformable DETR (Zhu et al. 2021).
        """
        examples = self.examples(rows, targets=targets)

        def answer(network: Network, batch: Batch) -> list[Any]:
            assert isinstance(network, Encoder) and isinstance(network.head, DetectionHead)
            logits, boxes = (said.float() for said in network.head(network(batch["pixels"])))
            best = logits.softmax(dim=-1)[..., :-1].flatten(1).sort(dim=1, descending=True, stable=True)
            return list(
                zip(best.values[:, :MOST].cpu(), best.indices[:, :MOST].cpu(), cornered(boxes).clamp(0, 1).cpu())
            )

        said = outputs(self, network, examples, answer, precision=precision, progress=progress)
        return [
            self._answer(scores, places, corners, example.memory)
            for (scores, places, corners), example in zip(said, examples)
        ]

    def _answer(self, scores: Tensor, places: Tensor, corners: Tensor, size: tuple[int, int]) -> Answer:
        pixels = corners.double() * torch.tensor([*size, *size])
        pixels[:, 2:] -= pixels[:, :2]
        tokens, labels = places // len(self.labels), places % len(self.labels)
        found = zip(scores.tolist(), labels.tolist(), pixels[tokens].tolist())
        return {
            "boxes": [
                {"label": self.labels[label], "score": score, "box": [round(number, 2) for number in box]}
                for score, label, box in found
                if score >= _LEAST_SCORE
            ]
        }

    def results(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[Any]:
        """Answers as COCO has results."""
        return coco_results(rows, answers, self.categories)

    def worded(self, row: Row) -> str:
        """A row in one line: the file of its picture."""
        return worded(row)

    def thumbnail(self, row: Row) -> str:
        """The picture of a row, small, as a data URI."""
        return thumbnail(row)

    def notes(self) -> list[str]:
        said = []
        if self.unseen:
            listed = ", ".join(f"'{name}' ({count:,})" for name, count in self.unseen.most_common(5))
            said.append(f"labels that no training row has count as missed: {listed}")
        if self.crowded:
            said.append(
                f"{self.crowded:,} pictures have more boxes than the {self.tokens} detection tokens, which can find no "
                "more; raise model.switches.detection_tokens"
            )
        return said

"""Sentence vectors: texts that belong together get vectors that point the same way (Reimers and Gurevych 2019).

Learned from pairs by contrast with the rest of the batch (Henderson et al. 2017, section 4.4). There is no head: the
vector is the mean, or the first, of an encoder's hidden states, of length 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError, RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.heads import pooled
from formary.model.topologies import Encoder, Network
from formary.recipe.schema import Recipe
from formary.tasks.models import context_of, scratch_config
from formary.tasks.protocol import Answer, Answers, Batch, Example, Precision, Progress, Row
from formary.tasks.reading import Reader, Reading, collated, hidden_states, outputs, text_of

Pooling = Literal["first", "mean"]


class Embed:
    """A vector for each text."""

    name = "embed"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder",)
    form: ClassVar[RowForm] = RowForm(
        columns=("text", "positive"), text=lambda row: f"{row['text']}\n{row['positive']}"
    )
    asks: ClassVar[tuple[str, ...]] = ("text",)
    answers: ClassVar[Answers] = "vectors"
    contrasts: ClassVar[bool] = True  # the rows of a forward pass with one another, so pieces of a batch teach less

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: int,
        pooling: Pooling = "mean",
        temperature: float = 0.05,
        recipe: Recipe | None = None,
    ) -> None:
        self.tokenizer, self.context, self.recipe = tokenizer, context, recipe
        self.pooling, self.temperature = pooling, temperature
        self.reader = Reader(tokenizer, context)

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return "masked_lm"

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        check_contrast(recipe, rows)
        for number, row in enumerate(rows, 1):
            _texts(row, f"training row {number}")
        train = recipe.train
        pooling = recipe.model.switches.get("pooling", "mean")
        if pooling not in ("first", "mean"):
            raise RecipeError(f"model.switches.pooling: task embed takes mean or first, not {pooling!r}")
        return cls(
            tokenizer, context=train.context, pooling=pooling, temperature=train.objective.temperature, recipe=recipe
        )

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        _check(config)
        context = context_of(config, settings)
        return cls(tokenizer, context=context, pooling=settings.get("pooling", "mean"))

    def settings(self) -> dict[str, Any]:
        return {"context": self.context, "pooling": self.pooling}

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(scratch_config(self.recipe, self.tokenizer, "encoder"))

    def head(self, config: ModelConfig) -> ModelConfig:
        _check(config)
        return dataclasses.replace(
            config,
            head="none",
            labels=(),
            head_bias=False,
            pooling=self.pooling,
            pooler=False,
            next_sentence=False,
            tied_embeddings=True,
            pad_id=config.pad_id if config.pad_id is not None else self.tokenizer.pad_id,
        )

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        """One example for each row; its target is the readings of the positive and, where there is one, the negative."""
        if not targets:
            texts = [text_of(row, "text", f"{where} {number}") for number, row in enumerate(rows, 1)]
            return [_example(reading, number) for number, reading in enumerate(self.reader.read(texts))]
        parts = [_texts(row, f"{where} {number}") for number, row in enumerate(rows, 1)]
        anchors = self.reader.read([part[0] for part in parts])
        positives = self.reader.read([part[1] for part in parts])
        negatives = iter(self.reader.read([part[2] for part in parts if part[2] is not None]))
        return [
            dataclasses.replace(
                _example(anchor, number), target=(positive, next(negatives) if part[2] is not None else None)
            )
            for number, (part, anchor, positive) in enumerate(zip(parts, anchors, positives))
        ]

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = collated(examples, self.tokenizer.pad_id)
        if any(example.target is None for example in examples):
            return batch
        positives = [_example(example.target[0], example.row) for example in examples]
        batch |= {f"positive_{name}": made for name, made in collated(positives, self.tokenizer.pad_id).items()}
        if any(example.target[1] is not None for example in examples):
            # A row without a negative holds its positive there, and the place is not compared with.
            negatives = [_example(example.target[1] or example.target[0], example.row) for example in examples]
            batch |= {f"negative_{name}": made for name, made in collated(negatives, self.tokenizer.pad_id).items()}
            batch["negative_given"] = torch.tensor([example.target[1] is not None for example in examples])
        return batch

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of finding a text's positive among all of the batch, and the text of a positive; their mean.

        Negatives take part in the first of the two. A text or a positive that occurs twice is no contrast to itself.
        """
        texts, positives = self._vectors(network, batch), self._vectors(network, _part(batch, "positive"))
        count = len(texts)
        scores = texts @ positives.T / self.temperature  # (batch, batch)
        twice = same_rows(batch["tokens"]) | same_rows(batch["positive_tokens"])
        against = None
        if "negative_tokens" in batch:
            negatives = self._vectors(network, _part(batch, "negative"))
            against = (texts @ negatives.T / self.temperature).masked_fill(~batch["negative_given"][None], -torch.inf)
        found = contrast(scores, twice, against)
        return found, torch.tensor(count)

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
        """{"vector"} for each row's text, of length 1; also {"positive"}, its vector, where the row has that column."""
        if targets:
            for number, row in enumerate(rows, 1):
                _texts(row, f"row {number}")
        second = [number for number, row in enumerate(rows) if isinstance(row.get("positive"), str)]
        asked = [*rows, *({"text": rows[number]["positive"]} for number in second)]

        def answer(network: Network, batch: Batch) -> list[list[float]]:
            return self._vectors(network, batch).tolist()

        vectors = outputs(
            self, network, self.examples(asked, targets=False), answer, precision=precision, progress=progress
        )
        answers: list[Answer] = [{"vector": vector} for vector in vectors[: len(rows)]]
        for number, vector in zip(second, vectors[len(rows) :]):
            answers[number]["positive"] = vector
        return answers

    def notes(self) -> list[str]:
        return self.reader.notes()

    def _vectors(self, network: Network, batch: Batch) -> Tensor:
        """(batch, width) of length 1, in float32."""
        assert isinstance(network, Encoder)
        hidden = hidden_states(network, batch).float()
        return F.normalize(pooled(hidden, batch["mask"], self.pooling), dim=-1)


def _check(config: ModelConfig) -> None:
    if config.topology != "encoder" or not config.reads_text:
        kind = f"encoder of {config.embedder}" if not config.reads_text else config.topology.replace("_", "-")
        raise RecipeError(
            f"model: task embed needs an encoder of texts, such as MiniLM or BERT, and this is of kind {kind}"
        )


def _texts(row: Row, where: str) -> tuple[str, str, str | None]:
    text, positive = text_of(row, "text", where), text_of(row, "positive", where)
    return text, positive, None if row.get("negative") is None else text_of(row, "negative", where)


def _example(reading: Reading, row: int) -> Example:
    return Example(reading.tokens, reading.types, row=row)


def _part(batch: Batch, part: str) -> Batch:
    names = ("tokens", "mask", "types")
    return {name: batch[f"{part}_{name}"] for name in names if f"{part}_{name}" in batch}


def check_contrast(recipe: Recipe, rows: Sequence[Row]) -> None:
    """Refuse what leaves the rows of a forward pass nothing to be contrasted with.

    Raises:
        DataError: fewer than two training rows. RecipeError: one row in a forward pass.
    """
    if len(rows) < 2:
        raise DataError(f"data.sources: {len(rows)} training rows; vectors are learned by contrast between rows")
    if 1 in (recipe.train.batch, recipe.train.micro_batch):
        raise RecipeError(
            f"train.batch: task {recipe.task} contrasts the rows of a forward pass, so it needs at least 2"
        )


def same_rows(tokens: Tensor) -> Tensor:
    """(batch, batch), True where two sequences of (batch, seq) are the same."""
    return (tokens[:, None] == tokens[None]).all(dim=-1)


def contrast(scores: Tensor, same: Tensor, against: Tensor | None = None) -> Tensor:
    """The summed cross-entropy of finding the own column of each row and the own row of each column, the mean of both.

    Args:
        scores: (batch, batch), on the diagonal those of pairs.
        same: (batch, batch), True where another row or column is no contrast, since it is the same thing again.
        against: (batch, others), what rows compete with too.
    """
    own = torch.arange(len(scores), device=scores.device)
    scores = scores.masked_fill(same & (own[:, None] != own), -torch.inf)
    forward = scores if against is None else torch.cat([scores, against], dim=1)
    found = F.cross_entropy(forward, own, reduction="sum") + F.cross_entropy(scores.T, own, reduction="sum")
    return found / 2

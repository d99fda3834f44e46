"""The shape every task has; the loop, the evaluation and the pipeline know nothing more of a task.

A task owns the model's form, its batches, its loss and the form of its answers. There are two kinds: pretraining tasks
learn from token shards, labelled tasks from rows, and these also answer: with numbers, or by writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from formary.data.records import RowForm
from formary.data.shards import TokenShards
from formary.data.tokenizer import Tokenizer
from formary.errors import RecipeError
from formary.model.config import ModelConfig
from formary.model.topologies import Network
from formary.recipe.schema import Recipe, Train

Batch = dict[str, Tensor]  # the first entry is what the network reads; every entry's first dimension is the sequence
Row = Mapping[str, Any]
Answer = dict[str, Any]
Answers = Literal[
    "labels",
    "tags",
    "spans",
    "texts",
    "vectors",
    "retrieval",
    "choices",
    "multiple_choice",
    "ranking",
    "forecasts",
    "row_labels",
    "pictures",
    "boxes",
]
Precision = Callable[[], AbstractContextManager[object]]
Progress = Callable[[int, int], object]  # is told how much is done, and of how much


@dataclass(frozen=True, eq=False)
class Source:
    """What an encoder-decoder's encoder reads where that is no text: a picture, say.

    Args:
        values: one input as the encoder's embedder takes it, without the batch: pixels (channels, height, width).
        positions: how many vectors the embedder makes of it.
    """

    values: Tensor
    positions: int

    def __len__(self) -> int:
        return self.positions


Prompt = tuple[int, ...] | Source


def read_of(batch: Batch) -> Tensor:
    """What the network reads of a batch: (batch, seq) ids, (batch, channels, height, width) pixels, ...; the first entry."""
    return next(iter(batch.values()))


def size_of(batch: Batch) -> int:
    """How much there is to read in a batch: tokens or time steps with their padding; of pictures, pictures."""
    read = read_of(batch)
    if not read.is_floating_point():
        return read.numel()
    return len(read) if read.dim() == 4 else read.shape[0] * read.shape[1]


class Batches(Protocol):
    """An endless supply of training batches, each a pure function of its step: nothing to save for a resume."""

    steps_per_epoch: int

    def batch(self, step: int) -> Batch:
        """The batch of optimiser step `step`, counted from 0; every tensor's first dimension is the sequence."""
        ...


def total_steps(settings: Train, batches: Batches) -> int:
    """Optimiser steps of a run: `steps`, or `epochs` passes over the data, or 1000.

    Raises:
        RecipeError: both were given.
    """
    if settings.steps and settings.epochs:
        raise RecipeError("train.steps and train.epochs: give one of them")
    if settings.epochs:
        return max(1, round(settings.epochs * batches.steps_per_epoch))
    return settings.steps or 1000


class Task(Protocol):
    """What every task gives the rest of Formary."""

    name: str
    tokenizer: Tokenizer

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        """Which special tokens a tokenizer trained for it needs: those of causal_lm, masked_lm, denoise or chat."""
        ...

    def model_config(self) -> ModelConfig:
        """The model to train from scratch, as the recipe asks."""
        ...

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss in nats and the number of predictions in it, both scalars."""
        ...


class PretrainingTask(Task, Protocol):
    """A task that learns from running text."""

    covers_text: bool  # the loss is over every token of the text, so it can be said in bits per byte

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None: ...

    def training_batches(self, shards: TokenShards) -> Batches:
        """Batches of `recipe.train.batch` sequences."""
        ...

    def validation_batches(self, shards: TokenShards, *, max_tokens: int | None) -> Iterator[Batch]:
        """The same batches at every call, over the whole split or its first `max_tokens` tokens."""
        ...


@dataclass(frozen=True)
class Example:
    """One sequence as the network reads it, and what the task has to remember of it.

    Args:
        inputs: what the network reads, its length first: token ids (seq,), pixels (height, width, channels), values of a
            series (steps, channels).
        types: (seq,) token types, or None where all are 0.
        target: what the loss compares with, in the task's own form; None when only an answer is wanted.
        row: the number of the row it was made from; several examples may be windows of one row.
        memory: whatever turns the network's numbers back into an answer (offsets, first pieces of words, ...).
    """

    inputs: NDArray[Any]
    types: NDArray[np.int64] | None = None
    target: Any = None
    row: int = 0
    memory: Any = field(default=None, compare=False)


class LabelledTask(Task, Protocol):
    """A task that learns from rows with answers, and answers rows without.

    It may say more of itself: `topologies` of the models it can train and the `embedder` that they read with (tokens, when
    left out), so that others are refused before any work; `augments`, the changes of `train.augment` that it can make;
    `needs_start`, that it changes a model which was trained before; and `vocabulary(recipe, rows)`, the tokenizer of what
    its training rows hold, where that is not running text; `training_batch(examples, step)` gives what a training step learns
    from, where that is not `collate`'s: pictures that are changed and mixed, a function of the step; `features(rows)` gives
    numbers (rows, numbers) for the linear baseline, which `features_are` names, where rows have no text;
    `worded(row)` stands for a row that is no text in a line about it; `thumbnail(row)` is a small picture of a row, as a data
    URI; `asks_any`, that a row may have any of its columns and need not have what the task asks for.
    """

    form: ClassVar[RowForm]  # the columns of its rows
    asks: ClassVar[tuple[str, ...]]  # the columns it needs to answer; a plain text stands for the first
    answers: ClassVar[Answers]  # what kind of answer it gives; evaluation follows from it

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        """The task as the training rows make it: label names, scales. `start` is the loaded model's config, if any.

        Raises:
            DataError: the rows cannot teach it (one class only, a row without its label); the row is named.
        """
        ...

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        """The task of a finished model; `settings` is what `settings` gave when it was saved, or {} for foreign ones."""
        ...

    def settings(self) -> dict[str, Any]:
        """What a later `of_model` needs and the config does not say, JSON-able."""
        ...

    def head(self, config: ModelConfig) -> ModelConfig:
        """A loaded model's config with this task's head on it.

        Raises:
            RecipeError: the model is of a topology that the task cannot use.
        """
        ...

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        """The rows as examples, in order; with targets when they are there to be learned or scored.

        Raises:
            DataError: a row is not as it must be; it is called `where` and its number, from 1.
        """
        ...

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Examples as one padded batch."""
        ...

    def notes(self) -> list[str]:
        """What happened to rows that a user should know: how many were cut to the context, how many labels unseen."""
        ...


@runtime_checkable
class AnsweringTask(LabelledTask, Protocol):
    """A labelled task whose answers are numbers of one forward pass: labels, tags, spans, vectors."""

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
        """The answers to rows, in order; as many at a time as memory allows, rows of like length together.

        Args:
            targets: whether the rows have their right answers, which are checked and counted as `examples` does.
            progress: is told how many sequences are answered, and of how many.

        Raises:
            DataError: a row is not as it must be; it is named by its number, from 1.
        """
        ...


@runtime_checkable
class WritingTask(LabelledTask, Protocol):
    """A labelled task whose answers are written token by token, by the rooms above (`infer.answers`).

    Where an answer is no text, `written(row, tokens)` makes it of what was written.
    """

    ends: tuple[int, ...]  # tokens that end an answer

    def prompt(self, row: Row, where: str) -> Prompt:
        """What is read before writing: a decoder's beginning, or an encoder-decoder's source.

        Raises:
            DataError: the row is not as it must be; it is called `where`.
        """
        ...

    def writing(self, row: Row) -> dict[str, Any]:
        """Options of `Model.generate` for the answer to a row, where the caller gives none."""
        ...

    def generation(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """generation_config.json of a model of this task, from that of the recipe's generate section."""
        ...


@runtime_checkable
class LikelihoodTask(WritingTask, Protocol):
    """A task whose answers cannot be right or wrong: a model is measured by how likely it finds the real ones."""

    def likelihood(
        self,
        network: Network,
        rows: Sequence[Row],
        *,
        precision: Precision = nullcontext,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """What the network needs to say each row's answer, for evaluation to sum up.

        Raises:
            DataError: a row is not as it must be; it is named by its number, from 1.
        """
        ...

    def showing(self, rows: Sequence[Row]) -> list[Row]:
        """The rows whose written answers a report shows, where these are measured."""
        ...


@runtime_checkable
class ReferringTask(LabelledTask, Protocol):
    """A labelled task whose loss compares the network with what it was before training."""

    def remember(self, network: Network, examples: Sequence[Example], *, precision: Precision = nullcontext) -> None:
        """Keep what the starting network says of examples that will be learned, scored or predicted."""
        ...

"""The shape every task has; the loop, the evaluation and the pipeline know nothing more of a task.

A task is made for one recipe and one tokenizer. It owns the model's form, the batches, the loss and its naming.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from formary.data.shards import TokenShards
from formary.data.tokenizer import Tokenizer
from formary.model.config import ModelConfig
from formary.model.topologies import Network
from formary.recipe.schema import Recipe

Batch = dict[str, Tensor]


class Batches(Protocol):
    """An endless supply of training batches, each a pure function of its step: nothing to save for a resume."""

    steps_per_epoch: int

    def batch(self, step: int) -> Batch:
        """The batch of optimiser step `step`, counted from 0; every tensor's first dimension is the sequence."""
        ...


class Task(Protocol):
    """What a task gives the rest of Formary."""

    name: str
    tokenizer: Tokenizer
    covers_text: bool  # the loss is over every token of the text, so it can be said in bits per byte

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None: ...

    def model_config(self) -> ModelConfig:
        """The model to train from scratch, as the recipe asks."""
        ...

    def training_batches(self, shards: TokenShards) -> Batches:
        """Batches of `recipe.train.batch` sequences."""
        ...

    def validation_batches(self, shards: TokenShards, *, max_tokens: int | None) -> Iterator[Batch]:
        """The same batches at every call, over the whole split or its first `max_tokens` tokens."""
        ...

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss in nats and the number of predictions in it, both scalars."""
        ...

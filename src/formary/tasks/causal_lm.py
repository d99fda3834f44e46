"""Causal language modelling: predict every next token (Radford et al. 2019).

Documents are packed end to end into windows; with `cross_documents: false` attention stays inside a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from formary.data.batches import IGNORED, Windows, ramp_lengths, stream_windows
from formary.data.shards import TokenShards
from formary.data.tokenizer import Tokenizer
from formary.model.config import ModelConfig, Topology
from formary.model.heads import LanguageHead
from formary.model.topologies import Decoder, Network
from formary.model.transformer import document_mask
from formary.recipe.schema import Recipe, Train
from formary.tasks.cross_entropy import cross_entropy
from formary.tasks.models import scratch_config
from formary.tasks.protocol import Batch, Example, total_steps
from formary.tasks.reading import padded


class CausalLM:
    """The task of GPT."""

    name = "causal_lm"
    topologies: ClassVar[tuple[Topology, ...]] = ("decoder",)
    covers_text = True
    ramps = True

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return cls.name

    def model_config(self) -> ModelConfig:
        return scratch_config(self.recipe, self.tokenizer, "decoder")

    def training_batches(self, shards: TokenShards) -> _WindowBatches:
        train = self.recipe.train
        inside = not train.objective.cross_documents
        windows = Windows(shards, context=train.context, batch=train.batch_size, seed=train.seed, document_ids=inside)
        return _WindowBatches(windows, train)

    def validation_batches(self, shards: TokenShards, *, max_tokens: int | None) -> Iterator[Batch]:
        """Non-overlapping windows over the split as one stream; every token but the first is predicted once."""
        train = self.recipe.train
        for rows in stream_windows(shards, context=train.context, batch=train.batch_size, max_tokens=max_tokens):
            yield {"tokens": torch.from_numpy(rows.tokens), "targets": torch.from_numpy(rows.targets)}

    def document_draws(self, shards: TokenShards) -> Callable[[int, np.random.Generator], Example | None]:
        """Of a document by its number: all of it, or a random stretch of context + 1 tokens where it is longer."""
        context = self.recipe.train.context
        begin = [] if shards.begin_id is None else [shards.begin_id]

        def draw(number: int, rng: np.random.Generator) -> Example | None:
            tokens = np.concatenate([np.array(begin, dtype=np.int64), shards.document(number).astype(np.int64)])
            start = int(rng.integers(max(0, len(tokens) - context - 1) + 1))
            return Example(tokens[start : start + context + 1], row=number) if len(tokens) > 1 else None

        return draw

    def collate_documents(self, examples: Sequence[Example]) -> Batch:
        """Documents, or stretches of them, each in a row of its own: every token but the first is predicted once."""
        inputs = [example.inputs[:-1] for example in examples]
        targets = [example.inputs[1:] for example in examples]
        return {"tokens": padded(inputs, self.tokenizer.pad_id or 0), "targets": padded(targets, IGNORED)}

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(network, Decoder) and isinstance(network.head, LanguageHead)
        smoothing = self.recipe.train.label_smoothing if network.training else 0.0
        documents = batch.get("documents")
        mask = document_mask(documents, causal=True) if documents is not None else None
        hidden = network(batch["tokens"], positions=_positions(documents), mask=mask)
        return cross_entropy(network.head, hidden, batch["targets"], smoothing=smoothing)


class _WindowBatches:
    """Windows of context + 1 tokens as inputs and targets one place apart; under a ramp they are cut into short ones."""

    def __init__(self, windows: Windows, train: Train) -> None:
        self.windows = windows
        self.steps_per_epoch = windows.steps_per_epoch
        self.total = total_steps(train, self)
        self.share = train.ramp.share if train.ramp else 0.0
        self.lengths = ramp_lengths(train.ramp.first, train.context) if train.ramp else [train.context]

    def batch(self, step: int) -> Batch:
        return self.at(step, step / self.total)

    def at(self, step: int, done: float) -> Batch:
        """The batch of a step when a share `done` of the run is over; it sees the tokens it would see without a ramp."""
        length = self.lengths[-1]
        if done < self.share:
            length = self.lengths[int(done / self.share * (len(self.lengths) - 1))]
        batch = self._whole(step)
        if length == self.lengths[-1]:
            return batch
        return {name: tensor.reshape(-1, length) for name, tensor in batch.items()}

    def _whole(self, step: int) -> Batch:
        arrays = self.windows.batch(step)
        tokens = torch.from_numpy(arrays["tokens"])
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        if "documents" in arrays:
            documents = torch.from_numpy(arrays["documents"])
            batch["documents"] = documents[:, :-1]
            # The first token of a document is not predicted from the document before it.
            batch["targets"] = batch["targets"].masked_fill(documents[:, 1:] != documents[:, :-1], -100)
        return batch


def _positions(documents: Tensor | None) -> Tensor | None:
    """Places counted from the start of each document in the window: (batch, seq)."""
    if documents is None:
        return None
    places = torch.arange(documents.shape[1]).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values

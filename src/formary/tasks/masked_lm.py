"""Masked language modelling: hide some tokens and predict them from both sides (Devlin et al. 2019).

Of the chosen 15 % of tokens, 80 % become the mask token, 10 % a random one, 10 % stay. Whole words can be masked
together, and next-sentence prediction can be learned beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from formary.data.batches import Segments
from formary.data.shards import TokenShards
from formary.data.tokenizer import Tokenizer
from formary.errors import RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.heads import LanguageHead
from formary.model.topologies import Encoder, Network
from formary.recipe.schema import Recipe
from formary.tasks.cross_entropy import IGNORED, cross_entropy
from formary.tasks.models import scratch_config
from formary.tasks.protocol import Batch


class MaskedLM:
    """The task of BERT."""

    name = "masked_lm"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder",)
    covers_text = False

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.pad_id = _needed(tokenizer.pad_id, "pad")
        self.mask_id = _needed(tokenizer.mask_id, "mask")
        self.cls_id = _needed(tokenizer.cls_id, "cls")
        self.sep_id = _needed(tokenizer.sep_id, "sep")
        objective = recipe.train.objective
        if objective.whole_words and recipe.data.words == "none":
            raise RecipeError(
                "train.objective.whole_words needs data.words: tokenizer or jieba, to know where words begin"
            )

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return cls.name

    def model_config(self) -> ModelConfig:
        config = scratch_config(self.recipe, self.tokenizer, "encoder")
        pairs = self.recipe.train.objective.next_sentence
        return dataclasses.replace(config, pooler=pairs, next_sentence=pairs)

    def training_batches(self, shards: TokenShards) -> _MaskedBatches:
        return _MaskedBatches(self, shards, seed=self.recipe.train.seed)

    def validation_batches(self, shards: TokenShards, *, max_tokens: int | None) -> Iterator[Batch]:
        """One pass over the split with masks that are the same every time."""
        batches = _MaskedBatches(self, shards, seed=0)
        tokens = min(shards.tokens, max_tokens or shards.tokens)
        per_step = self.recipe.train.batch_size * self.recipe.train.context
        for step in range(max(1, round(tokens / per_step))):
            yield batches.batch(step)

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats over the masked tokens; with next-sentence prediction its mean loss is added once per masked token."""
        assert isinstance(network, Encoder) and isinstance(network.head, LanguageHead)
        smoothing = self.recipe.train.label_smoothing if network.training else 0.0
        hidden = network(batch["tokens"], mask=batch["mask"], types=batch["types"])
        loss, count = cross_entropy(network.head, hidden, batch["targets"], smoothing=smoothing)
        if network.training and network.pooler is not None and network.next_sentence is not None:
            answers = network.next_sentence(network.pooler(hidden[:, 0]))
            loss = loss + count * F.cross_entropy(answers.float(), batch["is_next"].long())
        return loss, count


def _needed(token: int | None, name: str) -> int:
    if token is None:
        raise RecipeError(f"data.tokenizer: task masked_lm needs a {name} token and this tokenizer has none")
    return token


class _MaskedBatches:
    """[CLS] segment [SEP], or [CLS] A [SEP] B [SEP] with next-sentence prediction, then masked."""

    def __init__(self, task: MaskedLM, shards: TokenShards, *, seed: int) -> None:
        train = task.recipe.train
        self.task, self.seed, self.context = task, seed, train.context
        self.objective = train.objective
        pair = train.objective.next_sentence
        self.segments = Segments(
            shards, length=train.context - (3 if pair else 2), batch=train.batch_size, seed=seed, pairs=pair
        )
        self.steps_per_epoch = self.segments.steps_per_epoch
        unknown = [] if task.tokenizer.unk_id is None else [task.tokenizer.unk_id]
        self.special = np.array([task.cls_id, task.sep_id, task.pad_id, task.mask_id, *unknown])

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step, 1])
        task = self.task
        rows = self.segments.batch(step)
        size = len(rows)
        tokens = np.full((size, self.context), task.pad_id, dtype=np.int64)
        types = np.zeros((size, self.context), dtype=np.int64)
        begins = np.ones((size, self.context), dtype=bool)
        for i, row in enumerate(rows):
            place = 1
            tokens[i, 0] = task.cls_id
            for part, (piece, words) in enumerate(row.parts):
                end = place + len(piece)
                tokens[i, place:end] = piece
                tokens[i, end] = task.sep_id
                types[i, place : end + 1] = part
                if words is not None:
                    begins[i, place:end] = words
                place = end + 1
        targets = self._mask(tokens, begins, rng)
        batch = {
            "tokens": torch.from_numpy(tokens),
            "targets": torch.from_numpy(targets),
            "types": torch.from_numpy(types),
            "mask": torch.from_numpy(tokens != task.pad_id),
        }
        if self.objective.next_sentence:
            batch["is_next"] = torch.tensor([bool(row.is_next) for row in rows])
        return batch

    def _mask(
        self, tokens: NDArray[np.int64], begins: NDArray[np.bool_], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Change `tokens` in place and return the targets: the original id where chosen, `IGNORED` elsewhere."""
        rate = self.objective.mask_rate
        ordinary = ~np.isin(tokens, self.special)
        if self.objective.whole_words:
            # One draw per word, given to all its tokens.
            word = np.cumsum(begins | ~ordinary, axis=1, dtype=np.int64)
            draws = rng.random((len(tokens), tokens.shape[1] + 1))
            chosen = ordinary & (np.take_along_axis(draws, word, axis=1) < rate)
        else:
            chosen = ordinary & (rng.random(tokens.shape) < rate)
        if not chosen.any():
            chosen.flat[np.flatnonzero(ordinary)[:1]] = True
        targets = np.where(chosen, tokens, IGNORED)
        fate = rng.random(tokens.shape)
        random_ids = rng.integers(0, self.task.tokenizer.vocab_size, tokens.shape)
        tokens[chosen & (fate < 0.8)] = self.task.mask_id
        replaced = chosen & (fate >= 0.8) & (fate < 0.9)
        tokens[replaced] = random_ids[replaced]
        return targets

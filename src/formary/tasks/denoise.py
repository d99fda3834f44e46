"""Span-corruption denoising for encoder-decoders (Raffel et al. 2020, section 3.1.4).

Random spans are cut out of a text and replaced by sentinels; the decoder writes sentinel, span, sentinel, span, end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from formary.data.batches import Segments
from formary.data.shards import TokenShards
from formary.data.tokenizer import Tokenizer
from formary.errors import RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.topologies import EncoderDecoder, Network
from formary.recipe.schema import Recipe
from formary.tasks.cross_entropy import IGNORED, cross_entropy
from formary.tasks.models import scratch_config
from formary.tasks.protocol import Batch, Example
from formary.tasks.reading import collated, padded


class Denoise:
    """The task of T5."""

    name = "denoise"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder_decoder",)
    covers_text = False

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        objective, context = recipe.train.objective, recipe.train.context
        needed = max(1, round(context * objective.noise_density / objective.mean_span))
        if tokenizer.eos_id is None or tokenizer.pad_id is None:
            raise RecipeError("data.tokenizer: task denoise needs an end token and a pad token")
        if len(tokenizer.sentinel_ids) < needed:
            raise RecipeError(
                f"train.context: {context} tokens make {needed} removed spans, but the tokenizer has only "
                f"{len(tokenizer.sentinel_ids)} sentinel tokens; shorten the context, lengthen "
                "train.objective.mean_span, or use a larger data.tokenizer.vocab_size"
            )

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return cls.name

    def model_config(self) -> ModelConfig:
        config = scratch_config(self.recipe, self.tokenizer, "encoder_decoder")
        return dataclasses.replace(config, decoder_start_id=config.pad_id)

    def training_batches(self, shards: TokenShards) -> _DenoisingBatches:
        return _DenoisingBatches(self, shards, seed=self.recipe.train.seed)

    def validation_batches(self, shards: TokenShards, *, max_tokens: int | None) -> Iterator[Batch]:
        """One pass over the split with spans that are the same every time."""
        batches = _DenoisingBatches(self, shards, seed=0)
        tokens = min(shards.tokens, max_tokens or shards.tokens)
        per_step = self.recipe.train.batch_size * self.recipe.train.context
        for step in range(max(1, round(tokens / per_step))):
            yield batches.batch(step)

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(network, EncoderDecoder)
        smoothing = self.recipe.train.label_smoothing if network.training else 0.0
        hidden = network(batch["tokens"], batch["decoder_tokens"], source_mask=batch["mask"])
        return cross_entropy(network.head, hidden, batch["targets"], smoothing=smoothing)


class _DenoisingBatches:
    def __init__(self, task: Denoise, shards: TokenShards, *, seed: int) -> None:
        train = task.recipe.train
        self.task, self.seed = task, seed
        self.objective = train.objective
        self.segments = Segments(shards, length=train.context - 1, batch=train.batch_size, seed=seed)
        self.steps_per_epoch = self.segments.steps_per_epoch

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step, 2])
        tokenizer = self.task.tokenizer
        assert tokenizer.pad_id is not None and tokenizer.eos_id is not None
        sources, targets = [], []
        for row in self.segments.batch(step):
            tokens = row.parts[0][0]
            noise = noise_mask(len(tokens), self.objective.noise_density, self.objective.mean_span, rng)
            source, target = corrupt(tokens, noise, tokenizer.sentinel_ids)
            sources.append(np.append(source, tokenizer.eos_id))
            targets.append(np.append(target, tokenizer.eos_id))
        begun = [np.insert(target[:-1], 0, tokenizer.pad_id) for target in targets]
        return {
            **collated([Example(source) for source in sources], tokenizer.pad_id),
            "decoder_tokens": padded(begun, tokenizer.pad_id),
            "targets": padded(targets, IGNORED),
        }


def noise_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """True at the tokens to remove: about `density` of them, in spans of `mean_span` tokens on average.

    Kept and removed stretches alternate, a kept one first; both kinds are random partitions of their totals.
    """
    removed = int(min(max(round(length * density), 1), max(length - 1, 1)))
    spans = int(min(max(round(removed / mean_span), 1), removed, max(length - removed, 1)))
    if length <= removed:
        return np.ones(length, dtype=bool)
    lengths = np.empty(2 * spans, dtype=np.int64)
    lengths[0::2] = _partition(length - removed, spans, rng)
    lengths[1::2] = _partition(removed, spans, rng)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def corrupt(
    tokens: NDArray[np.integer], noise: NDArray[np.bool_], sentinels: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The text with each removed span as one sentinel, and the removed spans each after its sentinel."""
    begins = noise & ~np.concatenate([[False], noise[:-1]])
    span = np.cumsum(begins) - 1  # which removed span a position belongs to, or follows
    marks = np.asarray(sentinels, dtype=np.int64)
    source = np.where(begins, marks[np.maximum(span, 0)], tokens)[~noise | begins]
    removed = np.flatnonzero(noise)
    target = np.insert(
        tokens[removed].astype(np.int64), np.flatnonzero(begins[removed]), marks[span[removed][begins[removed]]]
    )
    return source.astype(np.int64), target


def _partition(total: int, parts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`total` cut at random into `parts` whole numbers of at least 1."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1 if parts > 1 else np.array([], dtype=np.int64)
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)

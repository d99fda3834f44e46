"""How well a language model predicts text: loss, perplexity and bits per byte beside unigram and 5-gram models.

Causal models score every token of the test documents once; masked and denoising models score their predictions.
Bits per byte compares across tokenizers. Every figure has a 95 % interval over documents, every verdict is paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from formary.data.batches import scored_windows
from formary.data.shards import TokenShards
from formary.evaluate.interval import Interval, Units, Verdict, bootstrap_ratio, paired_difference, sentence, units
from formary.evaluate.ngram import NGram, Unigram
from formary.model.heads import LanguageHead
from formary.model.topologies import Decoder, Encoder, EncoderDecoder, Network, TwoTowers
from formary.recipe.schema import Evaluate
from formary.tasks.cross_entropy import IGNORED, token_losses
from formary.tasks.protocol import Batch, PretrainingTask, Progress
from formary.train.machine import Runtime

Floats = NDArray[np.float64]
_BATCH_TOKENS = 8192
_SEED = 0  # of the bootstrap: the same figures at every reading of the same losses


def evaluate(
    task: PretrainingTask,
    network: Network,
    shards: TokenShards,
    *,
    training: TokenShards,
    settings: Evaluate,
    runtime: Runtime,
    split: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure `network` on a split, beside baselines fitted on the training split.

    Returns:
        {"split", "metrics": [{"metric", "protocol", "model", "baselines", "verdicts", "says"}]}, JSON-able; model and
        baselines are intervals {"value", "low", "high"}.
    """
    network.eval()
    if isinstance(network, Decoder):
        metrics = causal_metrics(
            network,
            shards,
            training=training,
            settings=settings,
            runtime=runtime,
            split=split,
            progress=progress,
        )
    else:
        assert not isinstance(network, TwoTowers)  # learns from rows
        metrics = _predictions(task, network, shards, training, settings, runtime, split, progress)
    return {"split": split, "metrics": metrics}


@torch.inference_mode()
def causal_losses(
    network: Decoder,
    shards: TokenShards,
    *,
    stride: int | None,
    max_tokens: int | None,
    runtime: Runtime,
    progress: Progress | None = None,
) -> tuple[Floats, NDArray[np.int64]]:
    """Nats of every scored token of the split in document order, and its place in the split: (tokens,) each.

    Each document is read by windows of the model's context that move by `stride`; a token is scored once, with at
    least context - stride tokens before it where the document has them.
    """
    context = network.config.context
    assert isinstance(network.head, LanguageHead)
    losses, places = [], []
    windows = scored_windows(
        shards,
        context=context,
        stride=stride or max(1, context // 2),
        rows=max(1, _BATCH_TOKENS // context),
        max_tokens=max_tokens,
    )
    for window in windows:
        targets = torch.from_numpy(window.targets)
        with runtime.autocast():
            hidden = network(torch.from_numpy(window.tokens).to(runtime.device))
            measured = token_losses(network.head, hidden, targets.to(runtime.device)).cpu()
        scored = targets != IGNORED
        losses.append(measured[scored].double().numpy())
        places.append((window.position[:, None] + scored.cumsum(dim=1).numpy() - 1)[scored.numpy()])
        if progress:
            progress(int(places[-1].max(initial=0)), min(shards.tokens, max_tokens or shards.tokens))
    return np.concatenate(losses), np.concatenate(places)


def causal_metrics(
    network: Decoder,
    shards: TokenShards,
    *,
    training: TokenShards | None,
    settings: Evaluate,
    runtime: Runtime,
    split: str,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Bits per byte, loss and perplexity of a causal model, as `evaluate` returns them.

    Args:
        training: what the baselines are fitted on; None measures the model alone.
        progress: is told how many tokens are scored, and of how many.
    """
    network.eval()
    losses, places = causal_losses(
        network,
        shards,
        stride=settings.stride,
        max_tokens=settings.max_tokens,
        runtime=runtime,
        progress=progress,
    )
    starts = np.searchsorted(places, shards.document_starts)
    by_model = {"model": losses}
    if training is not None and settings.baselines:
        train_tokens, vocab_size = training.window(0, training.tokens), network.config.vocab_size
        tokens, order = shards.window(0, shards.tokens), settings.ngram_order
        unigram = Unigram.fit(train_tokens, vocab_size=vocab_size)
        ngram = NGram.fit(train_tokens, training.document_starts, order=order, vocab_size=vocab_size)
        by_model["unigram"] = -unigram.log_probs(tokens)[places]
        by_model[f"{order}-gram"] = -ngram.log_probs(tokens, shards.document_starts)[places]
    stride = settings.stride or max(1, network.config.context // 2)
    where = f"{split}, context {network.config.context}, stride {stride}"
    per_token = np.ones(len(losses))
    lengths = np.maximum(np.diff(shards.document_starts), 1)
    per_byte = np.repeat(shards.document_bytes / lengths, np.diff(starts))
    tables = [
        ("bits_per_byte", {name: values / math.log(2) for name, values in by_model.items()}, per_byte, None),
        ("loss", by_model, per_token, None),
        ("perplexity", by_model, per_token, np.exp),
    ]
    return [
        _metric(name, where, {m: units(values, counts, starts) for m, values in of_model.items()}, settings, transform)
        for name, of_model, counts, transform in tables
    ]


@torch.inference_mode()
def _predictions(
    task: PretrainingTask,
    network: Encoder | EncoderDecoder,
    shards: TokenShards,
    training: TokenShards,
    settings: Evaluate,
    runtime: Runtime,
    split: str,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Loss and accuracy of what the task predicts, with each sequence of the split as a unit of resampling."""
    counts = np.bincount(training.window(0, training.tokens), minlength=network.config.vocab_size)
    commonest = int(counts.argmax())
    unigram = -Unigram.fit(training.window(0, training.tokens), vocab_size=network.config.vocab_size).log_probs(
        np.arange(network.config.vocab_size)
    )
    marks = np.array(sorted(task.tokenizer.special_ids))
    sums: dict[str, list[Floats]] = {name: [] for name in ("count", "loss", "hit", "unigram", "common")}
    done, most = 0, min(shards.tokens, settings.max_tokens or shards.tokens)
    for batch in task.validation_batches(shards, max_tokens=settings.max_tokens):
        moved = {name: tensor.to(runtime.device) for name, tensor in batch.items()}
        with runtime.autocast():
            losses, guesses = _guess(network, moved, torch.from_numpy(marks).to(runtime.device))
        targets = batch["targets"].numpy()
        # Sentinels and end marks are known beforehand: predicting them proves nothing. What is scored is an ordinary
        # token given that it is one, for the model as for the baselines, which never guess a mark.
        scored = (targets != IGNORED) & ~np.isin(targets, marks)
        ids = np.where(scored, targets, 0)
        rows = {
            "count": scored,
            "loss": np.where(scored, losses, 0.0),
            "hit": scored & (guesses == targets),
            "unigram": np.where(scored, unigram[ids], 0.0),
            "common": scored & (targets == commonest),
        }
        for name, values in rows.items():
            sums[name].append(values.astype(np.float64).sum(axis=1))
        done = min(done + targets.size, most)
        if progress:
            progress(done, most)
    columns = {name: np.concatenate(parts) for name, parts in sums.items()}
    count = columns["count"]
    where = f"{split}, {task.name.replace('_', ' ')}, ordinary tokens, context {network.config.context}"
    with_baseline = settings.baselines
    loss = {"model": "loss"} | ({"unigram": "unigram"} if with_baseline else {})
    hits = {"model": "hit"} | ({"commonest token": "common"} if with_baseline else {})

    def cut(names: dict[str, str]) -> dict[str, Units]:
        return {model: Units(columns[name], count, f"{len(count):,} sequences") for model, name in names.items()}

    return [
        _metric("accuracy", where, cut(hits), settings, None),
        _metric("loss", where, cut(loss), settings, None),
        _metric("perplexity", where, cut(loss), settings, np.exp),
    ]


def _guess(network: Encoder | EncoderDecoder, batch: Batch, marks: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Losses and best guesses among all tokens but `marks` at every target, (batch, seq) each; 0 elsewhere."""
    if isinstance(network, Encoder):
        hidden = network(batch["tokens"], mask=batch["mask"], types=batch["types"])
    else:
        hidden = network(batch["tokens"], batch["decoder_tokens"], source_mask=batch["mask"])
    assert network.head is not None
    scored = batch["targets"] != IGNORED
    logits = network.head(hidden[scored]).float().index_fill(-1, marks, -math.inf)
    losses, guesses = torch.zeros(scored.shape), torch.zeros(scored.shape, dtype=torch.long)
    losses[scored.cpu()] = F.cross_entropy(logits, batch["targets"][scored], reduction="none").cpu()
    guesses[scored.cpu()] = logits.argmax(dim=-1).cpu()
    return losses.numpy(), guesses.numpy()


def _metric(
    name: str,
    where: str,
    cut: dict[str, Units],
    settings: Evaluate,
    transform: Callable[[Any], Any] | None,
) -> dict[str, Any]:
    """One figure of the model and the baselines with intervals and paired verdicts, and a sentence about it."""
    intervals = {model: _interval(unit, settings, transform) for model, unit in cut.items()}
    model = cut["model"]
    verdicts: dict[str, Verdict] = {
        other: paired_difference(
            model.numerators,
            unit.numerators,
            model.denominators,
            resamples=settings.bootstrap,
            seed=_SEED,
            lower_is_better=name != "accuracy",
            transform=transform,
        ).verdict
        for other, unit in cut.items()
        if other != "model"
    }
    measured = intervals.pop("model")
    return {
        "metric": name,
        "protocol": f"{where}, {model.words}",
        "model": measured.to_json(),
        "baselines": {other: value.to_json() for other, value in intervals.items()},
        "verdicts": verdicts,
        "says": sentence(name, measured, intervals, verdicts),
    }


def _interval(unit: Units, settings: Evaluate, transform: Callable[[Any], Any] | None) -> Interval:
    return bootstrap_ratio(
        unit.numerators, unit.denominators, resamples=settings.bootstrap, seed=_SEED, transform=transform
    )

"""What a training will need, on paper: memory of each GPU, tokens per second, days, checkpoints, cost.

Arithmetic on sizes alone, no torch: 6 operations per weight and token (Kaplan et al. 2020, section 2.1) and those of
attention, at the share of the peak that published trainings reach. How far it is off is in docs/scale.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from formary.errors import FormaryError, nearest


@dataclass(frozen=True)
class Gpu:
    """A card: its makers' figures, and what an hour of it costs when rented (an assumption, prices move).

    Args:
        peak: operations per second on dense bfloat16 matrices (float16 where it has no bfloat16).
        memory: bytes.
        link: bytes per second to the other cards of its machine, one way.
        network: bytes per second to other machines, its share of them.
        dollars: per hour.
    """

    peak: float
    memory: float
    link: float
    network: float
    dollars: float


GPUS: Mapping[str, Gpu] = {
    "B200": Gpu(2250e12, 180e9, 900e9, 50e9, 5.00),
    "H200": Gpu(989e12, 141e9, 450e9, 50e9, 3.00),
    "H100": Gpu(989e12, 80e9, 450e9, 50e9, 2.50),
    "A100-80GB": Gpu(312e12, 80e9, 300e9, 25e9, 1.60),
    "A100-40GB": Gpu(312e12, 40e9, 300e9, 25e9, 1.20),
    "A100": Gpu(312e12, 80e9, 300e9, 25e9, 1.60),
    "MI300X": Gpu(1307e12, 192e9, 448e9, 50e9, 2.50),
    "L40S": Gpu(362e12, 48e9, 32e9, 12e9, 1.00),
    "L4": Gpu(121e12, 24e9, 16e9, 12e9, 0.60),
    "RTX4090": Gpu(165e12, 24e9, 16e9, 1e9, 0.40),
    "RTX3090": Gpu(71e12, 24e9, 16e9, 1e9, 0.25),
    "V100": Gpu(125e12, 32e9, 150e9, 12e9, 0.60),
    "T4": Gpu(65e12, 16e9, 8e9, 1e9, 0.30),
}

UTILISATION = 0.35  # of the peak, of what published trainings reach (docs/scale.md)
PER_MACHINE = 8  # GPUs
BYTES_PER_TOKEN = 4.3  # of English text with a byte-level BPE of 50 thousand tokens
TOKENS_PER_STEP = 2**19  # GPT-3's for its small models (Brown et al. 2020, table 2.1)
_WEIGHT, _MOMENTS = 4, 8  # bytes: float32 weights and gradients, two float32 moments
_ACTIVATIONS = (
    34  # bytes per token, layer and unit of width, attention computed in pieces (Korthikanti et al. 2023, eq. 2)
)
_ENTRY = 4  # bytes per token, layer and unit of width where only what enters a block is kept
_LOGITS = 3 * 4 * 2**23  # bytes: `tasks.cross_entropy` holds so many at a time
_FIXED, _FRAGMENTED = 1.5e9, 1.1  # bytes that CUDA and nccl take, and what the allocator cannot use
_FILLED = 0.9  # of the card by the pieces that the plan chooses itself
_WIDTH_PER_LAYER = 64  # of models of usual shape: 12 x 768, 24 x 2048 and 32 x 4096 lie on both sides


@dataclass(frozen=True)
class Shape:
    """A decoder's size."""

    parameters: float
    layers: int
    width: int
    vocab_size: int
    context: int

    @property
    def flops_per_token(self) -> float:
        """Operations of a forward and backward pass per token: 6 a weight, and attention's (Chowdhery et al. 2022, appendix B)."""
        return 6 * self.parameters + 12 * self.layers * self.width * self.context


@dataclass(frozen=True)
class Plan:
    """What was worked out; bytes, seconds and dollars."""

    shape: Shape
    tokens: float
    gpus: int
    gpu: str
    parallel: Literal["none", "ddp", "fsdp"]
    recompute: bool
    micro_batch: int  # sequences per forward pass of a GPU
    accumulation: int  # forward passes per step
    utilisation: float
    flops: float  # of the whole training
    tokens_per_second: float
    seconds: float
    state_bytes: float  # per GPU: weights, gradients, moments
    gathered_bytes: float  # per GPU: what is whole for a moment under fsdp
    activation_bytes: float  # per GPU
    memory: float  # per GPU, all of it
    room: float  # of the card
    communication_seconds: float  # per step, if none of it hides behind computation
    step_seconds: float
    checkpoint_bytes: float
    checkpoint_seconds: float
    model_bytes: float
    data_bytes: float  # token shards on disk
    dollars: float

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.memory <= self.room

    @property
    def tokens_per_step(self) -> int:
        """Of the global batch."""
        return self.gpus * self.micro_batch * self.accumulation * self.shape.context

    def lines(self) -> list[str]:
        """What a user should read, a fact a line."""
        shape = self.shape
        said = {"none": "one GPU", "ddp": "whole on every GPU (ddp)", "fsdp": "spread over the GPUs (fsdp)"}[
            self.parallel
        ]
        batch = f"{self.tokens_per_step:,} tokens a step: {self.micro_batch} x {self.accumulation} sequences of {shape.context:,} on each GPU"
        room = "fits" if self.fits else "does not fit"
        return [
            f"model        {count(shape.parameters)} parameters ({shape.layers} x {shape.width}, vocabulary {shape.vocab_size:,})",
            f"data         {count(self.tokens)} tokens, {size(self.data_bytes)} of token shards ({size(self.tokens * BYTES_PER_TOKEN)} of text), "
            f"{self.tokens / shape.parameters:,.0f} tokens per parameter",
            f"batch        {batch}; {self.tokens / self.tokens_per_step:,.0f} steps",
            f"computation  {self.flops:.2e} operations, {self.flops / self.tokens:.2e} a token",
            f"speed        {self.tokens_per_second:,.0f} tokens/s on {self.gpus} x {self.gpu} at {self.utilisation:.0%} of their peak",
            f"time         {span(self.seconds)} ({self.gpus * self.seconds / 3600:,.0f} GPU hours)",
            f"memory       {size(self.memory)} of {size(self.room)} on each GPU: {room}; the model is {said}",
            f"             weights, gradients, moments {size(self.state_bytes)}; whole for a moment {size(self.gathered_bytes)}; "
            f"activations {size(self.activation_bytes)}{' (recomputed)' if self.recompute else ''}",
            f"network      {self.communication_seconds:.2f} s of a step of {self.step_seconds:.2f} s; "
            + (
                "it hides behind the computation"
                if self.communication_seconds < 0.5 * self.step_seconds
                else "it will slow training down"
            ),
            f"checkpoint   {size(self.checkpoint_bytes)}, {self.checkpoint_seconds:.0f} s to write in the background; the model {size(self.model_bytes)}",
            f"cost         ${self.dollars:,.0f}",
        ]


def plan(
    *,
    parameters: float,
    tokens: float,
    gpus: str,
    context: int = 1024,
    vocab_size: int = 50304,
    layers: int | None = None,
    width: int | None = None,
    parallel: Literal["auto", "ddp", "fsdp"] = "auto",
    recompute: bool = False,
    micro_batch: int | None = None,
    tokens_per_step: int = TOKENS_PER_STEP,
    utilisation: float = UTILISATION,
    dollars: float | None = None,
    disk: float = 1e9,
    ema: bool = False,
) -> Plan:
    """Work out a training of a decoder.

    Args:
        parameters: how many, embeddings included.
        gpus: "8xH100"; the names are those of `GPUS`.
        layers, width: the model's shape; the usual one for its size where left out.
        parallel: auto: ddp where it fits, fsdp where not.
        recompute: keep only what enters each block (`train.activation_checkpointing`).
        micro_batch: sequences per forward pass of a GPU; the most that fit, up to 64, where left out.
        tokens_per_step: wanted; the plan comes as near as whole sequences allow.
        utilisation: of the peak that training reaches.
        dollars: per GPU and hour; the table's where left out.
        disk: bytes per second that checkpoints are written at.
        ema: whether an average of the weights is kept.

    Raises:
        FormaryError: the GPUs are not known, or a number makes no sense.
    """
    number, name = _gpus(gpus)
    card = GPUS[name]
    for what, value in (("--params", parameters), ("--tokens", tokens), ("--context", context), ("--mfu", utilisation)):
        if not value > 0:
            raise FormaryError(f"{what} {value}: must be above 0")
    if utilisation > 1:
        raise FormaryError(f"--mfu {utilisation}: is a share of the peak, such as {UTILISATION}")
    shape = _shape(parameters, vocab_size, context, layers, width)
    averages = _WEIGHT if ema else 0
    whole_state = (2 * _WEIGHT + _MOMENTS + averages) * parameters
    embedding = shape.vocab_size * shape.width
    block = (parameters - embedding) / shape.layers
    kinds: dict[str, tuple[float, float]] = {
        "none": (whole_state, 0.0),
        "ddp": (whole_state, 0.0),
        # The embedding is whole from the forward pass to the end of the backward pass, with its gradient; of the blocks
        # one is at work while the next is fetched and the one before is summed.
        "fsdp": (whole_state / number, 2 * _WEIGHT * (embedding + 2 * block)),
    }
    wanted = [parallel] if parallel != "auto" else ["ddp", "fsdp"]
    wanted = ["none"] if number == 1 else wanted
    per_sequence = shape.context * shape.layers * shape.width * (_ENTRY if recompute else _ACTIVATIONS)
    at_once = shape.context * shape.width * _ACTIVATIONS if recompute else 0.0  # of the block that is computed again

    def memory_of(kind: str, sequences: int) -> float:
        state, gathered = kinds[kind]
        return _FRAGMENTED * (state + gathered + sequences * (per_sequence + at_once) + _LOGITS) + _FIXED

    least = micro_batch or 1
    kind = next((kind for kind in wanted if memory_of(kind, least) <= card.memory), wanted[-1])
    each = max(1, round(tokens_per_step / number / context))  # sequences of a GPU per step
    most = next((n for n in (64, 32, 16, 8, 4, 2) if n <= each and memory_of(kind, n) <= _FILLED * card.memory), 1)
    micro = micro_batch or most
    accumulation = max(1, round(each / micro))
    passes = 4 / 3 if recompute else 1.0
    speed = number * card.peak * utilisation / (shape.flops_per_token * passes)
    step_tokens = number * micro * accumulation * context
    checkpoint = (_WEIGHT + _MOMENTS + averages) * parameters
    seconds = tokens / speed
    state, gathered = kinds[kind]
    return Plan(
        shape=shape,
        tokens=tokens,
        gpus=number,
        gpu=name,
        parallel=kind,  # type: ignore[arg-type]
        recompute=recompute,
        micro_batch=micro,
        accumulation=accumulation,
        utilisation=utilisation,
        flops=shape.flops_per_token * tokens,
        tokens_per_second=speed,
        seconds=seconds,
        state_bytes=state,
        gathered_bytes=gathered,
        activation_bytes=micro * (per_sequence + at_once),
        memory=memory_of(kind, micro),
        room=card.memory,
        communication_seconds=_communication(kind, parameters, number, accumulation, card),
        step_seconds=step_tokens / speed,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=checkpoint / disk,
        model_bytes=_WEIGHT * parameters,
        data_bytes=tokens * (2 if vocab_size <= 2**16 else 4),
        dollars=(card.dollars if dollars is None else dollars) * number * seconds / 3600,
    )


def _gpus(text: str) -> tuple[int, str]:
    """8xH100 -> 8 and the table's name."""
    found = re.fullmatch(r"\s*(?:(\d+)\s*[x×*]\s*)?([A-Za-z][\w-]*)\s*", text)
    names = {name.lower(): name for name in GPUS}
    if not found or int(found[1] or 1) < 1:
        raise FormaryError(f"--gpus {text}: write a number and a card, such as 8xH100")
    if found[2].lower() not in names:
        hint = nearest(found[2].upper(), GPUS)
        raise FormaryError(f"--gpus {text}: known cards are {', '.join(GPUS)}{f'; {hint}' if hint else ''}")
    return int(found[1] or 1), names[found[2].lower()]


def _shape(parameters: float, vocab_size: int, context: int, layers: int | None, width: int | None) -> Shape:
    """Layers and width for so many weights: 12 width^2 a layer and the embedding (Kaplan et al. 2020, table 1)."""
    if layers is None and width is None:
        fits = (w for w in range(64, 65536, 64) if 12 * w**3 / _WIDTH_PER_LAYER + vocab_size * w >= parameters)
        width = next(fits, 65536)
    if width is None:
        assert layers is not None
        a, b = 12 * layers, vocab_size
        width = max(1, round((-b + math.sqrt(b * b + 4 * a * parameters)) / (2 * a)))
    if layers is None:
        layers = max(1, round((parameters - vocab_size * width) / (12 * width**2)))
    if vocab_size * width >= parameters:
        raise FormaryError(
            f"--params {parameters:g}: the embedding alone has {vocab_size * width:,} ({vocab_size:,} tokens x {width}); "
            "lower --vocab or --width"
        )
    return Shape(parameters, layers, width, vocab_size, context)


def _communication(kind: str, parameters: float, number: int, accumulation: int, card: Gpu) -> float:
    """Seconds per step: ddp sums gradients once (a ring moves each twice), fsdp fetches weights twice and sums once a pass."""
    if kind == "none":
        return 0.0
    rate = card.link if number <= PER_MACHINE else min(card.link, card.network * PER_MACHINE)
    moved = _WEIGHT * parameters * (number - 1) / number * (2 if kind == "ddp" else 3 * accumulation)
    return moved / rate


# How numbers are said ----------------------------------------------------------------------------------------------------


def count(number: float) -> str:
    """124 M, 1.5 B, 30 B."""
    for unit, value in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= value:
            return f"{number / value:.3g} {unit}"
    return f"{number:,.0f}"


def size(number: float) -> str:
    """Bytes as 18 GB, 1.2 TB."""
    for unit, value in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= value:
            return f"{number / value:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def span(seconds: float) -> str:
    """Seconds as 40 minutes, 7.5 hours, 3.2 days."""
    for unit, value in (("days", 2 * 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= value:
            return f"{seconds / (86400 if unit == 'days' else value):.1f} {unit}"
    return f"{seconds:.0f} seconds"

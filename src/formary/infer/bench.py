"""How fast a model runs on this machine: writing, reading a prompt, answering texts, and how near memory's speed that is.

Writing and reading go through the engine, as when it serves; encoders answer texts of mixed length through `predict`.
Kernels are measured in turn, round by round. What figures mean for the reader is the command's to say.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from formary.data.buckets import by_length
from formary.errors import RequestError
from formary.infer import kernels
from formary.infer.engine import Engine, Request
from formary.infer.loaded import Model
from formary.infer.precision import autocast, fast_precision
from formary.infer.sampling import SamplingSettings
from formary.infer.stepper import evaluating
from formary.model.topologies import Encoder, Network
from formary.tasks.reading import Reader, padded

_TEXT = "the meeting of our small reading group moves to Thursday because Anna cannot come before seven o'clock"
_LONGEST_TEXT = 256  # words
_BATCH_TOKENS = 4096  # of a group of texts with its padding
_READ_BYTES = 2**28  # far more than a processor's caches hold


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Args:
        prompt: tokens of the prompts that are written on from.
        new: tokens written for each.
        batches: how many are written at once, each measured.
        prefill: tokens of the prompt whose reading is timed.
        texts: texts of mixed length that an encoder answers.
        rounds: how often all of it is measured.
    """

    prompt: int = 32
    new: int = 96
    batches: tuple[int, ...] = (1, 8)
    prefill: int = 512
    texts: int = 200
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("prompt", "new", "prefill", "texts", "rounds"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} = {getattr(self, name)}: must be at least 1")
        if not self.batches or min(self.batches) < 1:
            raise RequestError(f"batches = {list(self.batches)}: must be one or more whole numbers of at least 1")

    def fitting(self, model: Model) -> Workload:
        """The same, shortened to what the model's context holds.

        Raises:
            RequestError: the model reads no texts.
        """
        if not model.reads_text:
            raise RequestError(f"bench: measures models of texts, and this one reads {model.config.embedder}")
        context = model.config.context
        if model.config.encoder is not None:
            source = model.config.encoder.context
            return replace(
                self,
                prompt=min(self.prompt, source),
                prefill=min(self.prefill, source),
                new=max(1, min(self.new, context - 2)),
            )
        prompt = max(1, min(self.prompt, context // 2))
        new = max(1, min(self.new, context - prompt - 1))
        return replace(self, prompt=prompt, new=new, prefill=max(1, min(self.prefill, context - 1)))


@dataclass(frozen=True)
class Figure:
    """One thing measured, in all rounds.

    Args:
        bandwidth_share: of what memory can read, for writing one text: the weights' bytes times tokens/s.
    """

    kernel: str
    measure: str
    unit: str
    values: tuple[float, ...]
    bandwidth_share: float | None = None

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Largest less smallest, as a share of the median."""
        return (max(self.values) - min(self.values)) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Writing:
    """How fast texts were written."""

    first_seconds: float  # from the request to the first token of the last text to begin
    tokens_per_second: float  # of all texts together, while all of them were being written


def networks_of(model: Model) -> dict[str, Network]:
    """The model's network in every kernel that this machine has; an encoder's in bfloat16 too, where that is fast."""
    network, encoder = model.network, isinstance(model.network, Encoder)
    found = {"float32": network}
    if encoder and fast_precision("cpu") == "bfloat16":
        found["bfloat16"] = network
    if "int8" in kernels.available():
        found["int8"] = model.in_precision("int8")[0].network
    return found


def measure(
    model: Model,
    networks: Mapping[str, Network],
    workload: Workload,
    *,
    bandwidth: float | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> list[Figure]:
    """Everything that can be measured of a model.

    Args:
        networks: the model's network under the name of each kernel.
        bandwidth: bytes per second that memory gives, see `read_bandwidth`.
        told: called with what is measured next.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    encoder = isinstance(model.network, Encoder)
    rounds = {
        name: partial(_encoder_round, precision=_precision(name)) if encoder else _writer_round for name in networks
    }
    for number in range(-1, workload.rounds):  # the first round is short and does not count
        for name, one_round in rounds.items():
            told(f"round {number + 1} of {workload.rounds}, {name}" if number >= 0 else f"warming up {name}")
            for (what, unit), value in one_round(model, networks[name], workload, number).items():
                if number >= 0:
                    values.setdefault((name, what, unit), []).append(value)
    return [
        Figure(name, what, unit, tuple(found), _share(networks[name], what, found, bandwidth))
        for (name, what, unit), found in values.items()
    ]


def write(model: Model, engine: Engine, prompts: Sequence[tuple[int, ...]], new: int) -> Writing:
    """Write `new` tokens after the first one of each prompt, greedily, whatever they are, without speculation."""
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.submit(_request(model, prompt, new + 1, id=number))
    started: set[int | str] = set()
    first = began
    counted, all_written = 0, True
    last = began
    while engine.busy:
        events = engine.step()
        now = time.perf_counter()
        if len(started) < len(prompts):
            started |= {event.request for event in events}
            first = last = now
        elif all_written:
            counted += len(events)
            last = now
        all_written = all_written and all(event.finish is None for event in events)
    return Writing(first - began, counted / (last - first) if counted else 0.0)


def read(model: Model, engine: Engine, prompt: tuple[int, ...]) -> float:
    """Seconds until the first token after a prompt."""
    began = time.perf_counter()
    for _ in engine.generate([_request(model, prompt, 1)]):
        pass
    return time.perf_counter() - began


def read_bandwidth(seconds: float = 0.5, *, read_bytes: int = _READ_BYTES) -> float:
    """Bytes per second that the threads of torch read from memory together: the best of adding up a large tensor."""
    tensor = torch.ones(read_bytes // 4)
    best, end = float("inf"), time.perf_counter() + seconds
    tensor.sum()
    while time.perf_counter() < end:
        began = time.perf_counter()
        tensor.sum()
        best = min(best, time.perf_counter() - began)
    return tensor.numel() * 4 / best


def mixed_texts(count: int, *, longest: int = _LONGEST_TEXT, seed: int = 0) -> list[str]:
    """Texts of 3 to `longest` words, most of them short, the same at every call."""
    rng, words = random.Random(seed), _TEXT.split()
    lengths = [min(max(3, round(rng.lognormvariate(3.4, 0.8))), longest) for _ in range(count)]
    return [" ".join(rng.choices(words, k=length)) for length in lengths]


def _writer_round(model: Model, network: Network, workload: Workload, number: int) -> dict[tuple[str, str], float]:
    warm = number < 0
    found: dict[tuple[str, str], float] = {}
    engine = Engine(network, slots=max(workload.batches))
    for batch in workload.batches:
        prompts = [_tokens(model, workload.prompt, f"{number} {batch} {row}") for row in range(batch)]
        written = write(model, engine, prompts, 2 if warm else workload.new)
        found[f"writing, {batch} at once", "tokens/s"] = written.tokens_per_second
        if batch == min(workload.batches):
            found[f"first token after {workload.prompt}" + (f", {batch} at once" if batch > 1 else ""), "s"] = (
                written.first_seconds
            )
    prompt = _tokens(model, min(workload.prefill, workload.prompt) if warm else workload.prefill, f"{number} prefill")
    found[f"reading {workload.prefill} tokens", "s"] = read(model, engine, prompt)
    return found


def _precision(kernel: str) -> str:
    return "bfloat16" if kernel == "bfloat16" else "float32"


def _encoder_round(
    model: Model, network: Network, workload: Workload, number: int, *, precision: str
) -> dict[tuple[str, str], float]:
    texts = mixed_texts(workload.texts if number >= 0 else min(8, workload.texts))
    answering = Model(network, model.tokenizer, formary=model.formary)
    began = time.perf_counter()
    if _has_task(answering):
        answering.predict([_row(answering.task.asks, text) for text in texts], precision=precision)
    else:
        with autocast(precision, torch.device("cpu")):
            _read_texts(answering, texts)
    return {(f"{workload.texts} texts", "texts/s"): len(texts) / (time.perf_counter() - began)}


@torch.inference_mode()
def _read_texts(model: Model, texts: list[str]) -> None:
    """What an encoder without a task can do with texts: hidden states, like lengths together."""
    readings = [reading.tokens for reading in Reader(model.tokenizer, model.config.context).read(texts)]
    for rows in by_length([len(tokens) for tokens in readings], tokens=_BATCH_TOKENS):
        tokens = padded([readings[row] for row in rows], 0)
        lengths = torch.tensor([len(readings[row]) for row in rows])
        with evaluating(model.network):
            model.network(tokens, mask=torch.arange(tokens.shape[1]) < lengths[:, None])


def _row(asks: tuple[str, ...], text: str) -> dict[str, Any]:
    """A row with the columns that a task asks for, made from a text."""
    words = text.split()
    made: dict[str, Any] = {"tokens": words, "question": " ".join(words[:8]), "choices": [words[0], words[-1]]}
    return {name: made.get(name, text) for name in asks}


def _has_task(model: Model) -> bool:
    try:
        return model.task is not None
    except RequestError:
        return False


def _request(model: Model, prompt: tuple[int, ...], max_tokens: int, id: int = 0) -> Request:
    request, _ = model.request(prompt, 1, {"max_tokens": max_tokens})
    return replace(request, settings=SamplingSettings(), stop_tokens=frozenset(), stop=(), speculate=False, id=id)


def _tokens(model: Model, count: int, seed: str) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(model.config.vocab_size) for _ in range(count))


def _share(network: Network, what: str, found: Sequence[float], bandwidth: float | None) -> float | None:
    if bandwidth is None or what != "writing, 1 at once":
        return None
    return kernels.weight_bytes(network) * statistics.median(found) / bandwidth

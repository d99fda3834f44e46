"""The batch that fits: how many of the longest sequences a forward and backward pass can hold, and which many are fastest.

Powers of two are tried upwards with the run's own network and loss, within the memory that is really free here, the
container's limit included. The weights do not change.
"""

from __future__ import annotations

import ctypes
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from formary.errors import FormaryError
from formary.model.topologies import Network
from formary.recipe.schema import Train
from formary.tasks.protocol import Batch
from formary.train.loop import gradient
from formary.train.machine import Runtime
from formary.train.memory import is_memory
from formary.train.parallel import Loss

MARGIN = 0.3  # of the free memory stays free
LARGEST, SMALLEST = 64, 8  # sequences per step: beyond, a step costs more than it teaches; below, it is mostly noise
STEPS_PER_PASS = 50  # a pass over the data has at least so many steps, where it has rows enough
_AS_FAST = 1.05  # within this factor of the least time per sequence counts as equally fast
_LONG_ENOUGH = 0.3  # seconds of measuring, at most _REPEATS times
_REPEATS = 3
_STATE_BYTES = 8  # per number that trains: two float32 moments


@dataclass(frozen=True)
class Trial:
    """One size that was tried: bytes that its pass adds to the process, and seconds per sequence."""

    sequences: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """What was chosen, and from what.

    Args:
        batch: sequences per optimiser step.
        micro_batch: sequences per forward pass; None: the whole batch.
        why: one sentence.
        free: bytes that the run may use, the margin taken off.
        trials: the sizes that were tried.
    """

    batch: int
    micro_batch: int | None
    why: str
    free: int
    trials: tuple[Trial, ...]


def find_batch(
    loss_of: Loss,
    network: Network,
    longest: Callable[[int], Batch],
    settings: Train,
    runtime: Runtime,
    *,
    sequences: int,
    cuttable: bool = True,
) -> Fit:
    """The batch and micro-batch for this network and data on this machine.

    Args:
        longest: a batch of so many sequences, as long as they come.
        settings: a `micro_batch` given there is kept; `batch` is not read.
        sequences: how many there are to learn from in a pass.
        cuttable: whether the loss may be computed in pieces; False where the sequences of a pass are contrasted.

    Raises:
        FormaryError: not even one sequence fits.
    """
    cap = largest_sensible(sequences)
    whole = settings.model_copy(update={"micro_batch": None})
    most = min(cap, settings.micro_batch or cap)

    def once(count: int) -> float:
        began = time.perf_counter()
        gradient(loss_of, network, longest(count), whole, runtime)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    mode, trials = network.training, list[Trial]()
    smallest = 1 if cuttable else min(2, cap)
    with torch.random.fork_rng(), _cleared(network):
        network.train()
        free = int(free_memory(runtime) * (1 - MARGIN)) - _state_bytes(network, settings)
        count = smallest
        try:
            once(count)  # leaves the gradients in place, which every size needs alike
            while count <= most:
                with _peak(runtime) as peak:
                    seconds = [once(count)]
                while sum(seconds) < _LONG_ENOUGH and len(seconds) < _REPEATS:
                    seconds.append(once(count))
                if peak.bytes > free:
                    break
                trials.append(Trial(count, peak.bytes, min(seconds) / count))
                if 2 * peak.bytes > free and runtime.device.type == "cpu":
                    break  # twice as many would not fit, and a CPU process that tries is killed
                count *= 2
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
        network.train(mode)
    if not trials:
        raise FormaryError(
            f"train.batch: auto finds no room for {smallest} of {settings.context} tokens in {free / 2**30:.1f} GiB of "
            "free memory; lower train.context or model.size, or free memory"
        )
    return choose(trials, cap=cap, free=free, settings=settings, cuttable=cuttable)


def choose(trials: list[Trial], *, cap: int, free: int, settings: Train, cuttable: bool = True) -> Fit:
    """The largest batch that fits, up to `cap`, in the pieces that are fastest; larger pieces where it is the same."""
    fits = trials[-1].sequences
    if settings.micro_batch:
        batch, micro = cap, min(settings.micro_batch, cap)
    else:
        batch = min(fits, cap)
        least = min(trial.seconds for trial in trials)
        micro = max(trial.sequences for trial in trials if trial.seconds <= _AS_FAST * least)
    micro = batch if not cuttable else min(micro, batch)
    pieces = f" in pieces of {micro}, {'as asked' if settings.micro_batch else 'the fastest'}" if micro < batch else ""
    room = f"{trials[-1].bytes / 2**20:,.0f} MiB for {fits} of the longest, {free / 2**30:.1f} GiB free"
    reason = "more do not fit" if batch < cap else f"a pass is to have about {STEPS_PER_PASS} steps or more"
    reason = f"more than {LARGEST} teach little more per step" if batch == LARGEST else reason
    why = f"batch {batch}{pieces}: {reason} ({room})"
    return Fit(batch, None if micro >= batch else micro, why, free, tuple(trials))


def largest_sensible(sequences: int) -> int:
    """The largest power of two that leaves a pass its steps, between SMALLEST and LARGEST and within the data."""
    wanted = max(1, sequences // STEPS_PER_PASS)
    power = 2 ** int(math.log2(wanted))
    return max(1, min(max(power, SMALLEST), LARGEST, 2 ** int(math.log2(max(1, sequences)))))


def free_memory(runtime: Runtime) -> int:
    """Bytes that the process may still take: of the device, or of the machine and the container it runs in."""
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(runtime.device)[0])
    return min([int(psutil.virtual_memory().available), *_container_rooms()])


def _container_rooms() -> Iterator[int]:
    """What each control group that holds the process leaves it (version 2 and version 1); cached files count as free."""
    root = Path("/sys/fs/cgroup")
    places = {root, root / "memory"}
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)
            base = root if not kinds else root / "memory" if "memory" in kinds.split(",") else None
            if base is not None:
                inner = base / path.strip("/")
                places |= {inner, *(parent for parent in inner.parents if parent.is_relative_to(base))}
    for place in places:
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # not that version, or the word "max"
                room = int((place / limit).read_text()) - int((place / used).read_text())
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                yield max(0, room + int(stat.get(cached, 0)))


def _state_bytes(network: Network, settings: Train) -> int:
    """What training will add beside the passes: the optimiser's moments, the average and its exchange."""
    trains = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in network.parameters())
    return _STATE_BYTES * trains + (2 * 4 * everything if settings.ema else 0)


@contextmanager
def _cleared(network: Network) -> Iterator[None]:
    try:
        yield
    finally:
        for parameter in network.parameters():
            parameter.grad = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Peak:
    bytes = 0


@contextmanager
def _peak(runtime: Runtime) -> Iterator[_Peak]:
    """How many bytes the process grew by inside the block, at its highest."""
    peak = _Peak()
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
        before = torch.cuda.memory_allocated(runtime.device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(runtime.device) - before
        return
    with suppress(OSError, AttributeError):  # glibc: give back what earlier passes left, or it hides this one's need
        ctypes.CDLL(None).malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.001):
            peak.bytes = max(peak.bytes, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.bytes = max(peak.bytes, process.memory_info().rss - before)

"""What a training will take, known before it: a probe of its first steps with its own loop, data and model.

Memory is the highest that the process held, time is steps, validations and saves by their number, disk is counted from
the probe's own checkpoint. `measure_peak` measures afterwards what it really took, the same way.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from formary.errors import FormaryError
from formary.recipe.schema import Train
from formary.tasks.protocol import Batch, Batches, read_of, size_of, total_steps
from formary.train.fit import free_memory
from formary.train.loop import gradient, train
from formary.train.machine import Runtime
from formary.train.records import read_records

STEPS = 20  # of the probe; more where they are so quick that 20 say little
_WARM = 3  # steps before them that are not counted
_LONG_ENOUGH, _MOST = 4.0, 400  # seconds of counted steps, and the most of them
_SAMPLED = 200  # batches whose sizes are looked at


@dataclass(frozen=True)
class Forecast:
    """What the training loop of a run is expected to take.

    Args:
        steps: of the whole training.
        seconds: of the loop, from the first step to the best weights.
        step_seconds: mean of a step, for a batch of mean size.
        validations, validation_seconds: how many, and how long one takes.
        saves, save_seconds: likewise of checkpoints; those seconds are the background's, the step waits for fewer.
        memory: bytes that the process holds at its highest.
        free: bytes that it could have before it has to swap or is killed.
        checkpoint_bytes: of one checkpoint.
        checkpoints: most that lie on the disk at once.
        parameters: of the model.
        began: when the training would have begun, by `time.perf_counter`; what came before it is to be added.
    """

    steps: int
    seconds: float
    step_seconds: float
    validations: int
    validation_seconds: float
    saves: int
    save_seconds: float
    memory: int
    free: int
    checkpoint_bytes: int
    checkpoints: int
    parameters: int
    began: float


class Probed(FormaryError):
    """The probe is done: raised in place of a training's end, so that nothing after it happens."""

    def __init__(self, forecast: Forecast) -> None:
        super().__init__("the probe is done")
        self.forecast = forecast


def probe(loss_of: Any, network: Any, *, settings: Train, runtime: Runtime, batches: Batches, **given: Any) -> Any:
    """Stand in for `loop.train`, with its arguments: train a few steps in a temporary folder, and raise `Probed`."""
    began, total = time.perf_counter(), total_steps(settings, batches)
    sample, validation = given.get("sample"), given.get("validation")
    given |= {"console": Console(quiet=True), "watch": None}
    given.pop("seeing", None)
    given.pop("remade", None)
    reset_peak()
    with tempfile.TemporaryDirectory(prefix=".writing-probe-", dir=given["run"]) as folder:
        place, wanted = Path(folder), STEPS
        while True:
            given |= {"run": place / str(wanted), "checkpoints": place / str(wanted) / "checkpoints"}
            short = _short(settings, wanted + _WARM)
            timed = _Timed(batches)
            train(loss_of, network, batches=timed, settings=short, runtime=runtime, **(given | {"sample": None}))
            seconds, sizes = timed.steps(skip=_WARM)
            if sum(seconds) >= _LONG_ENOUGH or wanted >= _MOST:
                break
            wanted = min(_MOST, max(2 * wanted, int(1.2 * _LONG_ENOUGH * wanted / sum(seconds))))
        records = read_records(given["run"] / "metrics.jsonl")
        checked = [record["validation_seconds"] for record in records if "validation_seconds" in record]
        (saved,) = given["checkpoints"].glob("step-*")
        checkpoint_bytes = sum(file.stat().st_size for file in saved.iterdir())
        save_seconds = timed.seconds_after(float(sum(checked)))
        sampled = [batches.batch(step * max(1, total // _SAMPLED)) for step in range(min(total, _SAMPLED))]
        largest = max(sampled, key=lambda batch: (size_of(batch), read_of(batch).shape[1]))  # under a ramp, the longest
        if given.get("private") is None:
            gradient(loss_of, network, largest, settings, runtime)
        mean_size = sum(size_of(batch) for batch in sampled) / len(sampled)
        step_seconds = sum(seconds) / sum(sizes) * mean_size
        sampling = time.perf_counter()
        if sample and settings.sample_every:
            sample(network)
        sample_seconds = (time.perf_counter() - sampling) * (total // (settings.sample_every or total + 1))
        validations = -(-total // settings.validate_every) if validation else 0
        validation_seconds = float(sum(checked)) if validation else 0.0
        saves = (
            total // settings.save_every + 1 + (validations + 1) // 2
        )  # of the validations about half are the best yet
        raise Probed(
            Forecast(
                steps=total,
                seconds=total * step_seconds + validations * validation_seconds + sample_seconds,
                step_seconds=step_seconds,
                validations=validations,
                validation_seconds=validation_seconds,
                saves=saves,
                save_seconds=save_seconds,
                memory=peak_memory(runtime),
                free=free_memory(runtime) + held_memory(runtime),
                checkpoint_bytes=checkpoint_bytes,
                checkpoints=min(saves, settings.keep + settings.keep_best) + 1,  # one more while it is written
                parameters=sum(parameter.numel() for parameter in network.parameters()),
                began=began,
            )
        )


def _short(settings: Train, steps: int) -> Train:
    """Settings with which the loop does so many steps, validates once and saves once."""
    never = 10**9
    return settings.model_copy(
        update={
            "steps": steps,
            "epochs": None,
            "patience": None,
            "validate_every": never,
            "save_every": never,
            "sample_every": None,
            "keep_hours": None,
        }
    )


class _Timed:
    """Batches that note when each is asked for; the time between two is that of a step, all that belongs to it included."""

    def __init__(self, batches: Batches) -> None:
        self.inner, self.steps_per_epoch = batches, batches.steps_per_epoch
        self.asked: list[tuple[int, float, int]] = []  # step, when, tokens

    def batch(self, step: int) -> Batch:
        began = time.perf_counter()
        batch = self.inner.batch(step)
        self.asked.append((step, began, size_of(batch)))
        return batch

    def steps(self, *, skip: int) -> tuple[list[float], list[int]]:
        """Seconds and tokens of every step but the first few and the last, whose end is not seen."""
        counted = self.asked[skip:]
        seconds = [then - now for (_, now, _), (_, then, _) in pairwise(counted)]
        return seconds, [size for _, _, size in counted[:-1]]

    def seconds_after(self, validating: float) -> float:
        """From the last step on: its own time, the validation and the save that was waited for; the save is the rest."""
        seconds, _ = self.steps(skip=_WARM)
        return max(0.0, time.perf_counter() - self.asked[-1][1] - validating - sum(seconds) / len(seconds))


# Memory ---------------------------------------------------------------------------------------------------------------


def reset_peak() -> None:
    """Let the highest memory be counted from now on, where the system can do that (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory(runtime: Runtime) -> int:
    """Bytes that the process held at its highest since `reset_peak`; on a GPU, of the GPU."""
    if runtime.device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(runtime.device))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held_memory(runtime: Runtime) -> int:
    """Bytes that the process holds now."""
    if runtime.device.type == "cuda":
        return int(torch.cuda.memory_reserved(runtime.device))
    return int(psutil.Process().memory_info().rss)

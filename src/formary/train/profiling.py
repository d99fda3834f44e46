"""Where the time of a training step goes: torch's profiler over a few steps, as a Chrome trace and as a table by kind.

The first steps are left out, as they warm up. A profiled step is slower than others; the shares are what it is for.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from formary import durable
from formary.tasks.protocol import Batch, Batches

FOLDER, TRACE, TABLE = "profile", "trace.json.gz", "times.json"
KINDS = ("matrix products", "attention", "norms and activations", "loss", "optimiser", "data", "other operations")
REST = "Python and waiting"
"""What no operation of torch accounts for."""

_SKIPPED, _STEPS = 3, 8
_DATA = "formary: data"
# What an operation, or the nearest one above it that says more, belongs to. Products of batches of matrices (bmm) are
# attention's: layers multiply one matrix.
_OUTER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("data", (_DATA,)),
    ("optimiser", ("Optimizer.step", "Muon")),
    ("loss", ("_ChunkedCrossEntropy", "cross_entropy")),
)
_INNER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("scaled_dot_product", "_flash_attention", "_efficient_attention", "bmm", "_Rotate", "softmax")),
    ("matrix products", ("aten::mm", "addmm", "aten::linear", "mkldnn_linear")),
    ("norms and activations", ("norm", "gelu", "silu", "relu", "tanh", "dropout", "_RMSNorm", "sigmoid", "threshold")),
)


class Profile:
    """Watches some steps of a training; see `formary run --profile`.

    Args:
        run: the run folder; profile/trace.json.gz and profile/times.json are written there.
        key: of the training, by which the report knows that the times are its own.
        skipped: steps before the first that is watched; `steps`: how many are.
    """

    def __init__(self, run: Path, *, key: str = "", skipped: int = _SKIPPED, steps: int = _STEPS) -> None:
        self.folder, self.key, self.skipped, self.steps = run / FOLDER, key, skipped, steps
        self._passed, self._began = 0, 0.0
        self._profiler: Any = None
        self.times: dict[str, Any] | None = None
        """What was found: {steps, seconds, kinds: [{kind, seconds, share}], operations: [{name, kind, seconds, calls}]}."""

    def batches(self, batches: Batches) -> Batches:
        """The same batches, marked in the trace while they are made."""
        return _Marked(batches)

    def stepped(self) -> None:
        """A step is over: begin after the skipped ones, end after the watched ones."""
        self._passed += 1
        if self.times is None and self._profiler is None and self._passed >= self.skipped:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=activities)
            self._profiler.start()
            self._began = time.perf_counter()
        elif self._profiler is not None and self._passed >= self.skipped + self.steps:
            self.finish()

    def finish(self) -> None:
        """Write what was seen, if anything was.

        Raises:
            StorageError: it could not be written.
        """
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, steps = time.perf_counter() - self._began, self._passed - self.skipped
        profiler.stop()
        if steps < 1:
            return
        self.times = times_of(profiler.events(), steps=steps, seconds=seconds)
        with durable.new_folder(self.folder) as folder:
            profiler.export_chrome_trace(str(folder / TRACE))
            durable.write_json(folder / TABLE, {"key": self.key, **self.times})


def times_of(events: Iterable[Any], *, steps: int, seconds: float) -> dict[str, Any]:
    """Seconds by kind and by operation, each operation without those it calls; what is left of `seconds` is `REST`.

    On a GPU its own time is counted, and what the operations leave of `seconds` is the host's.
    """
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.is_async or not _runs_on_host(event):
            continue
        spent = (float(event.self_device_time_total) or float(event.self_cpu_time_total)) / 1e6
        kind = kind_of(event)
        by_kind[kind] += spent
        entry = by_name[event.name, kind]
        entry[0] += spent
        entry[1] += 1
    by_kind[REST] = max(0.0, seconds - sum(by_kind.values()))
    whole = sum(by_kind.values()) or 1.0
    kinds = [
        {"kind": kind, "seconds": by_kind[kind], "share": by_kind[kind] / whole}
        for kind in (*KINDS, REST)
        if by_kind[kind] > 0
    ]
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:20]
    operations = [
        {"name": name, "kind": kind, "seconds": spent, "calls": int(calls)} for (name, kind), (spent, calls) in longest
    ]
    kinds.sort(key=lambda entry: -float(entry["seconds"]))  # type: ignore[arg-type]
    return {"steps": steps, "seconds": seconds, "kinds": kinds, "operations": operations}


def kind_of(event: Any) -> str:
    """The kind that an operation of the trace belongs to, by what it is called within, else by its own name."""
    chain = [event]
    while (above := chain[-1].cpu_parent) is not None:
        chain.append(above)
    for kind, marks in _OUTER:
        if any(mark in one.name for one in chain for mark in marks):
            return kind
    for one in chain:
        for kind, marks in _INNER:
            if any(mark in one.name for mark in marks):
                return kind
    return KINDS[-1]


def said(times: dict[str, Any]) -> list[str]:
    """The table as lines for a terminal."""
    head = f"where the time went, over {times['steps']} steps of {1000 * times['seconds'] / times['steps']:.1f} ms:"
    return [head, *(f"  {entry['share']:>6.1%}  {entry['kind']}" for entry in times["kinds"])]


class _Marked:
    def __init__(self, batches: Batches) -> None:
        self._batches, self.steps_per_epoch = batches, batches.steps_per_epoch

    def batch(self, step: int) -> Batch:
        with record_function(_DATA):
            return self._batches.batch(step)


def _runs_on_host(event: Any) -> bool:
    return str(event.device_type).endswith("CPU")

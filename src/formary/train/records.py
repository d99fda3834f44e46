"""What a run writes down as it learns: metrics.jsonl, TensorBoard events, trackers, and a live line for the eye.

metrics.jsonl is the source of truth; a resumed run first cuts it back to the step it resumes from. `Seeing` is what a run
asks for beyond that: trackers, histograms, a profile of some steps.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from formary import durable
from formary.model.topologies import Network
from formary.tasks.protocol import Batches
from formary.train.profiling import Profile
from formary.train.trackers import Tracker

LIVE = "live.json"
"""In the run folder, for who watches from outside: steps of the training, and the process at work."""

_PLAIN_INTERVAL = 10.0  # seconds between lines when the output is not a terminal
_LEFT = "the checkpoints are whole, the same command goes on from the last"


@dataclass(frozen=True)
class Seeing:
    """What is seen of a run beside metrics.jsonl and the scalars and texts of TensorBoard.

    Args:
        trackers: are told every record as it is written.
        histograms_every: steps between histograms of weights and gradients in TensorBoard; None: none.
        profile: shows where the time of some steps goes.
    """

    trackers: Sequence[Tracker] = ()
    histograms_every: int | None = None
    profile: Profile | None = None

    def batches(self, batches: Batches) -> Batches:
        """The same batches; the profile sees how long they take to make."""
        return self.profile.batches(batches) if self.profile else batches

    def stepped(self) -> None:
        """A training step is over."""
        if self.profile:
            self.profile.stepped()


NOTHING_ELSE = Seeing()


class Records:
    """Opens the run's records; `resume_step` drops lines beyond it (a killed run wrote them and lost the weights)."""

    def __init__(
        self, run: Path, *, resume_step: int, total: int = 0, writes: bool = True, seeing: Seeing = NOTHING_ELSE
    ) -> None:
        """`total`: steps of the whole training; `writes`: whether this process does; of several one is enough."""
        self.path, self.writes, self.seeing = run / "metrics.jsonl", writes, seeing
        if not writes:
            return
        kept = [line for line in read_records(self.path) if line["step"] <= resume_step] if resume_step else []
        durable.write_text(self.path, "".join(_line(record) for record in kept))
        durable.write_json(run / LIVE, {"total": total, "pid": os.getpid()})
        if not resume_step:  # the curves of another training would be drawn into these
            shutil.rmtree(run / "tensorboard", ignore_errors=True)
        with durable.naming(run, left=_LEFT):
            self._file = self.path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line and the same numbers as TensorBoard scalars, texts as TensorBoard texts; tell the trackers.

        Raises:
            StorageError: the disk is full.
        """
        if not self.writes:
            return
        with durable.naming(self.path, left=_LEFT):
            self._file.write(_line({"step": step, **values}))
            self._file.flush()
            for name, value in values.items():
                if isinstance(value, str):
                    self._board.add_text(name, value, step)
                else:
                    self._board.add_scalar(name, value, step)
        for tracker in self.seeing.trackers:
            tracker.record(step, values)

    def before_update(self, step: int, network: Network) -> None:
        """Where `Seeing` asks for it: histograms of the weights and of the gradients that are about to change them."""
        every = self.seeing.histograms_every
        if not (self.writes and every and step % every == 0):
            return
        with durable.naming(self.path, left=_LEFT):
            for name, parameter in network.named_parameters():
                if parameter.requires_grad:
                    self._board.add_histogram(f"weights/{name}", _whole(parameter.detach()), step)
                if parameter.grad is not None:
                    self._board.add_histogram(f"gradients/{name}", _whole(parameter.grad), step)

    def close(self) -> None:
        """Flush and close both."""
        if not self.writes:
            return
        with durable.naming(self.path, left=_LEFT):
            self._file.close()
            self._board.close()


def _whole(tensor: Tensor) -> Tensor:
    """Finite numbers on the CPU: of a tensor in parts this process' part."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = local.float().flatten().cpu()
    return flat[flat.isfinite()]


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _line(record: dict[str, Any]) -> str:
    """One line of JSON; what is not a finite number is null, as JSON has no word for it."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(plain, ensure_ascii=False) + "\n"


class ProgressLine:
    """One line that lives on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, console: Console, total: int, unit: str = "tokens") -> None:
        self.console, self.total, self.unit = console, total, unit
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._last = 0.0
        self._epsilon: float | None = None

    def __enter__(self) -> ProgressLine:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def show(
        self,
        step: int,
        *,
        loss: float,
        bits_per_byte: float | None,
        rate: float,
        seconds_left: float,
        epsilon: float | None = None,
    ) -> None:
        """Show where the run is; `rate` in tokens (or what the task reads) per second, `epsilon` what a private training has spent."""
        self._epsilon = self._epsilon if epsilon is None else epsilon
        bits = f"  {bits_per_byte:.3f} bits/byte" if bits_per_byte is not None else ""
        spent = f"  epsilon {self._epsilon:.2f}" if self._epsilon is not None else ""
        speed = f"{rate:,.0f} {self.unit}/s  {duration(seconds_left)} left"
        line = f"step {step}/{self.total}  loss {loss:.3f}{bits}{spent}  {speed}"
        if self._live:
            self._live.update(Text(line))
        elif time.monotonic() - self._last >= _PLAIN_INTERVAL or step == self.total:
            self._last = time.monotonic()
            self.console.print(line, highlight=False)

    def say(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        self.console.print(text, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

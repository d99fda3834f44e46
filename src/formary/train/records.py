"""What a run writes down as it learns: metrics.jsonl, TensorBoard events, and a live line for the eye.

metrics.jsonl is the source of truth; a resumed run first cuts it back to the step it resumes from.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from formary import durable

_PLAIN_INTERVAL = 10.0  # seconds between lines when the output is not a terminal
_LEFT = "the checkpoints are whole, the same command goes on from the last"


class Records:
    """Opens the run's records; `resume_step` drops lines beyond it (a killed run wrote them and lost the weights)."""

    def __init__(self, run: Path, *, resume_step: int, writes: bool = True) -> None:
        """`writes`: whether this process does; of several one is enough."""
        self.path, self.writes = run / "metrics.jsonl", writes
        if not writes:
            return
        kept = [line for line in read_records(self.path) if line["step"] <= resume_step] if resume_step else []
        durable.write_text(self.path, "".join(_line(record) for record in kept))
        if not resume_step:  # the curves of another training would be drawn into these
            shutil.rmtree(run / "tensorboard", ignore_errors=True)
        with durable.naming(run, left=_LEFT):
            self._file = self.path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line and the same numbers as TensorBoard scalars, texts as TensorBoard texts.

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

    def close(self) -> None:
        """Flush and close both."""
        if not self.writes:
            return
        with durable.naming(self.path, left=_LEFT):
            self._file.close()
            self._board.close()


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

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total = console, total
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._last = 0.0

    def __enter__(self) -> ProgressLine:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, step: int, *, loss: float, bits_per_byte: float | None, rate: float, seconds_left: float) -> None:
        """Show where the run is; `rate` in tokens per second."""
        bits = f"  {bits_per_byte:.3f} bits/byte" if bits_per_byte is not None else ""
        line = f"step {step}/{self.total}  loss {loss:.3f}{bits}  {rate:,.0f} tokens/s  {duration(seconds_left)} left"
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

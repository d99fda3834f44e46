"""A run seen from outside: what its folder says of where it is, read again and again while another process works in it.

Nothing is written and nothing heavy is imported; metrics.jsonl is read on from where the last look ended.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from formary import durable

METRICS, LIVE = "metrics.jsonl", "live.json"
_STAGES = ("documents", "tokenizer", "tokens", "train", "evaluate", "report")


@dataclass(frozen=True)
class Status:
    """Where a run is.

    Args:
        state: "finished", the name of the stage at work, "stopped" or "not begun".
        training, validation: records of metrics.jsonl, in the order of steps.
        sample: the last text that the network wrote, "" if none.
        total: steps that the training has, None where it has not begun.
        memory: bytes of the process at work, None where it cannot be seen.
        skipped: steps that were skipped as harmful.
    """

    folder: Path
    name: str
    task: str
    state: str
    training: tuple[Mapping[str, Any], ...] = ()
    validation: tuple[Mapping[str, Any], ...] = ()
    sample: str = ""
    total: int | None = None
    memory: int | None = None
    skipped: int = 0

    @property
    def step(self) -> int:
        """The last step that is known."""
        return max((int(records[-1]["step"]) for records in (self.training, self.validation) if records), default=0)

    @property
    def seconds_left(self) -> float | None:
        """Of training, at the mean speed of its last steps; None where none is going on or nothing is known."""
        if self.state != "train" or self.total is None or len(self.training) < 2:
            return None
        first, last = self.training[-min(len(self.training), 10)], self.training[-1]
        pace = (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"])
        return max(0.0, (self.total - last["step"]) * pace)

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The validation with the lowest loss."""
        measured = [record for record in self.validation if _is_number(record.get("validation_loss"))]
        return min(measured, key=lambda record: float(record["validation_loss"]), default=None)

    @property
    def unit(self) -> str:
        """What its speed is counted in: tokens, images, ..."""
        from formary.recipe.schema import unit_of

        return unit_of(self.task)

    def last(self, name: str) -> float | None:
        """The last finite value of that name."""
        records = (record for record in reversed(sorted((*self.training, *self.validation), key=_step)))
        return next((float(record[name]) for record in records if _is_number(record.get(name))), None)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of all records that have a value of that name."""
        records = sorted((*self.training, *self.validation), key=_step)
        return [(float(r["step"]), float(r[name])) for r in records if _is_number(r.get(name))]


@dataclass
class Watcher:
    """Looks into one run folder, as often as asked."""

    folder: Path
    _offset: int = 0
    _identity: tuple[int, int] = (0, 0)
    _records: list[dict[str, Any]] = field(default_factory=list)

    def look(self) -> Status:
        """The run as it is now."""
        self._read_on()
        recipe = _recipe(self.folder)
        done = durable.read_json(self.folder / "stages.json")
        live = durable.read_json(self.folder / LIVE)
        working = _is_at_work(self.folder)
        waiting = [stage for stage in _stages_of(recipe) if stage not in done]
        state = (waiting[0] if waiting else "report") if working else "stopped" if waiting else "finished"
        if not working and not done and not self._records:
            state = "not begun"
        records = sorted(self._records, key=_step)
        return Status(
            folder=self.folder,
            name=str(recipe.get("name", self.folder.name)),
            task=str(recipe.get("task", "")),
            state=state,
            training=tuple(record for record in records if "loss" in record),
            validation=tuple(record for record in records if "validation_loss" in record),
            sample=next((str(record["sample"]) for record in reversed(records) if "sample" in record), ""),
            total=int(live["total"]) if "total" in live else None,
            memory=_memory(live.get("pid")) if working else None,
            skipped=_count_lines(self.folder / "incidents.jsonl"),
        )

    def _read_on(self) -> None:
        """Take in the lines that are new; a file that was written anew (a resume) is read from its beginning."""
        path = self.folder / METRICS
        try:
            with path.open("rb") as file:
                stat = path.stat()
                identity = (stat.st_dev, stat.st_ino)
                if identity != self._identity or stat.st_size < self._offset:
                    self._identity, self._offset, self._records = identity, 0, []
                file.seek(self._offset)
                read = file.read()
        except OSError:
            return
        whole = read[: read.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                self._records.append(record)


def runs_in(folder: Path) -> list[Path]:
    """The run folder itself, or the runs in a folder of runs, those that changed last first."""
    if _is_run(folder):
        return [folder]
    found = [path for path in folder.iterdir() if path.is_dir() and _is_run(path)] if folder.is_dir() else []
    return sorted(found, key=_changed, reverse=True)


def task_of(folder: Path) -> str:
    """The task of a run, "" where its recipe does not say it."""
    return str(_recipe(folder).get("task", ""))


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() and (folder / "log.txt").is_file()


def _changed(folder: Path) -> float:
    return max((path.stat().st_mtime for path in (folder / METRICS, folder / "log.txt") if path.exists()), default=0.0)


def _recipe(folder: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _stages_of(recipe: Mapping[str, Any]) -> list[str]:
    from formary.recipe.schema import PRETRAINING

    return [stage for stage in _STAGES if stage != "tokens" or recipe.get("task", "causal_lm") in PRETRAINING]


def _is_at_work(folder: Path) -> bool:
    """Whether a process holds the run's log, as every run does."""
    try:
        with (folder / "log.txt").open("rb") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except OSError:
        return False
    return False


def _memory(pid: Any) -> int | None:
    try:
        return int(psutil.Process(int(pid)).memory_info().rss)
    except (psutil.Error, TypeError, ValueError):
        return None


def _count_lines(path: Path) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum('"why"' in line and "rolled back" not in line for line in lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _step(record: Mapping[str, Any]) -> int:
    return int(record["step"])

"""A run: the stages of a recipe in order, each redone only when what it depends on has changed.

The key of a stage is a hash of its part of the recipe, the data files and the key of the stage before. Keys of
finished stages are in stages.json; a second run with the same keys has nothing to do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from formary import durable
from formary.errors import FormaryError
from formary.pipeline.stages import STAGES, Context, Stage
from formary.recipe import Recipe, read, to_yaml
from formary.recipe.bundled import find

_DONE = "stages.json"
_FORMAT = 1  # of the run folder; a new number makes every stage run anew


@dataclass(frozen=True)
class RunResult:
    """Where a run left its things, and what it found."""

    folder: Path
    model: Path
    report: Path
    did: tuple[str, ...]  # stages that ran now; empty when there was nothing to do
    metrics: tuple[dict[str, Any], ...]


def run(
    recipe: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    base: Path | None = None,
    folder: Path | None = None,
    until: str = "report",
    console: Console | None = None,
) -> RunResult:
    """Execute a recipe up to the stage `until`.

    Args:
        recipe: a Recipe, the path of one, or the name of a ready one.
        overrides: "train.steps=100" and the like, for a recipe given by path or name.
        base: where the recipe's relative paths count from; the recipe's own folder, or the current one for a Recipe.
        folder: the run folder; the recipe's run_folder or runs/NAME when left out.
        console: where to speak; the terminal when left out.

    Raises:
        FormaryError: something the user can mend. The stages before it are kept.
    """
    called = recipe.name if isinstance(recipe, Recipe) else str(recipe)
    if not isinstance(recipe, Recipe):
        path = find(str(recipe))
        recipe, base = read(path, overrides), base or path.parent
    base = base or Path()
    folder = folder or Path(recipe.run_folder or Path("runs") / recipe.name)
    console = console or Console()
    began = time.perf_counter()
    keys = stage_keys(recipe, base, folder)
    wanted = STAGES[: [stage.name for stage in STAGES].index(until) + 1]
    with _owned(folder) as log:
        speak = _Tee(console, log)
        done = _read_done(folder)
        waiting = [stage for stage in wanted if done.get(stage.name, {}).get("key") != keys[stage.name]]
        if not waiting:
            speak.print(f"nothing to do: {folder} is up to date ({time.perf_counter() - began:.1f} s)")
        else:
            _say_plan(speak, recipe, folder, wanted, waiting)
            durable.write_text(folder / "recipe.yaml", to_yaml(recipe))
        for stage in waiting:
            times = {name: entry["seconds"] for name, entry in done.items()}
            _execute(stage, Context(recipe, called, base, folder, speak, keys, times), done)
    return RunResult(
        folder=folder,
        model=folder / "model",
        report=folder / "report.html",
        did=tuple(stage.name for stage in waiting),
        metrics=tuple(_metrics(folder)),
    )


def stage_keys(recipe: Recipe, base: Path, folder: Path) -> dict[str, str]:
    """Every stage's key: what it depends on, and the key of the stage before."""
    key = _hash([_FORMAT, file_fingerprints(recipe, base, folder)])
    keys = {}
    for stage in STAGES:
        key = _hash([key, stage.name, stage.depends(recipe)])
        keys[stage.name] = key
    return keys


def file_fingerprints(recipe: Recipe, base: Path, folder: Path) -> list[str]:
    """A hash of the content of every file the recipe names; unchanged files (size, time) are not read again."""
    from formary.data.source import expand, fingerprint

    data = recipe.data
    paths = expand([*data.sources, *data.validation, *data.test], base)
    extra = [data.tokenizer.path, data.augment.synonyms, recipe.model.start]
    paths += [base / name for name in extra if name and (base / name).exists()]
    known = _read_json(folder / "data" / "fingerprints.json")
    found = {}
    for path in paths:
        stat = path.stat()
        mark = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        found[mark] = known[mark] if mark in known and path.is_file() else fingerprint([path])
    if folder.exists() and found != known:
        durable.write_json(folder / "data" / "fingerprints.json", found)
    return list(found.values())


def _execute(stage: Stage, context: Context, done: dict[str, dict[str, Any]]) -> None:
    context.console.rule(stage.name, align="left", style="dim")
    began = time.perf_counter()
    stage.work(context)
    done[stage.name] = {"key": context.keys[stage.name], "seconds": round(time.perf_counter() - began, 3)}
    durable.write_json(context.folder / _DONE, done)


def _say_plan(
    console: Console, recipe: Recipe, folder: Path, wanted: Sequence[Stage], waiting: Sequence[Stage]
) -> None:
    console.print(f"{recipe.name}: {recipe.description or recipe.task} -> {folder}")
    for stage in wanted:
        state = "to do" if stage in waiting else "done before"
        console.print(f"  {stage.name:<10} {stage.says} ({state})")


class _Tee(Console):
    """Prints to the user's console and into log.txt."""

    def __init__(self, console: Console, log: TextIO) -> None:
        plain: dict[str, Any] = {"markup": False, "highlight": False}
        super().__init__(file=console.file, stderr=console.stderr, quiet=console.quiet, width=console.width, **plain)
        self._log = Console(file=log, width=120, no_color=True, **plain)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        self._log.print(*objects, **options)
        self._log.file.flush()


@contextmanager
def _owned(folder: Path) -> Iterator[TextIO]:
    """The run folder's log, while no other process runs in it; leftovers of a killed run are removed.

    Raises:
        FormaryError: another process is at work in the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "log.txt").open("a", encoding="utf-8")
    except OSError as error:
        raise FormaryError(f"{folder}: the run folder cannot be written ({error.strerror})") from None
    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FormaryError(f"{folder}: another formary process is at work in this run folder") from None
        for place in (folder, folder / "data", folder / "data" / "tokens"):
            durable.remove_leftovers(place)
        yield log


def _read_done(folder: Path) -> dict[str, dict[str, Any]]:
    return _read_json(folder / _DONE)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return list(_read_json(folder / "evaluation.json").get("metrics", []))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

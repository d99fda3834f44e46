"""A run: the stages of a recipe in order, each redone only when what it depends on has changed.

The key of a stage is a hash of its part of the recipe, the data files and the key of the stage before. Keys of
finished stages are in stages.json; a second run with the same keys has nothing to do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from formary import durable
from formary.errors import FormaryError, RecipeError
from formary.pipeline.context import Context, existing
from formary.pipeline.fitting import check_model, check_processes
from formary.pipeline.ownership import check_owner, remember_owner
from formary.pipeline.resuming import check_unfinished
from formary.pipeline.stages import Stage, stages_of
from formary.recipe import Recipe, bundled, read, to_yaml
from formary.train.processes import Processes, joined

if TYPE_CHECKING:
    from formary.train.loop import Watch

_DONE = "stages.json"
_FINGERPRINTS = "data/fingerprints.json"
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
    file: Path | None = None,
    folder: Path | None = None,
    until: str = "report",
    console: Console | None = None,
    watch: Watch | None = None,
    allow_changed: bool = False,
) -> RunResult:
    """Execute a recipe up to the stage `until`; "prepare" stands for all that comes before training.

    Args:
        recipe: a Recipe, the path of one, or the name of a ready one.
        overrides: "train.steps=100" and the like, for a recipe given by path or name.
        base: where the recipe's relative paths count from; the recipe's own folder, or the current one for a Recipe.
        file: where a Recipe was read from, if from a file.
        folder: the run folder; the recipe's run_folder or runs/NAME when left out, if no other recipe ran there.
        console: where to speak; the terminal when left out.
        watch: is told of every validation, and may stop the training, as `train.loop.train` says.
        allow_changed: go on from the checkpoints of a training on other data or of another recipe, as far as they fit.

    Raises:
        FormaryError: something the user can mend. The stages before it are kept.
    """
    called = [recipe.name if isinstance(recipe, Recipe) else str(recipe)]
    called += [word for override in overrides for word in ("--set", override)]
    called += ["--folder", str(folder)] if folder else []
    if not isinstance(recipe, Recipe):
        file = bundled.find(str(recipe))
        recipe, base = read(file, overrides), base or file.parent
    base = base or Path()
    place = folder or bundled.run_folder(recipe)
    with joined() as processes:
        if not processes.leads:
            if start := bundled.starting_recipe(recipe, base):
                _run_start(start, recipe, base, place, Console(quiet=True))
            return _follow(recipe, called, base, place, processes)
        if folder is None:
            refuse_other(place, recipe, file, base)
        console = console or Console()
        if start := bundled.starting_recipe(recipe, base):
            _run_start(start, recipe, base, place, console)
        return _lead(recipe, called, base, file, place, until, console, watch, processes, allow_changed)


def _lead(
    recipe: Recipe,
    called: list[str],
    base: Path,
    file: Path | None,
    folder: Path,
    until: str,
    console: Console,
    watch: Watch | None,
    processes: Processes,
    allow_changed: bool,
) -> RunResult:
    """The run, as one process or as the first of several: the stages that wait to be done, in order."""
    began = time.perf_counter()
    fingerprints = file_fingerprints(recipe, base, folder)
    keys = stage_keys(recipe, fingerprints.values())
    stages = stages_of(recipe)
    names = [stage.name for stage in stages]
    wanted = stages[: names.index("train") if until == "prepare" else names.index(until) + 1]
    with owned(folder) as log:
        speak = _Tee(console, log)
        done = _read_done(folder)
        waiting = [stage for stage in wanted if not _is_done(stage, keys, done, folder)]
        data = _by_path(fingerprints)
        if any(stage.name == "train" for stage in waiting):
            check_unfinished(folder, recipe, keys["train"], data, allow_changed=allow_changed)
        if fingerprints != durable.read_json(folder / _FINGERPRINTS):
            durable.write_json(folder / _FINGERPRINTS, fingerprints)
        remember_owner(folder, file)
        if not waiting:
            speak.print(f"nothing to do: {folder} is up to date ({time.perf_counter() - began:.1f} s)")
        else:
            if any(stage.name == "train" for stage in waiting):
                check_model(recipe, base)
                check_processes(recipe, processes)
            _say_plan(speak, recipe, folder, wanted, waiting)
            durable.write_text(folder / "recipe.yaml", to_yaml(recipe))
        did = [stage.name for stage in waiting]
        processes.agree({"did": did, "keys": keys})
        for stage in waiting:
            times = {name: entry["seconds"] for name, entry in done.items()}
            processes.wait()
            given = (recipe, tuple(called), base, folder, speak, keys, times, watch, processes, data, allow_changed)
            _execute(stage, Context(*given), done)
        processes.wait()
    return _result(folder, did)


def _follow(recipe: Recipe, called: list[str], base: Path, folder: Path, processes: Processes) -> RunResult:
    """The run as one of several processes that is not the first: what is done together, in the leader's order.

    Raises:
        FormaryError: the leader's run folder is not to be seen from here.
    """
    told = processes.agree(None)
    for stage in stages_of(recipe):
        if stage.name in told["did"]:
            processes.wait()
            if not folder.is_dir():
                raise FormaryError(
                    f"{folder.absolute()}: is not there for process {processes.rank} on {socket.gethostname()}; the run "
                    "folder has to lie on a disk that all machines of the run share (name one with --folder)"
                )
            if stage.together:
                quiet = Console(quiet=True)
                stage.work(Context(recipe, tuple(called), base, folder, quiet, told["keys"], {}, processes=processes))
    processes.wait()
    return _result(folder, told["did"])


def _result(folder: Path, did: Sequence[str]) -> RunResult:
    return RunResult(folder, folder / "model", folder / "report.html", tuple(did), tuple(_metrics(folder)))


def _run_start(path: Path, recipe: Recipe, base: Path, folder: Path, console: Console) -> None:
    """Run the recipe whose model this one starts from, in its own folder; it may start from a third one itself."""
    seen, at = {folder.resolve()}, path
    while True:
        made = read(at)
        place = bundled.run_folder(made).resolve()
        if place in seen:
            raise RecipeError(
                f"model.start: {recipe.model.start} comes round to {place}, the folder of a run it starts"
            )
        seen.add(place)
        if (following := bundled.starting_recipe(made, at.parent)) is None:
            break
        at = following
    if existing(str(recipe.model.start), base) is None:  # not trained yet
        check_model(recipe, base)
    starting = read(path).model_copy(update={"machine": recipe.machine})
    run(starting, base=path.parent, file=path, console=console)


def refuse_other(folder: Path, recipe: Recipe, file: Path | None, base: Path) -> None:
    """Refuse a folder in which another recipe ran; see `ownership`.

    Raises:
        RecipeError: it did; or, as a run, where data files do not exist.
    """
    from formary.data.source import expand

    if not durable.read_json(folder / _DONE):
        return
    paths = expand([*recipe.data.sources, *recipe.data.validation, *recipe.data.test], base)
    own = {str(path.resolve()) for path in paths}
    found = _by_path(file_fingerprints(recipe, base, folder))
    data = {path: mark for path, mark in found.items() if path in own}
    check_owner(folder, recipe, file, data=data, known=_by_path(durable.read_json(folder / _FINGERPRINTS)))


def _by_path(fingerprints: Mapping[str, str]) -> dict[str, str]:
    return {mark.rsplit("|", 2)[0]: content for mark, content in fingerprints.items()}


def stage_keys(recipe: Recipe, fingerprints: Iterable[str]) -> dict[str, str]:
    """Every stage's key: what it depends on, and the key of the stage before; all depend on the files' content."""
    key = _hash([_FORMAT, list(fingerprints)])
    keys = {}
    for stage in stages_of(recipe):
        key = _hash([key, stage.name, stage.depends(recipe)])
        keys[stage.name] = key
    return keys


def file_fingerprints(recipe: Recipe, base: Path, folder: Path) -> dict[str, str]:
    """A hash of the content of every file the recipe names; unchanged files (size, time) are not read again.

    Returns:
        by path, size and time in the order of the recipe; the run folder keeps it for the next time.
    """
    from formary.data.files import expand, file_of, fingerprint

    data = recipe.data
    paths = expand([*data.sources, *data.validation, *data.test], base)
    extra = [data.tokenizer.path, data.augment.synonyms, recipe.model.start, recipe.model.start_text]
    if data.items is not None:
        paths += expand(data.items.sources, base)
        extra.append(data.items.vectors)
    paths += [path for name in extra if name and (path := existing(name, base))]
    known = durable.read_json(folder / _FINGERPRINTS)
    found: dict[str, str] = {}
    for path in paths:
        file = file_of(path)
        stat = file.stat()
        mark = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        found[mark] = known[mark] if mark in known and file.is_file() else fingerprint([path])
    return found


def _is_done(stage: Stage, keys: dict[str, str], done: dict[str, Any], folder: Path) -> bool:
    same = done.get(stage.name, {}).get("key") == keys[stage.name]
    return same and all((folder / name).exists() for name in stage.leaves)


def _execute(stage: Stage, context: Context, done: dict[str, dict[str, Any]]) -> None:
    context.console.rule(stage.name, align="left", style="dim")
    began = time.perf_counter()
    if done.pop(stage.name, None):  # what it left is about to change
        durable.write_json(context.folder / _DONE, done)
    earlier = stage.work(context) or 0.0
    seconds = round(earlier + time.perf_counter() - began, 3)
    done[stage.name] = {"key": context.keys[stage.name], "seconds": seconds}
    durable.write_json(context.folder / _DONE, done)


def _say_plan(
    console: Console, recipe: Recipe, folder: Path, wanted: Sequence[Stage], waiting: Sequence[Stage]
) -> None:
    console.print(f"{recipe.name}: {recipe.description or recipe.task} -> {folder}")
    for stage in wanted:
        state = "to do" if stage in waiting else "already done"
        console.print(f"  {stage.name:<10} {stage.says} ({state})")


class _Tee(Console):
    """Prints to the user's console and into log.txt. Lines are not broken: paths and commands stay whole to copy."""

    def __init__(self, console: Console, log: TextIO) -> None:
        plain: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
        super().__init__(
            file=console.file,
            quiet=console.quiet,
            width=console.width,
            force_terminal=console.is_terminal,
            force_interactive=console.is_interactive,
            no_color=console.no_color,
            **plain,
        )
        self._log = Console(file=log, width=100, no_color=True, force_terminal=False, **plain)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        with suppress(OSError):  # a full disk ends the run where something that matters cannot be written
            self._log.print(*objects, **options)
            self._log.file.flush()


@contextmanager
def owned(folder: Path) -> Iterator[TextIO]:
    """The run folder's log, while no other process runs in it; leftovers of a killed run are removed.

    Raises:
        FormaryError: another process is at work in the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise FormaryError(f"{folder}: is a file, and a run needs a folder; name another with --folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "log.txt").open("a", encoding="utf-8")
    except OSError as error:
        raise FormaryError(f"{folder}: the run folder cannot be written ({error.strerror})") from None
    try:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FormaryError(f"{folder}: another formary process is at work in this run folder") from None
        for place in ("", "data", "data/documents", "data/documents/parts", "data/tokens", "model"):
            durable.remove_leftovers(folder / place)
        yield log
    finally:
        with suppress(OSError):
            log.close()


def _read_done(folder: Path) -> dict[str, dict[str, Any]]:
    """Finished stages by name; an entry that is not one of ours counts as not done."""
    found = durable.read_json(folder / _DONE).items()
    return {name: entry for name, entry in found if isinstance(entry, dict) and {"key", "seconds"} <= entry.keys()}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return list(durable.read_json(folder / "evaluation.json").get("metrics", []))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

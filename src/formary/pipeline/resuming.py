"""Whether a training that was stopped may go on: not with other data or another recipe, unless the user says so.

Beside its checkpoints a training keeps what it depends on, field by field and file by file; what differs is shown. A
training that came to its end is no obstacle: a changed recipe then begins anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formary import durable
from formary.errors import RecipeError
from formary.pipeline.context import Context
from formary.recipe.schema import Recipe

_FILE = "training.json"
# What the weights do not depend on, by the beginning of a field's name.
_APART = (
    *("name", "description", "run_folder", "evaluate.", "generate.", "search.", "machine.threads"),
    *("train.keep", "train.save_every", "train.sample_every", "train.histograms_every"),
)
# What changes their last digits only.
_HARMLESS = ("train.micro_batch", "machine.")


def checkpoint_folder(context: Context) -> Path:
    """Where this training keeps its checkpoints."""
    return context.folder / "checkpoints" / context.keys["train"][:12]


def check_unfinished(folder: Path, recipe: Recipe, key: str, data: Mapping[str, str], *, allow_changed: bool) -> None:
    """Refuse to go on, or to throw away, what a stopped training of other data or another recipe has learned.

    Args:
        folder: the run folder.
        key: of the train stage.
        data: hashes of the data files by path.

    Raises:
        RecipeError: there is such a training; the difference is in the message, field by field.
    """
    held = _stopped(folder, key)
    if held is None or allow_changed:
        return
    place, step, told = held
    changed = _differences(told, recipe, data)
    if all(field.startswith(_HARMLESS) for field in changed):
        return
    lines = "".join(f"\n  {field}: {said}" for field, said in changed.items())
    raise RecipeError(
        f"{folder} holds a training that was stopped at step {step}, and since then this has changed:{lines}\n"
        f"Undo it to go on as before; or go on from step {step} with what is new: add --allow-changed; or begin anew: "
        f"delete {place.parent}"
    )


def claim(context: Context, data: Mapping[str, str], *, allow_changed: bool) -> None:
    """Before training: take over the checkpoints of a stopped training as allowed, delete all others, note what this
    one depends on."""
    mine = checkpoint_folder(context)
    held = _stopped(context.folder, context.keys["train"], finished=allow_changed)
    if held and not mine.exists():
        place, step, told = held
        changed = _differences(told, context.recipe, data)
        if allow_changed or all(field.startswith(_HARMLESS) for field in changed):
            place.rename(mine)
            for field, said in changed.items():
                context.console.print(f"  changed since step {step}: {field}: {said}")
    if mine.parent.is_dir():
        for other in mine.parent.iterdir():  # metrics.jsonl can follow only one
            if other.name != mine.name:
                shutil.rmtree(other, ignore_errors=True)
    told = {"key": context.keys["train"], "finished": False, "recipe": _fields(context.recipe), "data": dict(data)}
    durable.write_json(mine / _FILE, told)


def finished(context: Context) -> None:
    """After training: its model is saved, and its checkpoints are nobody's loss."""
    file = checkpoint_folder(context) / _FILE
    durable.write_json(file, durable.read_json(file) | {"finished": True})


def _stopped(folder: Path, key: str, *, finished: bool = False) -> tuple[Path, int, dict[str, Any]] | None:
    """Where another training has left checkpoints, its last step, and what it depended on; the newest there is.

    Args:
        finished: count those that came to their end, too.
    """
    found = []
    for place in folder.glob("checkpoints/*/"):
        told = durable.read_json(place / _FILE)
        if told and place.name != key[:12] and (finished or not told.get("finished")):
            from formary.train.checkpoint import steps_in

            if steps := steps_in(place):
                found.append((place, steps[-1], told))
    return max(found, key=lambda one: one[0].stat().st_mtime, default=None)


def _differences(told: Mapping[str, Any], recipe: Recipe, data: Mapping[str, str]) -> dict[str, str]:
    """What changed, as field or file -> sentence."""
    before, now = told.get("recipe", {}), _fields(recipe)
    found = {
        field: f"{_shown(before[field])} -> {_shown(now.get(field))}"
        for field in before
        if before[field] != now.get(field) and not field.startswith(_APART)
    }
    defaults = _fields(Recipe.model_validate({"name": "x", "data": {"sources": ["x"]}}))
    for field in now.keys() - before.keys():  # of another version of Formary, or of a section that was not there
        if now[field] != defaults.get(field) and not field.startswith(_APART):
            found[field] = f"not there -> {_shown(now[field])}"
    files: Mapping[str, str] = told.get("data", {})
    if sorted(files.values()) != sorted(data.values()):  # else at most moved
        for path in sorted(files.keys() | data.keys()):
            if path not in data:
                found[path] = "is not read any more"
            elif path not in files:
                found[path] = "was not read before"
            elif files[path] != data[path]:
                found[path] = "its content has changed"
    return found


def _fields(recipe: Recipe) -> dict[str, Any]:
    """The recipe as "train.optimiser.lr" -> value, JSON-able."""
    flat: dict[str, Any] = {}

    def walk(values: Mapping[str, Any], path: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                walk(value, f"{path}{name}.")
            else:
                flat[path + name] = value

    walk(recipe.model_dump(mode="json"), "")
    return flat


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 100 else text[:97] + "..."

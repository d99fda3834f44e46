"""Whose run a folder holds: recipes of one name share runs/NAME, and the second would undo the work of the first.

A folder remembers the recipe file that ran in it. The same file may change as it likes, but for its task and all of its
data: then it is another recipe under an old name. A folder that the user names is the user's to give.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from formary import durable
from formary.errors import RecipeError
from formary.recipe import Recipe, read

_OWNER = "owner.json"


def check_owner(
    folder: Path, recipe: Recipe, file: Path | None, *, data: Mapping[str, str], known: Mapping[str, str]
) -> None:
    """Refuse a folder with finished stages of another recipe.

    Args:
        file: where the recipe was read from, if from a file.
        data: hashes of the recipe's data files by path.
        known: those of the files of the run in the folder.

    Raises:
        RecipeError: the folder holds the run of a recipe file elsewhere, of another task, or on other data.
    """
    if not durable.read_json(folder / "stages.json"):
        return
    held = _held(folder, recipe, file, data, known)
    if held:
        raise RecipeError(
            f"{folder}: holds {held}, and recipes of one name ({recipe.name}) would undo each other's work; change `name`, "
            f"give this one a folder of its own with --folder {folder}-2, or delete {folder}"
        )


def remember_owner(folder: Path, file: Path | None) -> None:
    """Note the recipe file that runs in the folder, counted from it: both may be moved together."""
    place = os.path.relpath(file.resolve(), folder.resolve()) if file else None
    if durable.read_json(folder / _OWNER).get("recipe") != place:
        durable.write_json(folder / _OWNER, {"recipe": place})


def _held(
    folder: Path, recipe: Recipe, file: Path | None, data: Mapping[str, str], known: Mapping[str, str]
) -> str | None:
    """What a folder holds that is not this recipe's."""
    place = durable.read_json(folder / _OWNER).get("recipe")
    owner = (folder / place).resolve() if place else None
    if file and owner and owner != file.resolve() and owner.is_file():
        return f"the run of {owner}"
    try:
        task = read(folder / "recipe.yaml").task
    except RecipeError:  # of another version
        task = recipe.task
    if task != recipe.task:
        return f"a run of task {task} (and this is {recipe.task})"
    same = data.keys() & known.keys() or set(data.values()) & set(known.values())
    return None if same or not known or not data else "a run on other data"

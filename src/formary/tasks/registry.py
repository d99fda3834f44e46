"""Every task by its name in a recipe; other packages add theirs through the entry point group "formary.tasks"."""

from __future__ import annotations

from importlib.metadata import entry_points

from formary.errors import RecipeError, nearest
from formary.tasks.causal_lm import CausalLM
from formary.tasks.denoise import Denoise
from formary.tasks.masked_lm import MaskedLM
from formary.tasks.protocol import Task

TASKS: dict[str, type[Task]] = {"causal_lm": CausalLM, "masked_lm": MaskedLM, "denoise": Denoise}


def task_class(name: str) -> type[Task]:
    """The task of this name, ours or a plug-in's.

    Raises:
        RecipeError: there is none; the nearest name is suggested.
    """
    if name in TASKS:
        return TASKS[name]
    plugins = {entry.name: entry for entry in entry_points(group="formary.tasks")}
    if name in plugins:
        loaded: type[Task] = plugins[name].load()
        return loaded
    known = [*TASKS, *plugins]
    raise RecipeError(f"task: there is no '{name}'; {nearest(name, known) or 'tasks: ' + ', '.join(known)}")

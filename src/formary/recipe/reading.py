"""From YAML to a checked `Recipe`: every error names the field, the line where known, and the nearest right name.

Values given as `--set a.b=c` replace the file's. Paths stay as written; they count from the recipe's own folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from formary.errors import FormaryError, RecipeError, nearest
from formary.recipe.presets import training_of
from formary.recipe.schema import Recipe

_LENGTHS = ("steps", "epochs")  # of training; one of them is given
_AUTO = "literal['auto']"  # what pydantic calls the other choice of a field that takes a number or auto


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path`, with `overrides` such as "train.steps=100" applied.

    Raises:
        RecipeError: no such file, not YAML, an unknown field, or a value of the wrong kind.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe; `formary recipes` lists the ready ones") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise RecipeError(f"{path}: a recipe is a YAML text file in UTF-8 ({error})") from None
    return parse(text, name=str(path), overrides=overrides)


def parse(text: str, *, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe written in `text`; `name` is what errors call it."""
    values = yaml_in(text, name=name)
    if not isinstance(values, dict):
        raise RecipeError(
            f"{name}: a recipe is a mapping with at least `name` and `data`; `formary init DATA` writes one"
        )
    for override in overrides:
        _apply(values, override)
    given = {override.partition("=")[0].strip() for override in overrides}
    for one, other in (_LENGTHS, _LENGTHS[::-1]):  # what replaces one way of saying it replaces the other
        if f"train.{one}" in given and f"train.{other}" not in given and values["train"][one] is not None:
            values["train"].pop(other, None)
    model, train = values.get("model"), values.get("train") or {}
    if isinstance(model, dict) and isinstance(train, dict) and model.get("start") is None:
        ramps = values.get("task", "causal_lm") == "causal_lm" and values.get("privacy") is None
        values["train"] = training_of(str(model.get("preset")), train, ramps=ramps)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = [problem for problem in error.errors() if problem["loc"][-1] != _AUTO]  # its number is named too
        raise RecipeError(f"{name}: " + "; ".join(_sentence(problem) for problem in problems)) from None
    if recipe.train.steps and recipe.train.epochs:
        raise RecipeError(f"{name}: train.steps and train.epochs say the same thing in two ways; give one of them")
    return recipe


def yaml_in(text: str, *, name: str, refusal: type[FormaryError] = RecipeError) -> Any:
    """What is written in a YAML text; a `refusal` names the line where it is not YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise refusal(f"{name}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as resolved, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _apply(values: dict[str, Any], override: str) -> None:
    """Put one "a.b.c=value" into the nested mapping; the value is read as YAML (2e-4 counts as a number too)."""
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: expected key=value, e.g. --set train.steps=100")
    *parents, last = key.strip().split(".")
    for parent in parents:
        if values.get(parent) is None:  # left out, or written as null
            values[parent] = {}
        inner = values[parent]
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: '{parent}' is not a section")
        values = inner
    try:
        values[last] = yaml.safe_load(raw) if raw else None
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is not valid YAML; put quotes around text") from None


def _sentence(problem: Any) -> str:
    """One pydantic error as "train.stpes: unknown field; did you mean 'steps'?"."""
    location = [str(part) for part in problem["loc"] if not str(part).startswith("constrained-")]
    orelse = ", or auto" if len(location) < len(problem["loc"]) else ""
    field = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        return f"{field}: unknown field; {nearest(location[-1], known) or 'fields here: ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"{field}: this field is needed"
    return f"{field}: {problem['msg'][0].lower()}{problem['msg'][1:]}{orelse} (got {problem['input']!r})"


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _fields_at(path: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in path:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        inner = next((kind for kind in (annotation, *get_args(annotation)) if _is_section(kind)), None)
        if inner is None:
            return []
        section = inner
    return list(section.model_fields)

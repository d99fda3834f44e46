"""The `space` of a hyperparameter search: which fields of a recipe vary, over what, and whether that can be compared.

A dimension is a list of values, {range: [low, high]} or {log: [low, high]}. Fields and values are checked against the
schema before anything is trained. Nothing here knows how values are chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from formary.errors import RecipeError, nearest
from formary.recipe.schema import Recipe

Check = Callable[[str, Any], None]
"""Raises RecipeError if the recipe cannot have this value in this field."""

_FORMS = "a list of values, {range: [low, high]} or {log: [low, high]}"
_TRIED = "model, train, data.augment, data.tokenizer or data.words"
_JUDGES = {  # fields that say what validation is and how it judges
    "train.best": "search.metric says what validation has to improve",
    "train.validation_tokens": "every trial has to be validated on the same tokens",
    "train.validate_every": "every trial has to be validated as often",
    "train.seed": "the best seed is only the luckiest; `formary run --seeds` tells how much is chance",
}
_CHANGE_THE_LOSS = ("train.objective", "data.tokenizer", "data.words")


@dataclass(frozen=True)
class Dimension:
    """One field and what it may be.

    Args:
        field: its dotted name.
        choices: the values, of a list; empty for a range.
        low, high: the ends, of a range.
        log: whether a range is even in the logarithm.
        whole: whether a range holds whole numbers only.
    """

    field: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is in it."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


def space_of(recipe: Recipe, check: Check) -> tuple[Dimension, ...]:
    """The recipe's search space, or the default one: lr, batch and epochs around the recipe's.

    Raises:
        RecipeError: a field that does not exist, cannot have a value, or would make trials incomparable.
    """
    given = recipe.search.space or _around(recipe)
    return tuple(_dimension(field, values, recipe, check) for field, values in given.items())


def judged_by(recipe: Recipe) -> str:
    """What validation has to improve: "loss" or "metric"."""
    return recipe.search.metric or recipe.train.best


def value_at(recipe: Recipe, field: str) -> Any:
    """The recipe's own value of a field by its dotted name; None where it has none."""
    value: Any = recipe.model_dump()
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return list(value) if isinstance(value, tuple) else value


def _around(recipe: Recipe) -> dict[str, Any]:
    train = recipe.train
    lr, batch = train.optimiser.lr, train.batch
    middle = lr if not isinstance(lr, str) else 1e-4 if recipe.model.start else 1e-3
    size = batch if not isinstance(batch, str) else 16
    space: dict[str, Any] = {
        "train.optimiser.lr": {"log": [middle / 5, middle * 5]},
        "train.batch": sorted({max(1, size // 2), size, size * 2}),
    }
    if train.epochs:
        space["train.epochs"] = [train.epochs / 2, train.epochs, train.epochs * 2]
    return space


def _dimension(field: str, values: Any, recipe: Recipe, check: Check) -> Dimension:
    _refuse(field, recipe)
    if isinstance(values, list) and values:
        for value in values:
            _checked(field, value, check)
        return Dimension(field, choices=tuple(values))
    if not isinstance(values, Mapping) or len(values) != 1:
        raise RecipeError(f"search.space.{field}: give {_FORMS} (got {values!r})")
    ((form, ends),) = values.items()
    if form not in ("range", "log"):
        hint = nearest(str(form), ("range", "log")) or f"give {_FORMS}"
        raise RecipeError(f"search.space.{field}: '{form}' is no form of a range; {hint}")
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        raise RecipeError(f"search.space.{field}: {form} needs two numbers, low and high (got {ends!r})") from None
    if not low < high or (form == "log" and low <= 0):
        above = ", both above 0" if form == "log" else ""
        raise RecipeError(f"search.space.{field}: {form} needs low below high{above} (got {ends!r})")
    whole = _is_whole(field, low + 0.5, low, high, check)
    for end in (low, high):
        _checked(field, int(end) if whole else end, check)
    return Dimension(field, low=low, high=high, log=form == "log", whole=whole)


def _is_whole(field: str, fraction: float, low: float, high: float, check: Check) -> bool:
    """Whether a field takes whole numbers only: then a number between two of them is refused, and the ends are not."""
    if not (low.is_integer() and high.is_integer()):
        return False
    try:
        check(field, fraction)
    except RecipeError:
        return True
    return False


def _checked(field: str, value: Any, check: Check) -> None:
    try:
        check(field, value)
    except RecipeError as error:
        raise RecipeError(f"search.space: {error}") from None


def _refuse(field: str, recipe: Recipe) -> None:
    """Refuse what no trial would show, or what would change the measure that trials are compared by.

    A misspelt name passes: the check of its values knows the nearest right one.
    """
    section = field.split(".")[0]
    if section in ("name", "description", "run_folder", "task", "evaluate", "generate", "search", "machine"):
        raise RecipeError(f"search.space.{field}: makes no better model; what can be tried is {_TRIED}")
    if field in _JUDGES:
        raise RecipeError(f"search.space.{field}: {_JUDGES[field]}")
    known = type(recipe.data).model_fields
    inner = field.split(".")[1] if "." in field else ""
    if section == "data" and inner in known and inner not in ("augment", "tokenizer", "words"):
        raise RecipeError(
            f"search.space.{field}: it decides which rows there are, and trials on other rows cannot be compared; what "
            f"can be tried is {_TRIED}"
        )
    if judged_by(recipe) == "loss" and field.startswith(_CHANGE_THE_LOSS):
        remedy = "" if recipe.pretrains else "; set search.metric: metric"
        raise RecipeError(f"search.space.{field}: changes what the validation loss means, so it cannot choose{remedy}")


def told(settings: Mapping[str, Any]) -> str:
    """Settings in one line: train.batch 16, train.optimiser.lr 0.00031."""
    return ", ".join(f"{field} {plain(value)}" for field, value in settings.items())


def plain(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)

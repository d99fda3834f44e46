"""Whether a recipe's model fits its task, seen before the data work and not after: an hour may lie between.

Only what can be known without the data is looked at: the preset or the config of the model that is started from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formary.errors import RecipeError
from formary.model.config import ModelConfig, Topology
from formary.pipeline.context import existing
from formary.recipe import bundled, read
from formary.recipe.presets import PRESETS, preset
from formary.recipe.schema import Recipe
from formary.train.processes import Processes

_MODELS = {"encoder_decoder": "encoder-decoder", "two_towers": "two-tower model"}

SWITCHED = ("dropout", "pooling")
"""The switches that leave the weights of a loaded model their meaning."""


def check_model(recipe: Recipe, base: Path) -> None:
    """Refuse a model that the recipe's task cannot train.

    Args:
        base: where the recipe's paths count from.

    Raises:
        RecipeError: a wrong preset, switch, topology or context, no model where one is needed, or what cannot be trained
            privately; the field is named.
        MissingExtra: a library that training will need is not installed.
    """
    from formary.data.batches import ramp_lengths
    from formary.tasks.registry import labelled_task, pretraining_task

    if recipe.privacy:
        from formary.train import privacy

        privacy.check(recipe)
    if recipe.machine.trackers:
        from formary.train import trackers

        trackers.check(recipe.machine.trackers)

    labelled = labelled_task(recipe.task)
    task: Any = labelled or pretraining_task(recipe.task)
    augments: tuple[str, ...] = getattr(task, "augments", ())
    if unfit := [kind for kind in recipe.train.augment.asked if kind not in augments]:
        has = f"it has {', '.join(augments)}" if augments else "it learns its rows as they are"
        raise RecipeError(f"train.augment.{unfit[0]}: is nothing for task {recipe.task}; {has}")
    fitting = getattr(task, "topologies", ())
    if recipe.train.ramp:
        if not getattr(task, "ramps", False):
            raise RecipeError(
                f"train.ramp: is for packed text (causal_lm), and the task is {recipe.task}; leave it out"
            )
        ramp_lengths(recipe.train.ramp.first, recipe.train.context)
    if recipe.data.items is not None and not hasattr(task, "describe"):
        raise RecipeError(f"data.items: task {recipe.task} names no items that could be described; leave it out")
    if recipe.model.start is not None:
        if labelled:
            _check_switches(recipe)
        _check_start(recipe, recipe.model.start, base, fitting, getattr(task, "embedder", "tokens"))
        return
    if recipe.model.start_text is not None:
        raise RecipeError("model.start_text: is joined to the ViT that model.start names, and there is none; name one")
    model = recipe.model  # the vocabulary is not known yet and does not matter here
    made = preset(model.preset, vocab_size=1, context=recipe.train.context, size=model.size, switches=model.switches)
    reads = getattr(task, "embedder", "tokens")
    if getattr(task, "needs_start", False):
        raise RecipeError(
            f"model.start: task {recipe.task} changes a model that writes already, best one that task chat trained; "
            "name its folder"
        )
    if made.embedder != reads or (fitting and made.topology not in fitting):
        others = [name for name, fields in PRESETS.items() if _fits(fields, fitting, reads)]
        raise RecipeError(
            f"model.preset: task {recipe.task} needs {_needed(fitting, reads)}, and {model.preset} is "
            f"{_needed([made.topology], made.embedder)}; try {', '.join(others)}"
        )
    if labelled and recipe.train.tune.method != "full":
        raise RecipeError(
            f"train.tune.method: {recipe.train.tune.method} tunes a trained model; name one with model.start, or use full"
        )


def check_processes(recipe: Recipe, processes: Processes) -> None:
    """Refuse several processes where the result would depend on their number.

    Raises:
        RecipeError: the task compares the rows of a batch with one another, or the recipe says one process.
    """
    from formary.tasks.registry import labelled_task

    if processes.count == 1:
        return
    if recipe.machine.parallel == "none":
        raise RecipeError(
            f"machine.parallel: none, and {processes.count} processes were started; start one, or write auto, ddp or fsdp"
        )
    if getattr(labelled_task(recipe.task), "contrasts", False):
        raise RecipeError(
            f"task {recipe.task} contrasts the rows of a batch with one another, so a batch cannot be spread over "
            f"{processes.count} processes; run it with one (more threads help: machine.threads)"
        )


def _check_switches(recipe: Recipe) -> None:
    for name in recipe.model.switches:
        if name not in SWITCHED:
            raise RecipeError(f"model.switches.{name}: a loaded model can have only its dropout and pooling switched")


def _check_start(recipe: Recipe, start: str, base: Path, fitting: tuple[Topology, ...], reads: str) -> None:
    config = _config(start, base)
    if recipe.model.start_text is not None:
        joins = reads == "patches" and fitting in (("encoder_decoder",), ("two_towers",))
        if not joins:
            raise RecipeError(
                f"model.start_text: is for tasks with pictures and texts, caption and match_image_text, not {recipe.task}"
            )
        if recipe.model.start_text.startswith(bundled.RECIPE):
            raise RecipeError("model.start_text: name the folder of a trained model; recipe:NAME is for model.start")
        from formary.tasks.models import joined_config

        config = joined_config(config, _config(recipe.model.start_text, base), fitting[0])
    if config.embedder != reads or (fitting and config.topology not in fitting):
        kind = _needed([config.topology], config.embedder)
        raise RecipeError(f"model.start: task {recipe.task} needs {_needed(fitting, reads)}, and {start} is {kind}")
    if config.reads_text and config.context < recipe.train.context:
        raise RecipeError(
            f"train.context: {recipe.train.context} is longer than the {config.context} that {start} can read"
        )


def _config(start: str, base: Path) -> ModelConfig:
    """Of the model at `start`; where another recipe has not trained it yet, as that recipe will make it."""
    path = existing(start, base)
    if path is None and start.startswith(bundled.RECIPE):
        file = bundled.recipe_of(start, base)
        made = read(file)
        if made.model.start is not None:
            return _config(made.model.start, file.parent)
        model = made.model
        return preset(model.preset, vocab_size=1, context=made.train.context, size=model.size, switches=model.switches)
    from formary.hub.checkpoint import config_of

    return config_of(path or start)


def _fits(fields: Mapping[str, Any], topologies: tuple[str, ...], reads: str) -> bool:
    return fields.get("embedder", "tokens") == reads and (not topologies or fields["topology"] in topologies)


def _needed(topologies: Any, reads: str) -> str:
    """ "an encoder or a decoder", "an encoder of patches"."""
    return (_listed(topologies) or "a model") + (f" of {reads}" if reads != "tokens" else "")


def _listed(topologies: Any) -> str:
    """ "an encoder or a decoder"."""
    names = [_MODELS.get(topology, topology) for topology in topologies]
    return " or ".join(f"an {name}" if name[0] == "e" else f"a {name}" for name in names)

"""The command that finds a batch and learning rate for a recipe: tune."""

from __future__ import annotations

import json as json_format
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from formary.cli.run import AsJson, Folder, Overrides, Target, say
from formary.errors import FormaryError


def tune(
    recipe: Target,
    minutes: Annotated[float, typer.Option(help="How long it may try; preparing the data comes before.")] = 5.0,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the recipe with what was found, as NAME-tuned.")
    ] = None,
    set_: Overrides = None,
    folder: Folder = None,
    json: AsJson = False,
) -> None:
    """Choose batch and learning rate for a recipe on this machine, by short trainings of equal time.

    All begin with the same weights; the best third of each round is tried three times as long. Validation judges. A stopped
    tuning goes on with the same command.
    """
    from formary.pipeline.tune import tune as execute
    from formary.train.processes import here

    if here().count > 1:
        raise FormaryError("tune tries settings in one process; start it without torchrun")
    console = Console(stderr=True) if json else None
    found = execute(recipe, minutes=minutes, overrides=set_ or (), folder=folder, console=console)
    written = found.write(write) if write else None
    if json:
        trials = [
            {**asdict(trial), "lr": lr, "loss": trial.loss if math.isfinite(trial.loss) else None}
            for trial, lr in zip(found.trials, found.rates)
        ]
        values: dict[str, Any] = {"folder": str(found.folder), "set": list(found.sets), "trials": trials}
        values |= {"loss": found.best.loss, "own_loss": found.own.loss if math.isfinite(found.own.loss) else None}
        print(json_format.dumps(values | ({"recipe": str(written)} if written else {}), ensure_ascii=False))
        return
    for line in found.lines():
        say(line)
    if written:
        say(f"written: {written}\nnext, try:\n  formary run {written}")
    elif found.sets:
        say(f"next, try:\n  formary run {recipe} {found.command}")

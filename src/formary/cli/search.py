"""The command that tries settings of a recipe: search."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from formary.cli.run import AsJson, Overrides, Target, say
from formary.errors import FormaryError

if TYPE_CHECKING:
    from formary.pipeline.search import Found


def search(
    recipe: Target,
    trials: Annotated[
        int | None, typer.Option(help="How many trainings, those of earlier calls included; else search.trials.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no trial after this many minutes; else search.minutes.")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Measure the best on the test rows and write its report.")] = False,
    set_: Overrides = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where the search is kept; runs/NAME/search when left out.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Train a recipe with different settings and keep the best, judged by validation alone.

    What is tried stands in the recipe:

      search: {space: {train.optimiser.lr: {log: [1e-5, 1e-3]}}, trials: 20}

    Without it: the learning rate, batch size and epochs around the recipe's. The result is best.yaml, a recipe for
    `formary run`. A stopped search goes on with the same command.
    """
    from formary.pipeline.search import search as execute
    from formary.train.processes import here

    if here().count > 1:
        raise FormaryError("search tries settings in one process; start it without torchrun")
    found = execute(
        recipe,
        trials=trials,
        minutes=minutes,
        overrides=set_ or (),
        folder=folder,
        console=Console(stderr=True) if json else None,
        run_best=run,
    )
    if json:
        print(json_format.dumps(_plain(found), ensure_ascii=False))
        return
    for line in found.lines():
        say(line)
    say(f"all trials: {found.folder / 'search.html'}\nbest:       {found.best}")
    if found.run:
        say(f"report:     {found.run.report}\nmodel:      {found.run.model}")
    else:
        say(f"next, try:\n  formary run {found.best}")


def _plain(found: Found) -> dict[str, Any]:
    values: dict[str, Any] = {"folder": str(found.folder), "best": str(found.best), **found.summary}
    if found.run:
        values |= {"metrics": found.run.metrics, "report": str(found.run.report), "model": str(found.run.model)}
    return values

"""What a run shows of itself while it learns, as its recipe asks: trackers, histograms, a profile of some steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from formary.pipeline.context import Context

if TYPE_CHECKING:
    from formary.train.records import Seeing


@contextmanager
def seeing(context: Context) -> Iterator[Seeing]:
    """What the loop is to show itself to, while the block trains; the profile's table is told after it.

    Raises:
        MissingExtra: the library of a tracker is not installed.
    """
    from formary.train import profiling, trackers
    from formary.train.records import Seeing

    recipe, leads = context.recipe, context.processes.leads
    profile = profiling.Profile(context.folder, key=context.keys["train"]) if recipe.machine.profile and leads else None

    def say(text: str) -> None:
        context.console.print(f"  {text}", markup=False, highlight=False)

    with trackers.opened(
        recipe.machine.trackers if leads else (),
        run=context.folder,
        name=recipe.name,
        settings=recipe.model_dump(mode="json"),
        key=context.keys["train"],
        say=say,
    ) as opened:
        yield Seeing(opened, recipe.train.histograms_every, profile)
    if profile:
        profile.finish()
        for line in profiling.said(profile.times) if profile.times else ["too few steps were left to profile any"]:
            say(line)

"""What a run will need, told before it.

`foretell` prepares the data, which the run then need not do again, and lets `train.forecast` probe the training. It leaves
forecast.json, which `foretold` compares with what the training took.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from formary import durable
from formary.errors import FormaryError
from formary.pipeline.context import Context
from formary.pipeline.foretold import FORECAST

if TYPE_CHECKING:
    from formary.recipe import Recipe
    from formary.train.forecast import Forecast

_MODEL_BYTES = 4  # per parameter in the finished model
_REST_BYTES = 2**20  # records, curves, report


@dataclass(frozen=True)
class Foretold:
    """What a run is expected to need; times in seconds, sizes in bytes.

    Args:
        folder: of the run, where its data has been prepared.
        seconds: of the train stage.
        memory, memory_free: highest of the training, and what there is.
        disk, disk_free: what the run folder will hold at most beyond what it does now, and what there is.
        forecast: the parts it is made of.
    """

    folder: Path
    seconds: float
    memory: int
    memory_free: int
    disk: int
    disk_free: int
    forecast: Forecast

    @property
    def fits(self) -> bool:
        """Whether memory and disk are enough."""
        return self.memory <= self.memory_free and self.disk <= self.disk_free


def foretell(
    recipe: str, *, overrides: Sequence[str] = (), folder: Path | None = None, console: Console | None = None
) -> Foretold:
    """Prepare a run's data and predict what its training needs.

    Raises:
        FormaryError: the recipe starts from a model that is not trained yet, a batch does not fit into memory, or what a
            run would raise.
    """
    from formary.pipeline.run import file_fingerprints, owned, run, stage_keys
    from formary.pipeline.stages import trained
    from formary.recipe import bundled, read
    from formary.train.forecast import Probed, probe

    file = bundled.find(recipe)
    made, base = read(file, overrides), file.parent
    check_start(made, base)
    place = folder or bundled.run_folder(made)
    quiet = console or Console(quiet=True)
    run(recipe, overrides=overrides, folder=folder, until="prepare", console=quiet)
    keys = stage_keys(made, file_fingerprints(made, base, place).values())
    machine = made.machine.model_copy(update={"trackers": [], "profile": False})  # a probe is nothing to track
    probed = made.model_copy(update={"machine": machine})
    began = time.perf_counter()
    with owned(place) as log:
        context = Context(probed, (recipe,), base, place, Console(file=log, width=120), keys, {}, trainer=probe)
        try:
            trained(context)
        except Probed as done:
            forecast = done.forecast
            setting_up = forecast.began - began
        else:
            raise AssertionError("the probe did not end the training")
        model = 2 * _MODEL_BYTES * forecast.parameters  # the old one stays until the new one is whole
        disk = forecast.checkpoints * forecast.checkpoint_bytes + model + _REST_BYTES
        foretold = Foretold(
            folder=place,
            seconds=forecast.seconds + setting_up,
            memory=forecast.memory,
            memory_free=forecast.free,
            disk=disk,
            disk_free=shutil.disk_usage(place).free,
            forecast=forecast,
        )
        told = {name: value for name, value in asdict(foretold).items() if name != "folder"}
        durable.write_json(place / FORECAST, {"key": keys["train"], **told})
    return foretold


def check_start(recipe: Recipe, base: Path) -> None:
    """Refuse a recipe whose training cannot be looked at yet.

    Raises:
        FormaryError: it starts from the model of another recipe, which is not trained yet.
    """
    from formary.recipe import bundled, read

    if start := bundled.starting_recipe(recipe, base):
        trained_start = bundled.run_folder(read(start)) / "model" / "model.safetensors"
        if not trained_start.exists():
            raise FormaryError(
                f"model.start: {recipe.model.start} is not trained yet, and how this training goes depends on it; run "
                f"it first: formary run {start.stem}"
            )

"""Batch and learning rate for a recipe on this machine: short trainings of equal time, and the best go on to longer ones.

Every trial begins with the same weights and goes through the whole schedule by the clock (`train.timed`); a third of each round
stays for the next, which lasts three times as long (successive halving, Jamieson and Talwalkar 2016). Validation judges, test rows
are never looked at. Trials are kept in tune.json: a stopped tuning goes on with the one it was at.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from formary import durable
from formary.errors import FormaryError, RecipeError
from formary.pipeline.context import Context
from formary.pipeline.forecast import check_start
from formary.recipe import Recipe, read, to_yaml
from formary.recipe.bundled import find, run_folder

if TYPE_CHECKING:
    from formary.model.topologies import Network
    from formary.recipe.schema import Train
    from formary.tasks.protocol import Batch, Batches
    from formary.train.machine import Runtime
    from formary.train.parallel import Loss

FILE = "tune.json"
CLOCK = time.perf_counter
_KEPT = 3  # one of so many candidates stays for a round that is so many times as long
_ROUNDS = 3
_TRAINING = 0.75  # of the time; the rest is for measuring and for what is not counted
_MEASURING = 0.15
_BATCHES = 500  # of validation that are looked at, at most
_STEP = 10**0.5  # between neighbouring learning rates; half of it, in the logarithm, around the best of the first round
# What is tried: batches and rates as multiples of the recipe's, from many to few, and how many of the recipe's own steps the first
# round must have room for.
_GRIDS: tuple[tuple[tuple[float, ...], tuple[float, ...], int], ...] = (
    ((1, 0.5, 2, 4), tuple(_STEP**power for power in (0, -1, 1, -2, 2)), 24),
    ((1, 0.5, 2), tuple(_STEP**power for power in (0, -1, 1)), 12),
    ((1,), tuple(_STEP**power for power in (0, -1, 1)), 8),
)


@dataclass(frozen=True)
class Candidate:
    """A batch, and what the recipe's learning rates are multiplied by."""

    batch: int
    factor: float = 1.0


@dataclass(frozen=True)
class Trial:
    """What a candidate reached: the validation loss after so many seconds, infinite where it diverged or did not fit."""

    batch: int
    factor: float
    budget: float
    seconds: float
    steps: int
    loss: float

    @property
    def candidate(self) -> Candidate:
        """What was tried."""
        return Candidate(self.batch, self.factor)


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Args:
        folder: the run folder, with tune.json.
        trials: in the order they were made.
        own: the recipe's settings in the last round.
        best: the best of the last round.
        sets: the best settings as "field=value".
        rates: of every trial, the learning rate.
        recipe: with the best settings.
        file: where it was read from.
    """

    folder: Path
    trials: tuple[Trial, ...]
    own: Trial
    best: Trial
    sets: tuple[str, ...]
    rates: tuple[float, ...]
    recipe: Recipe
    file: Path

    @property
    def command(self) -> str:
        """The options that put the best settings into a command."""
        return " ".join(f"--set {one}" for one in self.sets)

    def lines(self) -> list[str]:
        """The last two rounds as a table, and what was found in sentences."""
        lasting = sorted({trial.budget for trial in self.trials}, reverse=True)
        said = [f"{'seconds':>8} {'batch':>6} {'learning rate':>14} {'steps':>7} {'validation loss':>16}"]
        rated = zip(self.trials, self.rates)
        for trial, lr in sorted(rated, key=lambda one: (-one[0].budget, one[0].loss)):
            if trial.budget in lasting[:2]:
                own = "  the recipe's own" if trial.candidate == self.own.candidate else ""
                said.append(f"{trial.budget:8.1f} {trial.batch:6} {lr:14.2g} {trial.steps:7} {trial.loss:16.4f}{own}")
        fewer = sum(trial.budget == lasting[-1] for trial in self.trials) if len(lasting) > 2 else 0
        said += [f"and {fewer} for {lasting[-1]:.1f} seconds each"] if fewer else []
        if self.best.candidate == self.own.candidate:
            return [*said, "the recipe's own settings are the best that were tried"]
        gain = f"{self.best.loss:.4f} in place of {self.own.loss:.4f} in {self.best.budget:.0f} seconds of training"
        return [
            *said,
            f"best: {gain}, once each: trainings this short like high rates, and a small gain may be chance",
        ]

    def write(self, path: Path) -> Path:
        """Write the recipe with the best settings, named NAME-tuned; its paths are as they are seen from there."""
        from formary.pipeline.search import moved

        named = self.recipe.model_copy(update={"name": f"{self.recipe.name}-tuned", "run_folder": None})
        head = f"# {self.file.name} with what `formary tune` found: {', '.join(self.sets) or 'nothing better'}\n\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(path, head + to_yaml(moved(named, self.file.parent, path.parent)))
        return path


@dataclass(frozen=True)
class _Parts:
    """What a training was about to begin with."""

    loss_of: Loss
    network: Network
    settings: Train
    runtime: Runtime
    remade: Callable[[Train], Batches]
    validation: Callable[[], Iterable[Batch]]


class _Taken(FormaryError):
    """Raised in place of a training, with its parts."""

    def __init__(self, parts: _Parts) -> None:
        super().__init__("the training was only looked at")
        self.parts = parts


def tune(
    recipe: str | Path,
    *,
    minutes: float = 5.0,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    console: Console | None = None,
) -> Tuned:
    """Find a batch and learning rate for a recipe in so many minutes; preparing its data comes before and is kept for its run.

    Args:
        recipe: the path of one, or the name of a ready one.
        overrides: "train.context=128" and the like.
        folder: the run folder; the recipe's when left out.

    Raises:
        RecipeError: the recipe trains privately.
        FormaryError: the time is too short for a comparison, there is nothing to validate on, every candidate diverged, or what a
            run would raise.
    """
    from formary.pipeline.run import file_fingerprints, owned, run, stage_keys
    from formary.train.machine import cpu_name

    if not minutes > 0:
        raise FormaryError(f"--minutes {minutes:g}: must be above 0")
    path = find(str(recipe))
    made = read(path, overrides)
    if made.privacy:
        raise RecipeError(
            "privacy: tuning trains many times on the same rows, and each time spends epsilon; give numbers"
        )
    check_start(made, path.parent)
    console = console or Console()
    place = folder or run_folder(made)
    run(str(path), overrides=overrides, folder=folder, until="prepare", console=console)
    keys = stage_keys(made, file_fingerprints(made, path.parent, place).values())
    with owned(place) as log:
        machine = made.machine.model_copy(update={"trackers": [], "profile": False})
        quiet = Console(file=log, width=120)
        given = made.model_copy(update={"machine": machine}), (str(recipe),), path.parent, place, quiet, keys
        parts = _parts(Context(*given, {}, trainer=_take))
        parts.network.to(parts.runtime.device)
        key = [keys["train"], minutes, cpu_name(), parts.runtime.threads]
        trials = _Trying(parts, made, key, place / FILE, console).all(60 * minutes)
    last = max(trial.budget for trial in trials)
    final = [trial for trial in trials if trial.budget == last]
    best = min(final, key=lambda trial: trial.loss)
    if not math.isfinite(best.loss):
        raise FormaryError("every learning rate and batch that was tried diverged; look at the data, or lower the rate")
    own = next(trial for trial in final if trial.candidate == _own(parts.settings))
    sets = _sets(made, parts, own, best)
    rates = tuple(_settings(parts.settings, trial.candidate, cuttable=True).optimiser.peak_lr for trial in trials)
    return Tuned(place, tuple(trials), own, best, sets, rates, read(path, [*overrides, *sets]), path)


def _take(loss_of: Any, network: Any, **given: Any) -> Any:
    """Stand in for `loop.train`: raise `_Taken`."""
    if given["validation"] is None:
        raise FormaryError("data.split.validation: there is nothing to validate on, and validation is what judges")
    raise _Taken(_Parts(loss_of, network, *(given[name] for name in ("settings", "runtime", "remade", "validation"))))


def _parts(context: Context) -> _Parts:
    from formary.pipeline.stages import trained

    try:
        trained(context)
    except _Taken as taken:
        return taken.parts
    raise AssertionError("the training was not taken")


class _Trying:
    """The trials of a tuning, from the first time or from tune.json on."""

    def __init__(self, parts: _Parts, recipe: Recipe, key: list[Any], file: Path, console: Console) -> None:
        from formary.tasks.registry import labelled_task

        self.parts, self.file, self.console = parts, file, console
        self.cuttable = not getattr(labelled_task(recipe.task), "contrasts", False)
        known = durable.read_json(file)
        self.state: dict[str, Any] = known if known.get("key") == key else {"key": key, "trials": []}
        self.done = [Trial(**trial) for trial in self.state["trials"]]

    def all(self, seconds: float) -> list[Trial]:
        """Every round's trials; `seconds` for all of them."""
        own = _own(self.parts.settings)
        if "plan" not in self.state:
            self.state["plan"] = self._plan(seconds)
            durable.write_json(self.file, self.state)
        first, measuring = self.state["plan"]["first"], self._measured_batches(self.state["plan"]["measuring"])
        candidates = [Candidate(*pair) for pair in self.state["plan"]["candidates"]]
        found: list[Trial] = []
        for number in range(_ROUNDS):
            budget = first * _KEPT**number
            self._print(f"round {number + 1} of {_ROUNDS}: {len(candidates)} settings, {budget:.1f} seconds each")
            ranked = sorted((self._one(each, budget, measuring) for each in candidates), key=lambda trial: trial.loss)
            found += ranked
            candidates = [trial.candidate for trial in ranked[: _kept(len(ranked))]]
            if number == 0:
                best = candidates[0]
                near = [dataclasses.replace(best, factor=best.factor * _STEP**half) for half in (-0.5, 0.5)]
                candidates += near
            candidates += [] if own in candidates else [own]
        return found

    def _plan(self, seconds: float) -> dict[str, Any]:
        """What is tried first, for how long, and how many seconds a measurement may take."""
        from formary.train.timed import as_it_was, train_for

        parts, own = self.parts, _own(self.parts.settings)
        with as_it_was(parts.network):  # the first step is not like the others
            batches = parts.remade(parts.settings)
            for _ in range(2):
                one = train_for(1e-9, parts.loss_of, parts.network, batches, parts.settings, parts.runtime, clock=CLOCK)
            step = one.seconds
        sequences = parts.remade(parts.settings.model_copy(update={"batch": 1})).steps_per_epoch
        for sizes, factors, least in _GRIDS:
            whole = [max(1, round(size * own.batch)) for size in (sizes if self.cuttable else (1.0,))]
            fitting = dict.fromkeys(size for size in whole if size <= max(own.batch, sequences))
            candidates = [Candidate(size, factor) for factor in factors for size in fitting]
            trials, cost = _cost(len(candidates))
            first = _TRAINING * seconds / cost
            if first >= least * step:
                return {
                    "candidates": [dataclasses.astuple(candidate) for candidate in candidates],
                    "first": first,
                    "measuring": _MEASURING * seconds / trials,
                }
        needed = math.ceil(cost * least * step / _TRAINING / 60)
        raise FormaryError(
            f"--minutes: a step takes {step:.2g} s, so that {seconds / 60:g} minutes are too few to compare settings; give "
            f"{needed} or more, or a smaller model to find them with (--set model.size)"
        )

    def _measured_batches(self, seconds: float) -> list[Batch]:
        """Batches of the validation split, spread over it, that are measured in about so many seconds."""
        from formary.train.loop import validation_loss

        parts = self.parts
        batches = list(islice(parts.validation(), _BATCHES))
        if not batches:
            raise FormaryError("data.split.validation: there is nothing to validate on, and validation is what judges")
        count = self.state["plan"].get("measured")
        if count is None:
            validation_loss(parts.loss_of, parts.network, batches[:1], parts.runtime)
            began = CLOCK()
            validation_loss(parts.loss_of, parts.network, batches[:1], parts.runtime)
            count = max(1, min(len(batches), int(seconds / (CLOCK() - began))))
            self.state["plan"]["measured"] = count
            durable.write_json(self.file, self.state)
        return [batches[place * len(batches) // count] for place in range(count)]

    def _one(self, candidate: Candidate, budget: float, measuring: list[Batch]) -> Trial:
        """A candidate's trial of this length: from the file, or made now."""
        for trial in self.done:
            if trial.candidate == candidate and trial.budget == budget:
                return trial
        from formary.train.loop import validation_loss
        from formary.train.memory import is_memory
        from formary.train.timed import as_it_was, train_for

        parts = self.parts
        settings = _settings(parts.settings, candidate, cuttable=self.cuttable)
        steps, seconds, loss = 0, 0.0, math.inf
        with as_it_was(parts.network):
            try:
                batches = parts.remade(settings)
                made = train_for(budget, parts.loss_of, parts.network, batches, settings, parts.runtime, clock=CLOCK)
                steps, seconds = made.steps, made.seconds
                if not made.diverged:
                    loss = validation_loss(parts.loss_of, parts.network, measuring, parts.runtime)
            except (MemoryError, RuntimeError) as error:
                if not is_memory(error):
                    raise
        trial = Trial(
            candidate.batch, candidate.factor, budget, seconds, steps, loss if math.isfinite(loss) else math.inf
        )
        self.done.append(trial)
        self.state["trials"] = [dataclasses.asdict(one) for one in self.done]
        durable.write_json(self.file, self.state)
        self._print(
            f"  batch {trial.batch}, learning rate {settings.optimiser.peak_lr:.2g}: validation loss {trial.loss:.4f} after "
            f"{trial.steps} steps"
        )
        return trial

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _own(settings: Train) -> Candidate:
    return Candidate(settings.batch_size)


def _kept(count: int) -> int:
    return -(-count // _KEPT)


def _cost(count: int) -> tuple[int, int]:
    """Trials of all rounds that begin with so many candidates, at most, and their time in those of the first round."""
    trials = cost = 0
    for number in range(_ROUNDS):
        trials, cost = trials + count, cost + count * _KEPT**number
        count = _kept(count) + 1 + 2 * (number == 0)  # the recipe's own, and the neighbours of the best
    return trials, cost


def _settings(settings: Train, candidate: Candidate, *, cuttable: bool) -> Train:
    """The recipe's settings with a candidate's; a larger batch goes through in pieces that are known to fit."""
    own = settings.optimiser

    def rate(value: float) -> float:
        return value if candidate.factor == 1 else float(f"{value * candidate.factor:.2g}")

    optimiser = own.model_copy(update={"lr": rate(own.peak_lr), "matrix_lr": rate(own.matrix_lr)})
    micro = settings.micro_batch
    if cuttable and candidate.batch > settings.batch_size:
        micro = micro or settings.batch_size
    return settings.model_copy(update={"batch": candidate.batch, "micro_batch": micro, "optimiser": optimiser})


def _sets(recipe: Recipe, parts: _Parts, own: Trial, best: Trial) -> tuple[str, ...]:
    """The best settings as the recipe's fields, and the steps that take as long as its own."""
    from formary.tasks.protocol import total_steps

    train, chosen = recipe.train, _settings(parts.settings, best.candidate, cuttable=True)
    found: dict[str, Any] = {}
    if chosen.batch != train.batch:
        found["train.batch"] = chosen.batch
        if chosen.micro_batch and chosen.micro_batch < chosen.batch_size:
            found["train.micro_batch"] = chosen.micro_batch
    if chosen.optimiser.lr != train.optimiser.lr:
        found["train.optimiser.lr"] = chosen.optimiser.peak_lr
    if train.optimiser.name == "muon" and chosen.optimiser.matrix_lr != train.optimiser.matrix_lr:
        found["train.optimiser.matrix_lr"] = chosen.optimiser.matrix_lr
    if not train.epochs and best.batch != own.batch:
        slower = (best.seconds / best.steps) / (own.seconds / own.steps)
        steps = total_steps(parts.settings, parts.remade(parts.settings)) / slower
        found["train.steps"] = max(1, int(float(f"{steps:.2g}")))
    return tuple(f"{field}={value}" for field, value in found.items())

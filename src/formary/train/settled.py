"""Settles what the recipe leaves to the machine and the data: `train.batch: auto` and `train.optimiser.lr: auto`.

What was found is kept in the run folder (batch_finder.json, lr_finder.json) under the key of the training, so that a
resumed run goes on with the same numbers. Everything after it sees numbers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from formary import durable
from formary.model.topologies import Network
from formary.recipe.schema import Train
from formary.tasks.protocol import Batch, Batches
from formary.train import fit, range_test
from formary.train.machine import Runtime
from formary.train.parallel import Loss

BATCH_FILE, LR_FILE = "batch_finder.json", "lr_finder.json"


def settle(
    loss_of: Loss,
    network: Network,
    *,
    settings: Train,
    batches: Callable[[Train], Batches],
    longest: Callable[[int], Batch] | None = None,
    cuttable: bool = True,
    runtime: Runtime,
    run: Path,
    key: str,
    console: Console,
) -> Train:
    """`settings` with numbers in the place of every "auto"; the network stays as it is.

    Args:
        loss_of: as for `loop.train`.
        batches: the training batches as settings make them.
        longest: a batch of so many sequences, as long as they come; None where all are of one length.
        cuttable: whether a batch may go through in pieces.
        run: the run folder.
        key: of this training; what another one found does not count.
        console: where to say what was chosen and why.
    """
    if not runtime.processes.leads:
        runtime.processes.wait()  # until the leader has found and recorded them
        return recorded(settings, run, key)
    known = recorded(settings, run, key)
    if known != settings:
        console.print(f"  {_numbers(settings, known)}, as found when this training began", highlight=False)
    network.to(runtime.device)
    if known.batch == "auto":
        single = known.model_copy(update={"batch": 1, "micro_batch": None, "ramp": None})

        def first(count: int) -> Batch:
            return batches(single.model_copy(update={"batch": count})).batch(0)

        found = fit.find_batch(
            loss_of,
            network,
            longest or first,
            known,
            runtime,
            sequences=batches(single).steps_per_epoch,
            cuttable=cuttable,
        )
        durable.write_json(run / BATCH_FILE, {"key": key, **asdict(found)})
        console.print(f"  {found.why}", highlight=False)
        known = _with_batch(known, asdict(found))
    if known.optimiser.lr == "auto":
        tried = range_test.find_lr(loss_of, network, batches(known), known, runtime)
        durable.write_json(run / LR_FILE, {"key": key, **asdict(tried)})
        console.print(f"  {tried.why}", highlight=False)
        known = _with_lr(known, tried.lr)
    runtime.processes.wait()
    return known


def recorded(settings: Train, run: Path, key: str) -> Train:
    """`settings` with those numbers in the place of "auto" that this training found before."""
    if settings.batch == "auto" and (found := found_in(run / BATCH_FILE, key)):
        settings = _with_batch(settings, found)
    if settings.optimiser.lr == "auto" and (found := found_in(run / LR_FILE, key)):
        settings = _with_lr(settings, found["lr"])
    return settings


def found_in(file: Path, key: str) -> dict[str, Any]:
    """What a finder left for the training of this key; {} where it did not."""
    found = durable.read_json(file)
    return found if found.get("key") == key else {}


def _with_batch(settings: Train, found: dict[str, Any]) -> Train:
    return settings.model_copy(update={"batch": found["batch"], "micro_batch": found["micro_batch"]})


def _with_lr(settings: Train, lr: float) -> Train:
    return settings.model_copy(update={"optimiser": range_test.at(settings.optimiser, lr)})


def _numbers(asked: Train, known: Train) -> str:
    said = [f"batch {known.batch}"] if known.batch != asked.batch else []
    if known.optimiser.lr != asked.optimiser.lr:
        said.append(f"learning rate {known.optimiser.peak_lr:.2g}")
    return ", ".join(said)

"""The learning-rate range test: how the training loss takes rising rates, and the rate that follows from it.

The run's own optimiser sweeps the rate exponentially over training batches (Smith 2017, section 3.3). Weights, random
state and the run's place in its data are afterwards what they were; nothing is learned here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from formary.errors import FormaryError
from formary.model.topologies import Network
from formary.recipe import schema
from formary.recipe.schema import Train
from formary.tasks.protocol import Batches
from formary.train.loop import gradient
from formary.train.machine import Runtime
from formary.train.optimisers import Optimiser
from formary.train.parallel import Loss
from formary.train.timed import as_it_was
from formary.train.tuning import lr_scale

LOWEST, HIGHEST, STEPS = 1e-7, 1.0, 71  # ten steps a decade
DIVERGED = 4.0  # times the best smoothed loss: no rate from here on is tried
_MEMORY = 0.8  # of the smoothed loss, per step
_HALF_WINDOW = 5  # steps on either side that a slope is taken over: a decade in all, or chance would choose
_REFERENCE_LR = schema.Optimiser().peak_lr  # what matrix_lr is set beside


@dataclass(frozen=True)
class Found:
    """What a range test saw and chose.

    Args:
        lr: the rate to train with at its peak.
        why: one sentence.
        rates: (steps,) in rising order.
        losses: (steps,) the training loss after the update at each rate.
        smoothed: (steps,) their running mean, which the choice looks at.
    """

    lr: float
    why: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]


def find_lr(
    loss_of: Loss,
    network: Network,
    batches: Batches,
    settings: Train,
    runtime: Runtime,
    *,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> Found:
    """The learning rate that a range test finds for this network, optimiser and data.

    Args:
        settings: `optimiser.lr` is not read; under muon `matrix_lr` is swept along, in its ratio to an lr of 0.001.
        watch: told the steps done and the most there can be.

    Raises:
        FormaryError: the loss is not finite at the lowest rate, or no rate lowers it.
    """
    rates, losses = [], []
    with as_it_was(network):
        torch.manual_seed(settings.seed)
        optimiser = Optimiser(
            network,
            at(settings.optimiser, 1.0),
            dtype=getattr(torch, runtime.precision),
            lr_scale=lambda name: lr_scale(name, network.config, settings.tune),
        )
        network.train()
        best = math.inf
        for step in range(STEPS + 1):
            loss, _, norm = gradient(loss_of, network, batches.batch(step), settings, runtime)
            if step:  # the loss of a step tells of the rate before it
                rates.append(_rate(step - 1))
                losses.append(loss)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                break
            mean = smooth(losses)[-1] if losses else loss
            best = min(best, mean)
            if mean > DIVERGED * best:
                break
            if step < STEPS:
                optimiser.step(_rate(step))
            watch(step, STEPS)
    return choose(rates, losses)


def choose(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """The rate where the loss falls most steeply, moved a third of the decades to where the loss is lowest, half a decade at most.

    Steepness is that of a straight line through the decade of rates around one. The steepest rate alone is cautious:
    rates that hold for a whole run lie above it, and rates near the lowest loss are where it is about to diverge.

    Args:
        rates: (steps,) rising by the same factor.
        losses: (steps,) after the update at each; where it is not finite the sweep ended.

    Raises:
        FormaryError: too few finite losses, or none that fell.
    """
    finite = next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    smoothed = smooth(losses[:finite])
    lowest = min(range(finite), key=smoothed.__getitem__, default=0)
    ends = f"diverged at {rates[-1]:.1e}" if len(rates) < STEPS or finite < len(losses) else "went on to 1"
    slopes = {
        centre: _slope(losses[centre - _HALF_WINDOW : centre + _HALF_WINDOW + 1])
        for centre in range(_HALF_WINDOW, min(lowest + 1, finite - _HALF_WINDOW))
    }
    steepest = min(slopes, key=slopes.__getitem__, default=0)
    if not slopes or slopes[steepest] >= 0:
        raise FormaryError(
            f"train.optimiser.lr: auto finds no learning rate: the training loss fell at none of the {len(rates)} rates "
            f"tried from {LOWEST:g} on (it {ends}); look at the data, or give a number, such as 0.001"
        )
    lr = float(f"{rates[steepest] * min((rates[lowest] / rates[steepest]) ** (1 / 3), 10**0.5):.2g}")
    why = (
        f"learning rate {lr:g}: in a range test of {len(rates)} steps the training loss fell fastest around "
        f"{rates[steepest]:.1e}, was lowest at {rates[lowest]:.1e} and {ends}"
    )
    return Found(lr, why, tuple(rates[:finite]), tuple(losses[:finite]), tuple(smoothed))


def at(optimiser: schema.Optimiser, lr: float) -> schema.Optimiser:
    """The settings at this learning rate; Muon's own rate keeps its ratio."""
    scale = lr / _REFERENCE_LR if optimiser.name == "muon" else 1.0
    return optimiser.model_copy(update={"lr": lr, "matrix_lr": optimiser.matrix_lr * scale})


def smooth(losses: Sequence[float]) -> list[float]:
    """The running mean that forgets exponentially, without the pull to zero at the start (Kingma and Ba 2015)."""
    means, mean = [], 0.0
    for number, loss in enumerate(losses, 1):
        mean = _MEMORY * mean + (1 - _MEMORY) * loss
        means.append(mean / (1 - _MEMORY**number))
    return means


def _slope(losses: Sequence[float]) -> float:
    """The least-squares slope per step."""
    middle = (len(losses) - 1) / 2
    return sum((place - middle) * loss for place, loss in enumerate(losses)) / sum(
        (place - middle) ** 2 for place in range(len(losses))
    )


def _rate(step: int) -> float:
    return LOWEST * math.pow(HIGHEST / LOWEST, step / (STEPS - 1))

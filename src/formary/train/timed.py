"""A training of so many seconds, for comparing settings by what they reach in equal time.

The schedule, and a ramp of sequence lengths, follow the clock in place of the step count: every setting goes through all of
them, whatever its steps cost. Nothing is saved; the network is left with its last weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from formary.model.topologies import Network
from formary.recipe.schema import Schedule, Train
from formary.tasks.protocol import Batch, Batches, size_of, total_steps
from formary.train.loop import gradient
from formary.train.machine import Runtime
from formary.train.optimisers import Optimiser
from formary.train.parallel import Loss
from formary.train.schedules import lr_factor
from formary.train.tuning import lr_scale

_FINE = 1_000_000  # parts of a run that the schedule tells apart
_DIVERGED = 10  # steps in a row whose loss or gradient is not finite


@dataclass(frozen=True)
class Timed:
    """What was done in the time: steps, tokens of their batches, and seconds, those of the step that passed the end included."""

    steps: int
    tokens: int
    seconds: float
    diverged: bool = False


def train_for(
    seconds: float,
    loss_of: Loss,
    network: Network,
    batches: Batches,
    settings: Train,
    runtime: Runtime,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Timed:
    """Train `network` in place until `clock` has gone on by so many seconds.

    Args:
        settings: its steps or epochs only say what share of the run a warm-up in steps is; averages and early stopping have
            no say here.
        clock: in seconds; `time.process_time` counts the processor's time and not that of other work on the machine.
    """
    torch.manual_seed(settings.seed)
    optimiser = Optimiser(
        network,
        settings.optimiser,
        dtype=getattr(torch, runtime.precision),
        lr_scale=lambda name: lr_scale(name, network.config, settings.tune),
    )
    schedule = in_shares(settings.schedule, total_steps(settings, batches))
    batch_at: Callable[[int, float], Batch] = getattr(batches, "at", lambda step, done: batches.batch(step))
    network.train()
    steps, tokens, harmful, used = 0, 0, 0, 0.0
    while used < seconds and harmful < _DIVERGED:
        began, done = clock(), used / seconds
        batch = batch_at(steps, done)
        loss, _, norm = gradient(loss_of, network, batch, settings, runtime)
        if math.isfinite(loss) and math.isfinite(norm):
            optimiser.step(lr_factor(schedule, int(done * _FINE), _FINE))
            harmful = 0
        else:
            optimiser.clear()
            harmful += 1
        steps, tokens, used = steps + 1, tokens + size_of(batch), used + clock() - began
    return Timed(steps, tokens, used, diverged=harmful >= _DIVERGED)


def in_shares(schedule: Schedule, total: int) -> Schedule:
    """The schedule with a warm-up of so many steps as the share of `total` that it is."""
    share = schedule.warmup if schedule.warmup < 1 else min(schedule.warmup / total, 1 - 1 / _FINE)
    return schedule.model_copy(update={"warmup": share})


@contextmanager
def as_it_was(network: Network) -> Iterator[None]:
    """Weights, gradients, mode and random state inside the block are the network's own again after it."""
    mode, weights = network.training, {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    with torch.random.fork_rng(enabled=True):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in network.state_dict().items():
                    tensor.copy_(weights[name])
            for parameter in network.parameters():
                parameter.grad = None
            network.train(mode)

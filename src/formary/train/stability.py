"""Steps that would do harm: which are skipped, when training goes back, and what is told of them afterwards.

A step is skipped when its loss or gradient is not finite, or lies so many standard deviations above its running mean.
The guard only judges; going back is the loop's. What it remembers is saved with every checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from formary import durable
from formary.model.topologies import Network
from formary.recipe.schema import Stability
from formary.tasks.protocol import Batch, read_of
from formary.train.machine import Runtime
from formary.train.parts import norm_of

FILE = "incidents.jsonl"
_MEMORY = 100  # steps over which the running mean and spread forget
_SETTLED = 100  # steps that are seen before any is called a spike
_LEAST_SPREAD = {
    "loss": 0.02,
    "norm": 0.5,
}  # of the loss its share; of the norm its logarithm, as clipping tames the rest
_TOLD = 20  # incidents of a run whose batch is looked into
_SHOWN, _CHARACTERS = 3, 400  # worst sequences of such a batch, and how much of the text of each


@dataclass
class Running:
    """Mean and variance that forget exponentially (West 1979), exact over the first steps."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Take one more value in."""
        self.count += 1
        share = max(1 / self.count, 1 / _MEMORY)
        difference = value - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference * difference)


@dataclass
class Memory:
    """What the guard remembers from step to step."""

    loss: Running = field(default_factory=Running)
    norm: Running = field(default_factory=Running)  # of the logarithm: norms vary by factors
    in_a_row: int = 0
    skipped: int = 0
    roll_backs: int = 0


class Guard:
    """Judges every step before its update.

    Args:
        spikes: standard deviations above the running mean at which a finite step is skipped; None: never.
    """

    def __init__(self, settings: Stability, *, spikes: float | None = None) -> None:
        self.settings, self.spikes, self.memory = settings, spikes, Memory()

    def judge(self, loss: float, norm: float) -> str | None:
        """Why this step is to be skipped, or None; `norm` is the gradient's before clipping."""
        reason = self._reason(loss, norm)
        memory = self.memory
        memory.in_a_row = memory.in_a_row + 1 if reason else 0
        memory.skipped += bool(reason)
        return reason

    def _reason(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:.4g} and gradient norm {norm:.4g} are not finite"
        memory, found = self.memory, None
        for name, running, value in (
            ("loss", memory.loss, loss),
            ("norm", memory.norm, math.log(max(norm, 1e-30))),
        ):
            least = _LEAST_SPREAD[name] * (abs(running.mean) if name == "loss" else 1.0)
            spread = max(math.sqrt(running.variance), least)
            limit = running.mean + (self.spikes or math.inf) * spread
            if self.spikes and running.count >= _SETTLED and value > limit:
                said, usual = (value, running.mean) if name == "loss" else (norm, math.exp(running.mean))
                found = found or (
                    f"{'loss' if name == 'loss' else 'gradient norm'} {said:.4g} is "
                    f"{(value - running.mean) / spread:.0f} standard deviations above its usual {usual:.4g}"
                )
                value = limit  # a lasting change widens the spread until it is no spike any more
            running.add(value)
        return found

    @property
    def must_roll_back(self) -> bool:
        """Whether so many steps were skipped in a row that the weights themselves are to blame."""
        return self.memory.in_a_row >= self.settings.roll_back_after

    @property
    def lr_factor(self) -> float:
        """What the roll-backs so far have left of the learning rate."""
        return self.settings.roll_back_lr**self.memory.roll_backs

    def rolled_back(self, roll_backs: int) -> None:
        """Note that training went back for the `roll_backs`-th time; the rest of the memory is the checkpoint's."""
        self.memory.roll_backs, self.memory.in_a_row = roll_backs, 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self.memory)

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.memory = Memory(**{**state, "loss": Running(**state["loss"]), "norm": Running(**state["norm"])})


Describe = Callable[[Batch], list[str]]
"""The text of every sequence of a batch."""


class Incidents:
    """What is told of skipped steps and roll-backs, in incidents.jsonl, for the report.

    Args:
        resume_step: where the training goes on; what the lost steps after it told is told again.
        roll_backs: how many there were; what was told before the last one stays.
        writes: whether this process does; the others only count.
    """

    def __init__(self, run: Path, *, resume_step: int, roll_backs: int, writes: bool = True) -> None:
        self.path, self.writes = run / FILE, writes
        known = incidents_of(run) if resume_step else []
        kept = [one for one in known if one["step"] <= resume_step or one["roll_backs"] < roll_backs]
        self.count = len(kept)
        if writes and (kept or self.path.exists()):
            durable.write_text(self.path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept))

    def write(self, step: int, roll_backs: int, **values: Any) -> None:
        """Append one."""
        self.count += 1
        if not self.writes:
            return
        line = json.dumps({"step": step, "roll_backs": roll_backs, **values}, ensure_ascii=False)
        with durable.naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @property
    def enough(self) -> bool:
        """Whether so many were looked into that more would only cost time."""
        return self.count >= _TOLD


def incidents_of(run: Path) -> list[dict[str, Any]]:
    """All that a run has told; a last line that a kill cut short is left out."""
    path, found = run / FILE, []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def post_mortem(
    loss_of: Callable[[Network, Batch], tuple[torch.Tensor, torch.Tensor]],
    network: Network,
    batch: Batch,
    runtime: Runtime,
    *,
    norm: float,
    describe: Describe | None,
) -> dict[str, Any]:
    """What a bad step was: gradient norm per layer, and the sequences of the batch that are worst, with their text.

    The gradients in place are those of the step, clipped or not; `norm` is their norm before. The weights, the
    gradients and the random numbers stay as they are.

    Returns:
        `shape` (sequences, tokens), `layers`: norm by layer (None: not finite), `worst`: list of {sequence, loss, text}.
    """
    sizes = {name: norm_of(gradients) for name, gradients in _by_layer(network).items()}
    total = math.sqrt(sum(size * size for size in sizes.values()))
    scale = norm / total if math.isfinite(total) and math.isfinite(norm) and total > 0 else 1.0
    found: dict[str, Any] = {
        "shape": list(read_of(batch).shape),
        "layers": {name: _finite(size * scale) for name, size in sizes.items()},
    }
    with _untouched(network):
        losses = [_alone(loss_of, network, batch, place, runtime) for place in range(len(read_of(batch)))]
    order = sorted(range(len(losses)), key=lambda place: (math.isfinite(losses[place]), -losses[place]))
    texts = describe(batch) if describe else []
    found["worst"] = [
        {"sequence": place, "loss": _finite(losses[place]), "text": texts[place][:_CHARACTERS] if texts else ""}
        for place in order[:_SHOWN]
    ]
    return found


def _by_layer(network: Network) -> dict[str, list[torch.Tensor]]:
    """Gradients by block ("transformer.blocks.3"), and by part of the network outside the blocks."""
    layers: dict[str, list[torch.Tensor]] = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            parts = name.split(".")
            inside = parts.index("blocks") + 2 if "blocks" in parts else max(1, len(parts) - 1)
            layers.setdefault(".".join(parts[:inside]), []).append(parameter.grad)
    return layers


def _alone(
    loss_of: Callable[[Network, Batch], tuple[torch.Tensor, torch.Tensor]],
    network: Network,
    batch: Batch,
    place: int,
    runtime: Runtime,
) -> float:
    part = {name: tensor[place : place + 1].to(runtime.device) for name, tensor in batch.items()}
    try:
        with runtime.autocast():
            summed, count = loss_of(network, part)
    except (RuntimeError, ValueError, IndexError):  # a loss that needs several sequences
        return 0.0
    return float(summed) / max(int(count), 1)


@contextmanager
def _untouched(network: Network) -> Iterator[None]:
    mode = network.training
    network.eval()
    with torch.no_grad(), torch.random.fork_rng():
        yield
    network.train(mode)


def _finite(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None

"""What a training is between two steps, whole: weights, optimiser, average, random numbers, and the loop's memory.

It is captured for a checkpoint and put back from one; where a recipe was changed on purpose, what fits is taken.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from formary.errors import CheckpointError
from formary.model.topologies import Network
from formary.recipe.schema import Train
from formary.train import rng
from formary.train.average import Average, put_weights, weights_of
from formary.train.checkpoint import Saved
from formary.train.optimisers import Optimiser
from formary.train.parallel import Spread
from formary.train.parts import part_like
from formary.train.privacy import PrivateTraining
from formary.train.stability import Guard


@dataclass
class Progress:
    """The loop's own memory, saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf  # what chooses the best weights: the validation loss, or a score turned negative
    best_loss: float = math.inf  # the validation loss of the best weights
    best_step: int = 0
    validations_without_gain: int = 0
    seconds_before: float = 0.0  # of `seconds`, those that earlier goes of a resumed run took
    bests: list[list[float]] = field(default_factory=list)  # [badness, step, loss] of the best validations, best first
    hourly: list[int] = field(default_factory=list)  # steps whose checkpoints stay for good
    hourly_at: float = 0.0  # `seconds` at the last of them
    recent_loss: float = 0.0  # sums since the last training line of metrics.jsonl
    recent_losses: int = 0
    recent_steps: int = 0
    recent_tokens: int = 0
    recent_seconds: float = 0.0

    def passed(self, tokens: int, seconds: float, loss: float | None) -> None:
        """Take in a step; `loss` is None where it was skipped."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.recent_steps += 1
        self.recent_tokens += tokens
        self.recent_seconds += seconds
        if loss is not None:
            self.recent_loss += loss
            self.recent_losses += 1

    def recent(self, total: int) -> tuple[float, float, float]:
        """Mean loss (NaN if every step was skipped) and tokens per second since the last call; seconds left to `total`."""
        mean = self.recent_loss / self.recent_losses if self.recent_losses else math.nan
        rate = self.recent_tokens / self.recent_seconds
        left = (total - self.step) * self.recent_seconds / self.recent_steps
        self.recent_loss, self.recent_losses, self.recent_steps = 0.0, 0, 0
        self.recent_tokens, self.recent_seconds = 0, 0.0
        return mean, rate, left

    def count_hours(self, hours: float | None) -> None:
        """Before a save: whether it is to stay because `hours` of training have gone by since the last that does."""
        if hours and self.seconds - self.hourly_at >= hours * 3600:
            self.hourly.append(self.step)
            self.hourly_at = self.seconds

    def validated(self, badness: float, loss: float, *, keep: int) -> bool:
        """Take in a validation; whether its weights are among the best `keep` and are to be saved."""
        self.bests = sorted([*self.bests, [badness, self.step, loss]], key=lambda one: (one[0], one[1]))[:keep]
        if badness < self.best:
            self.best, self.best_step, self.best_loss = badness, self.step, loss
            self.validations_without_gain = 0
        else:
            self.validations_without_gain += 1
        return any(step == self.step for _, step, _ in self.bests)

    def forget_best(self, step: int) -> None:
        """The weights of a best validation are lost: the next best takes its place."""
        self.bests = [one for one in self.bests if one[1] != step]
        self.best, best_step, self.best_loss = self.bests[0] if self.bests else [math.inf, 0, math.inf]
        self.best_step = int(best_step)

    @property
    def to_keep(self) -> set[int]:
        """The steps whose checkpoints stay, beside the newest."""
        return {self.best_step, *(int(step) for _, step, _ in self.bests), *self.hourly} - {0}


@dataclass
class State:
    """The parts of a training; see the module."""

    network: Network
    optimiser: Optimiser
    average: Average | None
    guard: Guard
    settings: Train
    threads: int
    spread: Spread
    private: PrivateTraining | None = None
    progress: Progress = field(default_factory=Progress)

    def captured(self) -> Saved:
        """All of it for a checkpoint, of several processes on the leader; the tensors may share what is training."""
        random_tensors, random_values = rng.captured()
        whole = self.spread.whole
        tensors = {
            "model": whole(weights_of(self.network)),
            "optimiser": whole(self.optimiser.state()),
            "rng": random_tensors,
        }
        if self.average:
            tensors["ema"] = whole(self.average.weights)
        state: dict[str, Any] = {
            "progress": asdict(self.progress),
            "ema_updates": self.average.updates if self.average else 0,
            "optimiser": self.settings.optimiser.name,
            "guard": self.guard.state(),
            "rng": random_values,
            "threads": self.threads,
        }
        if self.private:
            state["privacy"] = self.private.state()
        return Saved(self.progress.step, tensors, state)

    def put_back(self, saved: Saved, console: Console | None = None) -> None:
        """The inverse of `captured`; with a console, what differs from the training that was saved is said there.

        Raises:
            CheckpointError: the weights are those of another model.
        """
        self._check_weights(saved)
        put_weights(self.network, saved.tensors["model"])
        notes = []
        if saved.state["optimiser"] == self.settings.optimiser.name:
            known = self.optimiser.named
            moments = {key: tensor for key, tensor in saved.tensors["optimiser"].items() if _owner(key) in known}
            self.optimiser.load_state(moments)
        else:
            notes.append(
                f"the optimiser was {saved.state['optimiser']} and is {self.settings.optimiser.name}: it starts afresh"
            )
        if self.average:
            weights = saved.tensors.get("ema", saved.tensors["model"])
            self.average.weights = {
                name: part_like(weights[name].to(old.device), old) for name, old in self.average.weights.items()
            }
            self.average.updates = saved.state["ema_updates"]
        rng.put_back(saved.tensors["rng"], saved.state["rng"])
        self.guard.load_state(saved.state["guard"])
        if self.private:
            if "privacy" not in saved.state:
                raise CheckpointError(
                    f"the checkpoint of step {saved.step} was trained without privacy, which cannot be had afterwards; take "
                    "the privacy section out, or delete the run's checkpoints folder to begin anew"
                )
            self.private.load_state(saved.state["privacy"])
        held = saved.state["progress"]
        infinite = {name: math.inf for name in ("best", "best_loss") if held[name] is None}  # JSON has no infinity
        for name, value in {**held, **infinite}.items():
            setattr(self.progress, name, value)
        if saved.state["threads"] != self.threads:
            notes.append(
                f"{saved.state['threads']} threads computed before and {self.threads} do now: the last digits may differ"
            )
        if console:
            for note in notes:
                console.print(f"  {note}", highlight=False, markup=False)

    def _check_weights(self, saved: Saved) -> None:
        own, theirs = weights_of(self.network), saved.tensors["model"]
        for name in sorted(own.keys() ^ theirs.keys()):
            where = "the checkpoint has it not" if name in own else "only the checkpoint has it"
            raise CheckpointError(
                f"the checkpoint of step {saved.step} holds another model ({name}: {where}), so training cannot go on "
                "from it; undo the change of model or train.tune, or delete the run's checkpoints folder to begin anew"
            )
        for name, tensor in own.items():
            if tensor.shape != theirs[name].shape:
                raise CheckpointError(
                    f"the checkpoint of step {saved.step} holds another model ({name} is {tuple(theirs[name].shape)} "
                    f"there and {tuple(tensor.shape)} now), so training cannot go on from it; undo the change, or "
                    "delete the run's checkpoints folder to begin anew"
                )


def _owner(key: str) -> str:
    return key.rpartition("/")[0]

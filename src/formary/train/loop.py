"""The training loop, top to bottom: batch, loss, gradient, clip, update, validate, save.

Batches are pure functions of the step and checkpoints hold the rest, so a killed run resumes where it stood. The loop
knows tasks only by their batches and their (sum, count) loss; it has no idea of text, labels or tokenizers.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from torch import Tensor

from formary.errors import FormaryError, RecipeError
from formary.model.topologies import Network
from formary.recipe.schema import Train
from formary.tasks.protocol import Batch, Batches
from formary.train import checkpoint
from formary.train.machine import Runtime
from formary.train.optimisers import Optimiser
from formary.train.records import ProgressLine, Records, duration
from formary.train.schedules import lr_factor
from formary.train.tuning import lr_scale

Loss = Callable[[Network, Batch], tuple[Tensor, Tensor]]
"""The summed loss of a batch in nats and the number of predictions in it, both scalars."""

_RECORDS = 1000  # at most about this many training lines in metrics.jsonl
_BAD_STEPS = 20  # non-finite steps in a row before the run gives up


@dataclass(frozen=True)
class TokenBytes:
    """UTF-8 bytes that one token stands for, on average, in either split."""

    training: float
    validation: float


Watch = Callable[[float, float], bool]
"""Told after every validation which share of the run is done and what chooses the best weights (lower is better); whether to stop."""


class Stopped(FormaryError):
    """The caller's `watch` ended the training before its last step."""


class Interrupted(FormaryError):
    """Ctrl-C or SIGTERM: what was learned is saved, and the same command goes on from there."""

    exit_code = 130


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
    bad_steps: int = 0
    seconds_before: float = 0.0  # of `seconds`, those that earlier goes of a resumed run took


def train(
    loss_of: Loss,
    network: Network,
    *,
    batches: Batches,
    validation: Callable[[], Iterable[Batch]] | None,
    settings: Train,
    runtime: Runtime,
    run: Path,
    checkpoints: Path,
    console: Console,
    token_bytes: TokenBytes | None = None,
    score: Callable[[Network], tuple[str, float]] | None = None,
    sample: Callable[[Network], str] | None = None,
    compiled: bool = False,
    watch: Watch | None = None,
) -> Progress:
    """Train `network` in place until the last step, early stop, or a signal; it ends with the best weights.

    Args:
        loss_of: the summed loss of a batch in nats and the number of predictions in it.
        batches: what to learn from, step by step.
        validation: the same batches at every call, measured every `validate_every` steps; None trains without (the
            last weights count as best).
        run: the run folder, for metrics.jsonl and tensorboard/.
        checkpoints: where to save; the newest whole checkpoint there is resumed.
        token_bytes: UTF-8 bytes that a token of training and of validation stands for, to speak of bits per byte.
        score: a metric's name and value, higher is better, that chooses the best weights instead of the loss.
        sample: gives a text sample of the network, shown and recorded every `sample_every` steps.
        compiled: run the loss through torch.compile.
        watch: see `Watch`.

    Raises:
        Interrupted: a signal came; a checkpoint was saved first.
        Stopped: `watch` said so.
        FormaryError: the loss stayed non-finite.
    """
    network.to(runtime.device)
    total = total_steps(settings, batches)
    optimiser = Optimiser(
        network,
        settings.optimiser,
        dtype=getattr(torch, runtime.precision),
        lr_scale=lambda name: lr_scale(name, network.config, settings.tune),
    )
    average = Average(network, settings.ema) if settings.ema else None
    torch.manual_seed(settings.seed)
    progress = _resume(checkpoints, network, optimiser, average, console)
    step_loss = torch.compile(loss_of) if compiled else loss_of
    records = Records(run, resume_step=progress.step)
    every = max(1, total // _RECORDS)
    recent_loss, recent_steps, recent_tokens, recent_seconds = 0.0, 0, 0, 0.0
    saved_step = progress.step

    def save() -> None:
        nonlocal saved_step
        if saved_step != progress.step:
            _save(checkpoints, progress, network, optimiser, average)
            checkpoint.prune(checkpoints, keep=settings.keep, best_step=progress.best_step or None)
            saved_step = progress.step

    with ProgressLine(console, total) as line, _signals() as signals:
        network.train()
        while progress.step < total and not _has_levelled_off(progress, settings):
            began = time.perf_counter()
            batch = batches.batch(progress.step)
            loss, _, norm = gradient(step_loss, network, batch, settings, runtime)
            factor = lr_factor(settings.schedule, progress.step, total)
            if math.isfinite(loss) and math.isfinite(norm):
                optimiser.step(factor)
                if average:
                    average.update(network)
                progress.bad_steps = 0
            else:
                optimiser.clear()
                progress.bad_steps += 1
                line.say(
                    f"step {progress.step}: loss {loss} and gradient norm {norm} are not finite; the step was skipped"
                )
                if progress.bad_steps >= _BAD_STEPS:
                    raise FormaryError(
                        f"{_BAD_STEPS} steps in a row were not finite; lower train.optimiser.lr and run again"
                    )
            elapsed = time.perf_counter() - began
            progress.step += 1
            progress.tokens += batch["tokens"].numel()
            progress.seconds += elapsed
            recent_loss, recent_steps = recent_loss + loss, recent_steps + 1
            recent_tokens, recent_seconds = recent_tokens + batch["tokens"].numel(), recent_seconds + elapsed

            if progress.step % every == 0 or progress.step == total:
                mean = recent_loss / recent_steps
                bits = mean / math.log(2) / token_bytes.training if token_bytes else None
                rate = recent_tokens / recent_seconds
                values = {
                    "loss": mean,
                    "lr": factor * settings.optimiser.peak_lr,
                    "grad_norm": norm,
                    "tokens_per_second": rate,
                }
                values |= {"bits_per_byte": bits} if bits is not None else {}
                records.write(progress.step, values | {"seconds": progress.seconds, "tokens": progress.tokens})
                left = (total - progress.step) * recent_seconds / recent_steps
                line.show(progress.step, loss=mean, bits_per_byte=bits, rate=rate, seconds_left=left)
                recent_loss, recent_steps, recent_tokens, recent_seconds = 0.0, 0, 0, 0.0

            if progress.step % settings.validate_every == 0 or progress.step == total:
                if validation is not None:
                    began = time.perf_counter()
                    with averaged(network, average):
                        measured = validation_loss(loss_of, network, validation(), runtime)
                        scored = score(network) if score else None
                    values = {"validation_loss": measured, "validation_seconds": time.perf_counter() - began}
                    said = f"step {progress.step}: validation loss {measured:.4f}"
                    if token_bytes:
                        values["validation_bits_per_byte"] = measured / math.log(2) / token_bytes.validation
                        said += f", {values['validation_bits_per_byte']:.3f} bits per byte"
                    if scored:
                        values[f"validation_{scored[0]}"] = scored[1]
                        said += f", {scored[0].replace('_', ' ')} {scored[1]:.4f}"
                    records.write(progress.step, values | {"seconds": progress.seconds})
                    line.say(f"{said}, after {duration(progress.seconds)}")
                    if (badness := -scored[1] if scored else measured) < progress.best:
                        progress.best, progress.best_step, progress.best_loss = badness, progress.step, measured
                        progress.validations_without_gain = 0
                        save()
                    else:
                        progress.validations_without_gain += 1
                    if watch and watch(progress.step / total, badness):
                        records.close()
                        raise Stopped(f"stopped at step {progress.step} of {total}")
                else:
                    progress.best_step = progress.step
            if sample and settings.sample_every and progress.step % settings.sample_every == 0:
                with averaged(network, average):
                    text = sample(network)
                records.write(progress.step, {"sample": text})
                line.say(f"  it writes: {text!r}")
            if progress.step % settings.save_every == 0 or progress.step == total:
                save()
            if signals.came:
                save()
                records.close()
                raise Interrupted(f"stopped at step {progress.step} and saved; the same command goes on from there")
            if _has_levelled_off(progress, settings):
                save()
                line.say(f"no gain in {settings.patience} validations: stopped early at step {progress.step}")
    records.close()
    _take_best(checkpoints, network, average, progress)
    return progress


def _has_levelled_off(progress: Progress, settings: Train) -> bool:
    return bool(settings.patience) and progress.validations_without_gain >= (settings.patience or 0)


def total_steps(settings: Train, batches: Batches) -> int:
    """Optimiser steps of the run: `steps`, or `epochs` passes over the data, or 1000.

    Raises:
        RecipeError: both were given.
    """
    if settings.steps and settings.epochs:
        raise RecipeError("train.steps and train.epochs: give one of them")
    if settings.epochs:
        return max(1, round(settings.epochs * batches.steps_per_epoch))
    return settings.steps or 1000


def gradient(
    loss_of: Loss,
    network: Network,
    batch: Batch,
    settings: Train,
    runtime: Runtime,
) -> tuple[float, int, float]:
    """Leave the gradient of the mean loss of `batch` on the parameters, clipped.

    The batch goes through in pieces of `micro_batch` sequences whose summed losses are divided by the count of all
    predictions at the end, so the result does not depend on how it was cut.

    Returns:
        Mean loss in nats, number of predictions, gradient norm before clipping.
    """
    size = len(batch["tokens"])
    piece = settings.micro_batch or size
    loss_sum, count = 0.0, 0
    for start in range(0, size, piece):
        part = {name: tensor[start : start + piece].to(runtime.device) for name, tensor in batch.items()}
        with runtime.autocast():
            summed, predictions = loss_of(network, part)
        summed.backward()  # type: ignore[no-untyped-call]
        loss_sum, count = loss_sum + float(summed.detach()), count + int(predictions)
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) / max(count, 1)
    scale = 1 / max(count, 1)
    if settings.clip and norm > settings.clip:
        scale *= settings.clip / norm
    torch._foreach_mul_(gradients, scale)
    return loss_sum / max(count, 1), count, norm


@torch.no_grad()
def validation_loss(loss_of: Loss, network: Network, batches: Iterable[Batch], runtime: Runtime) -> float:
    """Mean loss in nats per prediction over the batches."""
    network.eval()
    loss_sum, count = 0.0, 0
    for batch in batches:
        with runtime.autocast():
            summed, predictions = loss_of(network, {name: tensor.to(runtime.device) for name, tensor in batch.items()})
        loss_sum, count = loss_sum + float(summed), count + int(predictions)
    network.train()
    return loss_sum / max(count, 1)


class Average:
    """Exponential moving average of the weights (Polyak and Juditsky 1992); `decay` is its memory per step."""

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        self.updates = 0

    def update(self, network: Network) -> None:
        """Move the average towards the network's weights; early on it forgets faster, as there is little to keep."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        current = [parameter.detach() for parameter in network.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)


@contextmanager
def averaged(network: Network, average: Average | None) -> Iterator[None]:
    """The network with its averaged weights inside the block, its own again after."""
    if average is None:
        yield
        return
    own = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    _put(network, average.weights)
    try:
        yield
    finally:
        _put(network, own)


@torch.no_grad()
def _put(network: Network, weights: dict[str, Tensor]) -> None:
    for name, parameter in network.named_parameters():
        parameter.copy_(weights[name])


def _weights(network: Network) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def _save(
    checkpoints: Path,
    progress: Progress,
    network: Network,
    optimiser: Optimiser,
    average: Average | None,
) -> None:
    tensors = {"model": _weights(network), "optimiser": optimiser.state(), "rng": checkpoint.rng_state()}
    if average:
        tensors["ema"] = average.weights
    state = {"progress": asdict(progress), "ema_updates": average.updates if average else 0}
    checkpoint.save(checkpoints, checkpoint.Saved(progress.step, tensors, state))


def _resume(
    checkpoints: Path,
    network: Network,
    optimiser: Optimiser,
    average: Average | None,
    console: Console,
) -> Progress:
    saved, skipped = checkpoint.newest(checkpoints)
    for sentence in skipped:
        console.print(sentence, highlight=False, markup=False)
    if saved is None:
        return Progress()
    _put(network, saved.tensors["model"])
    optimiser.load_state(saved.tensors["optimiser"])
    if average:
        average.weights = {name: saved.tensors["ema"][name] for name in average.weights}
        average.updates = saved.state["ema_updates"]
    torch.set_rng_state(saved.tensors["rng"]["torch"])
    console.print(f"resuming from step {saved.step}", highlight=False)
    progress = Progress(**saved.state["progress"])
    progress.seconds_before = progress.seconds
    return progress


def _take_best(checkpoints: Path, network: Network, average: Average | None, progress: Progress) -> None:
    """Leave the network with the best validated weights (averaged ones where the run averages)."""
    if progress.best_step and progress.best_step != progress.step:
        best = checkpoint.load(checkpoints / f"step-{progress.best_step:08d}")
        _put(network, best.tensors["ema" if average else "model"])
    elif average:
        _put(network, average.weights)


class _Signals:
    came = False


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Notice Ctrl-C and SIGTERM instead of dying; a second Ctrl-C dies at once."""
    noticed = _Signals()

    def notice(number: int, frame: FrameType | None) -> None:
        if noticed.came and number == signal.SIGINT:
            raise KeyboardInterrupt
        noticed.came = True

    try:
        before = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller handles signals
        before = {}
    try:
        yield noticed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The training loop, top to bottom: batch, loss, gradient, clip, update, validate, save.

Batches are pure functions of the step and checkpoints hold the rest, so a killed run resumes where it stood. The loop
knows tasks only by their batches and their (sum, count) loss; it has no idea of text, labels or tokenizers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from formary.errors import FormaryError
from formary.model.topologies import Network
from formary.recipe.schema import Train
from formary.tasks.protocol import Batch, Batches, read_of, size_of, total_steps
from formary.train import memory, rng, signals
from formary.train.average import Average, averaged
from formary.train.machine import Runtime
from formary.train.optimisers import Optimiser
from formary.train.parallel import Loss, Spread, recompute_activations
from formary.train.parts import norm_of
from formary.train.privacy import PrivateTraining
from formary.train.records import NOTHING_ELSE, ProgressLine, Records, Seeing, duration
from formary.train.returning import resume, roll_back, take_best
from formary.train.saving import Saver
from formary.train.schedules import lr_factor
from formary.train.stability import Describe, Guard, Incidents, post_mortem
from formary.train.state import Progress, State
from formary.train.tuning import lr_scale

_RECORDS = 1000  # at most about this many training lines in metrics.jsonl


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
    describe: Describe | None = None,
    spikes: float | None = None,
    compiled: bool = False,
    watch: Watch | None = None,
    private: PrivateTraining | None = None,
    seeing: Seeing = NOTHING_ELSE,
    unit: str = "tokens",
) -> Progress:
    """Train `network` in place until the last step, early stop, or a signal; it ends with the best weights.

    Args:
        loss_of: the summed loss of a batch in nats and the number of predictions in it.
        batches: what to learn from, step by step.
        validation: the same batches at every call, measured every `validate_every` steps; None trains without (the
            last weights count as best).
        run: the run folder, for metrics.jsonl, incidents.jsonl and tensorboard/.
        checkpoints: where to save; the newest whole checkpoint there is resumed.
        token_bytes: UTF-8 bytes that a token of training and of validation stands for, to speak of bits per byte.
        score: a metric's name and value, higher is better, that chooses the best weights instead of the loss.
        sample: gives a text sample of the network, shown and recorded every `sample_every` steps.
        describe: gives the text of every sequence of a batch, for what is told of skipped steps.
        spikes: standard deviations above the running mean at which a step is skipped; None: only what is not finite.
        compiled: run the loss through torch.compile.
        watch: see `Watch`.
        private: makes the gradients in place of `gradient`; attached to the network, with its own `batches`.
        seeing: what else is seen of the run, beside metrics.jsonl.
        unit: what `size_of` counts in a batch, for the line that shows the speed.

    Raises:
        Interrupted: a signal came; a checkpoint was saved first.
        Stopped: `watch` said so.
        OutOfMemory: a batch did not fit.
        FormaryError: training diverged, again after every roll-back.
    """
    network.to(runtime.device)
    recompute_activations(network, settings.activation_checkpointing)
    spread = Spread(loss_of, network, runtime, batch=lambda: batches.batch(0), compiled=compiled)
    network, processes = spread.network, spread.processes
    total = total_steps(settings, batches)
    rng.seed_all(settings.seed)
    optimiser = Optimiser(
        network,
        settings.optimiser,
        dtype=getattr(torch, runtime.precision),
        lr_scale=lambda name: lr_scale(name, network.config, settings.tune),
    )
    average = Average(network, settings.ema) if settings.ema else None
    guard = Guard(settings.stability, spikes=spikes)
    state = State(network, optimiser, average, guard, settings, runtime.threads, spread, private)
    resume(checkpoints, state, console)
    progress = state.progress
    gradient_of = private.gradient if private else gradient
    batches = seeing.batches(batches)
    records = Records(run, resume_step=progress.step, total=total, writes=processes.leads, seeing=seeing)
    incidents = Incidents(run, resume_step=progress.step, roll_backs=guard.memory.roll_backs, writes=processes.leads)
    every = max(1, total // _RECORDS)
    saved_step = progress.step

    with (
        ProgressLine(console, total, unit) as line,
        signals.noticed() as came,
        Saver(checkpoints, keep=settings.keep, writes=processes.leads) as saver,
    ):

        def save() -> None:
            nonlocal saved_step
            if saved_step != progress.step:
                progress.count_hours(settings.keep_hours)
                saver.save(state.captured(), also=progress.to_keep)
                saved_step = progress.step

        network.train()
        while progress.step < total and not _has_levelled_off(progress, settings):
            began = time.perf_counter()
            saver.check()
            spread.seed(settings.seed, progress.step)
            try:
                batch = batches.batch(progress.step)
            except Exception:  # the data failed, not the training: nothing of it is lost
                if spread.kind != "fsdp":  # the others may have got theirs, and would not help to save
                    save()
                raise
            try:
                loss, _, norm = gradient_of(spread.loss, network, batch, settings, runtime, spread)
            except (MemoryError, RuntimeError) as error:
                if not memory.is_memory(error):
                    raise
                raise _out_of_memory(state, batch, runtime) from error
            factor = lr_factor(settings.schedule, progress.step, total) * guard.lr_factor
            harm = guard.judge(loss, norm)
            if harm is None:
                records.before_update(progress.step + 1, network)
                optimiser.step(factor)
                if average:
                    average.update(network)
            else:
                line.say(f"step {progress.step}: {harm}; the step was skipped")
                found: dict[str, object] = {"why": harm}
                if not incidents.enough:
                    found |= post_mortem(spread.measured_loss, network, batch, runtime, norm=norm, describe=describe)
                incidents.write(progress.step, guard.memory.roll_backs, **found)
                optimiser.clear()
                if guard.must_roll_back:
                    back = roll_back(state, saver)
                    incidents.write(back, guard.memory.roll_backs, why="rolled back", lr_factor=guard.lr_factor)
                    line.say(
                        f"{settings.stability.roll_back_after} steps in a row were skipped: back to step {back}, from "
                        f"there on with {guard.lr_factor:g} of the learning rate"
                    )
                    records.close()
                    records = Records(run, resume_step=back, total=total, writes=processes.leads, seeing=seeing)
                    saved_step = back
                    continue
            elapsed = time.perf_counter() - began
            progress.passed(size_of(batch), elapsed, None if harm else loss)
            seeing.stepped()

            if progress.step % every == 0 or progress.step == total:
                mean, rate, left = progress.recent(total)
                bits = mean / math.log(2) / token_bytes.training if token_bytes else None
                values = {
                    "loss": mean,
                    "lr": factor * settings.optimiser.peak_lr,
                    "grad_norm": norm,
                    "tokens_per_second": rate,
                }
                values |= {"bits_per_byte": bits} if bits is not None else {}
                values |= private.spent(progress.step) if private else {}
                records.write(progress.step, values | {"seconds": progress.seconds, "tokens": progress.tokens})
                epsilon = values.get("epsilon")
                line.show(progress.step, loss=mean, bits_per_byte=bits, rate=rate, seconds_left=left, epsilon=epsilon)

            if progress.step % settings.validate_every == 0 or progress.step == total:
                if validation is not None:
                    began = time.perf_counter()
                    with averaged(network, average):
                        measured = validation_loss(spread.measured_loss, network, validation(), runtime, spread)
                        scored = spread.asked(score) if score else None
                    values = {"validation_loss": measured, "validation_seconds": time.perf_counter() - began}
                    said = f"step {progress.step}: validation loss {measured:.4f}"
                    if token_bytes:
                        values["validation_bits_per_byte"] = measured / math.log(2) / token_bytes.validation
                        said += f", {values['validation_bits_per_byte']:.3f} bits per byte"
                    if scored:
                        values[f"validation_{scored[0]}"] = scored[1]
                        said += f", {scored[0].replace('_', ' ')} {scored[1]:.4f}"
                    if private:
                        values["epsilon"] = private.epsilon
                        said += f", epsilon {private.epsilon:.2f}"
                    records.write(progress.step, values | {"seconds": progress.seconds})
                    line.say(f"{said}, after {duration(progress.seconds)}")
                    badness = -scored[1] if scored else measured
                    if progress.validated(badness, measured, keep=settings.keep_best):
                        save()
                    if watch and watch(progress.step / total, badness):
                        records.close()
                        raise Stopped(f"stopped at step {progress.step} of {total}")
                else:
                    progress.best_step = progress.step
            if sample and settings.sample_every and progress.step % settings.sample_every == 0:
                with averaged(network, average):
                    text = spread.asked(sample)
                records.write(progress.step, {"sample": text})
                line.say(f"  it writes: {text!r}")
            if progress.step % settings.save_every == 0 or progress.step == total:
                save()
            if processes.any(came.came):
                save()
                saver.wait()
                records.close()
                raise Interrupted(f"stopped at step {progress.step} and saved; the same command goes on from there")
            if _has_levelled_off(progress, settings):
                save()
                line.say(f"no gain in {settings.patience} validations: stopped early at step {progress.step}")
    records.close()
    take_best(checkpoints, state, console)
    return progress


def _has_levelled_off(progress: Progress, settings: Train) -> bool:
    return bool(settings.patience) and progress.validations_without_gain >= (settings.patience or 0)


def gradient(
    loss_of: Loss,
    network: Network,
    batch: Batch,
    settings: Train,
    runtime: Runtime,
    spread: Spread | None = None,
) -> tuple[float, int, float]:
    """Leave the gradient of the mean loss of `batch` on the parameters, clipped.

    The batch goes through in pieces of `micro_batch` sequences whose summed losses are divided by the count of all
    predictions at the end, so the result does not depend on how it was cut, nor on how many processes share it.

    Args:
        spread: of several processes; each learns from its part. Left out, this process learns from all of the batch.

    Returns:
        Mean loss in nats, number of predictions, gradient norm before clipping.
    """
    spread = spread or Spread.alone(loss_of, network, runtime)
    loss_sum, count = 0.0, 0
    for part, counts, context in spread.pieces(batch, settings.micro_batch):
        with context:
            with runtime.autocast():
                summed, predictions = loss_of(network, part)
            (summed if counts else summed * 0).backward()  # type: ignore[no-untyped-call]
        if counts:
            loss_sum, count = loss_sum + float(summed.detach()), count + int(predictions)
    loss_sum, count = spread.total(loss_sum, count)
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    scale = spread.gradient_factor / max(count, 1)
    norm = norm_of(gradients) * scale
    if settings.clip and norm > settings.clip:
        scale *= settings.clip / norm
    torch._foreach_mul_(gradients, scale)
    return loss_sum / max(count, 1), count, norm


@torch.no_grad()
def validation_loss(
    loss_of: Loss, network: Network, batches: Iterable[Batch], runtime: Runtime, spread: Spread | None = None
) -> float:
    """Mean loss in nats per prediction over the batches; of several processes each measures its part of each batch."""
    spread = spread or Spread.alone(loss_of, network, runtime)
    network.eval()
    loss_sum, count = 0.0, 0
    for batch in batches:
        for part, counts, _ in spread.pieces(batch, None):
            with runtime.autocast():
                summed, predictions = loss_of(network, part)
            if counts:
                loss_sum, count = loss_sum + float(summed), count + int(predictions)
    loss_sum, count = spread.total(loss_sum, count)
    network.train()
    return loss_sum / max(count, 1)


def _out_of_memory(state: State, batch: Batch, runtime: Runtime) -> memory.OutOfMemory:
    processes, loss_of = state.spread.processes, state.spread.loss

    def attempt(pieces: int) -> None:
        state.optimiser.clear()
        gradient(loss_of, state.network, batch, state.settings.model_copy(update={"micro_batch": pieces}), runtime)

    if processes.count > 1:  # the others would have to try with it
        sequences = len(read_of(batch))
        tokens = size_of(batch) // sequences
        return memory.OutOfMemory(
            f"step {state.progress.step}: memory ran out in process {processes.rank} of {processes.count} (counted from 0) "
            f"on its part of {sequences} sequences of {tokens} tokens; lower train.micro_batch (now "
            f"{state.settings.micro_batch or -(-sequences // processes.count)}), set train.activation_checkpointing, or "
            "machine.parallel: fsdp"
        )
    return memory.explained(state.progress.step, batch, state.settings, attempt)

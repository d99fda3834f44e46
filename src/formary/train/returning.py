"""Returning to a checkpoint: at the start, when training diverged, and at the end for the best weights.

What a checkpoint holds is `state`'s, how it lies on the disk is `checkpoint`'s; here is which one is taken.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from formary.errors import FormaryError
from formary.train import checkpoint
from formary.train.saving import Saver
from formary.train.state import Progress, State


def resume(checkpoints: Path, state: State, console: Console) -> None:
    """Put the newest whole checkpoint back, where there is one; broken ones are named, the best's too.

    Raises:
        CheckpointError: it does not fit the training.
    """
    processes = state.spread.processes
    saved, skipped = checkpoint.newest(checkpoints) if processes.leads else (None, [])
    for sentence in skipped:
        console.print(sentence, highlight=False, markup=False)
    step = processes.agree(saved.step if saved else None)
    if step is None:
        return
    saved = saved or checkpoint.load(checkpoint.path_of(checkpoints, step))
    console.print(f"resuming from step {saved.step}", highlight=False)
    state.put_back(saved, console)
    progress = state.progress
    progress.seconds_before = progress.seconds
    while progress.best_step not in (0, progress.step) and _best(checkpoints, progress, console) is None:
        pass


def _best(checkpoints: Path, progress: Progress, console: Console) -> checkpoint.Saved | None:
    """The checkpoint of the best weights; where it is broken it is named, and the next best takes its place."""
    path = checkpoint.path_of(checkpoints, progress.best_step)
    try:
        return checkpoint.load(path)
    except checkpoint.UNREADABLE as error:
        progress.forget_best(progress.best_step)
        instead = f"those of step {progress.best_step} count as the best" if progress.best_step else "later ones count"
        console.print(f"{path} held the best weights and is broken ({error}): {instead}", highlight=False, markup=False)
        return None


def roll_back(state: State, saver: Saver) -> int:
    """Go back to the newest checkpoint that no skipped step precedes, with a smaller learning rate; where there is none,
    the weights stay, which skipped steps have not changed.

    Returns:
        the step to go on from.

    Raises:
        FormaryError: that was done as often as it may be.
    """
    number, settings = state.guard.memory.roll_backs + 1, state.settings.stability
    if number > settings.roll_backs:
        raise FormaryError(
            f"training diverged: {settings.roll_back_after} steps in a row were skipped, and {number - 1} roll-backs to a "
            "smaller learning rate did not help; lower train.optimiser.lr and run again (incidents.jsonl in the run "
            "folder says which batches and layers)"
        )
    saver.wait()
    state.spread.processes.wait()  # until the leader has saved
    for step in reversed(checkpoint.steps_in(saver.folder)):
        path = checkpoint.path_of(saver.folder, step)
        try:
            saved = checkpoint.load(path)
        except checkpoint.UNREADABLE:
            continue
        if saved.state["guard"]["in_a_row"] == 0:
            spent = state.progress.seconds, state.progress.seconds_before
            private = state.private.state() if state.private else {}
            state.put_back(saved)
            state.progress.seconds, state.progress.seconds_before = spent
            if state.private:  # what was learned and thrown away has been spent all the same
                state.private.load_state(private)
            break
        checkpoint.delete(path)  # a resume would take it
    state.guard.rolled_back(number)
    state.spread.processes.wait()  # until all have read what the leader now writes anew
    saver.save(state.captured(), also=state.progress.to_keep)
    return state.progress.step


def take_best(checkpoints: Path, state: State, console: Console) -> None:
    """Leave the network with the best validated weights (averaged ones where the run averages)."""
    progress, weights = state.progress, state.average.weights if state.average else None
    state.spread.processes.wait()  # until the leader has saved
    while progress.best_step not in (0, progress.step):
        if best := _best(checkpoints, progress, console):
            weights = best.tensors["ema" if state.average else "model"]
            break
    state.spread.finish(weights)

"""What saving costs a training, and what it takes to go on from a checkpoint.

    python benchmarks/saving.py [--rounds 5] [--steps 12] [--threads 2] [--folder .]

The 6 x 384 model with AdamW, 16 x 256 tokens a step, float32. Blocks of steps without and with a save in the background come in
turn; the block is longer than the save, so all that a save costs is in it: the copy of the tensors, and what its thread takes from
the steps while it hashes and writes. At one save a minute the difference is spread over 60 seconds. Going on is reading the newest
checkpoint, with its checksums, and putting it back. Bars: 5 % and 5 seconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peers import machine
from rich.console import Console
from scale import SPEED, judged, loss_of

from formary.model.topologies import build
from formary.recipe import schema
from formary.recipe.presets import preset
from formary.train.loop import gradient
from formary.train.machine import Runtime
from formary.train.optimisers import Optimiser
from formary.train.parallel import Spread
from formary.train.processes import Processes
from formary.train.returning import resume
from formary.train.saving import Saver
from formary.train.stability import Guard
from formary.train.state import State

MINUTE, SHARE_BAR, SECONDS_BAR = 60.0, 0.05, 5.0


class Training:
    """A training of the model on one batch."""

    def __init__(self, threads: int) -> None:
        batch, context, vocab_size = SPEED["batch"], SPEED["context"], SPEED["vocab_size"]
        network = build(preset("gpt2", vocab_size=vocab_size, context=context, size=SPEED["size"]), seed=0)
        tokens = torch.randint(0, vocab_size, (batch, context + 1), generator=torch.Generator().manual_seed(0))
        self.rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        self.settings = schema.Train(batch=batch, context=context)
        self.runtime = Runtime(torch.device("cpu"), "float32", threads, Processes(), "auto")
        self.spread = Spread(loss_of, network, self.runtime, batch=lambda: self.rows)
        optimiser = Optimiser(network, self.settings.optimiser)
        guard = Guard(self.settings.stability, spikes=None)
        self.saved_step = 0
        self.state = State(network, optimiser, None, guard, self.settings, threads, self.spread)

    def step(self) -> None:
        state = self.state
        gradient(self.spread.loss, state.network, self.rows, self.settings, self.runtime, self.spread)
        state.optimiser.step(1.0)
        state.progress.step += 1

    def block(self, steps: int, saver: Saver | None) -> tuple[float, float]:
        """Seconds of so many steps, and of them the seconds that the call of `save` itself took."""
        began, stood = time.perf_counter(), 0.0
        for number in range(steps):
            self.step()
            if number == 0 and saver is not None:
                saving = time.perf_counter()
                self.saved_step = self.state.progress.step
                saver.save(self.state.captured())
                stood = time.perf_counter() - saving
        return time.perf_counter() - began, stood


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="in a block")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to write to; the system's temporary folder"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine())
    training = Training(given.threads)
    training.block(3, None)
    plain, saved, stood, late = [], [], [], 0
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        folder = Path(place) / "checkpoints"
        for _ in range(given.rounds):
            plain.append(training.block(given.steps, None)[0])
            with Saver(folder, keep=2) as saver:
                seconds, still = training.block(given.steps, saver)
                waited = time.perf_counter()
                saver.wait()
                late += time.perf_counter() - waited > 0.1
            saved.append(seconds)
            stood.append(still)
        size = sum(file.stat().st_size for file in max(folder.iterdir()).rglob("*") if file.is_file())
        returning = []
        for _ in range(given.rounds):
            fresh = Training(given.threads)
            began = time.perf_counter()
            resume(folder, fresh.state, Console(quiet=True))
            returning.append(time.perf_counter() - began)
            assert fresh.state.progress.step == training.saved_step
    if late:
        print(f"{late} saves outlasted their block: give it more --steps")
    cost = [b - a for a, b in zip(plain, saved)]
    share = statistics.median(cost) / MINUTE
    print(f"a checkpoint of {size / 1e6:,.0f} MB; {given.rounds} rounds of {given.steps} steps, medians and extremes")
    print(f"a step without a save: {told([p / given.steps for p in plain])}")
    print(f"standing still in a save: {told(stood)}")
    print(f"all that a save costs: {told(cost)}")
    print(f"at one save a minute: {share:.1%} of the time, bar {SHARE_BAR:.0%}: {judged(share <= SHARE_BAR)}")
    middle = statistics.median(returning)
    print(f"going on from a checkpoint: {told(returning)}, bar {SECONDS_BAR:g} s: {judged(middle <= SECONDS_BAR)}")


def told(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()

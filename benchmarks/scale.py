"""Two processes beside one: tokens per second of 2 x 1 thread (gloo) over 1 x 2 threads, memory under fsdp over ddp.

    python benchmarks/scale.py [--rounds 5] [--steps 12]

Speed: the 6 x 384 model, the same batch of 16 x 256 tokens a step, AdamW, float32, contestants in turn. Memory: 12 x 768 with a
batch of 2 x 64, so that weights, gradients and moments are what there is; the peak of resident memory while it learns, over what
the process held before it had a model. Bars: 0.9 and 0.65.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from peers import machine

from formary.model.topologies import Network, build, parameter_count
from formary.recipe import schema
from formary.recipe.presets import preset
from formary.tasks.cross_entropy import cross_entropy
from formary.tasks.protocol import Batch
from formary.train.loop import gradient
from formary.train.machine import Runtime
from formary.train.optimisers import Optimiser
from formary.train.parallel import Spread
from formary.train.processes import joined

SPEED: dict[str, Any] = {"size": "6x384", "vocab_size": 8192, "batch": 16, "context": 256}
MEMORY: dict[str, Any] = {"size": "12x768", "vocab_size": 8192, "batch": 2, "context": 64}
SPEED_BAR, MEMORY_BAR = 0.9, 0.65


def loss_of(network: Network, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return cross_entropy(network.head, network(batch["tokens"]), batch["targets"])


def learn(kind: str, threads: int, steps: int, size: str, vocab_size: int, batch: int, context: int) -> None:
    """As one of the processes: learn for some steps; the leader prints what it saw as JSON."""
    torch.set_num_threads(threads)
    with joined() as processes:
        processes.total(0.0)  # the connections are part of what the process holds without a model
        before = resident()
        with peak() as highest:
            network = build(preset("gpt2", vocab_size=vocab_size, context=context, size=size), seed=0)
            weights = parameter_count(network)
            runtime = Runtime(torch.device("cpu"), "float32", threads, processes, kind)
            settings = schema.Train(batch=batch, context=context)
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(0, vocab_size, (batch, context + 1), generator=generator)
            rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
            spread = Spread(loss_of, network, runtime, batch=lambda: rows)
            optimiser = Optimiser(spread.network, settings.optimiser)
            seconds = []
            for step in range(steps + 2):
                processes.wait()
                began = time.perf_counter()
                gradient(spread.loss, spread.network, rows, settings, runtime, spread)
                optimiser.step(1.0)
                processes.wait()
                if step >= 2:
                    seconds.append(time.perf_counter() - began)
        memory = processes.total(highest() - before)[0] / processes.count
        if processes.leads:
            rate = batch * context / statistics.median(seconds)
            print(json.dumps({"tokens_per_second": rate, "bytes": memory, "weights": weights}))


class peak:  # a context, used as a function
    """The highest resident memory inside the block, looked at every few milliseconds."""

    def __enter__(self) -> Callable[[], int]:
        self.highest, self.done = 0, threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return lambda: self.highest

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        self.watcher.join()

    def watch(self) -> None:
        while not self.done.wait(0.003):
            self.highest = max(self.highest, resident())


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def start(count: int, kind: str, threads: int, steps: int, model: dict[str, object]) -> dict[str, float]:
    """Let `count` processes learn, and return what the leader saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = json.dumps({"kind": kind, "threads": threads, "steps": steps, **model})
    common = os.environ | {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    if count > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--as", arguments],
            env=common
            | ({"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("a process failed; see above")
    found: dict[str, float] = json.loads(said[0].splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--as", dest="learner", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.learner:
        learn(**json.loads(given.learner))
        return
    print(machine())
    one, two = [], []
    for _ in range(given.rounds):
        one.append(start(1, "auto", 2, given.steps, SPEED)["tokens_per_second"])
        two.append(start(2, "ddp", 1, given.steps, SPEED)["tokens_per_second"])
    ratios = [b / a for a, b in zip(one, two)]
    print(
        f"| 6 x 384, 16 x 256 tokens | tokens/s |\n|---|---|\n| 1 process x 2 threads | {statistics.median(one):,.0f} |"
    )
    print(f"| 2 processes x 1 thread (ddp, gloo) | {statistics.median(two):,.0f} |")
    ratio = statistics.median(ratios)
    print(
        f"\nratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), bar {SPEED_BAR}: {judged(ratio >= SPEED_BAR)}\n"
    )
    ddp, fsdp = (start(2, kind, 1, 4, MEMORY) for kind in ("ddp", "fsdp"))
    print("| 12 x 768, 2 x 64 tokens | memory per process | bytes per weight |\n|---|---|---|")
    for name, seen in (("ddp", ddp), ("fsdp", fsdp)):
        print(f"| {name} | {seen['bytes'] / 2**20:,.0f} MiB | {seen['bytes'] / seen['weights']:.1f} |")
    ratio = fsdp["bytes"] / ddp["bytes"]
    print(f"\nratio {ratio:.2f}, bar {MEMORY_BAR}: {judged(ratio <= MEMORY_BAR)}")


def judged(reached: bool) -> str:
    return "reached" if reached else "NOT reached"


if __name__ == "__main__":
    main()

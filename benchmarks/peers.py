"""What the benchmarks share: the machine in a line, medians of runs taken in turn, contestants kept apart."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from formary.train.machine import cpu_name, physical_cores

ROOT = Path(__file__).resolve().parents[1]


def machine() -> str:
    """The processor, the threads and the versions a figure belongs to."""
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{cpu_name()}, {physical_cores()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {python}"


def installed(module: str, distribution: str) -> bool:
    """Whether a peer can be imported; its version, or how to get it, is printed."""
    if importlib.util.find_spec(module) is None:
        print(f"{distribution}: not installed, left out; pip install {distribution} brings it")
        return False
    print(f"{distribution} {version(distribution)}")
    return True


def figures_in_turn(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contestant returns, such as seconds, all of them in every round, after one round that does not count."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, work in contestants.items():
            figure = work()
            if number:
                figures[name].append(figure)
    return figures


def in_turn(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, all of them in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, work in contestants.items():
            began = time.perf_counter()
            work()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(slower: list[float], faster: list[float]) -> str:
    """The ratio round by round, as median (least to most)."""
    ratios = sorted(a / b for a, b in zip(slower, faster, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


class Apart:
    """A contestant in a process of its own, which stands still while others are at work.

    Threads of a library that wait for more work by spinning take time from whoever is measured next to them.

    Args:
        make: called with the arguments in that process; what it returns is the contestant.
        threads: of torch, there.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_stand_by, args=(other, threads, make, arguments), daemon=True)
        self._process.start()
        self._answer()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the contestant returns."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGCONT)
        self._pipe.send((method, arguments))
        return self._answer()

    def end(self) -> None:
        """Let go of the process and its memory."""
        self._process.kill()
        self._process.join()

    def _answer(self) -> Any:
        answer = self._pipe.recv()
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        if isinstance(answer, Exception):
            raise answer
        return answer


def _stand_by(pipe: Connection, threads: int, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    try:
        contestant = make(*arguments)
        pipe.send(None)
        while True:
            method, given = pipe.recv()
            pipe.send(getattr(contestant, method)(*given))
    except Exception as error:
        pipe.send(error)

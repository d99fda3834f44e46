"""What the benchmarks share: the machine in a line, and medians of runs taken in turn."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

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

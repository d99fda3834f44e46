"""What the machine offers a run: threads, device, precision.

bfloat16 autocast is taken where the processor multiplies it in hardware; on other CPUs it is slower than float32.
"""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from formary.errors import FormaryError
from formary.infer.precision import autocast, fast_precision
from formary.recipe.schema import Machine


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes."""

    device: torch.device
    precision: str
    threads: int

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        return autocast(self.precision, self.device)


def runtime(machine: Machine) -> Runtime:
    """Settle the recipe's `machine` section on this machine and set torch's thread count.

    Raises:
        FormaryError: cuda was asked for and is not there.
    """
    threads = machine.threads or physical_cores()
    torch.set_num_threads(threads)
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise FormaryError("machine.device: cuda was asked for, but this torch sees no CUDA device; use device: auto")
    kind = "cuda" if machine.device != "cpu" and torch.cuda.is_available() else "cpu"
    precision = fast_precision(kind) if machine.precision == "auto" else machine.precision
    return Runtime(device=torch.device(kind), precision=precision, threads=threads)


def physical_cores() -> int:
    """Cores this process may use; hyper-threads do not count."""
    allowed = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed or 1))


def cpu_name() -> str:
    """The processor as it calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

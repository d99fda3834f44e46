"""What the machine offers a run: threads, device, precision.

bfloat16 autocast is taken where the processor multiplies it in hardware; on other CPUs it is slower than float32.
"""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from formary.errors import FormaryError
from formary.infer.precision import autocast, fast_precision
from formary.recipe.schema import Machine
from formary.train.processes import ALONE, Processes, here


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes."""

    device: torch.device
    precision: str
    threads: int
    processes: Processes = ALONE  # this one among those of the run
    parallel: str = "auto"  # how a training lies over them: auto, ddp, fsdp or none

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        return autocast(self.precision, self.device)


def runtime(machine: Machine) -> Runtime:
    """Settle the recipe's `machine` section on this machine and set torch's thread count.

    Raises:
        FormaryError: cuda was asked for and is not there, or there are more processes than GPUs.
    """
    processes = here()
    threads = machine.threads or max(1, physical_cores() // processes.local_count)
    torch.set_num_threads(threads)
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise FormaryError("machine.device: cuda was asked for, but this torch sees no CUDA device; use device: auto")
    if machine.deterministic:
        _be_deterministic()
    kind = "cuda" if machine.device != "cpu" and torch.cuda.is_available() else "cpu"
    precision = fast_precision(kind) if machine.precision == "auto" else machine.precision
    device = torch.device(kind)
    if kind == "cuda" and processes.count > 1:
        if processes.local_count > torch.cuda.device_count():
            raise FormaryError(
                f"{processes.local_count} processes and {torch.cuda.device_count()} GPUs: start one process for each GPU, or "
                "let them run on the processor with --set machine.device=cpu"
            )
        device = torch.device(kind, processes.local_rank)
        torch.cuda.set_device(device)
    return Runtime(device, precision, threads, processes, machine.parallel)


def _be_deterministic() -> None:
    """Let torch take only algorithms that give the same bits every time, in this process from now on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


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

"""In which precision forward passes compute: bfloat16 where the processor multiplies it in hardware, else float32.

Weights stay in float32; autocast turns them once for all passes inside one `autocast` block.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from formary.errors import RequestError

PRECISIONS = ("auto", "float32", "bfloat16")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which forward passes run.

    Args:
        precision: "auto" (see `fast_precision`), "float32" or "bfloat16".

    Raises:
        RequestError: another precision.
    """
    if precision not in PRECISIONS:
        raise RequestError(f"precision: {precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        precision = fast_precision(device.type)
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def fast_precision(kind: str) -> str:
    """The faster of bfloat16 and float32 on a kind of device; on CPUs without its products bfloat16 is slower."""
    fast = torch.cuda.is_bf16_supported() if kind == "cuda" else cpu_multiplies_bfloat16()
    return "bfloat16" if fast else "float32"


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has bfloat16 products in hardware (AVX-512 BF16, AMX, Arm BF16)."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags())


def cpu_flags() -> set[str]:
    """What the processor can do, as Linux lists it; empty on other systems."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.lower().startswith(("flags", "features")):
            return set(line.split(":", 1)[1].split())
    return set()

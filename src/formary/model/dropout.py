"""Dropout: while training, numbers are set to zero by chance and the others grow, so that none is relied on alone.

(Srivastava et al. 2014.) On a CPU torch draws for each number by itself; here four share one 64-bit draw, which is
several times as fast. Chances are multiples of 1/65,536.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HALF = 2**15  # 16-bit numbers lie in [-_HALF, _HALF)


def dropout(vectors: Tensor, share: float) -> Tensor:
    """`vectors` with about `share` of their numbers set to zero and the others divided by 1 - share."""
    if not share:
        return vectors
    if vectors.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(vectors, share)
    draws = torch.empty(-(-vectors.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: vectors.numel()].view(vectors.shape) >= round(2 * _HALF * share) - _HALF
    return vectors * kept.to(vectors.dtype).mul_(1 / (1 - share))


class Dropout(nn.Module):
    """`dropout` while training, nothing otherwise."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, vectors: Tensor) -> Tensor:
        return dropout(vectors, self.share) if self.training else vectors

"""Norms: keep the numbers that flow through a stack at one scale.

RMSNorm has its gradient written out here: torch's own takes many passes over memory on a CPU, and a small model
spends more time on them than on attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formary.model.config import TransformerConfig


def make_norm(config: TransformerConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the width."""
    if config.norm == "rms":
        return RMSNorm(config.width, eps=config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, vectors: Tensor) -> Tensor:
        return rms_norm(vectors, self.weight, self.eps)


def rms_norm(vectors: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`vectors` (..., width) brought to root mean square 1, times `weight` (width,)."""
    if torch.is_grad_enabled() and vectors.dtype == weight.dtype and not torch.compiler.is_compiling():
        normed: Tensor = _RMSNorm.apply(vectors, weight, eps)  # type: ignore[no-untyped-call]
        return normed
    return F.rms_norm(vectors, weight.shape, weight.to(vectors.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm is LayerNorm about a mean of zero; only the gradient's own mean, which LayerNorm removes, comes back."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = vectors.shape[-1]
        scale = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(vectors, weight, scale)
        return (vectors * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        vectors, weight, scale = ctx.saved_tensors
        gradient = outputs[0].contiguous()
        of_vectors, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient,
            vectors.contiguous(),
            weight.shape,
            torch.zeros_like(scale),
            scale,
            weight,
            None,
            [True, True, False],
        )
        of_vectors.addcmul_(scale, (gradient @ weight).unsqueeze(-1), value=1 / weight.shape[0])
        return of_vectors, of_weight, None

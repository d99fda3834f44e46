"""Norms: keep the numbers that flow through a stack at one scale.

RMSNorm has its gradient written out here: torch's own takes many passes over memory on a CPU, and a small model
spends more time on them than on attention.
"""

from __future__ import annotations

from typing import Any, Literal

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


class InstanceNorm(nn.Module):
    """Each series measured from its own level in its own unit, and its forecast brought back (Kim et al. 2022, eq. 2-3).

    The level is the mean of what is known of the series, or its last known value, of which a series without a fixed level
    is best measured; the unit is the standard deviation around the mean.
    """

    EPS = 1e-3  # of the variance, which is about 1 over a whole series: a stretch that stands still is not blown up

    def __init__(self, level: Literal["mean", "last"]) -> None:
        super().__init__()
        self.level = level
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The level and the unit (batch, 1) of values (batch, steps), NaN where unknown; 0 and about 0 where all are."""
        given = ~values.isnan()
        known = torch.where(given, values, 0.0)
        count = given.sum(dim=1, keepdim=True).clamp(min=1)
        mean = known.sum(dim=1, keepdim=True) / count
        variance = torch.where(given, (known - mean) ** 2, 0.0).sum(dim=1, keepdim=True) / count
        unit = (variance + self.EPS).sqrt()
        if self.level == "mean":
            return mean, unit
        last = (given * torch.arange(values.shape[1], device=values.device)).argmax(dim=1, keepdim=True)
        return known.gather(1, last), unit

    def forward(self, values: Tensor, level: Tensor, unit: Tensor) -> Tensor:
        return (values - level) / unit * self.weight + self.bias

    def inverse(self, values: Tensor, level: Tensor, unit: Tensor) -> Tensor:
        """What `forward` made such numbers of."""
        return (values - self.bias) / (self.weight + self.EPS**2) * unit + level


def rms_norm(vectors: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`vectors` (..., width) brought to root mean square 1, times `weight` (width,)."""
    if torch.is_grad_enabled() and weight.dtype.itemsize >= 4 and not torch.compiler.is_compiling():
        normed: Tensor = _RMSNorm.apply(vectors, weight, eps)  # type: ignore[no-untyped-call]
        return normed
    return F.rms_norm(vectors, weight.shape, weight.to(vectors.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm is LayerNorm about a mean of zero; only the gradient's own mean, which LayerNorm removes, comes back.

    It is computed in the weight's precision and comes back in that of the vectors.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, weight: Tensor, eps: float) -> Tensor:
        width, whole = vectors.shape[-1], vectors.to(weight.dtype)
        scale = torch.linalg.vector_norm(whole, dim=-1, keepdim=True).square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(vectors, weight, scale)
        return (whole * scale).mul_(weight).to(vectors.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        vectors, weight, scale = ctx.saved_tensors
        gradient = outputs[0].to(weight.dtype).contiguous()
        of_vectors, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient,
            vectors.to(weight.dtype).contiguous(),
            weight.shape,
            torch.zeros_like(scale),
            scale,
            weight,
            None,
            [True, True, False],
        )
        of_vectors.addcmul_(scale, (gradient @ weight).unsqueeze(-1), value=1 / weight.shape[0])
        return of_vectors.to(vectors.dtype), of_weight, None

"""RMSNorm's written-out gradient against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from formary.model.norms import rms_norm

EPS = 1e-6


def heads(dtype: torch.dtype) -> Tensor:
    """(batch, heads, seq, head_width) as attention takes queries out of one product: not contiguous."""
    whole = torch.randn(2, 5, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return whole.to(dtype)[:, :, 3:6].transpose(1, 2)


def with_gradients(norm: object, vectors: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    vectors, weight = vectors.detach().requires_grad_(), weight.detach().requires_grad_()
    normed = norm(vectors, weight)  # type: ignore[operator]
    (normed.double() * torch.linspace(-1, 2, normed.numel(), dtype=torch.float64).view(normed.shape)).sum().backward()
    assert vectors.grad is not None and weight.grad is not None
    assert normed.dtype == vectors.grad.dtype == vectors.dtype and weight.grad.dtype == weight.dtype
    return normed.detach().double(), vectors.grad.double(), weight.grad.double()


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "close"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.01),  # as autocast calls it: a bfloat16 has eight bits
    ],
)
def test_values_and_gradients_are_those_of_torch(dtype: torch.dtype, weight_dtype: torch.dtype, close: float) -> None:
    vectors, weight = heads(dtype), torch.linspace(0.5, 2, 8, dtype=weight_dtype)
    found = with_gradients(lambda x, w: rms_norm(x, w, EPS), vectors, weight)
    true = with_gradients(lambda x, w: F.rms_norm(x, (8,), w, EPS), vectors.double(), weight.double())
    for one, other in zip(found, true):
        assert (one - other).abs().max() <= close * other.abs().max()


def test_in_bfloat16_the_weights_gradient_is_summed_in_full_precision() -> None:
    vectors = torch.randn(4_000, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = torch.ones(8)
    _, _, found = with_gradients(lambda x, w: rms_norm(x, w, EPS), vectors, weight)
    _, _, true = with_gradients(lambda x, w: F.rms_norm(x, (8,), w, EPS), vectors.double(), weight.double())
    assert (found - true).abs().max() <= 0.005 * true.abs().max()

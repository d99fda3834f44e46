"""Cross-entropy over a large vocabulary without ever holding all its logits.

Logits for all positions at once are the largest tensor of a small model, and moving them through memory costs more
than computing them. Here a few hundred positions at a time go from hidden state to loss to gradient while in cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formary.model.heads import LanguageHead

IGNORED = -100
_TINY = 1e-37  # a likelihood below this counts as this: 85 nats
_CHUNK_LOGITS = 1 << 23  # logits held at a time: 16 MB in float32; fewer, and the products of matrices slow down


def cross_entropy(
    head: LanguageHead, hidden: Tensor, targets: Tensor, *, smoothing: float = 0.0, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood in nats, and how many targets were scored.

    Args:
        hidden: (batch, seq, width), before the head.
        targets: token ids (batch, seq); `IGNORED` where nothing is predicted, and no logits are computed there.
        smoothing: share of the target's probability spread over the vocabulary (Szegedy et al. 2016, section 7).
        weight: in place of the head's matrix (vocab_size, width): another, or its first rows where only those compete.
    """
    scored = targets != IGNORED
    count = scored.sum()
    matrix = head.weight if weight is None else weight
    bias = head.bias if head.bias is None or len(head.bias) == len(matrix) else head.bias[: len(matrix)]
    if (
        weight is None and head._forward_hooks and torch.is_grad_enabled()
    ):  # who watches the head is to see whole rows go through it
        logits = head(hidden).float().flatten(0, -2)
        loss = F.cross_entropy(
            logits, targets.flatten(), ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum"
        )
        return loss, count
    hidden = hidden[scored] if not bool(scored.all()) else hidden.flatten(0, -2)
    loss = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        head.prepare(hidden), matrix, bias, targets[scored], smoothing, head.cap
    )
    return loss, count


@torch.no_grad()
def token_losses(head: LanguageHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each target, (batch, seq); 0 where `IGNORED`."""
    losses = torch.zeros(targets.shape, device=targets.device)
    scored = targets != IGNORED
    rows, wanted = head.prepare(hidden[scored]), targets[scored]
    pieces = [
        F.cross_entropy(head.capped(F.linear(part, head.weight, head.bias).float()), target, reduction="none")
        for part, target in zip(torch.split(rows, _rows(head.weight)), torch.split(wanted, _rows(head.weight)))
    ]
    if pieces:
        losses[scored] = torch.cat(pieces)
    return losses


def _rows(weight: Tensor) -> int:
    return max(64, _CHUNK_LOGITS // weight.shape[0])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient is made in the forward pass, while the logits are at hand: softmax minus one-hot."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        smoothing: float,
        cap: float | None,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight if dtype is None else weight.to(dtype)
            inputs = hidden.to(matrix.dtype)
            needs_gradient = any(ctx.needs_input_grad[:3])
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            hidden_gradient = torch.empty_like(inputs) if needs_gradient else None
            weight_gradient = torch.zeros_like(weight) if needs_gradient else None
            bias_gradient = torch.zeros_like(bias) if needs_gradient and bias is not None else None
            rows = _rows(weight)
            for start in range(0, len(inputs), rows):
                part, target = inputs[start : start + rows], targets[start : start + rows, None]
                logits = F.linear(part, matrix).float()
                if bias is not None:
                    logits += bias
                if cap is not None:
                    logits = logits.div_(cap).tanh_().mul_(cap)
                # One fused pass gives the gradient's softmax; the loss is read off it at the targets.
                gradient = logits.softmax(dim=1)
                log_likely = gradient.gather(1, target).clamp_min_(_TINY).log_()
                total -= log_likely.sum()
                if smoothing:
                    total += smoothing * (logits.gather(1, target) - logits.mean(dim=1, keepdim=True)).sum()
                if hidden_gradient is None or weight_gradient is None:
                    continue
                if smoothing:
                    gradient -= smoothing / weight.shape[0]
                gradient.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=gradient.dtype))
                if cap is not None:  # of cap x tanh(x / cap): 1 - tanh^2
                    gradient -= gradient * (logits / cap).square_()
                if bias_gradient is not None:
                    bias_gradient += gradient.sum(dim=0)
                gradient = gradient.to(matrix.dtype)
                torch.mm(gradient, matrix, out=hidden_gradient[start : start + rows])
                if matrix.dtype == weight_gradient.dtype:
                    weight_gradient.addmm_(gradient.t(), part)
                else:
                    weight_gradient += gradient.t() @ part
            ctx.hidden_dtype = hidden.dtype
            ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        scale = outputs[0]
        return (
            hidden.to(ctx.hidden_dtype) * scale,
            weight * scale,
            None if bias is None else bias * scale,
            None,
            None,
            None,
        )

"""One Transformer block: attention, then a feed-forward network, each with a norm and a residual path.

Pre-norm keeps the residual path clean (GPT-2, Llama); post-norm normalises after each addition (BERT, BART).
The stack of blocks is in `transformer`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from formary.model.attention import Attention, Cache
from formary.model.config import TransformerConfig
from formary.model.dropout import Dropout
from formary.model.norms import make_norm


class FeedForward(nn.Module):
    """Position-wise network: out(act(in(x))), or gated out(act(gate(x)) * in(x)) (Shazeer 2020).

    The gated form keeps gate and input in one fused projection, gate first.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.gated
        self.activation = config.activation
        self.input = nn.Linear(config.width, config.ffn_inner * (2 if config.gated else 1), bias=config.bias)
        self.output = nn.Linear(config.ffn_inner, config.width, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.input(hidden)
        if self.gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = activate(gate, self.activation) * inner
        else:
            inner = activate(inner, self.activation)
        return self.output(inner)


class Block(nn.Module):
    """Self-attention, cross-attention where the config asks for it, feed-forward; each as a residual step."""

    recompute = False  # whether the backward pass computes again what is inside (Chen et al. 2016)

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.pre = config.norm_position == "pre"
        self.dropout = Dropout(config.dropout)
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        if config.cross_attention:
            self.cross_norm = make_norm(config)
            self.cross = Attention(config, layer, cross=True)
        self.has_cross = config.cross_attention
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)

    def forward(self, hidden: Tensor, **context: Any) -> Tensor:
        """(batch, seq, width) to the same; the arguments are those of `_through`."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._through, hidden, use_reentrant=False, **context)
        return self._through(hidden, **context)

    def _through(
        self,
        hidden: Tensor,  # (batch, seq, width)
        *,
        mask: Tensor | None,
        causal: bool,
        rotation: tuple[Tensor, Tensor] | None,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        cache: Cache | None,
        first_only: bool = False,
        values: Tensor | None = None,
    ) -> Tensor:
        entry = self.attention_norm(hidden) if self.pre else hidden
        change = self.attention(
            entry, mask=mask, causal=causal, rotation=rotation, cache=cache, first_only=first_only, embedded=values
        )
        hidden = hidden[:, :1] if first_only else hidden
        hidden = self._add(hidden, change, self.attention_norm)
        if self.has_cross:
            entry = self.cross_norm(hidden) if self.pre else hidden
            change = self.cross(entry, mask=memory_mask, causal=False, memory=memory, cache=cache)
            hidden = self._add(hidden, change, self.cross_norm)
        entry = self.ffn_norm(hidden) if self.pre else hidden
        return self._add(hidden, self.ffn(entry), self.ffn_norm)

    def _add(self, hidden: Tensor, change: Tensor, norm: nn.Module) -> Tensor:
        hidden = hidden + self.dropout(change)
        return hidden if self.pre else norm(hidden)


def activate(inner: Tensor, activation: str) -> Tensor:
    """The non-linearity of the feed-forward network, by its name in the config."""
    match activation:
        case "gelu":
            return F.gelu(inner)
        case "gelu_tanh":
            return F.gelu(inner, approximate="tanh")
        case "gelu_quick":  # an approximation by one sigmoid (Hendrycks and Gimpel 2016, section 2), CLIP's
            return inner * torch.sigmoid(1.702 * inner)
        case "silu":
            return F.silu(inner)
        case "relu":
            return F.relu(inner)
        case "relu2":
            return torch.square(F.relu(inner))
    raise ValueError(f"unknown activation {activation}")

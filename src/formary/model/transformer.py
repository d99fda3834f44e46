"""The Transformer: vectors in, hidden states out; a stack of blocks and what they share.

Shared by all blocks: the rotation of rotary positions, the relative bias, the masks, the last norm.
What the vectors mean (tokens, patches, items, windows of a series) is the embedders' business.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from formary.model.attention import Cache, RelativeBias, Rotary
from formary.model.block import Block
from formary.model.config import TransformerConfig
from formary.model.norms import make_norm


class Transformer(nn.Module):
    """A stack of `config.layers` blocks (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config) if config.final_norm else None
        self.between: nn.Parameter | None = None
        if config.layer_positions:
            self.between = nn.Parameter(torch.zeros(config.layers - 1, 1, config.context, config.width))
        self.rotary = Rotary(config) if config.position == "rope" else None
        self.relative_bias = RelativeBias(config) if config.position == "relative_bias" else None

    def forward(
        self,
        vectors: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
        first_only: bool = False,
        values: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Hidden states (batch, seq, width) for vectors (batch, seq, width).

        Args:
            positions: place of each vector in its sequence, (batch, seq) or (1, seq); 0..seq-1 when left out.
            mask: True where a query may attend, broadcastable to (batch, heads, seq, keys). When left out a causal
                stack sees the past and an encoder sees everything. With a cache, keys counts the cached ones.
            memory: the encoder's hidden states (batch, memory_seq, width), for cross-attention.
            memory_mask: True where memory may be attended, broadcastable to (batch, heads, seq, memory_seq).
            cache: keys and values of earlier positions; this call's are appended.
            first_only: give the first position alone, (batch, 1, width), and spare the last block the others.
            values: the tables' vectors that are added to values, each (batch, seq, kv_heads x head_width).
        """
        seq = vectors.shape[1]
        if positions is None:
            positions = torch.arange(seq, device=vectors.device)[None]
        rotation = self.rotary(positions) if self.rotary is not None else None
        if self.relative_bias is not None:
            mask = self._biased(mask, positions, keys=seq if mask is None else mask.shape[-1])
        causal = self.config.causal and mask is None and seq > 1
        hidden = vectors
        for layer, block in enumerate(self.blocks):
            table = self.config.value_table(layer)
            hidden = block(
                hidden,
                mask=mask,
                causal=causal,
                rotation=rotation,
                memory=memory,
                memory_mask=memory_mask,
                cache=cache,
                first_only=first_only and block is self.blocks[-1],
                values=None if table is None else values[table],
            )
            if self.between is not None and layer < len(self.between):
                hidden = hidden + self.between[layer]
        return self.norm(hidden) if self.norm is not None else hidden

    def _biased(self, mask: Tensor | None, positions: Tensor, *, keys: int) -> Tensor:
        """The relative bias as a float mask, minus infinity where attention is not allowed."""
        assert self.relative_bias is not None
        bias: Tensor = self.relative_bias(positions, keys)
        if mask is None and self.config.causal:
            mask = causal_mask(positions, keys)
        return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def causal_mask(positions: Tensor, keys: int) -> Tensor:
    """True where the query at `positions` (batch, seq) may see key 0..keys-1: (batch, 1, seq, keys)."""
    return (torch.arange(keys, device=positions.device) <= positions[:, :, None]).unsqueeze(1)


def document_mask(documents: Tensor, *, causal: bool) -> Tensor:
    """True where query and key belong to the same document (batch, seq) -> (batch, 1, seq, seq)."""
    same = documents[:, :, None] == documents[:, None, :]
    return (same.tril() if causal else same).unsqueeze(1)

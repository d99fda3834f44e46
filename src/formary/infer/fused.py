"""A decoder's forward pass in few operations, for networks in 8 bits: a small model's token costs little else.

The arithmetic is `model.transformer`'s, written around `kernels.sums_of`: scales are multiplied in where something is
multiplied anyway, and attention is three products of one shape for every row. It reads and fills the engine's cache.
Attention asks with at least four queries a head, as a product of fewer rows adds in another order: so a position's bits
do not depend on what is read beside it.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor

from formary.infer.cache import KVCache, rounded
from formary.infer.kernels import Int8Linear, product, sums_of
from formary.model.block import Block, activate
from formary.model.norms import RMSNorm
from formary.model.topologies import Decoder, Network

_QUERIES = 4
_PIECE = 128  # positions of a long text that ask together, so that no product reads keys that none of them may see


def fits(network: Network) -> TypeGuard[Decoder]:
    """Whether `FusedDecoder` can take the place of a network's forward pass."""
    return (
        isinstance(network, Decoder)
        and network.config.transformer.norm_position == "pre"
        and network.config.transformer.position != "relative_bias"
        and not network.config.transformer.cross_attention
        and any(isinstance(module, Int8Linear) for module in network.modules())
    )


class FusedDecoder:
    """Hidden states of a `Decoder` in 8 bits; called as the network is, always with a cache."""

    def __init__(self, network: Decoder, cache: KVCache) -> None:
        self.network = network
        self.cache = cache
        config = network.config.transformer
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_head_count, config.q_head_width
        self.group = self.heads // self.kv_heads
        scale = config.attention_scale
        self.scale = self.head_width**-0.5 if scale is None else scale
        self.blocks = [_FusedBlock(block) for block in network.transformer.blocks if isinstance(block, Block)]
        self._seen: tuple[tuple[int, int, int], list[tuple[Tensor, Tensor]]] = ((0, 0, 0), [])

    def __call__(self, tokens: Tensor, *, positions: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """Hidden states (rows, seq, width) for token ids (rows, seq); positions and mask as `cache.begin` gave them."""
        rows, seq = tokens.shape
        network, heads, turned = self.network, self.heads, self.heads + self.kv_heads
        assert mask is not None and cache is self.cache, "this cache always rounds, and so always masks"
        hidden = network.embedder(tokens, positions=positions).view(rows * seq, -1)
        pieces = self._pieces(mask, rows, seq)
        queries = hidden.new_zeros(rows * self.kv_heads, _QUERIES, self.head_width)
        rotation = self._rotation(positions)
        for layer, (block, (keys, values)) in enumerate(zip(self.blocks, self._views())):
            projected = block.projected(hidden)
            qkv = projected.view(rows, seq, turned + self.kv_heads, self.head_width)
            if block.query_norm is not None and block.key_norm is not None:
                qkv[:, :, :heads] = block.query_norm(qkv[:, :, :heads])
                qkv[:, :, heads:turned] = block.key_norm(qkv[:, :, heads:turned])
            if rotation is not None:
                turning = qkv[:, :, :turned].view(rows, seq, turned, 2, -1)
                swapped = turning.flip(3)
                turning.mul_(rotation[0]).addcmul_(swapped, rotation[1])
            by_head = qkv.transpose(1, 2)
            cache.store(layer, by_head[:, heads:turned], by_head[:, turned:])
            attended = [
                self._attended(by_head[:, :heads, start:stop], keys[:, :, :end], values[:, :end], bias, queries)
                for start, stop, end, bias in pieces
            ]
            hidden = block.followed(hidden, attended[0] if len(pieces) == 1 else torch.cat(attended, dim=1))
        if network.transformer.norm is not None:
            hidden = network.transformer.norm(hidden)
        return hidden.view(rows, seq, -1)

    def _views(self) -> list[tuple[Tensor, Tensor]]:
        """Of each layer the keys (rows x kv_heads, head_width, keys) and values (rows x kv_heads, keys, head_width)."""
        start, stop, end = self.cache.extent
        if self._seen[0] != (start, stop, end):
            views = [
                (keys[start:stop, :, :end].flatten(0, 1).mT, values[start:stop, :, :end].flatten(0, 1))
                for keys, values in zip(self.cache.keys, self.cache.values)
            ]
            self._seen = ((start, stop, end), views)
        return self._seen[1]

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines (rows or 1, seq, 1, 1, head_width / 2), and sines with their signs (rows or 1, seq, 1, 2, ...)."""
        rotary = self.network.transformer.rotary
        if rotary is None:
            return None
        cosines, sines = (table.transpose(1, 2).unsqueeze(3) for table in rotary(positions))
        return cosines, torch.cat([-sines, sines], dim=3)

    def _attended(self, asked: Tensor, keys: Tensor, values: Tensor, bias: Tensor, padded: Tensor) -> Tensor:
        """What (rows, heads, seq, head_width) queries gather: (rows, seq, heads x head_width)."""
        rows, heads, seq, width = asked.shape
        count = self.group * seq
        asked = asked.reshape(rows * self.kv_heads, count, width)
        if count < _QUERIES:
            padded[:, :count] = asked
            asked = padded
        weights = torch.softmax(torch.baddbmm(bias, asked, keys, alpha=self.scale), dim=-1)
        gathered = torch.bmm(weights, values)[:, :count]
        if seq > 1:
            gathered = gathered.reshape(rows, heads, seq, width).transpose(1, 2)
        return gathered.reshape(rows, seq, heads * width)

    def _pieces(self, mask: Tensor, rows: int, seq: int) -> list[tuple[int, int, int, Tensor]]:
        """Positions that ask together: first, last + 1, how many keys they may see, and the bias on their scores."""
        start, stop, end = self.cache.extent
        longest = max(self.cache.lengths[start:stop])
        found = []
        for first in range(0, seq, _PIECE):
            last = min(first + _PIECE, seq)
            seen = min(rounded(longest + last), end)
            found.append((first, last, seen, self._bias(mask[:, :, first:last, :seen], rows, last - first)))
        return found

    def _bias(self, mask: Tensor, rows: int, seq: int) -> Tensor:
        """The mask as numbers to add to the scores, (rows x kv_heads, queries, keys), or (1, 1, keys) where that does."""
        keys = mask.shape[-1]
        bias = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)  # (rows or 1, 1, seq, keys)
        if seq == 1 and len(bias) == 1:
            return bias.view(1, 1, keys)
        asked = self.group * seq
        bias = bias[:, :, None].expand(rows, self.kv_heads, self.group, seq, keys).reshape(-1, asked, keys)
        if asked < _QUERIES:  # padding asks too; what it gathers is dropped
            bias = torch.cat([bias, bias[:, :1].expand(-1, _QUERIES - asked, -1)], dim=1)
        return bias


class _FusedBlock:
    """The weights of one block, as its step uses them."""

    def __init__(self, block: Block) -> None:
        attention, ffn = block.attention, block.ffn
        self.attention_norm, self.ffn_norm = _FusedNorm(block.attention_norm), _FusedNorm(block.ffn_norm)
        self.query_norm, self.key_norm = attention.query_norm, attention.key_norm
        self.qkv, self.output = _int8(attention.qkv), _int8(attention.output)
        self.input, self.back = _int8(ffn.input), _int8(ffn.output)
        self.gated, self.activation, self.inner = ffn.gated, ffn.activation, self.back.in_features

    def projected(self, hidden: Tensor) -> Tensor:
        """Queries, keys and values side by side, (rows, (heads + 2 kv_heads) x head_width)."""
        return self.attention_norm.then(hidden, self.qkv)

    def followed(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block after attention, with both residual paths; attended is (rows, seq, heads x head_width)."""
        hidden = self._added(hidden, attended.reshape(len(hidden), -1), self.output)
        inner = self.ffn_norm.then(hidden, self.input)
        if self.gated:
            gate, rest = inner[:, : self.inner], inner[:, self.inner :]
            inner = activate(gate, self.activation).mul_(rest)
        else:
            inner = activate(inner, self.activation)
        return self._added(hidden, inner, self.back)

    @staticmethod
    def _added(hidden: Tensor, vectors: Tensor, linear: Int8Linear) -> Tensor:
        """hidden + linear(vectors)."""
        hidden = torch.addcmul(hidden, *sums_of(vectors, linear.packed))
        return hidden if linear.bias is None else hidden.add_(linear.bias)


class _FusedNorm:
    """A norm and the product after it; an RMSNorm's division waits until the product's own scale is multiplied in."""

    def __init__(self, norm: torch.nn.Module) -> None:
        self.norm = norm
        self.scale: Tensor | None = None
        if isinstance(norm, RMSNorm):
            width = len(norm.weight)
            self.scale = norm.weight.detach() * math.sqrt(width)
            self.floor = torch.tensor(math.sqrt(width * norm.eps))

    def then(self, hidden: Tensor, linear: Int8Linear) -> Tensor:
        """linear(norm(hidden)): (rows, width) -> (rows, out)."""
        if self.scale is None:
            out = product(self.norm(hidden), linear.packed)
        else:
            sums, largest = sums_of(hidden * self.scale, linear.packed)
            length = torch.linalg.vector_norm(hidden, 2, -1, True)
            out = sums.mul_(largest.div_(torch.hypot(length, self.floor)))
        return out if linear.bias is None else out.add_(linear.bias)


def _int8(module: torch.nn.Module) -> Int8Linear:
    assert isinstance(module, Int8Linear)
    return module

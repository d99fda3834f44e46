"""What a stack in 8 bits computes between its products: into attention and the network, attention, the activation.

Each is plain torch over positions that do not see each other, except through attention: it runs as it is, and
`compiled` makes native code of it once for each shape of model. Weights are arguments, so all layers share that code.

A product takes `digits`, one or two bytes of what is left after a position is divided by its `unit`, and gives `sums`:
both are (digits x positions, ...), all first digits first, the unit is (positions, 1), and sums x unit is what the layer gives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from formary.model.block import activate
from formary.model.config import TransformerConfig
from formary.model.norms import RMSNorm

Entry = tuple[int, bool]
"""How a product is entered: digits for a number, and whether `digits_of` is given a split."""
QUERIES = 4
"""Least queries that a head asks with: a product of fewer rows adds in another order than one of many."""


def add(vectors: Tensor, sums: Tensor, unit: Tensor, bias: Tensor | None, limit: int) -> Tensor:
    """vectors + what a product gave, (positions, width)."""
    added = torch.addcmul(vectors, whole(sums.view(-1, *vectors.shape), limit), unit)
    return added if bias is None else added + bias


def whole(sums: Tensor, limit: int) -> Tensor:
    """The sums of one or two digits (digits, ...) as one number: (...)."""
    return sums[0] if len(sums) == 1 else torch.add(sums[0], sums[1], alpha=0.5 / limit)


def digits_of(vectors: Tensor, count: int, limit: int, split: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """Digits (count x positions, width + extra) of vectors (positions, width), and their unit (positions, 1).

    A position of zeros has the unit 0: its digits mean nothing, and times 0 they are 0.

    Args:
        split: columns that are shared out to several, so that few large ones do not make all others coarse: into how many
            each is (width,); which ones the extra columns belong to (extra,), as which share (extra,), of how many
            (extra,). The shares of a number add up to it exactly. Only with one digit.
    """
    if not split:
        unit = vectors.abs().amax(-1, True) / limit
        scaled = vectors / unit
        if count == 1:
            return scaled, unit
        first = torch.round(scaled)
        return torch.cat([first, (scaled - first) * (2 * limit)]), unit
    shares, columns, places, of = split
    unit = (vectors.abs() / shares).amax(-1, True) / limit
    rounded = torch.round(vectors / unit)
    extra = torch.floor((rounded[:, columns] + places) / of)
    return torch.cat([torch.floor(rounded / shares), extra], dim=1), unit


class Enter(nn.Module):
    """The residual addition and the norm before a product; an RMSNorm's division is left to the unit.

    Where norms stand after the addition (post), the vectors that go on are the normed ones.
    """

    def __init__(self, config: TransformerConfig, *, added: int, into: Entry, limit: int) -> None:
        super().__init__()
        self.post = config.norm_position == "post"
        self.norm, self.eps, self.width = config.norm, config.norm_eps, config.width
        self.added, self.count, self.split, self.limit, self.bias = added, *into, limit, config.bias
        self.spread = False

    def weights(self, norm: nn.Module, bias: Tensor | None, split: Sequence[Tensor]) -> list[Tensor]:
        """What `forward` is given of a layer: its norm, the bias of the product whose sums are added, `digits_of`'s split."""
        if isinstance(norm, RMSNorm):
            given = [norm.weight.detach() * math.sqrt(self.width)]
        else:
            assert isinstance(norm, nn.LayerNorm)
            given = [norm.weight.detach(), norm.bias.detach()]
        if self.bias:
            given.append(torch.zeros(self.width) if bias is None else bias)
        return [*given, *split]

    def forward(self, hidden: Tensor, sums: Tensor, unit: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(positions, width), sums of what is added -> the new hidden vectors, digits of their norm, the unit."""
        norm, left = (weights[:1], weights[1:]) if self.norm == "rms" else (weights[:2], weights[2:])
        bias, split = (left[0], left[1:]) if self.bias else (None, left)
        hidden = add(hidden, sums, unit, bias, self.limit)
        if self.norm == "rms" and not self.post:
            digits, unit = digits_of(hidden * norm[0], self.count, self.limit, split)
            floor = math.sqrt(self.width * self.eps)
            length = hidden.square().sum(-1, True).sqrt()
            return hidden, digits, unit / torch.hypot(length, torch.full_like(length, floor))
        if self.norm == "rms":
            normed = hidden * norm[0] / (hidden.square().sum(-1, True) + self.width * self.eps).sqrt()
        else:
            normed = torch.nn.functional.layer_norm(hidden, (self.width,), norm[0], norm[1], self.eps)
        return normed if self.post else hidden, *digits_of(normed, self.count, self.limit, split)


class Attend(nn.Module):
    """Attention between its two products, keeping the new keys and values in the cache."""

    def __init__(self, config: TransformerConfig, *, given: int, into: Entry, limit: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_head_count, config.q_head_width
        self.group = self.heads // self.kv_heads
        self.surplus = max(0, QUERIES - self.group)
        self.scale = self.head_width**-0.5 if config.attention_scale is None else config.attention_scale
        self.bias, self.eps = bool(config.qkv_bias), config.norm_eps if config.qk_norm else None
        self.turns = config.position == "rope"
        self.given, self.count, self.split, self.limit = given, *into, limit
        self.spread = False

    def forward(
        self,
        sums: Tensor,  # (digits, rows, seq, (heads + 2 kv_heads) x head_width)
        unit: Tensor,  # (rows, seq, 1)
        keys: Tensor,  # (slots from the first row on, kv_heads, capacity, head_width), as are the values
        values: Tensor,
        places: Tensor,  # (rows, seq, kv_heads): where new keys go, in keys seen as (all, head_width)
        bias: Tensor,  # (rows, queries, keys), 0 where a query may look, else -infinity; `bias_of` makes it
        *more: Tensor,  # cosines, sines (rows, seq, 1, head_width / 2); the bias; the norms of queries and keys; the split
    ) -> tuple[Tensor, Tensor]:
        """Digits (count x rows x seq, heads x head_width) of what each position gathers, and their unit."""
        _, rows, seq, _ = sums.shape
        length, width, kv = bias.shape[-1], self.head_width, self.kv_heads
        turned = self.heads + kv
        left = list(more)
        cosines, sines = (left.pop(0), left.pop(0)) if self.turns else (None, None)
        projected = whole(sums, self.limit) * unit
        if self.bias:
            projected = projected + left.pop(0)
        heads = projected.view(rows, seq, turned + kv, width)
        asking, answering = heads[:, :, : self.heads], heads[:, :, self.heads : turned]
        if self.eps is not None:
            asking, answering = (
                torch.nn.functional.rms_norm(part, (width,), left.pop(0), self.eps) for part in (asking, answering)
            )
        if cosines is not None and sines is not None:
            asking, answering = _turned(asking, cosines, sines), _turned(answering, cosines, sines)
        flat = places.flatten()
        keys.view(-1, width).index_copy_(0, flat, answering.reshape(-1, width))
        values.view(-1, width).index_copy_(0, flat, heads[:, :, turned:].reshape(-1, width))
        # The queries of the heads that share keys stand together, and a few more of zeros: see `bias_of`.
        asking = (asking * self.scale).view(rows, seq, kv, self.group, width).permute(0, 2, 3, 1, 4)
        asking = asking.reshape(rows * kv, self.group * seq, width)
        asking = torch.nn.functional.pad(asking, (0, 0, 0, self.surplus))
        scores = torch.bmm(asking, keys[:rows, :, :length].flatten(0, 1).mT).view(rows, kv, -1, length)
        weights = torch.softmax(scores + bias[:, None], dim=-1).view(rows * kv, -1, length)
        gathered = torch.bmm(weights, values[:rows, :, :length].flatten(0, 1))[:, : self.group * seq]
        gathered = gathered.view(rows, kv, self.group, seq, width).permute(0, 3, 1, 2, 4)
        return digits_of(gathered.reshape(rows * seq, self.heads * width), self.count, self.limit, left)

    def bias_of(self, mask: Tensor) -> Tensor:
        """What is added to the scores for a mask (rows, seq, keys): for all heads that share keys, and surplus queries."""
        rows, seq, length = mask.shape
        bias = torch.zeros(rows, self.group * seq + self.surplus, length)
        asked = bias[:, : self.group * seq].view(rows, self.group, seq, length)
        asked.masked_fill_(~mask[:, None], -math.inf)
        return bias


class Project(nn.Module):
    """Queries, keys and values as numbers, where attention itself is torch's: an encoder's, which has no cache."""

    def __init__(self, config: TransformerConfig, *, given: int, limit: int) -> None:
        super().__init__()
        self.width = (config.heads + 2 * config.kv_head_count) * config.q_head_width
        self.bias = bool(config.qkv_bias)
        self.given, self.limit = given, limit
        self.spread = False

    def forward(self, sums: Tensor, unit: Tensor, *bias: Tensor) -> tuple[Tensor]:
        """Sums (digits x positions, (heads + 2 kv_heads) x head_width) -> the same numbers without digits."""
        projected = whole(sums.view(self.given, -1, self.width), self.limit) * unit
        return (projected + bias[0] if self.bias else projected,)


class Round(nn.Module):
    """What attention gathered, as digits for the product after it."""

    def __init__(self, config: TransformerConfig, *, into: Entry, limit: int) -> None:
        super().__init__()
        self.width = config.heads * config.q_head_width
        self.count, self.split, self.limit = *into, limit
        self.spread = False

    def forward(self, gathered: Tensor, *split: Tensor) -> tuple[Tensor, Tensor]:
        """(positions, heads x head_width) -> digits (count x positions, ...), and their unit."""
        return digits_of(gathered, self.count, self.limit, split)


class Activate(nn.Module):
    """The activation between the two products of the feed-forward network."""

    def __init__(self, config: TransformerConfig, *, given: int, into: Entry, limit: int) -> None:
        super().__init__()
        self.activation, self.gated, self.bias = config.activation, config.gated, config.bias
        self.inner = config.ffn_inner
        self.given, self.count, self.split, self.limit = given, *into, limit
        self.spread = False

    def forward(self, sums: Tensor, unit: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        """Sums (digits x positions, inner or 2 x inner) -> digits (count x positions, inner), and their unit."""
        inner = whole(sums.view(self.given, -1, sums.shape[-1]), self.limit) * unit
        if self.bias:
            inner = inner + more[0]
        if self.gated:
            inner = activate(inner[:, : self.inner], self.activation) * inner[:, self.inner :]
        else:
            inner = activate(inner, self.activation)
        return digits_of(inner, self.count, self.limit, more[self.bias :])


Part = Enter | Attend | Project | Round | Activate


def spread(part: Part) -> Part:
    """The same part for many positions at once: compiled, it spreads them over threads; what it computes is the same."""
    wide = copy.copy(part)
    wide.spread = True
    return wide


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`model.attention.rotate` of heads (rows, seq, heads, head_width)."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)

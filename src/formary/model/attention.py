"""Attention: every position asks the others what they know (Vaswani et al. 2017, section 3.2).

Self- and cross-attention, grouped key-value heads, rotary positions, query-key norms: one class, few branches.
It does not own the cache of past keys and values; whoever generates passes one in.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formary.model.config import RopeScaling, TransformerConfig
from formary.model.dropout import dropout
from formary.model.norms import RMSNorm

_WRITTEN_OUT = 2**24  # scores of a layer, 32 MB, up to which attention is written out


class Cache(Protocol):
    """Keys and values of earlier positions, owned by the inference engine."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (batch, kv_heads, seq, head_width); return all to attend to."""
        ...

    def memory(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The projected encoder memory of this layer, when it was stored before."""
        ...

    def store_memory(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep the projected encoder memory of this layer for the next steps."""
        ...


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads (Ainslie et al. 2023).

    With `cross=False` queries, keys and values come from one fused projection of the same vectors; with
    `cross=True` queries come from the vectors and keys and values from the encoder's memory.
    """

    def __init__(self, config: TransformerConfig, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_head_count, config.q_head_width
        self.scale = config.attention_scale
        self.dropout = config.dropout
        self.layer = layer
        self.cross = cross
        q_width, kv_width = self.heads * self.head_width, self.kv_heads * self.head_width
        bias = bool(config.qkv_bias)
        if cross:
            self.query = nn.Linear(config.width, q_width, bias=bias)
            self.key_value = nn.Linear(config.width, 2 * kv_width, bias=bias)
        else:
            self.qkv = nn.Linear(config.width, q_width + 2 * kv_width, bias=bias)
        self.output = nn.Linear(q_width, config.width, bias=config.bias)
        self.query_norm = RMSNorm(self.head_width, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_width, eps=config.norm_eps) if config.qk_norm else None
        valued = config.value_table(layer) is not None and not cross
        self.value_mix = ValueMix() if valued else None

    def forward(
        self,
        hidden: Tensor,  # (batch, seq, width)
        *,
        mask: Tensor | None,  # broadcastable to (batch, heads, seq, keys): bool (True attends) or a float bias
        causal: bool,
        rotation: tuple[Tensor, Tensor] | None = None,  # cosines and sines, each (batch or 1, 1, seq, head_width / 2)
        memory: Tensor | None = None,  # (batch, memory_seq, width)
        cache: Cache | None = None,
        first_only: bool = False,  # let only the first position ask: (batch, 1, width) comes back
        embedded: Tensor | None = None,  # (batch, seq, kv_heads x head_width), mixed into the values
    ) -> Tensor:
        if self.cross:
            queries = self._split(self.query(hidden), self.heads)
            keys, values = self._memory(memory, cache)
        else:
            by_head = self.qkv(hidden).unflatten(-1, (-1, self.head_width))
            q, k, v = by_head.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
            if self.value_mix is not None:
                assert embedded is not None
                v = self.value_mix(v.flatten(2), embedded).view_as(v)
            queries, keys, values = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            if self.query_norm is not None and self.key_norm is not None:
                queries, keys = self.query_norm(queries), self.key_norm(keys)
            if rotation is not None:
                queries, keys = rotate(queries, rotation), rotate(keys, rotation)
            if cache is not None:
                keys, values = cache.append(self.layer, keys, values)
        if first_only:
            queries, mask = queries[:, :, :1], None if mask is None else mask[:, :, :1]
        dropped = self.dropout if self.training else 0.0
        causal = causal and mask is None
        if _slow_fused(queries, keys, causal=causal, dropped=dropped):
            attended = attend(queries, keys, values, mask=mask, causal=causal, scale=self.scale, dropped=dropped)
        else:
            attended = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropped,
                is_causal=causal,
                scale=self.scale,
                enable_gqa=self.kv_heads != self.heads,
            )
        return self.output(attended.transpose(1, 2).flatten(2))

    def _split(self, vectors: Tensor, heads: int) -> Tensor:
        """(batch, seq, heads x head_width) -> (batch, heads, seq, head_width)."""
        return vectors.view(vectors.shape[0], vectors.shape[1], heads, self.head_width).transpose(1, 2)

    def _memory(self, memory: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        stored = cache.memory(self.layer) if cache is not None else None
        if stored is not None:
            return stored
        assert memory is not None, "cross-attention needs the encoder's memory"
        k, v = self.key_value(memory).chunk(2, dim=-1)
        keys, values = self._split(k, self.kv_heads), self._split(v, self.kv_heads)
        if cache is not None:
            cache.store_memory(self.layer, keys, values)
        return keys, values


class ValueMix(nn.Module):
    """A learned share of the values and one of their embeddings (see `embedders.ValueEmbedder`)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, values: Tensor, embedded: Tensor) -> Tensor:
        """Both (batch, seq, kv_heads x head_width), and so is what comes back."""
        return self.weight[0] * values + self.weight[1] * embedded


def attend(
    queries: Tensor,  # (batch, heads, seq, head_width)
    keys: Tensor,  # (batch, kv_heads, keys, head_width), as are the values
    values: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropped: float,
) -> Tensor:
    """softmax(scale q k^T) v, written out (Vaswani et al. 2017, eq. 1), with the share `dropped` of the weights left out."""
    if (group := queries.shape[1] // keys.shape[1]) > 1:
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    if causal:
        mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=keys.device).tril()
    scores = (queries * (queries.shape[-1] ** -0.5 if scale is None else scale)) @ keys.mT
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    return dropout(scores.softmax(dim=-1), dropped) @ values


def _slow_fused(queries: Tensor, keys: Tensor, *, causal: bool, dropped: float) -> bool:
    """Whether torch's fused attention, or a gradient through it, would take longer than `attend`.

    On a CPU it has no dropout, and in bfloat16 its gradient takes about three times as long; it spares memory, so long
    sequences keep it where nothing is dropped.
    """
    if queries.device.type != "cpu" or dropped:
        return queries.device.type == "cpu"
    if causal or not queries.requires_grad or queries.dtype != torch.bfloat16:
        return False
    batch, heads, seq, _ = queries.shape
    return heads == keys.shape[1] and batch * heads * seq * keys.shape[2] <= _WRITTEN_OUT


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021): pair i of a head turns by position x theta^(-2i / head_width).

    The pairs are (first half, second half) of a head, as in the Hugging Face layout of Llama.
    """

    cosines: Tensor
    sines: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        exponents = torch.arange(0, config.q_head_width, 2, dtype=torch.float32) / config.q_head_width
        frequencies = config.rope_theta**-exponents
        if config.rope_scaling is not None:
            frequencies = _stretch(frequencies, config.rope_scaling)
        angles = torch.outer(
            torch.arange(config.context, dtype=torch.float32), frequencies
        )  # (context, head_width / 2)
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions (batch, seq), each (batch, 1, seq, head_width / 2)."""
        return self.cosines[positions].unsqueeze(1), self.sines[positions].unsqueeze(1)


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs of `heads` (batch, heads, seq, head_width) by the given angles (Su et al. 2021, eq. 34)."""
    cosines, sines = (table.to(heads.dtype) for table in rotation)
    if torch.compiler.is_compiling():  # which makes one pass of it, and cannot write into halves of a tensor
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    turned: Tensor = _Rotate.apply(heads, cosines, sines)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: two passes over memory where the general rule takes eight."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turn(heads, cosines, sines)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turn(outputs[0], cosines, -sines), None, None


def _turn(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    turned = torch.empty_like(heads)
    first, second = heads.chunk(2, dim=-1)
    into_first, into_second = turned.chunk(2, dim=-1)
    torch.mul(first, cosines, out=into_first).addcmul_(second, sines, value=-1)
    torch.mul(second, cosines, out=into_second).addcmul_(first, sines)
    return turned


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow down the low frequencies by `factor`, keep the high ones, blend between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    blend = ((scaling.original_context / wavelengths - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling.factor)


class RelativeBias(nn.Module):
    """T5's learned bias for each bucket of query-key distance and each head (Raffel et al. 2020, section 2.1)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.buckets = config.relative_buckets
        self.max_distance = config.relative_max_distance
        self.causal = config.causal
        self.weight = nn.Parameter(torch.zeros(config.relative_buckets, config.heads))

    def forward(self, positions: Tensor, keys: int) -> Tensor:
        """The bias (batch, heads, seq, keys) for query positions (batch, seq) and key positions 0..keys-1."""
        distance = torch.arange(keys, device=positions.device)[None, None, :] - positions[:, :, None]
        return self.weight[self._bucket(distance)].permute(0, 3, 1, 2)

    def _bucket(self, distance: Tensor) -> Tensor:
        """Near distances have a bucket each, far ones share them on a logarithmic scale."""
        buckets = self.buckets
        bucket = torch.zeros_like(distance)
        if not self.causal:
            buckets //= 2
            bucket = bucket + (distance > 0) * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        scale = (buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
        return bucket + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

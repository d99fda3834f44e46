"""A decoder's forward pass in few operations, for networks in 8 bits: a small model's token costs little else.

The arithmetic is `model.transformer`'s, written around the eight-bit products: what lies between two of them is one
call (`between`), native code where `compiled` has made some. It reads and fills the engine's cache, and a position's
bits do not depend on what is read beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from formary.infer import between, compiled
from formary.infer.cache import KVCache, rounded_exactly
from formary.infer.kernels import Int8Linear, blocks_of, entry_of, half_range, int8_of, multiply, products_of
from formary.model.block import Block
from formary.model.topologies import Decoder, Network

_PIECE = 128  # positions of a long text that ask together, so that no product reads keys that none of them may see

_MANY = 64  # positions from which the parts are spread over threads


def fits(network: Network) -> TypeGuard[Decoder]:
    """Whether `FusedDecoder` can take the place of a network's forward pass."""
    return (
        isinstance(network, Decoder)
        and network.config.transformer.norm_position == "pre"
        and network.config.transformer.position != "relative_bias"
        and not network.config.transformer.cross_attention
        and not network.config.transformer.value_embeddings
        and any(isinstance(module, Int8Linear) for module in network.modules())
    )


@dataclass(frozen=True)
class Parts:
    """What is computed between a decoder's products, one of each for all its layers."""

    enter_attention: between.Enter
    attend: between.Attend
    enter_ffn: between.Enter
    activate: between.Activate

    @property
    def all(self) -> list[between.Part]:
        """In the order in which a block calls them; then those for many positions in the same order."""
        few: list[between.Part] = [self.enter_attention, self.attend, self.enter_ffn, self.activate]
        return [*few, *map(between.spread, few)]


def parts_of(network: Decoder) -> Parts:
    """The parts between the products of a network that `fits`."""
    config, limit = network.config.transformer, half_range()
    block = blocks_of(network)[0]  # all are alike in this
    qkv, output, into, back = map(entry_of, products_of(block))
    return Parts(
        between.Enter(config, added=back[0], into=qkv, limit=limit),
        between.Attend(config, given=qkv[0], into=output, limit=limit),
        between.Enter(config, added=output[0], into=into, limit=limit),
        between.Activate(config, given=into[0], into=back, limit=limit),
    )


class FusedDecoder:
    """Hidden states of a `Decoder` in 8 bits; called as the network is, always with a cache."""

    def __init__(self, network: Decoder, cache: KVCache) -> None:
        self.network = network
        self.cache = cache
        self.parts = parts = parts_of(network)
        self.compiled, calls = compiled.ready(*parts.all)
        self._few, self._many = calls[:4], calls[4:]
        blocks = blocks_of(network)
        biases = [None, *(int8_of(block.ffn.output).bias for block in blocks)]
        self._layers = [_Layer.of(block, before, parts) for block, before in zip(blocks, biases)]
        self._last_bias = biases[-1]

    def __call__(self, tokens: Tensor, *, positions: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """Hidden states (rows, seq, width) for token ids (rows, seq); positions and mask as `cache.begin` gave them."""
        rows, seq = tokens.shape
        network, parts = self.network, self.parts
        assert mask is not None and cache is self.cache, "this cache always rounds, and so always masks"
        hidden = network.embedder(tokens, positions=positions).reshape(rows * seq, -1)
        spans = self._spans(positions, mask, rows, seq)
        keys, values = cache.of_pass()
        sums = hidden.new_zeros(parts.enter_attention.added * len(hidden), hidden.shape[1])  # nothing to add yet
        unit = hidden.new_zeros(len(hidden), 1)
        enter_attention, attend, enter_ffn, activate = self._many if len(hidden) >= _MANY else self._few
        for layer, own_keys, own_values in zip(self._layers, keys, values):
            hidden, digits, unit = enter_attention(hidden, sums, unit, *layer.attention)
            sums = multiply(digits, layer.qkv).view(parts.attend.given, rows, seq, -1)
            unit = unit.view(rows, seq, 1)
            if len(spans) == 1:
                digits, unit = attend(sums, unit, own_keys, own_values, *spans[0][2], *layer.attending)
            else:
                digits, unit = self._attended(attend, spans, sums, unit, own_keys, own_values, layer.attending)
            hidden, digits, unit = enter_ffn(hidden, multiply(digits, layer.output), unit, *layer.ffn)
            digits, unit = activate(multiply(digits, layer.input), unit, *layer.activating)
            sums = multiply(digits, layer.back)
        hidden = between.add(hidden, sums, unit, self._last_bias, parts.enter_attention.limit)
        if network.transformer.norm is not None:
            hidden = network.transformer.norm(hidden)
        return hidden.view(rows, seq, -1)

    def _attended(
        self,
        attend: compiled.Call,
        spans: list[tuple[int, int, list[Tensor]]],
        sums: Tensor,
        unit: Tensor,
        keys: Tensor,
        values: Tensor,
        weights: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """What `Attend` gives for a long text, span after span."""
        count, (rows, _, _) = self.parts.attend.count, unit.shape
        all_digits, units = [], []
        for first, last, given in spans:
            part = sums[:, :, first:last].contiguous(), unit[:, first:last].contiguous()
            digits, found = attend(*part, keys, values, *given, *weights)
            all_digits.append(digits.view(count, rows, last - first, -1))
            units.append(found.view(rows, last - first, 1))
        return torch.cat(all_digits, dim=2).flatten(0, 2), torch.cat(units, dim=1).flatten(0, 1)

    def _spans(self, positions: Tensor, mask: Tensor, rows: int, seq: int) -> list[tuple[int, int, list[Tensor]]]:
        """Positions that ask together, in turn: the first, the last + 1, and what `Attend` is given about them."""
        start, stop, end = self.cache.extent
        longest = max(self.cache.lengths[start:stop])
        places = self.cache.places
        rotary = self.network.transformer.rotary
        tables = [] if rotary is None else [each.transpose(1, 2) for each in rotary(positions)]
        spans = []
        for first in range(0, seq, _PIECE):
            last = min(first + _PIECE, seq)
            seen = min(rounded_exactly(longest + last), end)
            bias = self.parts.attend.bias_of(mask[:, 0, first:last, :seen].expand(rows, -1, -1))
            given = [places[:, first:last], bias]
            given += [each[:, first:last].expand(rows, -1, -1, -1) for each in tables]
            spans.append((first, last, [each.contiguous() for each in given]))
        return spans


@dataclass(frozen=True)
class _Layer:
    """The products of one block, and what is given to the parts between them."""

    qkv: torch.ScriptObject
    output: torch.ScriptObject
    input: torch.ScriptObject
    back: torch.ScriptObject
    attention: list[Tensor]
    attending: list[Tensor]
    ffn: list[Tensor]
    activating: list[Tensor]

    @classmethod
    def of(cls, block: Block, bias_before: Tensor | None, parts: Parts) -> _Layer:
        qkv, output, into, back = products_of(block)
        norms = [
            norm.weight.detach() for norm in (block.attention.query_norm, block.attention.key_norm) if norm is not None
        ]
        return cls(
            qkv=qkv.packed.weight,
            output=output.packed.weight,
            input=into.packed.weight,
            back=back.packed.weight,
            attention=parts.enter_attention.weights(block.attention_norm, bias_before, qkv.packed.split),
            attending=[*([] if qkv.bias is None else [qkv.bias]), *norms, *output.packed.split],
            ffn=parts.enter_ffn.weights(block.ffn_norm, output.bias, into.packed.split),
            activating=[*([] if into.bias is None else [into.bias]), *back.packed.split],
        )

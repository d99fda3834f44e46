"""An encoder's forward pass in few operations, for networks in 8 bits: the eight-bit products, and one call between two of them.

The arithmetic is `model.transformer`'s; attention is torch's, over all positions at once. What lies between the products
(`between`) is native code where `compiled` has made some, else plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formary.infer import between, compiled
from formary.infer.kernels import Int8Linear, blocks_of, entry_of, half_range, int8_of, multiply, products_of
from formary.model.attention import rotate
from formary.model.block import Block
from formary.model.topologies import Encoder, Network, padding_mask


def fits(network: Network) -> TypeGuard[Encoder]:
    """Whether `FusedEncoder` can take the place of a network."""
    return (
        isinstance(network, Encoder)
        and network.config.transformer.position != "relative_bias"
        and not network.config.transformer.qk_norm
        and not network.config.transformer.layer_positions
        and any(isinstance(module, Int8Linear) for module in network.modules())
    )


class FusedEncoder(Encoder):
    """An encoder in 8 bits; called as the network it is made of, whose weights and name of modules it keeps."""

    def __init__(self, network: Encoder) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(network.__dict__)  # it takes the place of that network
        self.parts = parts_of(network)
        self._calls: tuple[compiled.Call, ...] | None = None
        blocks = blocks_of(network)
        self._layers = [_Layer.of(block, before, self.parts) for block, before in zip(blocks, [None, *blocks])]

    def forward(
        self,
        inputs: Tensor,
        *,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """As `Encoder.forward`."""
        vectors = self.embedder(inputs) if types is None else self.embedder(inputs, types=types)
        rows, seq, width = vectors.shape
        stack, asked = self.config.transformer, padding_mask(mask)
        rotary = self.transformer.rotary
        rotation = None if rotary is None else rotary(torch.arange(seq)[None])
        enter_attention, project, round_, enter_ffn, activate = self._ready()
        hidden = vectors.float().reshape(rows * seq, width)
        sums, unit = hidden.new_zeros(self.parts[0].added * len(hidden), width), hidden.new_zeros(len(hidden), 1)
        for number, layer in enumerate(self._layers):
            if number == 0 and self.parts[0].post:  # nothing was added yet that would have to be normed
                digits, unit = between.digits_of(hidden, self.parts[0].count, half_range(), layer.split)
            else:
                hidden, digits, unit = enter_attention(hidden, sums, unit, *layer.attention)
            (projected,) = project(multiply(digits, layer.qkv), unit, *layer.projecting)
            last = first_only and number == len(self._layers) - 1
            gathered = self._attended(projected.view(rows, seq, -1), asked, rotation, first_only=last)
            if last:
                hidden = hidden.view(rows, seq, width)[:, 0]
            digits, unit = round_(gathered, *layer.rounding)
            hidden, digits, unit = enter_ffn(hidden, multiply(digits, layer.output), unit, *layer.ffn)
            digits, unit = activate(multiply(digits, layer.input), unit, *layer.activating)
            sums = multiply(digits, layer.back)
        hidden = between.add(hidden, sums, unit, self._layers[-1].back_bias, half_range())
        if stack.norm_position == "post":
            hidden = self._layers[-1].norm(hidden)
        if self.transformer.norm is not None:
            hidden = self.transformer.norm(hidden)
        return hidden.view(rows, -1, width)

    def _ready(self) -> tuple[compiled.Call, ...]:
        """What to call between products; looked for once, at the first call."""
        if self._calls is None:
            self._calls = tuple(compiled.ready(*self.parts)[1])
        return self._calls

    def _attended(
        self, projected: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None, *, first_only: bool
    ) -> Tensor:
        """(rows, seq, (heads + 2 kv_heads) x head_width) -> (rows x seq, heads x head_width), or of the first alone."""
        stack = self.config.transformer
        heads, kv = stack.heads, stack.kv_head_count
        split = projected.view(*projected.shape[:2], -1, stack.q_head_width).transpose(1, 2)
        queries, keys, values = split[:, :heads], split[:, heads : heads + kv], split[:, heads + kv :]
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if first_only:
            queries = queries[:, :, :1]
        causal = stack.causal and mask is None and not first_only
        gathered = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=causal,
            scale=stack.attention_scale,
            enable_gqa=kv != heads,
        )
        return gathered.transpose(1, 2).reshape(-1, heads * stack.q_head_width)


Parts = tuple[between.Enter, between.Project, between.Round, between.Enter, between.Activate]


def parts_of(network: Encoder) -> Parts:
    """The parts between the products of a network that `fits`, in the order in which a block calls them."""
    config, limit = network.config.transformer, half_range()
    block = blocks_of(network)[0]  # all are alike in this
    qkv, output, into, back = map(entry_of, products_of(block))
    parts = (
        between.Enter(config, added=back[0], into=qkv, limit=limit),
        between.Project(config, given=qkv[0], limit=limit),
        between.Round(config, into=output, limit=limit),
        between.Enter(config, added=output[0], into=into, limit=limit),
        between.Activate(config, given=into[0], into=back, limit=limit),
    )
    for part in parts:
        part.spread = True
    return parts


@dataclass(frozen=True)
class _Layer:
    """The products of one block, and what is given to the parts between them."""

    qkv: torch.ScriptObject
    output: torch.ScriptObject
    input: torch.ScriptObject
    back: torch.ScriptObject
    split: tuple[Tensor, ...]
    attention: list[Tensor]
    projecting: list[Tensor]
    rounding: list[Tensor]
    ffn: list[Tensor]
    activating: list[Tensor]
    back_bias: Tensor | None
    norm: nn.Module

    @classmethod
    def of(cls, block: Block, before: Block | None, parts: Parts) -> _Layer:
        qkv, output, into, back = products_of(block)
        enter_attention, _, _, enter_ffn, _ = parts
        added = None if before is None else int8_of(before.ffn.output).bias
        if enter_attention.post:  # each norm stands after the addition that came before
            norms = (None if before is None else before.ffn_norm), block.attention_norm
        else:
            norms = block.attention_norm, block.ffn_norm
        return cls(
            qkv=qkv.packed.weight,
            output=output.packed.weight,
            input=into.packed.weight,
            back=back.packed.weight,
            split=qkv.packed.split,
            attention=[] if norms[0] is None else enter_attention.weights(norms[0], added, qkv.packed.split),
            projecting=[] if qkv.bias is None else [qkv.bias],
            rounding=list(output.packed.split),
            ffn=enter_ffn.weights(norms[1], output.bias, into.packed.split),
            activating=[*([] if into.bias is None else [into.bias]), *back.packed.split],
            back_bias=back.bias,
            norm=block.ffn_norm,
        )

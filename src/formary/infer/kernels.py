"""Matrix products in eight-bit integers: weights by row, activations by position, sums exact.

A position's numbers are brought to its own largest magnitude, so one scale serves all positions of a call and none sees
its neighbours; integer sums do not depend on their order. So a sequence alone and in a batch gives the same bits.
It replaces the linear layers of a network; `fused` writes a decoder's step around them, `probe` decides where it pays.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from formary.errors import RequestError
from formary.model.block import Block
from formary.model.heads import LanguageHead
from formary.model.topologies import Decoder, Encoder, EncoderDecoder, Network

KERNELS = ("float32", "int8")
"""What a network's products can be computed in, slowest first."""

_STRENGTHS = (0.0, 0.4, 0.5, 0.6, 0.75)
_CALIBRATED = 128  # positions that choose how strongly a layer is smoothed
_USUAL = 0.98  # quantile that stands for an input channel's size
_COARSE = 3e-4  # relative squared error from which a layer is given a second digit
_JUDGED = 256  # outputs by which it is chosen
_FLOOR = 1e-5

Module = TypeVar("Module", bound=nn.Module)


@cache
def available() -> tuple[str, ...]:
    """The kernels that this machine and this torch have."""
    try:
        exact = product(torch.eye(8), pack(torch.eye(8)))
    except (RuntimeError, AttributeError):
        return ("float32",)
    return KERNELS if torch.allclose(exact, torch.eye(8), atol=1e-3) else ("float32",)


@dataclass(frozen=True, eq=False, slots=True)
class Packed:
    """A matrix (out, in) in eight bits, laid out for the processor.

    Args:
        smooth: (in,), multiplies what is fed to it.
        fine: what is fed to it is rounded to two digits of eight bits, a second product that takes the first one's rest.
    """

    weight: torch.ScriptObject
    smooth: Tensor | None = None
    fine: bool = False


def pack(weight: Tensor, smooth: Tensor | None = None, *, fine: bool = False) -> Packed:
    """Round a matrix (out, in) to 8 bits with one scale for each row.

    Args:
        smooth: (in,); the columns are divided by it, and `product` multiplies its input with it.
    """
    weight = weight.detach().float()
    if smooth is not None:
        weight = weight / smooth
    scales = weight.abs().amax(dim=1).clamp_min(1e-30).double() / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another home for these functions; they are the fast ones here
        torch.backends.quantized.engine = "fbgemm"
        rounded = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
        return Packed(torch.ops.quantized.linear_prepack(rounded, None), smooth, fine)


def product(vectors: Tensor, packed: Packed) -> Tensor:
    """vectors (rows, in) times the transposed matrix: (rows, out) in float32."""
    if packed.smooth is not None:
        vectors = vectors * packed.smooth
    sums, largest = sums_of(vectors, packed)
    return sums.mul_(largest)


def sums_of(vectors: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """The product (rows, out) of already smoothed vectors over each row's largest magnitude, and those (rows, 1).

    A row of zeros has no such magnitude: its sums mean nothing, and times 0 they are 0.
    """
    largest = vectors.abs().amax(-1, True)
    half = _half_range()
    if not packed.fine:
        return _multiply(vectors / largest, 1 / half, half + 1, packed.weight), largest
    rows = len(vectors)
    digits = vectors.new_empty(2 * rows, vectors.shape[1])
    scaled = torch.div(vectors, largest / half, out=digits[rows:])
    first = torch.round(scaled, out=digits[:rows])
    scaled.sub_(first).mul_(2 * half)
    sums = _multiply(digits, 1.0, half + 1, packed.weight)
    return torch.add(sums[:rows], sums[rows:], alpha=0.5 / half), largest.div_(half)


def _multiply(vectors: Tensor, scale: float, zero: int, weight: torch.ScriptObject) -> Tensor:
    """vectors / scale, rounded and offset into a byte, times the matrix: exact integer sums, as float32."""
    sums: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(
        vectors, scale, zero, weight
    )
    return sums


@cache
def _half_range() -> int:
    """The largest activation: 127, or 63 on processors that add products of bytes in 16 bits, where 127 overflows."""
    packed = pack(torch.full((16, 64), 127.0))
    sums = _multiply(torch.ones(1, 64), 1 / 127, 128, packed.weight)
    return 127 if torch.allclose(sums, torch.full((1, 16), 127.0 * 64), rtol=1e-3) else 63


class Int8Linear(nn.Module):
    """A linear layer whose product is computed in 8 bits: (..., in) -> (..., out) in float32."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, smooth: Tensor | None = None, *, fine: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = pack(weight, smooth, fine=fine)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, vectors: Tensor) -> Tensor:
        out = product(vectors.reshape(-1, self.in_features).float(), self.packed)
        if self.bias is not None:
            out += self.bias
        return out.view(*vectors.shape[:-1], self.out_features)


class Int8Head(nn.Module):
    """A language head whose output matrix is in 8 bits."""

    def __init__(self, head: LanguageHead) -> None:
        super().__init__()
        self.head = head
        self.output = Int8Linear(head.weight, head.bias, fine=True)  # one position a row: the second digit is free

    @property
    def weight(self) -> Tensor:
        """The matrix as it was, (vocab_size, width)."""
        return self.head.weight

    def prepare(self, hidden: Tensor) -> Tensor:
        """What is multiplied with the output matrix."""
        return self.head.prepare(hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size)."""
        logits: Tensor = self.output(self.prepare(hidden))
        return logits


@torch.no_grad()
def quantised(network: Network, sample: Tensor, *, source: Tensor | None = None) -> Network:
    """A copy of a network whose linear layers and output matrix compute in 8 bits; embeddings and norms are shared.

    Before rounding, each layer's input channels are balanced against its weights (SmoothQuant, Xiao et al. 2023,
    eq. 4), as strongly as gives the smallest error on the sample. Where a norm or a linear map comes before, it takes
    the factors over; elsewhere they are multiplied in.

    Args:
        sample: real token ids (1, seq), or whatever the network reads; some hundreds of positions are enough.
        source: of an encoder-decoder, whose `sample` is then the target.

    Raises:
        RequestError: the network's weights are not in float32, or not on a CPU.
    """
    parameter = next(network.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32 or "int8" not in available():
        raise RequestError(
            f"kernel int8: needs float32 weights on a processor that multiplies bytes, not {parameter.dtype} on "
            f"{parameter.device}; use kernel float32"
        )
    inputs = _inputs(network, sample, source)
    shared = {id(p): p for p in network.parameters()} | {id(b): b for b in network.buffers()}
    copied = copy.deepcopy(network, dict(shared))
    for name, module in list(copied.named_modules()):
        if isinstance(module, Block) and module.pre:
            _quantise_block(module, name, inputs)
    for name, module in list(copied.named_modules()):
        for place, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                smooth, fine = _fitted(child.weight, inputs.get(f"{name}.{place}" if name else place))
                setattr(module, place, Int8Linear(child.weight, child.bias, smooth, fine=fine))
    if isinstance(copied, Decoder | Encoder | EncoderDecoder) and isinstance(copied.head, LanguageHead):
        copied.head = Int8Head(copied.head)  # type: ignore[assignment]
    return copied.eval()


def _quantise_block(block: Block, name: str, inputs: dict[str, Tensor]) -> None:
    """The layers of a pre-norm block whose factors the norm, or the linear map, before them takes over."""
    attention, ffn = block.attention, block.ffn
    smooth, fine = _fitted(attention.qkv.weight, inputs.get(f"{name}.attention.qkv"))
    block.attention_norm, weight = _taken_over(block.attention_norm, attention.qkv.weight, smooth)
    qkv = Int8Linear(weight, attention.qkv.bias, fine=fine)
    smooth, fine = _fitted(ffn.input.weight, inputs.get(f"{name}.ffn.input"))
    block.ffn_norm, weight = _taken_over(block.ffn_norm, ffn.input.weight, smooth)
    bias: Tensor | None = ffn.input.bias
    if ffn.gated:
        smooth, fine_output = _fitted(ffn.output.weight, inputs.get(f"{name}.ffn.output"))
        if smooth is not None:  # the gated values are linear in the second half of the layer before
            rows = torch.cat([torch.ones_like(smooth), smooth])
            weight, bias = weight * rows[:, None], None if bias is None else bias * rows
            output = Int8Linear(ffn.output.weight / smooth, ffn.output.bias, fine=fine_output)
            ffn.register_module("output", output)
    attention.register_module("qkv", qkv)
    ffn.register_module("input", Int8Linear(weight, bias, fine=fine))


def _taken_over(norm: nn.Module, weight: Tensor, smooth: Tensor | None) -> tuple[nn.Module, Tensor]:
    """A norm that multiplies its outputs with the factors, and the matrix after it with its columns divided by them."""
    if smooth is None:
        return norm, weight
    scaled = copy.deepcopy(norm)
    for parameter in scaled.parameters():
        parameter.data *= smooth
    return scaled, weight / smooth


def _fitted(weight: Tensor, inputs: Tensor | None) -> tuple[Tensor | None, bool]:
    """The factors (in,) for a layer's input with the smallest error on its sample, and whether it needs two digits."""
    if inputs is None or not len(inputs):
        return None, True
    matrix = weight.detach().float()
    rows = inputs / inputs.square().mean(dim=1, keepdim=True).sqrt().clamp_min(_FLOOR)  # a position has its own scale
    of_input = rows.abs().quantile(_USUAL, dim=0).clamp_min(_FLOOR)
    of_weight = matrix.abs().amax(dim=0).clamp_min(_FLOOR)
    matrix = matrix[:: max(1, len(matrix) // _JUDGED)]
    exact = rows @ matrix.T
    size = exact.square().sum(dim=1).clamp_min(_FLOOR)
    best: Tensor | None = None
    least = math.inf
    for strength in _STRENGTHS:
        factors = None
        if strength:
            factors = of_weight ** (1 - strength) / of_input**strength
            factors = factors / factors.log().mean().exp()
        error = ((product(rows, pack(matrix, factors)) - exact).square().sum(dim=1) / size).mean().item()
        if error < least:
            best, least = factors, error
    return best, least > _COARSE


def _inputs(network: Network, sample: Tensor, source: Tensor | None) -> dict[str, Tensor]:
    """What each linear layer is fed on the sample: by name, (positions, in), spread over the sample."""
    found: dict[str, Tensor] = {}

    def keep(name: str, vectors: Tensor) -> None:
        rows = vectors.detach().reshape(-1, vectors.shape[-1]).float()
        found[name] = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _CALIBRATED)).long()].clone()

    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: keep(name, given[0]))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    training = network.training
    network.eval()
    try:
        if isinstance(network, EncoderDecoder):
            assert source is not None, "an encoder-decoder needs a source"
            network.decode(sample, network.encode(source))
        else:
            network(sample)
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    return found


def weight_bytes(network: Network) -> int:
    """Bytes of weights that one token reads: the layers and the output matrix, not the embeddings looked up."""
    total = 0
    for module in network.modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel() * module.weight.element_size()
        elif isinstance(module, Int8Linear):
            total += module.out_features * module.in_features
        elif isinstance(module, LanguageHead):
            total += module.weight.numel() * module.weight.element_size()
        elif isinstance(module, Int8Head):
            total -= module.weight.numel() * module.weight.element_size()  # its LanguageHead is counted, not read
    return total


def chunks(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Pieces of at most `size` tokens."""
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]

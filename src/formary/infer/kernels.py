"""Matrix products in eight-bit integers: weights by row, activations by position, sums exact.

A position's numbers are brought to its own largest magnitude, so one scale serves all positions of a call and none sees
its neighbours; integer sums do not depend on their order. So a sequence alone and in a batch gives the same bits.
It replaces the linear layers of a network; `fused` writes a decoder's step around them, `probe` decides where it pays.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from formary.errors import RequestError
from formary.infer.between import Entry, digits_of, whole
from formary.model.block import Block
from formary.model.heads import LanguageHead
from formary.model.topologies import Decoder, Encoder, EncoderDecoder, Network

KERNELS = ("float32", "int8")
"""What a network's products can be computed in, slowest first."""

_JUDGING = 128  # positions of the sample that decide whether a layer needs a second digit
_COARSE = 3e-4  # mean squared error of a position, relative to its size, from which it does
_JUDGED = 256  # outputs by which that is judged
_FLOOR = 1e-5
_NOTHING, _SHARES, _DIGIT = range(3)  # what a layer needs, by rising cost
_EXTRA = 32  # one extra column for so many of a layer's own


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
        fine: what is fed to it is rounded to two digits of eight bits, a second product that takes the first one's rest.
        split: large columns of what is fed to it are shared out to several columns, see `between.digits_of`.
    """

    weight: torch.ScriptObject
    fine: bool = False
    split: tuple[Tensor, ...] = ()


def pack(weight: Tensor, *, fine: bool = False, shares: Tensor | None = None) -> Packed:
    """Round a matrix (out, in) to 8 bits with one scale for each row.

    Args:
        shares: into how many columns each one is shared out (in,), whole numbers; not with `fine`.
    """
    weight = weight.detach().float()
    split: tuple[Tensor, ...] = ()
    if shares is not None:
        columns = torch.repeat_interleave(torch.arange(len(shares)), shares - 1)
        places = torch.cat([torch.arange(1, int(count)) for count in shares[shares > 1]] or [torch.empty(0)])
        split = shares.float(), columns, places.float(), shares[columns].float()
        weight = torch.cat([weight, weight[:, columns]], dim=1)
    scales = weight.abs().amax(dim=1).clamp_min(1e-30).double() / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another home for these functions; they are the fast ones here
        torch.backends.quantized.engine = "fbgemm"
        rounded = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
        return Packed(torch.ops.quantized.linear_prepack(rounded, None), fine, split)


def product(vectors: Tensor, packed: Packed) -> Tensor:
    """vectors (rows, in) times the transposed matrix: (rows, out) in float32."""
    sums, unit = sums_of(vectors, packed)
    return sums.mul_(unit)


def sums_of(vectors: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """The product (rows, out) of vectors over each row's unit, and those (rows, 1)."""
    digits, unit = digits_of(vectors, 2 if packed.fine else 1, half_range(), packed.split)
    sums = multiply(digits, packed.weight)
    return whole(sums.view(-1, len(vectors), sums.shape[1]), half_range()), unit


def multiply(digits: Tensor, weight: torch.ScriptObject) -> Tensor:
    """Numbers of at most `half_range` (rows, in), rounded to whole ones, times a packed matrix: (rows, out), exact sums."""
    return _operator()(digits, 1.0, half_range() + 1, weight)


@cache
def _operator() -> Callable[[Tensor, float, int, torch.ScriptObject], Tensor]:
    """(vectors / scale, rounded and offset into a byte) times the matrix: exact integer sums, as float32."""
    operator = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    # Called as an overload it first looks through its arguments for subclasses, which takes longer than the rest of a call.
    found: Callable[[Tensor, float, int, torch.ScriptObject], Tensor] = getattr(operator, "_op", operator)
    return found


@cache
def half_range() -> int:
    """The largest activation: 127, or 63 on processors that add products of bytes in 16 bits, where 127 overflows."""
    packed = pack(torch.full((16, 64), 127.0))
    sums = _operator()(torch.ones(1, 64), 1 / 127, 128, packed.weight)
    return 127 if torch.allclose(sums, torch.full((1, 16), 127.0 * 64), rtol=1e-3) else 63


class Int8Linear(nn.Module):
    """A linear layer whose product is computed in 8 bits: (..., in) -> (..., out) in float32."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, fine: bool = False, shares: Tensor | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = pack(weight, fine=fine, shares=shares)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, vectors: Tensor) -> Tensor:
        out = product(vectors.reshape(-1, self.in_features).float(), self.packed)
        if self.bias is not None:
            out += self.bias
        return out.view(*vectors.shape[:-1], self.out_features)


def int8_of(module: nn.Module) -> Int8Linear:
    """A linear layer of a network that `quantised` made."""
    assert isinstance(module, Int8Linear)
    return module


def blocks_of(network: Decoder | Encoder) -> list[Block]:
    """The blocks of a network's stack."""
    return [block for block in network.transformer.blocks if isinstance(block, Block)]


def products_of(block: Block) -> tuple[Int8Linear, Int8Linear, Int8Linear, Int8Linear]:
    """The products of a block in their order: query-key-value, attention's output, and the feed-forward's two."""
    attention, ffn = block.attention, block.ffn
    return int8_of(attention.qkv), int8_of(attention.output), int8_of(ffn.input), int8_of(ffn.output)


def entry_of(module: nn.Module) -> Entry:
    """How its product is entered."""
    packed = int8_of(module).packed
    return 2 if packed.fine else 1, bool(packed.split)


class Int8Head(LanguageHead):
    """A language head whose output matrix is in 8 bits; `weight` stays what it was, as the embedding may be the same."""

    def __init__(self, head: LanguageHead) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(head.__dict__)  # it takes the place of that head
        self.output = Int8Linear(head.weight, head.bias, fine=True)  # one position a row: the second digit is free

    def forward(self, hidden: Tensor) -> Tensor:
        return self.capped(self.output(self.prepare(hidden)))


@torch.no_grad()
def quantised(network: Network, sample: Tensor, *, source: Tensor | None = None) -> Network:
    """A copy of a network whose linear layers and output matrix compute in 8 bits; embeddings and norms are shared.

    In some layers a few columns of the input are far larger than the others, and one digit of eight bits says too little
    about the rest: the sample shows where. Large columns are shared out to extra ones (Zhao et al. 2019, "outlier channel
    splitting"); where that is not enough, layers of that kind are given a second digit instead. (Balancing the outliers
    against the weights, as SmoothQuant does, was tried: what the sample does not show, such as the first token of a
    conversation, then breaks.)

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
    copied = copy.deepcopy(network, shared)
    linear = {name: module for name, module in copied.named_modules() if isinstance(module, nn.Linear)}
    needs: dict[str, int] = {}  # of each kind of layer: nothing, shared columns, or a second digit
    shares = {name: _shares(inputs[name]) for name in linear if name in inputs}
    for name, module in linear.items():
        of_layer = _need(module.weight, inputs[name], shares[name]) if name in inputs else _DIGIT
        needs[_kind(name)] = max(needs.get(_kind(name), _NOTHING), of_layer)
    for name, module in linear.items():
        owner, _, place = name.rpartition(".")
        need = needs[_kind(name)]
        rounded = Int8Linear(
            module.weight, module.bias, fine=need == _DIGIT, shares=shares[name] if need == _SHARES else None
        )
        setattr(copied.get_submodule(owner), place, rounded)
    if isinstance(copied.head, LanguageHead):
        copied.head = Int8Head(copied.head)
    return copied.eval()


def _kind(name: str) -> str:
    """A layer's name without the number of its block: layers of a kind are rounded alike, so that `fused` has one code."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _shares(inputs: Tensor) -> Tensor:
    """Into how many columns each one of a layer's inputs (positions, in) is shared out: the largest ones, by turns."""
    width = inputs.shape[1]
    shares = torch.ones(width, dtype=torch.long)
    sizes = inputs.abs()
    for _ in range(-(-width // _EXTRA // 8) * 8):
        largest = torch.bincount((sizes / shares).argmax(dim=1), minlength=width).argmax()
        shares[largest] += 1
    return shares


def _need(weight: Tensor, inputs: Tensor, shares: Tensor) -> int:
    """The least with which a sample of what is fed to a layer comes out fine enough."""
    matrix = weight.detach().float()[:: max(1, len(weight) // _JUDGED)]
    exact = inputs @ matrix.T
    size = exact.square().sum(dim=1).clamp_min(_FLOOR)
    for need, packed in ((_NOTHING, pack(matrix)), (_SHARES, pack(matrix, shares=shares))):
        error = (product(inputs, packed) - exact).square().sum(dim=1) / size
        if error.mean() <= _COARSE:
            return need
    return _DIGIT


def _inputs(network: Network, sample: Tensor, source: Tensor | None) -> dict[str, Tensor]:
    """What each linear layer is fed on the sample: by name, (positions, in), spread over the sample."""
    found: dict[str, Tensor] = {}

    def keep(name: str, vectors: Tensor) -> None:
        rows = vectors.detach().reshape(-1, vectors.shape[-1]).float()
        found[name] = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _JUDGING)).long()].clone()

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
            extra = len(module.packed.split[1]) if module.packed.split else 0
            total += module.out_features * (module.in_features + extra)
        elif isinstance(module, LanguageHead) and not isinstance(module, Int8Head):  # whose Int8Linear is counted
            total += module.weight.numel() * module.weight.element_size()
    return total

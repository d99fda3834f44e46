"""The key-value cache: what every layer remembers of the positions it has read, in slots allocated once.

Row i of every tensor is one sequence with a length of its own; the sequences in use are always rows 0..n-1, so that
attention reads a view and nothing is copied per token. What lies beyond a row's length is never attended to, so going
back is setting a length. It knows neither tokens nor requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from formary.model.config import TransformerConfig
from formary.model.transformer import causal_mask

# Attention reads a multiple of this many keys, the surplus masked: then a row alone and beside longer rows is mostly
# computed from tensors of one shape, and the surplus adds exact zeros.
_KEYS = 64
_STEPS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024)


class KVCache:
    """Static keys and values for `slots` sequences of up to `context` tokens; implements `model.attention.Cache`.

    One forward pass over some rows is: `begin`, the network's forward, `commit`.

    `keys` and `values` hold one tensor for each layer, (slots, kv_heads, capacity, head_width), where capacity is more
    than the context: padding that would come after a row's last place is written to the very last one.

    Args:
        config: of the decoding stack.
        slots: sequences held at once.
        context: most tokens of one sequence.
        memory_context: most encoder positions of one sequence; 0 without cross-attention.
        exact: count keys by `rounded_exactly`, also where all rows begin.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        slots: int,
        context: int,
        memory_context: int = 0,
        exact: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.slots = slots
        self.context = context
        self._exact = exact
        self._counted = rounded_exactly if exact else rounded
        self.lengths = [0] * slots
        self.memory_lengths = [0] * slots
        self._always_mask = config.position == "relative_bias"
        self._capacity, memory_capacity = self._counted(context + 1), rounded(memory_context)
        shape = (slots, config.kv_head_count, self._capacity, config.q_head_width)
        self.keys = [zeros(shape, dtype, device) for _ in range(config.layers)]
        self.values = [zeros(shape, dtype, device) for _ in range(config.layers)]
        memory_shape = (slots, config.kv_head_count, memory_capacity, config.q_head_width)
        layers = config.layers if memory_context else 0
        self._memory_keys = [zeros(memory_shape, dtype, device) for _ in range(layers)]
        self._memory_values = [zeros(memory_shape, dtype, device) for _ in range(layers)]
        self._device = device
        self._heads = torch.arange(config.kv_head_count, device=device)[:, None]
        # Of the forward pass in progress:
        self._start = self._stop = self._end = 0
        self._counts: list[int] = []  # new tokens of each row
        self._places = torch.empty(0, dtype=torch.long, device=device)  # where it writes, see `store`
        self._new_memory = False
        self._memory_end = 0

    def begin(
        self, start: int, counts: Sequence[int], *, new_memory: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Prepare a forward pass over rows start, start + 1, ..., which all get as many new tokens as the longest.

        Args:
            counts: how many of a row's new tokens are real; the rest is padding, and is forgotten.
            new_memory: real encoder positions of each row, when this pass projects and stores the memory.

        Returns:
            positions (rows or 1, seq); mask (rows or 1, 1, seq, keys) or None where the network's own causal rule does;
            memory_mask (rows, memory_seq), True at real positions, or None where all are real.
        """
        self._start, self._stop, self._counts = start, start + len(counts), list(counts)
        lengths = self.lengths[self._start : self._stop]
        seq = max(counts)
        self._begin_memory(new_memory)
        fresh, equal = max(lengths) == 0, min(lengths) == max(lengths)
        new = torch.tensor(lengths[:1] if equal else lengths, device=self._device)[:, None]
        new = new + torch.arange(seq, device=self._device)  # (rows or 1, seq)
        rows = (
            torch.arange(self._start, self._stop, device=self._device)[:, None, None] * len(self._heads) + self._heads
        )
        self._places = (rows * self._capacity + new.clamp(max=self._capacity - 1)[:, None, :]).flatten()
        self._end = self._counted(max(length + count for length, count in zip(lengths, counts)))
        if fresh and not self._exact:
            self._end = seq
            return new, causal_mask(new, seq) if self._always_mask else None, self._memory_mask()
        return new.clamp(max=self.context - 1), causal_mask(new, self._end), self._memory_mask()

    @property
    def extent(self) -> tuple[int, int, int]:
        """Of the pass in progress: its first row, the row after its last, and how many keys attention reads."""
        return self._start, self._stop, self._end

    @property
    def places(self) -> Tensor:
        """Where the pass in progress writes, (rows, seq, kv_heads), in keys seen as (all, head_width) from its first row."""
        offset = self._start * len(self._heads) * self._capacity
        places = self._places.view(self._stop - self._start, len(self._heads), -1).transpose(1, 2)
        return places - offset if offset else places

    def of_pass(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer from the first row of the pass in progress on."""
        if not self._start:
            return self.keys, self.values
        return [keys[self._start :] for keys in self.keys], [values[self._start :] for values in self.values]

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep new keys and values (rows, kv_heads, seq, head_width) of this pass."""
        for held, new in ((self.keys[layer], keys), (self.values[layer], values)):
            held.view(-1, held.shape[-1]).index_copy_(0, self._places, new.reshape(-1, held.shape[-1]))

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`store` new keys and values; return all there are, up to the longest row."""
        self.store(layer, keys, values)
        if self._end == keys.shape[2]:  # they are all there are
            return keys, values
        rows = slice(self._start, self._stop)
        return self.keys[layer][rows, :, : self._end], self.values[layer][rows, :, : self._end]

    def memory(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The projected encoder memory of the rows in this pass, or None when this pass is to store it."""
        if self._new_memory:
            return None
        rows = slice(self._start, self._stop)
        return self._memory_keys[layer][rows, :, : self._memory_end], self._memory_values[layer][
            rows, :, : self._memory_end
        ]

    def store_memory(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep the projected encoder memory (rows, kv_heads, memory_seq, head_width) of the rows in this pass."""
        rows = slice(self._start, self._stop)
        self._memory_keys[layer][rows, :, : keys.shape[2]] = keys
        self._memory_values[layer][rows, :, : keys.shape[2]] = values

    def commit(self) -> None:
        """End a pass: each row has grown by its count."""
        for place, count in enumerate(self._counts):
            self.lengths[self._start + place] += count

    def clear(self, row: int) -> None:
        """Forget the tokens of a row; its encoder memory stays."""
        self.lengths[row] = 0

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from place `length` on."""
        self.lengths[row] = min(self.lengths[row], length)

    def wipe(self, row: int, start: int = 0) -> None:
        """Write zeros over a row from place `start` on: what it held was not finite, and 0 times NaN would be NaN."""
        for tensor in (*self.keys, *self.values):
            tensor[row, :, start:] = 0
        for tensor in () if start else (*self._memory_keys, *self._memory_values):
            tensor[row] = 0

    def copy(self, source: int, target: int) -> None:
        """Make row `target` equal to row `source`, encoder memory included."""
        length, memory = self.lengths[source], self.memory_lengths[source]
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]
        for tensor in (*self._memory_keys, *self._memory_values):
            tensor[target, :, :memory] = tensor[source, :, :memory]
        self.lengths[target], self.memory_lengths[target] = length, memory

    def reorder(self, parents: Sequence[int]) -> None:
        """Row i becomes what row parents[i] was; all named rows have equal lengths (beam search)."""
        if list(parents) == list(range(len(parents))):
            return
        length, memory = self.lengths[parents[0]], self.memory_lengths[parents[0]]
        order = torch.tensor(parents, device=self._device)
        for tensor in (*self.keys, *self.values):
            tensor[: len(parents), :, :length] = tensor[order, :, :length]
        for tensor in (*self._memory_keys, *self._memory_values):
            tensor[: len(parents), :, :memory] = tensor[order, :, :memory]
        for row in range(len(parents)):
            self.lengths[row], self.memory_lengths[row] = length, memory

    def _begin_memory(self, new_memory: Sequence[int] | None) -> None:
        self._new_memory = new_memory is not None
        if new_memory is not None:
            self.memory_lengths[self._start : self._stop] = new_memory
        longest = max(self.memory_lengths[self._start : self._stop])
        self._memory_end = longest if self._new_memory else rounded(longest)

    def _memory_mask(self) -> Tensor | None:
        lengths = self.memory_lengths[self._start : self._stop]
        if min(lengths) == self._memory_end:
            return None
        return torch.arange(self._memory_end, device=self._device) < torch.tensor(lengths, device=self._device)[:, None]


def rounded(length: int) -> int:
    """The number of keys that attention reads where `length` are needed."""
    return -(-length // _KEYS) * _KEYS


def rounded_exactly(length: int) -> int:
    """As `rounded`, but so that the weights of surplus keys, zeros, change no bit of a product over the keys.

    A product sums a long row in blocks, and where they end depends on its length, unless that is a multiple of a block.
    """
    step = _block()
    return rounded(length) if length <= step else -(-length // step) * step


@cache
def _block() -> int:
    """How many keys this processor's product sums in one go, as a product tells of itself."""
    generator = torch.Generator().manual_seed(0)
    longest = 2 * max(_STEPS)
    values = torch.randn(1, longest, 16, generator=generator)
    weights = torch.rand(1, 4, longest, generator=generator)
    for step in _STEPS:
        lengths = [*range(_KEYS, step, _KEYS), *range(step, longest + 1, step)]
        if all(_same_sums(weights, values, lengths[place:]) for place in range(len(lengths))):
            return step
    return max(_STEPS)


def _same_sums(weights: Tensor, values: Tensor, lengths: Sequence[int]) -> bool:
    """Whether weights as long as the first of `lengths` give the same bits with zeros after them, as long as the others."""
    sums = []
    for length in lengths:
        padded = torch.zeros(*weights.shape[:2], length)
        padded[..., : lengths[0]] = weights[..., : lengths[0]]
        sums.append(torch.bmm(padded, values[:, :length]))
    return all(torch.equal(each, sums[0]) for each in sums)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros that take memory only where they are written: a short text in a long context costs little.

    They must be zeros: attention multiplies masked values by 0, and 0 times leftover NaN would be NaN.
    """
    if torch.device(device).type == "cpu" and dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.zeros(shape, dtype=str(dtype).removeprefix("torch.")))
    return torch.zeros(shape, dtype=dtype, device=device)

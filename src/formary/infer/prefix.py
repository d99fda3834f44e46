"""The prefix cache: keys and values of token sequences that were read before, so that equal beginnings are not read again.

Sequences are cut into blocks of 32 tokens, and a block is known by its tokens and the block before it: a tree whose
paths are prefixes. The blocks used longest ago make room for new ones. It does not run the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from formary.infer.cache import KVCache, zeros

BLOCK = 32


class PrefixTree:
    """Which prefixes are kept, and in which block of the store each of their pieces lies.

    Args:
        blocks: most pieces kept at once.
        size: tokens of a piece.
    """

    def __init__(self, blocks: int, size: int = BLOCK) -> None:
        self.size = size
        self._root: dict[tuple[int, ...], _Node] = {}
        self._free = list(reversed(range(blocks)))
        # From the one used longest ago on. A node's parent is always behind it, so that the first is always a leaf.
        self._used: dict[int, _Node] = {}

    def __len__(self) -> int:
        return len(self._used)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The blocks of the longest kept prefix of `tokens`, in order; they count as used."""
        path = self._path(tokens)
        self._touch(path)
        return [node.block for node in path]

    def add(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Keep the whole pieces of `tokens`, as many as there is room for.

        Returns:
            (piece, block) for each piece that was not kept before: piece i is tokens i x size to (i + 1) x size.
        """
        path = self._path(tokens)
        self._touch(path)
        own = {node.block for node in path}
        added: list[tuple[int, int]] = []
        for index, piece in list(enumerate(self._pieces(tokens)))[len(path) :]:
            if not self._free and not self._forget_oldest(own):
                break
            siblings = path[-1].children if path else self._root
            node = _Node(self._free.pop(), piece, siblings)
            siblings[piece] = node
            path.append(node)
            own.add(node.block)
            self._used[node.block] = node
            added.append((index, node.block))
        self._touch(path)
        return added

    def _path(self, tokens: Sequence[int]) -> list[_Node]:
        path: list[_Node] = []
        children = self._root
        for piece in self._pieces(tokens):
            node = children.get(piece)
            if node is None:
                break
            path.append(node)
            children = node.children
        return path

    def _pieces(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        for start in range(0, len(tokens) - self.size + 1, self.size):
            yield tuple(tokens[start : start + self.size])

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            del self._used[node.block]
            self._used[node.block] = node

    def _forget_oldest(self, own: set[int]) -> bool:
        oldest = next(iter(self._used.values()), None)
        if oldest is None or oldest.block in own:
            return False
        del self._used[oldest.block]
        del oldest.siblings[oldest.piece]
        self._free.append(oldest.block)
        return True


@dataclass(eq=False, slots=True)
class _Node:
    block: int
    piece: tuple[int, ...]
    siblings: dict[tuple[int, ...], _Node]  # where its parent keeps it
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


class PrefixCache:
    """Copies beginnings of sequences out of a `KVCache`'s rows, and back into others.

    Args:
        tokens: most tokens kept; memory is taken only as they come.
    """

    def __init__(self, cache: KVCache, tokens: int) -> None:
        blocks = tokens // BLOCK
        self._cache = cache
        self._tree = PrefixTree(blocks)
        self._keys = [_store(tensor, blocks) for tensor in cache.keys]
        self._values = [_store(tensor, blocks) for tensor in cache.values]

    @property
    def tokens(self) -> int:
        """How many tokens are kept now."""
        return len(self._tree) * BLOCK

    def match(self, tokens: Sequence[int]) -> int:
        """How many tokens `load` would find."""
        return len(self._tree.find(tokens[:-1])) * BLOCK

    def load(self, tokens: Sequence[int], row: int) -> int:
        """Begin row `row` with the longest kept prefix of `tokens`, not all of them; how many tokens that is."""
        blocks = self._tree.find(tokens[:-1])
        self._cache.lengths[row] = length = len(blocks) * BLOCK
        if blocks:
            index = torch.tensor(blocks)
            for row_tensor, kept in self._pairs():
                row_tensor[row, :, :length] = kept[index].transpose(0, 1).flatten(1, 2)
        return length

    def save(self, tokens: Sequence[int], row: int) -> None:
        """Keep the prefixes of `tokens`, which are those that row `row` holds."""
        added = self._tree.add(tokens[: self._cache.lengths[row]])
        if not added:
            return
        first, last = added[0][0], added[-1][0] + 1  # what is missing is always the end
        index = torch.tensor([block for _, block in added])
        for row_tensor, kept in self._pairs():
            pieces = row_tensor[row, :, first * BLOCK : last * BLOCK]
            kept[index] = pieces.reshape(pieces.shape[0], last - first, BLOCK, -1).transpose(0, 1)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip((*self._cache.keys, *self._cache.values), (*self._keys, *self._values))


def _store(like: Tensor, blocks: int) -> Tensor:
    _, kv_heads, _, head_width = like.shape
    return zeros((blocks, kv_heads, BLOCK, head_width), like.dtype, like.device)

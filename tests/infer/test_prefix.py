"""The prefix tree against a dictionary of prefixes, and the cache's copies against what was there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formary.infer.cache import KVCache
from formary.infer.prefix import BLOCK, PrefixCache, PrefixTree
from formary.recipe.presets import preset

SIZE = 2


class NaivePrefixes:
    """Every kept prefix with the time of its last use; a longer one counts as used just before its own beginning."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.times: dict[tuple[int, ...], tuple[int, int]] = {}
        self.clock = 0

    def use(self, tokens: tuple[int, ...]) -> None:
        self.clock += 1
        for end in range(SIZE, len(tokens) + 1, SIZE):
            if tokens[:end] in self.times:
                self.times[tokens[:end]] = (self.clock, -end)

    def find(self, tokens: tuple[int, ...]) -> int:
        self.use(tokens)
        return max((end for end in range(SIZE, len(tokens) + 1, SIZE) if tokens[:end] in self.times), default=0)

    def add(self, tokens: tuple[int, ...]) -> None:
        self.use(tokens)
        for end in range(SIZE, len(tokens) + 1, SIZE):
            if tokens[:end] in self.times:
                continue
            if len(self.times) == self.most:
                oldest = min(self.times, key=self.times.__getitem__) if self.times else None
                if oldest is None or tokens[: len(oldest)] == oldest:
                    break
                del self.times[oldest]
            self.times[tokens[:end]] = (self.clock, -end)


sequences = st.lists(st.integers(0, 1), max_size=12).map(tuple)
operations = st.lists(st.tuples(st.booleans(), sequences), max_size=40)


@given(st.integers(0, 7), operations)
def test_the_tree_finds_what_a_dictionary_of_prefixes_finds(blocks: int, operations: list[tuple[bool, tuple]]) -> None:
    tree, naive = PrefixTree(blocks, SIZE), NaivePrefixes(blocks)
    pieces: dict[int, tuple[int, ...]] = {}  # what the caller stored in each block
    for adds, tokens in operations:
        if adds:
            for piece, block in tree.add(tokens):
                pieces[block] = tokens[piece * SIZE : (piece + 1) * SIZE]
            naive.add(tokens)
        found = tree.find(tokens)
        assert len(found) * SIZE == naive.find(tokens)
        assert sum((pieces[block] for block in found), ()) == tokens[: len(found) * SIZE]
        assert len(tree) == len(naive.times) <= blocks


@pytest.fixture
def cache() -> KVCache:
    network = preset("gpt-mini", vocab_size=9, context=200, size="2x32", switches={"heads": 4, "kv_heads": 2})
    cache = KVCache(dataclasses.replace(network.transformer), slots=3, context=200)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_(generator=torch.Generator().manual_seed(0))
    return cache


def test_a_row_begins_with_a_copy_of_what_was_kept(cache: KVCache) -> None:
    prefixes = PrefixCache(cache, 10 * BLOCK)
    tokens = [place % 7 for place in range(3 * BLOCK + 5)]
    cache.lengths[0] = len(tokens)
    prefixes.save(tokens, 0)
    assert prefixes.tokens == 3 * BLOCK
    longer = [*tokens[: 3 * BLOCK], 8, 8]
    cache.lengths[1] = len(longer)
    for tensor in (*cache.keys, *cache.values):
        tensor[1, :, : 3 * BLOCK] = tensor[0, :, : 3 * BLOCK]
    assert prefixes.load(longer, 2) == 3 * BLOCK == cache.lengths[2]
    for tensor in (*cache.keys, *cache.values):
        assert torch.equal(tensor[2, :, : 3 * BLOCK], tensor[0, :, : 3 * BLOCK])


def test_the_last_token_of_a_prompt_is_always_left_to_read(cache: KVCache) -> None:
    prefixes = PrefixCache(cache, 10 * BLOCK)
    tokens = list(range(2 * BLOCK))
    cache.lengths[0] = 2 * BLOCK
    prefixes.save(tokens, 0)
    assert prefixes.load(tokens, 1) == prefixes.match(tokens) == BLOCK


def test_only_what_a_row_holds_is_kept(cache: KVCache) -> None:
    prefixes = PrefixCache(cache, 10 * BLOCK)
    cache.lengths[0] = 2 * BLOCK - 1
    prefixes.save(list(range(3 * BLOCK)), 0)
    assert prefixes.tokens == BLOCK

"""Same and nearly the same texts: an exact set of 64-bit hashes, and MinHash signatures with banded look-up.

Both look only at folded text, and both are compact: 10 to 16 bytes a row for exact, about half a kilobyte for near.
It says which texts are alike; dropping them is `clean`'s and `documents`' business.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

PERMUTATIONS = 128
"""Values per signature: the standard error of an estimated similarity is sqrt(J (1 - J) / 128), at most 0.044."""

SHINGLE_WORDS = 3
"""A shingle is this many neighbouring words; a Chinese, Japanese or Korean character counts as a word."""

_ASCII_SPACE = b" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"
_ASCII_LOWER = bytes(range(65)) + bytes(range(97, 123)) + bytes(range(91, 256))
_BLOCK = 4096  # signatures
_MAX_CANDIDATES = 64  # looked at per band, so that boilerplate shared by thousands of documents stays cheap


def exact_key(text: str) -> int:
    """The 64-bit hash of `text` without regard to case and white space; never 0. Stable over runs and machines."""
    if text.isascii():
        folded = text.encode().translate(_ASCII_LOWER, _ASCII_SPACE)
    else:
        folded = "".join(text.casefold().split()).encode("utf-8", "surrogatepass")
    return xxhash.xxh3_64_intdigest(folded) or 1


class HashSet:
    """A growing set of non-zero 64-bit hashes in one flat array (open addressing, at most 4/5 full).

    The members have to be hashes, spread evenly over 64 bits: a number's place in the array follows from its size.
    A Python set takes about 70 bytes a number, this takes 10 to 16: ten million rows fit in 160 MB.
    """

    def __init__(self, size: int = 1024) -> None:
        self._count = 0
        self._slots = size
        self._table = array("Q", bytes(8 * (size + 64)))

    def __len__(self) -> int:
        return self._count

    def __contains__(self, value: int) -> bool:
        return self._table[self._find(value)] == value

    @property
    def nbytes(self) -> int:
        """Bytes the table occupies."""
        return len(self._table) * self._table.itemsize

    def add(self, value: int) -> bool:
        """Put `value` (1 to 2**64 - 1) in; False if it was there already."""
        slot = self._find(value)
        if self._table[slot] == value:
            return False
        self._table[slot] = value
        self._count += 1
        # Probing runs off the last slot into a tail instead of wrapping round; a nearly full tail also means "grow".
        if self._count * 5 > self._slots * 4 or slot > self._slots + 32:
            self._grow()
        return True

    def _find(self, value: int) -> int:
        """The slot that holds `value`, or the free one where it belongs. The home slot rises with the value."""
        table = self._table
        slot = (value * self._slots) >> 64
        while (held := table[slot]) and held != value:
            slot += 1
        return slot

    def _grow(self) -> None:
        values = np.frombuffer(self._table, dtype=np.uint64)
        values = np.sort(values[values != 0])
        self._slots = int(self._slots * 1.6)
        while True:
            # Sorted values have sorted homes, so each goes to its home or right behind the one before it.
            homes = _homes(values, self._slots)
            order = np.arange(len(values))
            slots = np.maximum.accumulate(homes - order) + order
            if len(slots) == 0 or slots[-1] <= self._slots + 32:
                break
            self._slots = int(self._slots * 1.1) + 64
        table = np.zeros(self._slots + 64, dtype=np.uint64)
        table[slots] = values
        self._table = array("Q", table.tobytes())


class NearDuplicates:
    """Finds texts whose estimated Jaccard similarity of word shingles to an earlier one exceeds a threshold.

    MinHash (Broder 1997) with banding (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", ch. 3): a pair at the
    threshold shares a band with probability of at least 0.97, and every candidate is checked against its signature.

    Args:
        threshold: similarity (0 to 1) that must be exceeded.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.band_rows = _band_rows(threshold)
        self.bands = PERMUTATIONS // self.band_rows
        self._count = 0
        # 16 bits of each value are kept: two unlike values agree by chance once in 65,536.
        self._signatures: list[np.ndarray[Any, Any]] = []  # in blocks, which grow without being copied
        self._runs: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []

    def __len__(self) -> int:
        return self._count

    def add(self, texts: Sequence[str]) -> list[int | None]:
        """Put texts in, in order; for each that is near an earlier kept one, that one's number, else None.

        Numbers count the kept texts from 0. A near-duplicate is not kept, so chains do not grow: every dropped text is
        itself near a kept one.
        """
        signatures, keys = self._signed(texts)
        partners = self._candidates(keys)
        # Within the batch, texts that share a band with an earlier text of the batch are candidates too.
        in_batch: dict[int, list[int]] = {}
        number_of: dict[int, int] = {}
        answers: list[int | None] = []
        for i, text_keys in enumerate(keys.tolist()):
            near = self._nearest(signatures[i], partners[i])
            shared = {j for key in text_keys for j in in_batch.get(key, ())[-_MAX_CANDIDATES:]}
            if near is None and shared:
                earlier = sorted(shared)
                equal = (signatures[earlier] == signatures[i]).mean(axis=1)
                best = int(equal.argmax())
                near = number_of[earlier[best]] if equal[best] > self.threshold else None
            answers.append(near)
            if near is None:
                number_of[i] = self._count + len(number_of)
                for key in text_keys:
                    in_batch.setdefault(key, []).append(i)
        kept = list(number_of)
        self._store(signatures[kept], keys[kept])
        return answers

    def find(self, texts: Sequence[str]) -> list[int | None]:
        """For each text the number of a near one that was added, or None; puts nothing in."""
        signatures, keys = self._signed(texts)
        partners = self._candidates(keys)
        return [self._nearest(signature, candidates) for signature, candidates in zip(signatures, partners)]

    def _signed(self, texts: Sequence[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        full = signatures(texts)
        used = full[:, : self.bands * self.band_rows].reshape(len(texts), self.bands, self.band_rows).astype(np.uint64)
        keys = np.broadcast_to(np.arange(self.bands, dtype=np.uint64), used.shape[:2]).copy()
        for row in range(self.band_rows):
            keys = _mixed(keys ^ used[:, :, row])
        return full.astype(np.uint16), keys

    def _candidates(self, keys: np.ndarray[Any, Any]) -> list[set[int]]:
        found: list[set[int]] = [set() for _ in keys]
        if keys.size == 0:
            return found
        for run_keys, run_rows in self._runs:
            first = np.searchsorted(run_keys, keys, side="left")
            last = np.minimum(np.searchsorted(run_keys, keys, side="right"), first + _MAX_CANDIDATES)
            for text, band in zip(*np.nonzero(last > first)):
                found[text].update(run_rows[first[text, band] : last[text, band]].tolist())
        return found

    def _nearest(self, signature: np.ndarray[Any, Any], candidates: set[int]) -> int | None:
        if not candidates:
            return None
        numbers = sorted(candidates)
        stored = np.stack([self._signatures[number // _BLOCK][number % _BLOCK] for number in numbers])
        equal = (stored == signature).mean(axis=1)
        best = int(equal.argmax())
        return numbers[best] if equal[best] > self.threshold else None

    def _store(self, signatures: np.ndarray[Any, Any], keys: np.ndarray[Any, Any]) -> None:
        if len(signatures) == 0:
            return
        end = self._count + len(signatures)
        for number, signature in enumerate(signatures, self._count):
            if number % _BLOCK == 0:
                self._signatures.append(np.empty((_BLOCK, PERMUTATIONS), dtype=np.uint16))
            self._signatures[-1][number % _BLOCK] = signature
        rows = np.repeat(np.arange(self._count, end, dtype=np.uint32), keys.shape[1])
        run = _sorted_run(keys.ravel(), rows)
        # Sorted runs of doubling size: each entry is merged log(n) times, and a look-up searches log(n) runs.
        while self._runs and len(self._runs[-1][0]) < 2 * len(run[0]):
            keys_before, rows_before = self._runs.pop()
            run = _sorted_run(np.concatenate([keys_before, run[0]]), np.concatenate([rows_before, run[1]]))
        self._runs.append(run)
        self._count = end


def signatures(texts: Sequence[str]) -> np.ndarray[Any, Any]:  # (texts, PERMUTATIONS) uint32
    """MinHash signatures; the share of equal values of two rows estimates the Jaccard similarity of their shingles."""
    hashes, starts = _shingles(texts)
    result = np.empty((len(texts), PERMUTATIONS), dtype=np.uint32)
    if len(texts) == 0:
        return result
    scratch = np.empty_like(hashes)
    for i in range(PERMUTATIONS):  # h_i(x) = a_i x + b_i mod 2^32, a permutation since a_i is odd
        np.multiply(hashes, _FACTORS[i], out=scratch)
        np.add(scratch, _OFFSETS[i], out=scratch)
        result[:, i] = np.minimum.reduceat(scratch, starts)
    return result


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Hashes (uint32) of all shingles of all texts, and where each text's begin; every text has at least one."""
    folded = [text.casefold() for text in texts]
    joined = "\n".join(folded) + "\n"  # a newline belongs to no word
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = np.array([len(text) + 1 for text in folded], dtype=np.int64)
    text_starts = np.concatenate([[0], np.cumsum(lengths)])

    inside = _is_word(codes)
    alone = _is_cjk(codes)
    starts = inside.copy()
    starts[1:] &= ~inside[:-1] | alone[1:] | alone[:-1]
    word_starts = np.flatnonzero(starts)
    if len(word_starts) == 0:
        return _whole_texts(texts), np.arange(len(texts))
    # A word's hash is the sum over its characters of (character mixed with its place in the word).
    characters = np.flatnonzero(inside)
    word_of = np.cumsum(starts)[characters] - 1
    place = (characters - word_starts[word_of]).astype(np.uint64)
    mixed = _mixed((codes[characters].astype(np.uint64) << np.uint64(24)) + place)
    words = _mixed(np.add.reduceat(mixed, np.searchsorted(characters, word_starts)))

    shingled = words.copy()
    for next_word in range(1, SHINGLE_WORDS):
        shingled[:-next_word] = shingled[:-next_word] * np.uint64(0x9E3779B97F4A7C15) + words[next_word:]
    hashes = (_mixed(shingled) >> np.uint64(32)).astype(np.uint32)

    first = np.searchsorted(word_starts, text_starts)
    counts = np.diff(first) - (SHINGLE_WORDS - 1)
    text_of = np.repeat(np.arange(len(texts)), np.diff(first))
    within_text = np.arange(len(words)) - first[text_of] < counts[text_of]
    # Texts shorter than one shingle are represented by one hash of the whole text.
    short = np.flatnonzero(counts < 1)
    sizes = np.maximum(counts, 1)
    begins = np.cumsum(sizes) - sizes
    is_whole = np.zeros(sizes.sum(), dtype=bool)
    is_whole[begins[short]] = True
    result = np.empty(len(is_whole), dtype=np.uint32)
    result[is_whole] = _whole_texts([texts[i] for i in short.tolist()])
    result[~is_whole] = hashes[within_text]
    return result, begins


def _whole_texts(texts: Sequence[str]) -> np.ndarray[Any, Any]:
    return np.array([exact_key(text) >> 32 for text in texts], dtype=np.uint32)


def _is_word(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Not white space, not punctuation of ASCII, Latin-1, the general, CJK and full-width blocks."""
    table = _WORD_BELOW_256
    small = codes < 256
    result = np.ones(len(codes), dtype=bool)
    result[small] = table[codes[small]]
    if small.all():
        return result
    for low, high in (
        (0x2000, 0x206F),
        (0x3000, 0x3004),
        (0x3007, 0x3020),
        (0xFE30, 0xFE6F),
        (0xFF00, 0xFF0F),
        (0xFF1A, 0xFF20),
    ):
        result &= (codes < low) | (codes > high)
    return result


def _is_cjk(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Characters of scripts written without spaces between words."""
    result = (codes >= 0x3040) & (codes <= 0x9FFF)
    result |= (codes >= 0xAC00) & (codes <= 0xD7A3)
    result |= (codes >= 0xF900) & (codes <= 0xFAFF)
    result |= (codes >= 0x20000) & (codes <= 0x3FFFF)
    return result


def _mixed(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every bit of the input reaches every bit of the output."""
    mixed: np.ndarray[Any, Any] = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _sorted_run(
    keys: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    order = np.argsort(keys, kind="stable")
    return keys[order], rows[order]


def _homes(values: np.ndarray[Any, Any], slots: int) -> np.ndarray[Any, Any]:
    """(value * slots) >> 64 without losing bits: the high part of a 64 x 32 bit product, by 32-bit halves."""
    low, high = values & np.uint64(0xFFFFFFFF), values >> np.uint64(32)
    factor = np.uint64(slots)
    return ((high * factor + ((low * factor) >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)


def _band_rows(threshold: float) -> int:
    """The longest band with which a pair at the threshold is still found with probability 0.97."""
    for rows in range(PERMUTATIONS, 1, -1):
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.97:
            return rows
    return 1


_random = np.random.default_rng(20240229)
_FACTORS = _random.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32) | np.uint32(1)
_OFFSETS = _random.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32)
_WORD_BELOW_256 = np.array([chr(code).isalnum() or chr(code) == "_" for code in range(256)])

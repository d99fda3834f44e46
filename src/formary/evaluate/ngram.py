"""Count-based language models, the baselines a Transformer has to beat: a unigram and an interpolated n-gram.

The one idea: an n-gram is (number of its context, last token), so each order is one sorted array of integers and
counting, discounting and scoring are array operations. It takes token ids; it knows nothing of tokenizers or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_DISCOUNTS = (0.5, 1.0, 1.5)  # for counts 1, 2, 3+ where the counts of counts are too thin to estimate them


@dataclass(frozen=True)
class Unigram:
    """Each token by its share of the training text, plus one (Laplace) so that none is impossible."""

    logarithms: Floats  # (vocab_size,)

    @classmethod
    def fit(cls, tokens: ArrayLike, *, vocab_size: int) -> Unigram:
        """Count `tokens` (n,)."""
        counts = np.bincount(_checked(tokens, vocab_size), minlength=vocab_size) + 1.0
        return cls(np.log(counts / counts.sum()))

    def log_probs(self, tokens: ArrayLike) -> Floats:
        """Natural logarithm of each token's probability: (n,) -> (n,)."""
        return np.asarray(self.logarithms[_checked(tokens, len(self.logarithms))], dtype=np.float64)


@dataclass(frozen=True)
class _Order:
    """All seen n-grams of one length n > 1. A gram's number is its place in `keys`."""

    keys: Integers  # (grams,) sorted: number of the context (a gram of length n - 1) * (vocab_size + 1) + token
    probabilities: Floats  # (grams,) p(token | context), interpolated with all shorter contexts
    left_over: Floats  # (contexts,) what a context leaves to the next shorter one; 1 where nothing followed it

    def find(self, keys: Integers) -> Integers:
        """The numbers of grams, -1 where unseen."""
        places = np.searchsorted(self.keys, keys)
        return np.where(np.append(self.keys, -1)[places] == keys, places, -1)


@dataclass(frozen=True)
class NGram:
    """An interpolated n-gram model with modified Kneser-Ney discounts (Chen & Goodman 1999, section 3).

    p(w | h) = (a(hw) - D(a(hw))) / sum_v a(hv) + left_over(h) p(w | h without its first token), down to 1 / vocab_size.
    The adjusted count a is the count at the highest order, the number of distinct left neighbours below it; grams that
    begin a document have no neighbour but the begin mark, so they keep their count. Probabilities over the vocabulary
    sum to 1 in every context. The end of a document is predicted if its token is in the text.
    """

    order: int
    vocab_size: int
    unigrams: Floats  # (vocab_size,) probabilities without context
    orders: tuple[_Order, ...]  # lengths 2 .. order

    @classmethod
    def fit(cls, tokens: ArrayLike, document_starts: ArrayLike, *, order: int = 5, vocab_size: int) -> NGram:
        """Count n-grams up to length `order` within documents.

        About 0.2 s and 60 MB per million tokens and order; pass a slice of a corpus that is too large for that.

        Args:
            tokens: (n,) ids below vocab_size; a memory map will do.
            document_starts: (documents + 1,) offsets into tokens, the last one being n.

        Raises:
            ValueError: an id outside the vocabulary, or offsets that do not fit.
        """
        if order < 1:
            raise ValueError(f"order must be at least 1, not {order}")
        marked, starts = _with_begin_marks(tokens, document_starts, vocab_size)
        depth = _depth(len(marked), starts)
        base = vocab_size + 1  # the begin mark is token number vocab_size; it is context only, never predicted
        numbers: Integers = marked  # per position: number of the gram of the current length that ends there
        keys: Integers = np.arange(base)
        counts = np.bincount(marked, minlength=base)
        from_begin = np.zeros(base, dtype=bool)
        shorter = np.zeros(0)  # probabilities of the grams one token shorter
        below: Integers = np.zeros(base, dtype=np.int64)  # the gram one shorter at the same end, per gram
        unigrams = np.zeros(0)
        built: list[_Order] = []
        for length in range(1, order + 1):
            if length < order:
                longer_keys, longer_numbers, longer_counts, ends = _extend(numbers, marked, depth, length + 1, base)
                neighbours = np.bincount(numbers[ends], minlength=len(keys))
                adjusted = np.where(from_begin, counts, neighbours)
            else:
                adjusted = counts
            if length == 1:
                unigrams = shorter = _unigram_probabilities(adjusted[:vocab_size])
                shorter = np.append(shorter, 0.0)
            else:
                probabilities, left_over = _interpolate(adjusted, keys // base, shorter[below], contexts=len(shorter))
                built.append(_Order(keys, probabilities, left_over))
                shorter = probabilities
            if length < order:
                from_begin = (longer_keys // base == vocab_size) if length == 1 else from_begin[longer_keys // base]
                below = numbers[ends]
                keys, numbers, counts = longer_keys, longer_numbers, longer_counts
        return cls(order, vocab_size, unigrams, tuple(built))

    def log_probs(self, tokens: ArrayLike, document_starts: ArrayLike | None = None) -> Floats:
        """Natural logarithm of each token's probability given those before it in its document: (n,) -> (n,).

        `tokens` is one document, or several behind one another with their `document_starts` (documents + 1,).
        """
        single = (0, len(np.asarray(tokens)))
        marked, starts = _with_begin_marks(
            tokens, single if document_starts is None else document_starts, self.vocab_size
        )
        base = self.vocab_size + 1
        probabilities = np.append(self.unigrams, 1.0)[marked]
        numbers: Integers = marked
        first = np.zeros(len(marked), dtype=bool)
        first[starts] = True
        for seen in self.orders:
            contexts = np.empty_like(
                numbers
            )  # a begin mark has no context, hence -1: everything before it is another text
            contexts[1:], contexts[:1] = numbers[:-1], -1
            contexts[first] = -1
            numbers = np.full(len(marked), -1, dtype=np.int64)
            known = np.flatnonzero(contexts >= 0)
            found = seen.find(contexts[known] * base + marked[known])
            numbers[known] = found
            probabilities[known] *= seen.left_over[contexts[known]]
            hit = found >= 0
            probabilities[known[hit]] = seen.probabilities[found[hit]]
        return np.asarray(np.log(probabilities[~first]), dtype=np.float64)


def discounts(adjusted: Integers) -> tuple[float, float, float]:
    """D1, D2, D3+ from how many grams have counts 1 to 4 (Chen & Goodman 1999, eq. 26).

    Where a count of counts is 0 or a discount would fall outside (0, count], a fixed value (0.5, 1, 1.5) stands in.
    """
    n = np.bincount(adjusted[adjusted < 5], minlength=5)[:5].astype(float)
    if n[1] == 0 or n[2] == 0:
        return _DISCOUNTS
    y = n[1] / (n[1] + 2 * n[2])
    estimated = [i - (i + 1) * y * n[i + 1] / n[i] if n[i] and n[i + 1] else -1.0 for i in (1, 2, 3)]
    one, two, three = (d if 0 < d <= i else _DISCOUNTS[i - 1] for i, d in enumerate(estimated, start=1))
    return one, two, three


def _extend(
    numbers: Integers, marked: Integers, depth: Integers, length: int, base: int
) -> tuple[Integers, Integers, Integers, Integers]:
    """Grams of `length` from those one shorter: keys, number per position, counts, and one end position per gram."""
    positions = np.flatnonzero(depth >= length)
    key_at = numbers[positions - 1] * base + marked[positions]
    ordered = np.argsort(key_at)
    sorted_keys = key_at[ordered]
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = sorted_keys[1:] != sorted_keys[:-1]
    firsts = np.flatnonzero(new)
    longer = np.full(len(marked), -1, dtype=np.int64)
    longer[positions[ordered]] = np.cumsum(new) - 1
    counts = np.diff(np.append(firsts, len(ordered)))
    return sorted_keys[firsts], longer, counts, positions[ordered[firsts]]


def _interpolate(adjusted: Integers, contexts_of: Integers, shorter: Floats, *, contexts: int) -> tuple[Floats, Floats]:
    """Probabilities per gram and what is left over per context."""
    discount = np.array([0.0, *discounts(adjusted)])[np.minimum(adjusted, 3)]
    totals = np.bincount(contexts_of, weights=adjusted, minlength=contexts)
    removed = np.bincount(contexts_of, weights=discount, minlength=contexts)
    followed = totals > 0
    left_over = np.divide(removed, totals, out=np.ones(contexts), where=followed)
    return (adjusted - discount) / totals[contexts_of] + left_over[contexts_of] * shorter, left_over


def _unigram_probabilities(adjusted: Integers) -> Floats:
    """Discounted shares interpolated with the uniform distribution: (vocab_size,)."""
    if adjusted.sum() == 0:
        return np.full(len(adjusted), 1 / len(adjusted))
    discount = np.array([0.0, *discounts(adjusted)])[np.minimum(adjusted, 3)]
    return np.asarray((adjusted - discount + discount.sum() / len(adjusted)) / adjusted.sum(), dtype=np.float64)


def _with_begin_marks(tokens: ArrayLike, document_starts: ArrayLike, vocab_size: int) -> tuple[Integers, Integers]:
    """Tokens with a begin mark (id vocab_size) before each document, and where those marks are."""
    checked = _checked(tokens, vocab_size)
    starts = np.asarray(document_starts, dtype=np.int64)
    if len(starts) < 1 or starts[0] != 0 or starts[-1] != len(checked) or (np.diff(starts) < 0).any():
        raise ValueError(f"document_starts must rise from 0 to {len(checked)}, the number of tokens")
    marks = starts[:-1] + np.arange(len(starts) - 1)
    marked = np.full(len(checked) + len(marks), vocab_size, dtype=np.int64)
    plain = np.ones(len(marked), dtype=bool)
    plain[marks] = False
    marked[plain] = checked
    return marked, marks


def _depth(count: int, marks: Integers) -> Integers:
    """How long the gram that ends at each position may be without leaving its document, begin mark included."""
    sizes = np.diff(np.append(marks, count))
    return np.arange(count) - np.repeat(marks, sizes) + 1


def _checked(tokens: ArrayLike, vocab_size: int) -> Integers:
    ids = np.asarray(tokens).astype(np.int64)
    if ids.ndim != 1:
        raise ValueError(f"tokens must be (n,), not {ids.shape}")
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(f"token ids must lie in 0 .. {vocab_size - 1}, found {ids.min()} .. {ids.max()}")
    return ids

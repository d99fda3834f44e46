"""The n-gram baselines are what the formulas say, sum to one everywhere, and are fast enough to always be run."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.evaluate.ngram import NGram, Unigram, discounts

BEGIN = "begin"


class LiteralKneserNey:
    """Chen & Goodman's formulas with dictionaries and recursion, one token at a time."""

    def __init__(self, documents: list[list[int]], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        raw: list[Counter] = [Counter() for _ in range(order + 1)]
        left: list[dict] = [defaultdict(set) for _ in range(order + 1)]
        for document in documents:
            words = (BEGIN, *document)
            for length in range(1, order + 1):
                for start in range(len(words) - length + 1):
                    gram = words[start : start + length]
                    raw[length][gram] += 1
                    if start > 0:
                        left[length][gram].add(words[start - 1])
        self.adjusted: list[dict] = [{}]
        for length in range(1, order + 1):
            counts = {}
            for gram, count in raw[length].items():
                if gram == (BEGIN,):
                    continue
                counts[gram] = count if length == order or gram[0] == BEGIN else len(left[length][gram])
            self.adjusted.append(counts)
        self.discounts = [None, *(discounts(np.array(list(c.values()), dtype=int)) for c in self.adjusted[1:])]

    def probability(self, word: int, context: tuple) -> float:
        length = len(context) + 1
        shorter = self.probability(word, context[1:]) if context else 1 / self.vocab_size
        followers = [count for gram, count in self.adjusted[length].items() if gram[:-1] == context]
        if not followers:
            return shorter
        discount = [0.0, *self.discounts[length]]
        count = self.adjusted[length].get((*context, word), 0)
        gamma = sum(discount[min(c, 3)] for c in followers) / sum(followers)
        return max(count - discount[min(count, 3)], 0) / sum(followers) + gamma * shorter

    def log_probs(self, document: list[int]) -> np.ndarray:
        words = (BEGIN, *document)
        ends = range(1, len(words))
        return np.log([self.probability(words[i], words[max(0, i - self.order + 1) : i]) for i in ends])


def packed(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *map(len, documents)])
    return np.array([t for d in documents for t in d], dtype=np.uint16), starts


texts = st.lists(st.lists(st.integers(0, 5), max_size=25), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(train=texts, test=st.lists(st.integers(0, 6), max_size=20), order=st.integers(1, 5))
def test_every_probability_is_that_of_the_literal_formulas(train, test, order):
    model = NGram.fit(*packed(train), order=order, vocab_size=7)
    oracle = LiteralKneserNey(train, order, vocab_size=7)
    np.testing.assert_allclose(model.log_probs(np.array(test, dtype=int)), oracle.log_probs(test), atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(train=texts, context=st.lists(st.integers(0, 6), max_size=6), order=st.integers(1, 6))
def test_probabilities_over_the_vocabulary_sum_to_one_in_any_context(train, context, order):
    model = NGram.fit(*packed(train), order=order, vocab_size=7)
    last = [model.log_probs(np.array([*context, word]))[-1] for word in range(7)]
    assert np.exp(last).sum() == pytest.approx(1, abs=1e-9)
    assert np.isfinite(last).all()


def test_a_longer_text_with_estimated_discounts_matches_the_literal_formulas():
    random = np.random.default_rng(3)
    documents = [random.zipf(1.4, size=60).clip(max=30).tolist() for _ in range(12)]
    counts = LiteralKneserNey(documents[:10], 3, vocab_size=32).adjusted[3]
    assert discounts(np.array(list(counts.values()))) != (0.5, 1.0, 1.5), "the case should not rest on the fallback"
    model = NGram.fit(*packed(documents[:10]), order=3, vocab_size=32)
    oracle = LiteralKneserNey(documents[:10], 3, vocab_size=32)
    for document in documents[8:]:  # two seen, two new
        np.testing.assert_allclose(model.log_probs(np.array(document)), oracle.log_probs(document), atol=1e-10)


def test_discounts_are_those_of_chen_and_goodman():
    adjusted = np.repeat([1, 2, 3, 4, 9], [100, 40, 20, 12, 5])
    y = 100 / 180
    expected = (1 - 2 * y * 40 / 100, 2 - 3 * y * 20 / 40, 3 - 4 * y * 12 / 20)
    assert discounts(adjusted) == pytest.approx(expected)


def test_discounts_stay_usable_when_counts_of_counts_are_empty():
    for adjusted in ([], [7, 9], [1, 1, 1], [2, 2], [1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]):
        for limit, discount in enumerate(discounts(np.array(adjusted, dtype=int)), start=1):
            assert 0 < discount <= limit


def test_context_never_reaches_into_the_document_before():
    documents = [[1, 2, 3], [3, 1, 2, 2], [], [2]]
    model = NGram.fit(*packed(documents), order=4, vocab_size=5)
    together = model.log_probs(*packed(documents))
    apart = np.concatenate([model.log_probs(np.array(d, dtype=int)) for d in documents])
    np.testing.assert_array_equal(together, apart)


def test_the_begin_of_a_document_is_learnt():
    documents = [[4, *row] for row in np.random.default_rng(0).integers(0, 4, size=(50, 6)).tolist()]
    model = NGram.fit(*packed(documents), order=3, vocab_size=6)
    assert np.exp(model.log_probs(np.array([4])))[0] > 0.9
    assert np.exp(model.log_probs(np.array([0, 4])))[1] < 0.1


def test_more_context_helps_where_context_decides_and_does_not_harm_where_it_does_not():
    random = np.random.default_rng(1)
    tokens = [0, 1]
    for luck in random.random(6000):  # half the time the last token decides, half the time the last two do
        tokens.append((tokens[-1] + 1) % 8 if luck < 0.5 else (tokens[-1] * 3 + tokens[-2]) % 8)
    train, test = tokens[:5000], np.array(tokens[5000:])
    loss = {n: -NGram.fit(*packed([train]), order=n, vocab_size=8).log_probs(test).mean() for n in (1, 2, 3, 5)}
    assert loss[1] > loss[2] + 0.2
    assert loss[2] > loss[3] + 0.2
    assert loss[3] < np.log(2) * 1.1, "order 3 sees all that decides, which leaves one bit at most"
    assert loss[5] < loss[3] * 1.2, "contexts that are too long back off"


def test_no_training_text_gives_the_uniform_distribution():
    model = NGram.fit(np.zeros(0, dtype=np.uint16), np.array([0]), order=3, vocab_size=10)
    np.testing.assert_allclose(np.exp(model.log_probs(np.array([3, 3, 9]))), 0.1)


def test_unigram_counts_one_more_of_everything():
    model = Unigram.fit(np.array([0, 0, 2]), vocab_size=4)
    np.testing.assert_allclose(np.exp(model.log_probs(np.array([0, 1, 2, 3]))), np.array([3, 1, 2, 1]) / 7)


def test_ids_outside_the_vocabulary_and_wrong_offsets_are_refused():
    with pytest.raises(ValueError, match=r"0 \.\. 4"):
        NGram.fit(np.array([5]), np.array([0, 1]), vocab_size=5)
    with pytest.raises(ValueError, match=r"0 \.\. 4"):
        Unigram.fit(np.array([1]), vocab_size=5).log_probs(np.array([-1]))
    with pytest.raises(ValueError, match="document_starts"):
        NGram.fit(np.array([1, 2]), np.array([0, 1]), vocab_size=5)
    with pytest.raises(ValueError, match="order"):
        NGram.fit(np.array([1]), np.array([0, 1]), order=0, vocab_size=5)

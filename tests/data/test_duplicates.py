"""Exact duplicates by hash and near-duplicates by MinHash, against plain sets as the oracle."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data import duplicates
from formary.data.duplicates import HashSet, NearDuplicates, exact_key, signatures

quick = settings(max_examples=80, deadline=None)
WORDS = [f"w{number}" for number in range(5000)]


def prose(seed: int, words: int = 300) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def edited(text: str, changes: int, seed: int) -> str:
    words, chance = text.split(), random.Random(seed)
    for place in chance.sample(range(len(words)), changes):
        words[place] = "edited"
    return " ".join(words)


def jaccard(one: str, other: str) -> float:
    sets = [set(zip(words, words[1:], words[2:])) for words in (one.split(), other.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@quick
@given(
    st.lists(st.one_of(st.integers(1, 50), st.integers(1, 2**64 - 1), st.integers(2**64 - 50, 2**64 - 1)), max_size=400)
)
def test_a_hash_set_answers_like_a_set(values: list[int]) -> None:
    ours, theirs = HashSet(size=4), set()
    for value in values:
        assert (value in ours) == (value in theirs)
        assert ours.add(value) == (value not in theirs)
        theirs.add(value)
    assert len(ours) == len(theirs) and all(value in ours for value in theirs)


def test_a_hash_set_takes_at_most_sixteen_bytes_a_number() -> None:
    ours = HashSet()
    values = np.random.default_rng(0).integers(1, 2**64, 100_000, dtype=np.uint64).tolist()
    assert sum(map(ours.add, values)) == len(set(values))
    assert not any(map(ours.add, values))
    assert ours.nbytes <= 16.1 * len(ours)


@quick
@given(st.text(max_size=60), st.sampled_from([" ", "\n", "\t", "\u3000"]))
def test_case_and_white_space_make_no_difference(text: str, space: str) -> None:
    assert exact_key(text) == exact_key(space + text + space) == exact_key(text.casefold())
    assert exact_key(text) != exact_key(text + "x")


def test_ascii_text_folds_as_it_would_among_other_characters() -> None:
    every = "".join(map(chr, range(128)))
    assert exact_key(every) == exact_key("".join(every.casefold().split()))
    assert exact_key("The  End\n") == exact_key("the end") != exact_key("the and")


def test_a_key_is_the_same_in_every_run_and_on_every_machine() -> None:
    assert exact_key("Call me Ishmael.") == 0x7013DC97CC76E569


@pytest.mark.parametrize("changes", [3, 10, 30])
def test_equal_values_of_signatures_estimate_jaccard_similarity(changes: int) -> None:
    pairs = [(prose(seed), edited(prose(seed), changes, seed)) for seed in range(40)]
    ours = signatures([text for pair in pairs for text in pair])
    estimated = (ours[0::2] == ours[1::2]).mean(axis=1)
    true = np.array([jaccard(*pair) for pair in pairs])
    # The standard error of one estimate is sqrt(J (1 - J) / 128).
    error = np.sqrt(true * (1 - true) / 128)
    assert abs((estimated - true).mean()) < 4 * error.mean() / np.sqrt(len(pairs))
    assert (abs(estimated - true) < 4.5 * error).all()


def test_shingles_are_of_words_in_text_and_of_characters_in_chinese() -> None:
    one, other = signatures(["The quick, brown fox -- jumps!", "the QUICK brown fox jumps"])
    assert (one == other).all()
    spaced, joined = signatures(["话说天下大势，分久必合", "话说 天下 大势 分久 必合。"])
    assert (spaced == joined).all()
    changed = signatures(["话说天下大势，分久必离"])[0]
    assert 0.4 < (spaced == changed).mean() < 0.98


@quick
@given(st.lists(st.text(st.sampled_from("ab ,.年月\n🙂éß"), max_size=40), min_size=1, max_size=6))
def test_a_signature_does_not_depend_on_the_other_texts(texts: list[str]) -> None:
    together = signatures(texts)
    assert together.shape == (len(texts), duplicates.PERMUTATIONS)
    for text, signature in zip(texts, together):
        assert (signatures([text])[0] == signature).all()


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_near_duplicates_are_found_and_others_are_not_whatever_the_batches(batch: int) -> None:
    originals = [prose(seed) for seed in range(150)]
    copies = [edited(text, 3, seed) for seed, text in enumerate(originals)]  # J about 0.94
    others = [edited(text, 60, seed) for seed, text in enumerate(originals)]  # J about 0.35
    texts = [text for triple in zip(originals, copies, others) for text in triple]
    near = NearDuplicates(0.8)
    answers = [answer for start in range(0, len(texts), batch) for answer in near.add(texts[start : start + batch])]
    assert answers[0::3] == [None] * 150
    assert answers[2::3] == [None] * 150
    assert answers[1::3] == [2 * number for number in range(150)]  # kept so far: an original and an other each
    assert len(near) == 300


def test_a_chain_of_small_edits_does_not_swallow_what_is_far_from_every_kept_text() -> None:
    chain = [prose(0, 100)]
    for step in range(12):
        chain.append(edited(chain[-1], 2, step))
    near = NearDuplicates(0.8)
    kept = [text for text in chain if near.add([text]) == [None]]
    assert len(kept) > 1
    # Every dropped text is near one that stays (five standard errors below the threshold at most).
    assert all(max(jaccard(text, other) for other in kept) > 0.8 - 0.15 for text in chain)


def test_finding_puts_nothing_in() -> None:
    near = NearDuplicates(0.7)
    near.add([prose(1)])
    assert near.find([prose(1), prose(2)]) == [0, None]
    assert near.find([prose(2)]) == [None] and len(near) == 1


def test_empty_and_wordless_texts_are_alike_only_when_equal() -> None:
    near = NearDuplicates(0.5)
    assert near.add(["", "...", "!!!", "", "one", "One "]) == [None, None, None, 0, None, 3]
    assert near.add([]) == []


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8, 0.95, 0.99])
def test_bands_find_a_pair_at_the_threshold_with_probability_of_97_per_cent(threshold: float) -> None:
    near = NearDuplicates(threshold)
    assert near.bands * near.band_rows <= duplicates.PERMUTATIONS
    if near.band_rows > 1:
        assert 1 - (1 - threshold**near.band_rows) ** near.bands >= 0.97


def test_many_stored_texts_are_still_found() -> None:
    near = NearDuplicates(0.8)
    texts = [prose(seed, 12) for seed in range(9000)]
    for start in range(0, len(texts), 1000):
        near.add(texts[start : start + 1000])
    assert near.find(texts[::500]) == [number if len(near) == 9000 else None for number in range(0, 9000, 500)]

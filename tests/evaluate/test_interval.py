"""Intervals agree with scipy, cover the truth as often as they promise, and verdicts follow from them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats

from formary.evaluate.interval import Interval, blocks, bootstrap_ratio, paired_difference, units


def documents(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss sums and token counts of documents of very different lengths and difficulties; 2 nats a token in truth."""
    random = np.random.default_rng(seed)
    tokens = random.integers(20, 400, size=count).astype(float)
    return tokens * random.gamma(20, 0.1, size=count), tokens


def scipy_interval(losses, tokens, statistic) -> tuple[float, float]:
    result = scipy.stats.bootstrap(
        (losses, tokens), statistic, paired=True, n_resamples=20_000, method="BCa", rng=np.random.default_rng(5)
    )
    return result.confidence_interval.low, result.confidence_interval.high


def test_loss_per_token_agrees_with_scipy():
    losses, tokens = documents(60, seed=0)
    ours = bootstrap_ratio(losses, tokens, resamples=20_000, seed=1)
    low, high = scipy_interval(losses, tokens, lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis))
    assert ours.value == pytest.approx(losses.sum() / tokens.sum())
    tolerance = 0.03 * (high - low)
    assert ours.low == pytest.approx(low, abs=tolerance)
    assert ours.high == pytest.approx(high, abs=tolerance)


def test_perplexity_agrees_with_scipy_where_the_distribution_is_skewed():
    losses, tokens = documents(12, seed=3)
    losses[0] *= 2.5
    ours = bootstrap_ratio(losses, tokens, resamples=20_000, seed=1, transform=np.exp)
    low, high = scipy_interval(losses, tokens, lambda a, b, axis: np.exp(a.sum(axis=axis) / b.sum(axis=axis)))
    assert ours.value == pytest.approx(math.exp(losses.sum() / tokens.sum()))
    tolerance = 0.05 * (high - low)
    assert ours.low == pytest.approx(low, abs=tolerance)
    assert ours.high == pytest.approx(high, abs=tolerance)


def test_a_mean_of_many_has_the_interval_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(3, 1, size=5000)
    interval = bootstrap_ratio(values, np.ones(5000), resamples=4000, seed=0)
    half = 1.96 * values.std() / math.sqrt(5000)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    held = 0
    for seed in range(400):
        interval = bootstrap_ratio(*documents(60, seed), resamples=500, seed=seed)
        held += interval.low <= 2.0 <= interval.high
    assert 0.91 <= held / 400 <= 0.985


def test_the_same_seed_gives_the_same_interval():
    case = documents(20, seed=0)
    assert bootstrap_ratio(*case, seed=4) == bootstrap_ratio(*case, seed=4)
    assert bootstrap_ratio(*case, seed=4) != bootstrap_ratio(*case, seed=5)


def test_equal_documents_leave_no_doubt():
    assert bootstrap_ratio([6, 6, 6], [3, 3, 3], seed=0) == Interval(2, 2, 2)


def test_one_document_alone_has_a_value_and_no_bounds():
    interval = bootstrap_ratio([6.0], [3.0], seed=0)
    assert interval == Interval(2, -math.inf, math.inf)
    assert not interval.known
    assert Interval.from_json(json.loads(json.dumps(interval.to_json()))) == interval


def test_empty_documents_change_nothing():
    losses, tokens = documents(20, seed=0)
    with_empty = bootstrap_ratio(np.append(losses, [0, 0]), np.append(tokens, [0, 0]), seed=0)
    assert with_empty == bootstrap_ratio(losses, tokens, seed=0)


@pytest.mark.parametrize(
    ("numerators", "denominators"),
    [([], []), ([1, 2], [1]), ([1, math.nan], [1, 1]), ([1, 2], [1, 0]), ([1, 2], [1, -1]), ([0, 0], [0, 0])],
)
def test_nonsense_is_refused(numerators, denominators):
    with pytest.raises(ValueError):
        bootstrap_ratio(numerators, denominators, seed=0)


def test_a_small_steady_gain_is_seen_though_the_intervals_overlap():
    losses, tokens = documents(60, seed=0)
    model = losses - 0.02 * tokens
    ours, theirs = bootstrap_ratio(model, tokens, seed=0), bootstrap_ratio(losses, tokens, seed=0)
    assert ours.high > theirs.low, "the two intervals overlap"
    difference = paired_difference(model, losses, tokens, seed=0)
    assert difference.verdict == "better"
    assert difference.interval.value == pytest.approx(-0.02)
    assert paired_difference(losses, model, tokens, seed=0).verdict == "worse"
    assert paired_difference(model, losses, tokens, seed=0, lower_is_better=False).verdict == "worse"
    assert paired_difference(losses, model, tokens, seed=0, lower_is_better=False).verdict == "better"


def test_two_equally_good_models_are_rarely_called_different():
    random = np.random.default_rng(0)
    verdicts = []
    for seed in range(200):
        losses, tokens = documents(40, seed)
        noise = random.normal(0, 0.1, size=(2, 40)) * tokens
        verdicts.append(
            paired_difference(losses + noise[0], losses + noise[1], tokens, resamples=400, seed=seed).verdict
        )
    assert verdicts.count("cannot tell") >= 180
    assert paired_difference([3.0], [9.0], [1.0], seed=0).verdict == "cannot tell", "one document proves nothing"


def test_a_difference_of_perplexities_is_measured_after_the_transform():
    losses, tokens = documents(40, seed=0)
    model = losses - 0.1 * tokens
    difference = paired_difference(model, losses, tokens, seed=0, transform=np.exp)
    ratio = losses.sum() / tokens.sum()
    assert difference.interval.value == pytest.approx(math.exp(ratio - 0.1) - math.exp(ratio))
    assert difference.verdict == "better"


def test_blocks_keep_every_token_and_leave_no_short_one():
    values = np.arange(10.0)
    np.testing.assert_array_equal(blocks(values, length=3), [0 + 1 + 2, 3 + 4 + 5, 6 + 7 + 8 + 9])
    np.testing.assert_array_equal(blocks(values, length=30), [45])
    assert len(blocks([], length=3)) == 0
    with pytest.raises(ValueError):
        blocks(values, length=0)


def test_blocks_hold_the_truth_where_single_tokens_pretend_to_know_more():
    held_by_blocks = held_by_tokens = 0
    for seed in range(150):
        random = np.random.default_rng(seed)
        shocks = random.normal(size=6200)
        losses = 2 + np.convolve(shocks, np.full(20, 20**-0.5), mode="valid")[:6000]  # neighbours share their luck
        cut = units(losses, np.ones(6000), [0, 6000])
        interval = bootstrap_ratio(cut.numerators, cut.denominators, resamples=300, seed=seed)
        held_by_blocks += interval.low <= 2 <= interval.high
        interval = bootstrap_ratio(losses, np.ones(6000), resamples=100, seed=seed)
        held_by_tokens += interval.low <= 2 <= interval.high
    assert held_by_blocks / 150 > 0.85
    assert held_by_tokens / 150 < 0.6


def test_many_documents_are_resampled_whole_and_few_in_blocks():
    values, ones = np.arange(1000.0), np.ones(1000)
    many = units(values, ones, np.arange(0, 1001, 20))
    assert many.words == "50 documents"
    np.testing.assert_array_equal(many.numerators, values.reshape(50, 20).sum(axis=1))
    few = units(values, ones, [0, 400, 400, 1000])
    assert few.words == "15 blocks of 64 tokens from 2 documents"
    assert few.numerators.sum() == values.sum() and few.denominators.sum() == 1000
    assert units([], [], [0, 0]).words == "0 documents"
    with pytest.raises(ValueError, match="document_starts"):
        units(values, ones, [0, 10])

"""Intervals agree with scipy, cover the truth as often as they promise, and verdicts follow from them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats

from formary.evaluate import interval
from formary.evaluate.interval import (
    Interval,
    blocks,
    bootstrap_ratio,
    bootstrap_rows,
    metric_entry,
    paired_difference,
    paired_rows,
    units,
    wilson,
)
from formary.recipe.schema import Evaluate


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


def share_of(hits):
    return lambda weights: weights @ np.asarray(hits, dtype=float) / weights.sum(axis=1)


def test_rows_resampled_by_weights_agree_with_scipy():
    values = np.random.default_rng(0).gamma(2, size=80)
    ours = bootstrap_rows(80, lambda w: w @ values / w.sum(axis=1), resamples=20_000, seed=1)
    result = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5)
    )
    low, high = result.confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(low, abs=0.03 * (high - low))
    assert ours.high == pytest.approx(high, abs=0.03 * (high - low))


def test_weights_are_multiplicities_of_as_many_rows():
    seen = []

    def statistic(weights):
        seen.append(weights)
        return weights[:, 0]

    bootstrap_rows(7, statistic, resamples=50, seed=0)
    drawn = np.concatenate([weights for weights in seen if len(weights) > 1])
    assert drawn.shape == (50, 7) and drawn.dtype == np.float64
    assert (drawn.sum(axis=1) == 7).all() and (drawn == drawn.round()).all() and drawn.max() > 1


def test_the_rows_drawn_do_not_depend_on_how_many_fit_in_memory(monkeypatch):
    hits = np.arange(50) % 3 == 0
    whole = bootstrap_rows(50, share_of(hits), resamples=200, seed=3)
    monkeypatch.setattr(interval, "_AT_ONCE", 700)
    assert bootstrap_rows(50, share_of(hits), resamples=200, seed=3) == whole


def test_resamples_without_a_value_are_left_out_unless_they_are_most():
    def sometimes(share):
        return lambda w: np.where(np.arange(len(w)) < share * len(w), w @ np.arange(9.0), np.nan)

    assert bootstrap_rows(9, sometimes(0.8), resamples=100, seed=0).known
    assert not bootstrap_rows(9, lambda w: np.where(len(w) > 1, np.nan, w.sum(axis=1)), resamples=100, seed=0).known
    assert not bootstrap_rows(1, share_of([1]), resamples=100, seed=0).known
    with pytest.raises(ValueError, match="no rows"):
        bootstrap_rows(0, share_of([]), seed=0)


def test_a_verdict_on_rows_needs_an_interval_beside_zero_and_enough_rows():
    good, bad = share_of([1] * 36 + [0] * 4), share_of([1] * 20 + [0] * 20)
    assert paired_rows(40, good, bad, seed=0).verdict == "better"
    assert paired_rows(40, bad, good, seed=0).verdict == "worse"
    assert paired_rows(40, good, bad, seed=0, lower_is_better=True).verdict == "worse"
    assert paired_rows(40, good, good, seed=0).verdict == "cannot tell"
    assert paired_rows(5, share_of([1] * 5), share_of([0] * 5), seed=0).verdict == "cannot tell", "5 rows prove nothing"
    assert paired_rows(6, share_of([1] * 6), share_of([0] * 6), seed=0).verdict == "better"


def test_a_metric_entry_says_what_its_numbers_say():
    hits, rare = share_of([1] * 30 + [0] * 10), share_of([1] * 8 + [0] * 32)
    entry = metric_entry("macro_f1", "test", {"majority class": rare, "model": hits}, 40, settings=Evaluate())
    low, high = entry["model"]["low"], entry["model"]["high"]
    assert entry["says"] == f"macro f1 0.750 ({low:.3f} to {high:.3f}); better than majority class 0.200"
    assert entry["verdicts"] == {"majority class": "better"}
    assert entry["protocol"] == "test" and json.loads(json.dumps(entry)) == entry
    alone = bootstrap_rows(40, hits, resamples=1000, seed=0)
    assert Interval.from_json(entry["model"]) == alone, "one metric, one interval, however it is asked for"


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (1, 1), (3, 7), (450, 1000)])
def test_wilson_intervals_agree_with_scipy(hits, count):
    low, high = scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")
    ours = wilson(hits, count)
    assert (ours.value, ours.low, ours.high) == pytest.approx((hits / count, low, high), abs=1e-12)


def test_all_right_on_a_few_rows_is_not_certainty():
    entry = metric_entry("accuracy", "test", {"model": share_of([1] * 10)}, 10, settings=Evaluate(), share_of_rows=True)
    assert entry["model"]["value"] == 1.0 and 0.6 < entry["model"]["low"] < 0.8

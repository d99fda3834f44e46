"""Sampling: each filter against a slow literal implementation, draws against the distribution they come from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.errors import RequestError
from formary.infer.sampling import NO_TOKEN, History, SamplingSettings, Table, draw, process, sample, uniform

rows_of_logits = st.lists(
    st.lists(st.floats(-8, 8, width=32), min_size=7, max_size=7, unique=True), min_size=1, max_size=4
)


def processed(logits: Any, **options: Any) -> np.ndarray[Any, Any]:
    logits = torch.tensor(logits, dtype=torch.float64)
    table = Table([SamplingSettings(**{"temperature": 1.0, **options})] * len(logits))
    return process(logits, table, [None] * len(logits)).numpy()


def kept(logits: Any, **options: Any) -> list[set[int]]:
    return [set(np.flatnonzero(row > -np.inf).tolist()) for row in processed(logits, **options)]


def probabilities(row: Any) -> list[float]:
    weights = [math.exp(value) for value in row]
    return [weight / sum(weights) for weight in weights]


def literal_top_p(row: list[float], p: float) -> set[int]:
    chances = probabilities(row)
    chosen: set[int] = set()
    for token in sorted(range(len(row)), key=lambda token: -chances[token]):
        chosen.add(token)
        if sum(chances[token] for token in chosen) >= p:
            break
    return chosen


def literal_typical(row: list[float], p: float) -> set[int]:
    chances = probabilities(row)
    entropy = -sum(chance * math.log(chance) for chance in chances)
    chosen: set[int] = set()
    for token in sorted(range(len(row)), key=lambda token: abs(-math.log(chances[token]) - entropy)):
        chosen.add(token)
        if sum(chances[token] for token in chosen) >= p:
            break
    return chosen


@given(rows_of_logits, st.integers(1, 9))
def test_top_k_keeps_the_k_likeliest(logits: list[list[float]], k: int) -> None:
    expected = [set(sorted(range(7), key=lambda token: -row[token])[:k]) for row in logits]
    assert kept(logits, top_k=k) == expected


@given(rows_of_logits, st.sampled_from([0.1, 0.37, 0.5, 0.9, 0.99]))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(logits: list[list[float]], p: float) -> None:
    for row, found in zip(logits, kept(logits, top_p=p)):
        literal = literal_top_p(row, p)
        edges = np.cumsum(sorted(probabilities(row), reverse=True))
        apart = np.diff(sorted(probabilities(row))).min()
        if np.abs(edges - p).min() > 1e-6 and apart > 1e-7:  # float32 tells them apart
            assert found == literal


@given(rows_of_logits, st.sampled_from([0.05, 0.2, 0.7, 1.0]))
def test_min_p_keeps_tokens_at_least_p_times_as_likely_as_the_likeliest(logits: list[list[float]], p: float) -> None:
    for row, found in zip(logits, kept(logits, min_p=p)):
        chances = probabilities(row)
        sure = {token for token in range(7) if chances[token] > p * max(chances) * (1 + 1e-6)}
        possible = {token for token in range(7) if chances[token] >= p * max(chances) * (1 - 1e-6)}
        assert sure <= found <= possible


@given(rows_of_logits, st.sampled_from([0.2, 0.5, 0.9]))
def test_typical_keeps_tokens_nearest_the_entropy(logits: list[list[float]], p: float) -> None:
    for row, found in zip(logits, kept(logits, typical_p=p)):
        chances = probabilities(row)
        entropy = -sum(chance * math.log(chance) for chance in chances)
        distances = sorted((abs(-math.log(chance) - entropy), chance) for chance in chances)
        gaps = np.diff([distance for distance, _ in distances])
        edges = np.cumsum([chance for _, chance in distances])
        if np.abs(edges - p).min() > 1e-6 and gaps.min() > 1e-6:
            assert found == literal_typical(row, p)


@given(rows_of_logits, st.sampled_from([{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"typical_p": 0.4}]))
def test_a_filter_keeps_something_and_does_not_change_what_it_keeps(
    logits: list[list[float]], option: dict[str, Any]
) -> None:
    plain, filtered = processed(logits), processed(logits, **option)
    assert (filtered > -np.inf).any(axis=1).all()
    assert (filtered == np.where(filtered > -np.inf, plain, -np.inf)).all()
    if "typical_p" not in option:  # the others always keep the likeliest token
        assert (filtered.argmax(axis=1) == plain.argmax(axis=1)).all()


@pytest.mark.parametrize(("spread", "fewest", "most"), [(6.0, 1, 64), (1.5, 65, 1024), (0.1, 1025, 3000)])
def test_top_p_over_a_large_vocabulary_is_that_of_the_whole_sort(spread: float, fewest: int, most: int) -> None:
    row = torch.randn(1, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * spread
    chances = np.sort(row.softmax(-1).numpy()[0])[::-1]
    count = int((np.cumsum(chances) < 0.8).sum()) + 1
    assert fewest <= count <= most
    assert len(kept(row.tolist(), top_p=0.8)[0]) == count


def test_temperature_divides_and_a_tiny_one_is_greedy_without_overflow() -> None:
    row = [[1.0, 3.0, 2.0]]
    assert np.allclose(np.diff(processed(row, temperature=0.5)), [[4.0, -2.0]])
    tiny = SamplingSettings(temperature=1e-40)
    assert sample(torch.tensor(row) * 30, Table([tiny]), [0.999]) == [1]
    for least in (1e-46, 5e-324):  # which float32 would make 0
        assert sample(torch.tensor(row), Table([SamplingSettings(temperature=least)]), [0.999]) == [1]


settings_up_to_the_ends = st.fixed_dictionaries(
    {"temperature": st.floats(min_value=0, allow_infinity=False)},
    optional={
        "top_k": st.integers(1, 10**30),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "typical_p": st.floats(0, 1, exclude_min=True),
        "repetition_penalty": st.floats(min_value=1, allow_infinity=False),
        "frequency_penalty": st.floats(0, 1e30),
    },
)


@given(rows_of_logits, settings_up_to_the_ends, st.sampled_from([torch.float32, torch.float64]))
def test_any_settings_within_their_ranges_choose_a_token_of_the_vocabulary(
    logits: list[list[float]], options: dict[str, Any], dtype: torch.dtype
) -> None:
    scores = torch.tensor(logits, dtype=dtype)
    scores[:, 5] = -math.inf
    table, histories = Table([SamplingSettings(**options)] * len(scores)), [History(7, [0, 5])] * len(scores)
    for token in sample(scores, table, [1 - 2.0**-48] * len(scores), histories):
        assert token == NO_TOKEN or (0 <= token < 7 and token != 5)


def test_penalties_follow_their_formulas() -> None:
    history = History(4, prompt=[0, 1])
    for token in (1, 2, 2):
        history.add(token)
    logits = torch.tensor([[2.0, -1.0, 3.0, 1.0]])
    options = {"repetition_penalty": 2.0, "frequency_penalty": 0.25, "presence_penalty": 0.5}
    found = process(logits, Table([SamplingSettings(**options)]), [history])
    # seen: 0 1 2; generated: 1 once, 2 twice
    assert found.tolist() == [[2 / 2, -1 * 2 - 0.25 - 0.5, 3 / 2 - 2 * 0.25 - 0.5, 1.0]]


def test_logit_bias_is_added_and_minus_infinity_forbids() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0]])
    table = Table([SamplingSettings(logit_bias={1: -math.inf, 0: 2.0}), SamplingSettings()])
    assert sample(logits, table, [0.0, 0.0]) == [0, 1]


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square over 7 outcomes: 22.5 is its 99.9 % point for 6 degrees of freedom."""
    draws = 40_000
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.9])
    options = SamplingSettings(temperature=0.8)
    uniforms = [uniform(7, 0, step) for step in range(draws)]
    tokens = sample(logits.expand(draws, -1), Table([options] * draws), uniforms)
    expected = (logits / 0.8).softmax(-1).numpy() * draws
    observed = np.bincount(tokens, minlength=7)
    assert ((observed - expected) ** 2 / expected).sum() < 22.5


def test_neighbouring_seeds_samples_and_steps_are_independent() -> None:
    """Chi-square over a 6 x 6 table of pairs: 66.6 is its 99.9 % point for 35 degrees of freedom."""
    neighbours = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    for other in neighbours:
        pairs = np.zeros((6, 6))
        for step in range(0, 20_000, 2):
            first, second = uniform(3, 2, step), uniform(3 + other[0], 2 + other[1], step + other[2])
            pairs[int(6 * first), int(6 * second)] += 1
        expected = pairs.sum() / 36
        assert ((pairs - expected) ** 2 / expected).sum() < 66.6


@given(st.integers(-(2**70), 2**70), st.integers(0, 10**6), st.integers(0, 10**6))
def test_uniform_is_a_pure_function_within_its_range(seed: int, index: int, step: int) -> None:
    assert 0 <= uniform(seed, index, step) < 1
    assert uniform(seed, index, step) == uniform(seed, index, step)


@given(rows_of_logits, st.sampled_from([0.0, 1 - 2.0**-48]))
def test_the_ends_of_the_unit_interval_draw_tokens_that_are_possible(logits: list[list[float]], point: float) -> None:
    filtered = torch.tensor(processed(logits, top_k=2))
    for token, row in zip(draw(filtered, [point] * len(filtered)).tolist(), filtered):
        assert row[token] > -math.inf


mixtures = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([1, 3, 10_000]),
        "top_p": st.sampled_from([0.3, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "typical_p": st.sampled_from([0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "logit_bias": st.sampled_from([{}, {3: 5.0}]),
    },
)


@settings(max_examples=60)
@given(st.lists(mixtures, min_size=1, max_size=5), st.integers(0, 1000))
def test_a_row_is_the_same_to_the_last_bit_whatever_is_beside_it(mixed: list[dict[str, Any]], seed: int) -> None:
    chosen = [SamplingSettings(**options) for options in mixed]
    logits = torch.randn(len(chosen), 50, generator=torch.Generator().manual_seed(seed))
    histories = [History(50, prompt=[row, 2 * row + 1]) for row in range(len(chosen))]
    together = process(logits, Table(chosen), histories)
    tokens = sample(logits, Table(chosen), [uniform(seed, row, 0) for row in range(len(chosen))], histories)
    for row, one in enumerate(chosen):
        alone = process(logits[row : row + 1], Table([one]), [histories[row]])
        assert torch.equal(together[row], alone[0])
        assert sample(logits[row : row + 1], Table([one]), [uniform(seed, row, 0)], [histories[row]]) == [tokens[row]]


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.2},
        {"min_p": -0.1},
        {"typical_p": 2},
        {"repetition_penalty": 0},
        {"frequency_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"seed": 1.5},
        {"seed": None},
        {"logit_bias": [1, 2]},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {1: math.inf}},
    ],
)
def test_a_setting_out_of_range_is_named(option: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(option))):
        SamplingSettings(**option)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1, "top_p": 0.5}])
def test_logits_that_are_not_numbers_give_no_token_and_change_no_other_row(settings: dict[str, Any]) -> None:
    for row in ([math.nan, 0.0, 1.0], [-math.inf] * 3, [0.0, math.inf, 1.0]):
        logits = torch.tensor([[0.0, 9.0, 1.0], row, [9.0, 0.0, 1.0]])
        table = Table([SamplingSettings(**settings)] * 3)
        assert sample(logits, table, [0.5] * 3) == [1, NO_TOKEN, 0]

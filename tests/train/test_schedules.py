"""Learning-rate schedules: their shape at the points that define it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formary.recipe.schema import Schedule
from formary.train.schedules import lr_factor, warmup_steps

NAMES = ["constant", "linear", "cosine", "exponential", "wsd"]


@given(name=st.sampled_from(NAMES), total=st.integers(1, 500), warmup=st.floats(0, 0.5), final=st.floats(0, 1))
def test_factors_stay_between_zero_and_one_and_never_rise_after_warmup(name, total, warmup, final):
    schedule = Schedule(name=name, warmup=warmup, final=final)
    factors = [lr_factor(schedule, step, total) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    after = factors[warmup_steps(schedule, total) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "exponential"])
def test_the_last_step_is_at_the_final_share(name):
    assert lr_factor(Schedule(name=name, final=0.1), 199, 200) == pytest.approx(0.1)


def test_warmup_rises_linearly_to_the_peak():
    schedule = Schedule(name="constant", warmup=4)
    assert [lr_factor(schedule, step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_wsd_is_flat_until_its_decay_begins():
    schedule = Schedule(name="wsd", warmup=0, decay=0.25, final=0)
    assert lr_factor(schedule, 70, 101) == 1.0
    assert lr_factor(schedule, 88, 101) == pytest.approx(0.48, abs=0.01)

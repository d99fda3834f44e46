"""Batches of like length: every row once an epoch, little padding, a pure function of the step."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from formary.data.buckets import LengthBuckets, by_length

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@given(LENGTHS, st.integers(1, 40), st.integers(0, 5))
def test_an_epoch_reads_every_row_once(lengths, batch, seed):
    buckets = LengthBuckets(lengths, batch=batch, seed=seed)
    for epoch in range(2):
        steps = range(epoch * buckets.steps_per_epoch, (epoch + 1) * buckets.steps_per_epoch)
        rows = np.concatenate([buckets.rows(step) for step in steps])
        assert sorted(rows.tolist()) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 40), st.integers(0, 1000))
def test_a_step_reads_the_same_rows_whatever_was_read_before(lengths, batch, step):
    one, other = (LengthBuckets(lengths, batch=batch, seed=3) for _ in range(2))
    one.rows(step // 2)
    assert one.rows(step).tolist() == other.rows(step).tolist()


def test_rows_of_a_batch_are_of_like_length():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 256, 4000)
    buckets = LengthBuckets(lengths, batch=16, seed=0)
    padded = sum(lengths[buckets.rows(step)].max() * 16 for step in range(buckets.steps_per_epoch))
    assert padded / lengths.sum() < 1.1


@given(LENGTHS, st.integers(1, 2000))
def test_groups_for_measuring_hold_every_row_once_within_the_tokens_allowed(lengths, tokens):
    groups = list(by_length(lengths, tokens=tokens))
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[row] for row in group) <= tokens for group in groups)

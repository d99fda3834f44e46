"""Batches: every window, token and segment has its turn exactly once, in an order that only seed and step decide.

The shards are arrays in memory; what is checked is which positions come out, for any sizes.
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.batches import IGNORED, Segments, Windows, scored_windows, stream_windows
from formary.data.shards import TokenShards
from formary.errors import DataError, RecipeError

BEGIN = 99_999


def made(sizes: list[int], *, begin_id: int | None = BEGIN, words: bool = False) -> TokenShards:
    """Shards whose token at position p is p itself."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    array = np.arange(starts[-1], dtype=np.uint32)
    flags = array % 3 == 0 if words else None
    meta = {"begin_id": begin_id, "vocab_size": 100_000}
    return TokenShards(Path("split"), meta, array, starts, np.array(sizes, dtype=np.int64), flags)


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


# --- windows ---


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(2, 400), context=st.integers(1, 50), batch=st.integers(1, 7), seed=st.integers(0, 5))
def test_every_window_is_visited_once_per_epoch(tokens, context, batch, seed):
    if tokens <= context:
        with pytest.raises(DataError, match=r"train\.context"):
            Windows(made([tokens]), context=context, batch=batch, seed=seed)
        return
    windows = Windows(made([tokens]), context=context, batch=batch, seed=seed)
    count = windows.windows_per_epoch
    assert windows.steps_per_epoch == -(-count // batch)
    seen = np.concatenate([windows.batch(step)["tokens"] for step in range(2 * windows.steps_per_epoch + 1)])
    for epoch in range(2):
        rows = seen[epoch * count : (epoch + 1) * count]
        assert rows.shape == (count, context + 1)
        assert rows.dtype == np.int64
        starts = np.sort(rows[:, 0])
        assert np.all(np.diff(starts) == context)  # each once, side by side
        assert np.all(np.diff(rows, axis=1) == 1)  # consecutive tokens
        assert rows.max() < tokens
    # What an epoch leaves out, at both ends together, is less than two windows.
    assert (tokens - 1) - count * context < 2 * context


def test_a_batch_depends_on_seed_and_step_only():
    shards = made([37] * 20)
    forward = Windows(shards, context=8, batch=5, seed=3)
    backward = Windows(shards, context=8, batch=5, seed=3)
    steps = list(range(60))
    expected = {step: forward.batch(step)["tokens"].tolist() for step in steps}
    assert {step: backward.batch(step)["tokens"].tolist() for step in reversed(steps)} == expected
    assert Windows(shards, context=8, batch=5, seed=4).batch(0)["tokens"].tolist() != expected[0]


def test_epochs_differ_in_order_and_offset():
    windows = Windows(made([2000]), context=10, batch=1, seed=0)
    epochs = [
        [int(windows.starts(epoch * windows.windows_per_epoch + place)[0]) for place in range(20)] for epoch in range(6)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({epoch[0] % 10 for epoch in epochs}) > 2


def test_document_ids_say_which_document_each_token_is_of():
    shards = made([3, 1, 50, 7])
    windows = Windows(shards, context=9, batch=4, seed=1, document_ids=True)
    for step in range(5):
        batch = windows.batch(step)
        expected = np.searchsorted([3, 4, 54], batch["tokens"], side="right")
        assert batch["documents"].tolist() == expected.tolist()
    assert "documents" not in Windows(shards, context=9, batch=4, seed=1).batch(0)


def test_a_context_longer_than_the_split_names_the_tokens_and_the_field():
    with pytest.raises(DataError, match=r"holds 12 tokens in 2 documents.*train\.context \+ 1 = 65.*to 11 or less"):
        Windows(made([5, 7]), context=64, batch=1, seed=0)


def test_the_order_stays_what_it_was_when_runs_were_started():
    # A resumed run relies on it; a change here breaks every unfinished run.
    assert Windows(made([200]), context=10, batch=8, seed=7).starts(0).tolist() == [67, 37, 127, 117, 47, 107, 137, 97]
    spans = Segments(made([30, 5, 9, 70]), length=16, batch=4, seed=7).spans(1)
    assert [[(span.start, span.length) for span in row] for row, _ in spans] == [
        [(44, 8)],
        [(30, 5), (35, 9)],
        [(84, 16)],
        [(16, 14)],
    ]


# --- evaluation ---


def scored(batches) -> list[tuple[int, int, int]]:
    """(position, token before it, tokens before it in the window) of every scored target, as they come."""
    found = []
    for batch in batches:
        assert batch.tokens.shape == batch.targets.shape
        for tokens, targets, _document, position in zip(batch.tokens, batch.targets, batch.document, batch.position):
            places = np.flatnonzero(targets != IGNORED)
            assert targets[places[0]] == position
            found += [(int(targets[place]), int(tokens[place]), int(place)) for place in places]
    return found


@settings(max_examples=150, deadline=None)
@given(
    sizes=sizes,
    context=st.integers(1, 20),
    stride=st.integers(1, 20),
    rows=st.integers(1, 5),
    begin_id=st.sampled_from([BEGIN, None]),
    by_length=st.booleans(),
)
def test_every_token_of_every_document_is_scored_exactly_once(sizes, context, stride, rows, begin_id, by_length):
    shards = made(sizes, begin_id=begin_id)
    stride = min(stride, context)
    batches = list(scored_windows(shards, context=context, stride=stride, rows=rows, by_length=by_length))
    found = scored(batches)
    firsts = set(shards.document_starts[:-1].tolist())
    expected = [p for p in range(shards.tokens) if begin_id is not None or p not in firsts]
    positions = [position for position, _, _ in found]
    assert (sorted(positions) if by_length else positions) == expected
    for position, before, place in found:
        start = shards.document_starts[shards.document_of(np.array([position]))[0]]
        assert before == (BEGIN if position == start else position - 1)
        available = position - start + (begin_id is not None)
        assert place + 1 >= min(available, context - stride + 1)  # tokens of its document that it is seen with
    for batch in batches:
        assert batch.tokens.size <= rows * context
        for tokens, targets, document in zip(batch.tokens, batch.targets, batch.document):
            inside = tokens[: np.flatnonzero(targets != IGNORED)[-1] + 1]
            assert set(shards.document_of(inside[inside != BEGIN]).tolist()) <= {document}


@settings(max_examples=50, deadline=None)
@given(sizes=sizes, context=st.integers(1, 20), limit=st.integers(1, 100))
def test_evaluation_stops_after_max_tokens(sizes, context, limit):
    shards = made(sizes)
    found = scored(scored_windows(shards, context=context, max_tokens=limit))
    assert [position for position, _, _ in found] == list(range(min(limit, shards.tokens)))
    found = scored(stream_windows(shards, context=context, max_tokens=limit))
    assert [position for position, _, _ in found] == list(range(1, min(limit + 1, shards.tokens)))


@settings(max_examples=50, deadline=None)
@given(sizes=sizes, context=st.integers(1, 20), batch=st.integers(1, 5))
def test_the_stream_is_cut_into_windows_that_do_not_overlap(sizes, context, batch):
    shards = made(sizes)
    batches = list(stream_windows(shards, context=context, batch=batch))
    found = scored(batches)
    assert [position for position, _, _ in found] == list(range(1, shards.tokens))
    assert all(before == position - 1 and place == (position - 1) % context for position, before, place in found)
    assert all(len(batch_.tokens) == batch for batch_ in batches[:-1])


# --- segments ---


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, length=st.integers(1, 30), batch=st.integers(1, 5), seed=st.integers(0, 3))
def test_segments_cover_every_token_once_per_epoch(sizes, length, batch, seed):
    shards = made(sizes)
    segments = Segments(shards, length=length, batch=batch, seed=seed)
    count = segments.segments_per_epoch
    rows = [row for step in range(2 * segments.steps_per_epoch + 1) for row, _ in segments.spans(step)]
    for epoch in range(2):
        spans = [span for row in rows[epoch * count : (epoch + 1) * count] for span in row]
        covered = sorted(place for span in spans for place in range(span.start, span.start + span.length))
        assert covered == list(range(shards.tokens))
        for span in spans:
            inside = np.arange(span.start, span.start + span.length)
            assert set(shards.document_of(inside).tolist()) == {span.document}
    for row in rows:
        assert sum(span.length for span in row) <= length
        if len(row) > 1:  # only whole short documents are put together
            assert all(span.length == sizes[span.document] for span in row)


def test_segments_give_the_tokens_and_word_starts_of_their_spans():
    shards = made([30, 4, 5, 6], words=True)
    segments = Segments(shards, length=16, batch=3, seed=0)
    for step in range(6):
        for row, (spans, _) in zip(segments.batch(step), segments.spans(step), strict=True):
            ((tokens, starts),) = row.parts
            assert row.is_next is None
            expected = [place for span in spans for place in range(span.start, span.start + span.length)]
            firsts = {span.start for span in spans}
            assert tokens.tolist() == expected
            assert starts.tolist() == [place % 3 == 0 or place in firsts for place in expected]
    assert (shards.word_starts == (shards.array % 3 == 0)).all()  # the map itself is never written to


def test_long_documents_are_cut_at_other_places_each_epoch():
    segments = Segments(made([1000]), length=64, batch=1, seed=0)
    cuts = [
        sorted(segments.spans(epoch * segments.segments_per_epoch + place)[0][0][0].start for place in range(16))
        for epoch in range(4)
    ]
    assert len({tuple(epoch) for epoch in cuts}) == 4


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 60), min_size=2, max_size=8),
    length=st.integers(8, 24),
    seed=st.integers(0, 3),
    words=st.booleans(),
)
def test_pairs_go_on_or_come_from_another_document(sizes, length, seed, words):
    shards = made(sizes, words=words)
    segments = Segments(shards, length=length, batch=4, seed=seed, pairs=True)
    for step in range(segments.steps_per_epoch):
        for ((first, second), is_next), row in zip(segments.spans(step), segments.batch(step), strict=True):
            assert row.is_next is is_next
            assert first.length >= 1
            assert second.length >= 1
            assert first.length + second.length <= length
            assert is_next == (second.document == first.document)
            if is_next:
                assert second.start == first.start + first.length
            for span, (tokens, _) in zip((first, second), row.parts, strict=True):
                assert tokens.tolist() == list(range(span.start, span.start + span.length))
                assert set(shards.document_of(tokens).tolist()) == {span.document}


def test_about_half_of_the_pairs_go_on():
    segments = Segments(made([40] * 50), length=16, batch=100, seed=0, pairs=True)
    following = [is_next for step in range(10) for _, is_next in segments.spans(step)]
    assert 430 < sum(following) < 570


def test_segments_depend_on_seed_and_step_only():
    shards = made([100, 3, 4, 50, 8])
    for pairs in (False, True):
        forward, backward = (Segments(shards, length=16, batch=3, seed=1, pairs=pairs) for _ in range(2))
        expected = [forward.spans(step) for step in range(20)]
        assert [backward.spans(step) for step in reversed(range(20))][::-1] == expected


def test_segments_of_nothing_and_pairs_of_one_document_are_errors():
    with pytest.raises(DataError, match="holds no document"):
        Segments(made([]), length=8, batch=1, seed=0)
    with pytest.raises(DataError, match=r"at least 2 documents.*next_sentence"):
        Segments(made([100]), length=8, batch=1, seed=0, pairs=True)
    with pytest.raises(RecipeError, match=r"train\.context"):
        Segments(made([100, 100]), length=5, batch=1, seed=0, pairs=True)

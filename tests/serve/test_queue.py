"""The queue: nobody overtakes in one's own line, keys share fairly, and it holds no more than it may."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formary.serve.errors import QueueFull
from formary.serve.queue import FairQueue


@dataclass(eq=False)
class Entry:
    key: str
    cost: int


def entries(*costs: int, key: str = "a") -> list[Entry]:
    return [Entry(key, cost) for cost in costs]


costs = st.lists(st.integers(1, 50), max_size=20)


@given(costs)
def test_one_key_is_served_in_the_order_of_arrival(listed: list[int]) -> None:
    queue: FairQueue[Entry] = FairQueue(10_000)
    put = entries(*listed)
    for entry in put:
        queue.offer([entry])
    assert [queue.pop() for _ in put] == put
    assert len(queue) == queue.tokens == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=60))
def test_keys_that_wait_are_given_equally_much_within_their_largest_requests(listed: list[tuple[str, int]]) -> None:
    """Goyal et al. 1996, theorem 1: |given(a) - given(b)| is at most the largest of a plus the largest of b."""
    queue: FairQueue[Entry] = FairQueue(100_000)
    for key, cost in listed:
        queue.offer([Entry(key, cost)])
    left = {key: sum(cost for k, cost in listed if k == key) for key in "abc"}
    largest = {key: max((cost for k, cost in listed if k == key), default=0) for key in "abc"}
    done = dict.fromkeys("abc", 0)
    while len(queue):
        entry = queue.pop()
        done[entry.key] += entry.cost
        waiting = [key for key in "abc" if done[key] < left[key]]
        for one in waiting:
            for other in waiting:
                assert done[one] - done[other] <= largest[one] + largest[other]
    assert done == left


def test_with_requests_of_one_size_keys_take_turns() -> None:
    queue: FairQueue[Entry] = FairQueue(1000)
    queue.offer(entries(*[10] * 6, key="loud"))
    queue.offer(entries(10, 10, key="quiet"))
    assert [queue.pop().key for _ in range(5)] == ["loud", "quiet", "loud", "quiet", "loud"]


def test_one_who_comes_late_does_not_wait_for_all_before() -> None:
    queue: FairQueue[Entry] = FairQueue(1000)
    queue.offer(entries(*[10] * 20, key="loud"))
    for _ in range(10):
        queue.pop()
    queue.offer(entries(10, key="late"))
    assert "late" in [queue.pop().key for _ in range(2)]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 40), st.booleans()), max_size=80))
def test_the_tokens_are_those_of_what_waits_whatever_comes_and_goes(listed: list[tuple[str, int, bool]]) -> None:
    queue: FairQueue[Entry] = FairQueue(100)
    waiting: list[Entry] = []
    for key, cost, leaves in listed:
        entry = Entry(key, cost)
        try:
            queue.offer([entry])
            waiting.append(entry)
        except QueueFull:
            held = sum(other.cost for other in waiting)
            assert held + cost > 100
        if leaves and waiting:
            gone = waiting.pop(len(waiting) // 2)
            assert queue.remove(gone) and not queue.remove(gone)
        assert queue.tokens == sum(other.cost for other in waiting)
        assert sorted(map(id, queue)) == sorted(map(id, waiting)) and len(queue) == len(waiting)
        assert queue.tokens <= 100 * (1 + 1 / 2 + 1 / 3 + 1 / 4) + 40


def test_a_request_of_several_prompts_is_taken_whole_or_not_at_all() -> None:
    queue: FairQueue[Entry] = FairQueue(100)
    queue.offer(entries(60))
    with pytest.raises(QueueFull):
        queue.offer(entries(30, 30))
    assert queue.tokens == 60 and len(queue) == 1


def test_a_queue_that_one_key_has_filled_still_takes_another() -> None:
    queue: FairQueue[Entry] = FairQueue(100)
    queue.offer(entries(*[10] * 10, key="loud"))
    with pytest.raises(QueueFull):
        queue.offer(entries(10, key="loud"))
    queue.offer(entries(10, 10, key="quiet"))
    with pytest.raises(QueueFull):
        queue.offer(entries(40, key="quiet"))


def test_an_empty_queue_takes_a_request_of_any_size() -> None:
    queue: FairQueue[Entry] = FairQueue(10)
    queue.offer(entries(500))
    assert queue.pop().cost == 500
    with pytest.raises(IndexError):
        queue.pop()
    assert queue.peek() is None

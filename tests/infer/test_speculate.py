"""Guesses: what the look-up and a draft network propose, and when proposing is given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formary.errors import RequestError
from formary.infer.engine import Engine, Request
from formary.infer.speculate import Draft, Guesser, Lookup, Speculator
from formary.model.topologies import Network

Make = Callable[..., Network]


def literal_guess(tokens: list[int], most: int) -> list[int]:
    """Search the whole text for the latest earlier occurrence of its last 4, 3 or 2 tokens."""
    for size in (4, 3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                text = list(tokens)
                for index in range(most):
                    text.append(text[end + index])
                return text[len(tokens) :]
    return []


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=8), st.integers(1, 9))
def test_the_look_up_continues_the_latest_occurrence(pieces: list[list[int]], most: int) -> None:
    lookup, text = Lookup(), list[int]()
    for piece in pieces:
        text += piece
        assert lookup.guess(text, most) == literal_guess(text, most)


def greedy(network: Network, prompt: tuple[int, ...], count: int) -> list[int]:
    request = Request(prompt, max_tokens=count, stop_tokens=frozenset(), speculate=False)
    return [event.token for event in Engine(network).generate([request])]


def test_a_draft_writes_on_greedily_and_takes_back_what_was_wrong(make_network: Make) -> None:
    network = make_network("gpt-mini", seed=3)
    draft = Draft(network, slots=3, context=32, vocab_size=40, chunk=4)
    rows = [(1, 2, 3), (4,), (9, 9, 9, 9, 9, 9)]
    assert draft.guess(rows, [3, 5, 4])[:2] == [greedy(network, rows[0], 3), greedy(network, rows[1], 5)]
    longer = [(1, 2, 3, 7), (4, *greedy(network, rows[1], 2)), (*rows[2], 5, 5)]
    expected = [greedy(network, row, 4) for row in longer]
    assert draft.guess(longer, [4, 0, 4]) == [expected[0], [], expected[2]]
    draft.copy(2, 1)
    assert draft.guess([longer[0], longer[2]], [4, 4]) == [expected[0], expected[2]]


def test_a_draft_reads_a_long_prompt_piece_by_piece_before_it_guesses(make_network: Make) -> None:
    network = make_network("gpt-mini", seed=3)
    draft = Draft(network, slots=1, context=32, vocab_size=40, chunk=4)
    prompt = tuple(range(10))
    found = [draft.guess([prompt], [2])[0] for _ in range(3)]
    assert found == [[], [], greedy(network, prompt, 2)]
    assert draft.guess([tuple(range(31))], [3]) == [[]]  # no room


def test_a_draft_that_cannot_guess_is_refused(make_network: Make) -> None:
    network = make_network("gpt-mini")
    with pytest.raises(RequestError, match="vocabulary of 50 tokens"):
        Engine(network, draft=make_network("gpt-mini", vocab_size=50))
    with pytest.raises(RequestError, match="decoder"):
        Engine(network, draft=make_network("seq2seq-mini"))


def used(speculator: Speculator, guesser: Guesser, *, steps: int, plain: float, seconds: float, right: bool) -> int:
    """Steps that guessed, when a step takes `plain` seconds without and `seconds` with guesses."""
    guessed, text = 0, [1, 2] * 5
    for _ in range(steps):
        guess = speculator.guess([guesser], [text], [8])
        guessed += bool(guess[0])
        accepted = len(guess[0]) if right else 0
        speculator.learn([guesser], guess, [accepted], seconds if guess[0] else plain)
    return guessed


def test_guessing_goes_on_where_it_pays() -> None:
    assert used(Speculator(), Guesser(), steps=100, plain=1.0, seconds=1.5, right=True) > 90


@pytest.mark.parametrize(("seconds", "right"), [(1.5, False), (20.0, True)])
def test_guessing_that_does_not_pay_is_given_up_and_retried_rarely(seconds: float, right: bool) -> None:
    speculator, guesser = Speculator(), Guesser()
    assert 1 <= used(speculator, guesser, steps=100, plain=1.0, seconds=seconds, right=right) < 30
    assert used(speculator, guesser, steps=400, plain=1.0, seconds=seconds, right=right) < 10


def test_who_wants_guesses_gets_them_and_who_does_not_never() -> None:
    assert used(Speculator(), Guesser(True), steps=50, plain=1.0, seconds=20.0, right=False) == 50
    assert used(Speculator(), Guesser(False), steps=50, plain=1.0, seconds=1.0, right=True) == 0


@given(st.data())
def test_a_longer_guess_is_never_expected_to_be_less_right(data: Any) -> None:
    guesser = Guesser()
    for _ in range(data.draw(st.integers(0, 10))):
        guessed = data.draw(st.integers(1, 8))
        guesser.learn(guessed, data.draw(st.integers(0, guessed)))
    values = [guesser.expected(count) for count in range(9)]
    assert values == sorted(values) and all(value <= count for count, value in enumerate(values))

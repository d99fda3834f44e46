"""Turns: one at a time, and nobody twice while another waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from formary.serve.turns import Turns


def test_the_one_who_waits_comes_before_the_one_who_comes_again(until: Callable[..., None]) -> None:
    turns, order = Turns(), []

    def other() -> None:
        with turns.turn():
            order.append("other")

    with turns.turn():
        thread = threading.Thread(target=other)
        thread.start()
        until(lambda: turns._line)
    with turns.turn():
        order.append("again")
    thread.join()
    assert order == ["other", "again"]


def test_no_two_hold_it_at_once_and_an_error_gives_it_back() -> None:
    turns, inside, most = Turns(), [], []

    def work() -> None:
        for _ in range(200):
            with turns.turn():
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 800 and max(most) == 1
    with pytest.raises(ZeroDivisionError), turns.turn():
        raise ZeroDivisionError
    with turns.turn():
        pass

"""Ctrl-C and SIGTERM while training: noticed, so that the step is finished and saved before the process ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Signals:
    """Whether one came."""

    came = False


@contextmanager
def noticed() -> Iterator[Signals]:
    """Notice Ctrl-C and SIGTERM instead of dying; a second Ctrl-C dies at once."""
    signals = Signals()

    def notice(number: int, frame: FrameType | None) -> None:
        if signals.came and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.came = True

    try:
        before = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller handles signals
        before = {}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

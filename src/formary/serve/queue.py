"""The queue of requests that wait for a model: bounded by tokens, fair between the keys they came with.

Among keys the one that has been given least goes next (start-time fair queueing, Goyal et al. 1996): with requests of
equal size that is taking turns. A full queue still has room for a key that holds less than its share of it.
It is not thread-safe: its owner locks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from formary.serve.errors import QueueFull


class Waiting(Protocol):
    """What can stand in the queue: whose it is, and how many tokens it stands for."""

    key: str
    cost: int


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """First in, first out for each key; between keys by what each was given so far.

    Args:
        capacity: most tokens that wait.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = 0
        self._lanes: OrderedDict[str, dict[int, T]] = OrderedDict()  # of keys with something waiting, by id, in order
        self._held: dict[str, int] = {}  # tokens waiting, by key
        self._begins: dict[str, int] = {}  # when, in tokens given, a key's next entry may begin
        self._now = 0

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def __iter__(self) -> Iterator[T]:
        for lane in self._lanes.values():
            yield from lane.values()

    def offer(self, entries: Sequence[T]) -> None:
        """Put all of one request's entries in, or none.

        Raises:
            QueueFull: there is no room for them.
        """
        if not entries:
            return
        key, cost = entries[0].key, sum(entry.cost for entry in entries)
        held = self._held.get(key, 0)
        share = self.capacity / len({*self._lanes, key})
        # An empty queue takes a request of any size: it bounds what waits, not what is asked.
        if self.tokens and self.tokens + cost > self.capacity and held + cost > share:
            raise QueueFull
        if key not in self._lanes:
            self._lanes[key] = {}
            self._begins[key] = max(self._begins.get(key, 0), self._now)
        self._lanes[key].update((id(entry), entry) for entry in entries)
        self._held[key] = held + cost
        self.tokens += cost

    def peek(self) -> T | None:
        """The entry that is next, or None."""
        key = self._next()
        return None if key is None else next(iter(self._lanes[key].values()))

    def pop(self) -> T:
        """Take the entry that is next."""
        key = self._next()
        if key is None:
            raise IndexError("the queue is empty")
        entry = self._lanes[key].pop(next(iter(self._lanes[key])))
        self._now = self._begins[key]
        self._begins[key] += max(entry.cost, 1)
        self._left(key, entry)
        return entry

    def remove(self, entry: T) -> bool:
        """Take out an entry whose client has gone; False when it is not waiting any more."""
        if self._lanes.get(entry.key, {}).pop(id(entry), None) is None:
            return False
        self._left(entry.key, entry)
        return True

    def clear(self) -> list[T]:
        """Empty it; what was waiting."""
        entries = list(self)
        for entry in entries:
            self.remove(entry)
        return entries

    def _next(self) -> str | None:
        return min(self._lanes, key=lambda key: self._begins[key], default=None)

    def _left(self, key: str, entry: T) -> None:
        self.tokens -= entry.cost
        self._held[key] -= entry.cost
        if not self._lanes[key]:
            del self._lanes[key], self._held[key]
        # A key's past counts only while it is ahead of the others, so that nothing is kept of keys that are gone.
        for gone in [k for k, begins in self._begins.items() if k not in self._lanes and begins <= self._now]:
            del self._begins[gone]
        if not self._lanes:
            self._begins.clear()
            self._now = 0

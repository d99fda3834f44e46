"""One thread for each loaded model: it alone touches the model's engine, and answers rows a few at a time.

Texts come from the engine, a token for each at every step; beam search, which it does not know, goes on beside it, one
row at a time and one step at every step of the engine.

The asyncio side hands work in and takes it back through one lock; what is written comes out through mailboxes. A
request whose client has gone leaves before the engine's next step. It knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from formary.errors import FormaryError, RequestError
from formary.infer.answers import rows_of, searching
from formary.infer.engine import Engine, EngineStatistics, Event, NotFinite, Request
from formary.infer.loaded import Model
from formary.serve.errors import QueueFull, Stopped
from formary.serve.queue import FairQueue
from formary.serve.turns import Turns
from formary.tasks.protocol import WritingTask

log = logging.getLogger(__name__)

MOST_ROWS = 64  # answered together, however many wait: so that a step of another model does not wait long
_SHORTEST, _LONGEST = 1, 60  # seconds, of Retry-After

Item = Event | list[dict[str, Any]] | Exception


class Mailbox:
    """Where one HTTP request's events arrive: put in by the worker's thread, read by the asyncio side."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._items: deque[tuple[int, Item]] = deque()
        self._arrived = asyncio.Event()

    async def get(self) -> list[tuple[int, Item]]:
        """All that has arrived since the last call, at least one: (place of the job in its request, what)."""
        await self._arrived.wait()
        self._arrived.clear()
        items = list(self._items)
        self._items.clear()
        return items

    def put(self, place: int, item: Item) -> None:
        """Add what has arrived; called in the loop."""
        self._items.append((place, item))
        self._arrived.set()


@dataclass(eq=False)
class Job:
    """One prompt and its answers, or some rows to be answered; one HTTP request has one or several.

    Args:
        key: whose it is.
        cost: the tokens it stands for in the queue.
        mailbox: where its answers go, under the number `place`.
        request: what the engine is asked.
        rows: what the model's task is asked instead, with options: at most `MOST_ROWS`, and with beams one.
    """

    key: str
    cost: int
    mailbox: Mailbox
    place: int = 0
    request: Request | None = None
    rows: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    id: int = 0
    unfinished: int = 0  # answers; the worker's

    @property
    def searched(self) -> bool:
        """Whether its one row is answered by beam search."""
        return self.options.get("beams", 1) > 1


@dataclass(frozen=True)
class WorkerState:
    """What a worker is doing, as of its last step, for metrics."""

    queued: int = 0
    queued_tokens: int = 0
    active: int = 0
    reading: int = 0
    free: int = 0
    statistics: EngineStatistics = field(default_factory=EngineStatistics)


def _unwritable(request: Request) -> FormaryError:
    """Why no token could be chosen: what the request asks for may leave none; else the model's numbers are none."""
    asked = request.settings
    penalised = asked.repetition_penalty != 1 or asked.frequency_penalty != 0 or asked.presence_penalty != 0
    if penalised or request.constraint is not None:
        return RequestError(
            "no token can be chosen with these penalties or this format of the answer; give milder ones "
            "(if it fails without them too, the model's weights are damaged)"
        )
    return NotFinite()


class Worker:
    """Owns a model, its engine and the queue in front of it.

    Args:
        model: is not touched by anyone else while the worker runs, but for its tokenizer and its settings.
        turns: shared by the workers of a process.
        queue_tokens: most tokens that wait.
        slots, context: of the engine; a model that does not write has none.
        engine: makes the engine.
    """

    def __init__(self, name: str, model: Model, turns: Turns, *, queue_tokens: int, engine: Any = None) -> None:
        self.name = name
        self.model = model
        self._turns = turns
        self._make_engine = engine
        self._engine: Engine | None = engine() if engine is not None else None
        self.context = self._engine.context if self._engine is not None else model.config.context
        self._changed = threading.Condition()
        # All of these only under the lock of `_changed`.
        self._writing: FairQueue[Job] = FairQueue(queue_tokens)
        self._answering: FairQueue[Job] = FairQueue(queue_tokens)
        self._running: dict[int, Job] = {}
        self._search: tuple[Job, Generator[None, None, dict[str, Any]]] | None = None  # the thread's own
        self._cancelled: list[int] = []
        self._stopping = False
        self._numbers = itertools.count(1)
        self._rate = 200.0  # tokens of the queue worked off in a second, a moving average
        self._worked = 0
        self._past = EngineStatistics()  # of engines that failed
        self.state = WorkerState(free=self._engine.slots if self._engine is not None else 0)
        self._thread = threading.Thread(target=self._run, name=f"formary-{name}", daemon=True)

    # --- the asyncio side ---

    @contextmanager
    def running(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Have jobs of one request done; on leaving, whatever of them is not finished is given up.

        Raises:
            QueueFull: there is no room for them now.
        """
        self._submit(jobs)
        try:
            yield
        finally:
            self._give_up(jobs)

    def _submit(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            if self._stopping:
                raise Stopped
            queue = self._writing if jobs and jobs[0].request is not None else self._answering
            for job in jobs:
                job.id = next(self._numbers)
                job.unfinished = job.request.n if job.request is not None else 1
                if job.request is not None:
                    job.request = replace(job.request, id=job.id)
            try:
                queue.offer(jobs)
            except QueueFull:
                raise QueueFull(self._retry_after(queue.tokens)) from None
            self._changed.notify()

    def _give_up(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            for job in jobs:
                queue = self._writing if job.request is not None else self._answering
                if not queue.remove(job) and self._running.pop(job.id, None) is not None and job.request is not None:
                    self._cancelled.append(job.id)
            self._changed.notify()

    def _retry_after(self, tokens: int) -> int:
        # When about a tenth of what waits has been worked off there is room again.
        return int(min(max(tokens / 10 / self._rate, _SHORTEST), _LONGEST))

    # --- life ---

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """Tell everyone who waits that nothing comes any more, and end the thread after its current step."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    # --- the thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._something_to_do():
                    self._changed.wait()
                if self._stopping:
                    left = [*self._running.values(), *self._writing.clear(), *self._answering.clear()]
                    self._running.clear()
                    break
                cancelled, self._cancelled = self._cancelled, []
            began, self._worked = time.monotonic(), 0
            deliveries: list[tuple[Job, Item]] = []
            try:
                self._work(cancelled, deliveries)
            except Exception as error:
                deliveries += self._failed(error)
            self._deliver(deliveries)
            self._publish(time.monotonic() - began)
        self._deliver([(job, Stopped()) for job in left])

    def _something_to_do(self) -> bool:
        busy = self._engine is not None and self._engine.busy
        waiting = len(self._writing) or len(self._answering)
        return bool(self._stopping or self._cancelled or waiting or self._search is not None or busy)

    def _work(self, cancelled: Sequence[int], deliveries: list[tuple[Job, Item]]) -> None:
        """One round: who left goes, who waits comes, one step of the engine, one batch of rows."""
        engine = self._engine
        if engine is not None:
            for number in cancelled:
                engine.cancel(number)
            self._admit(engine, deliveries)
        rows = self._take_rows() if self._search is None else []
        if rows and rows[0].searched:
            self._search = rows[0], self._searching(rows[0])
        elif rows:
            with self._turns.turn():
                deliveries += self._answer(rows)
        if self._search is not None:
            deliveries += self._search_on(*self._search)
        if engine is not None and engine.busy:
            with self._turns.turn():
                events = engine.step()
            with self._changed:
                for event in events:
                    self._sort(event, deliveries)

    def _admit(self, engine: Engine, deliveries: list[tuple[Job, Item]]) -> None:
        """Move jobs from the queue into the engine while it has free slots; there they wait for nobody."""
        free = engine.free - engine.waiting
        while free > 0:
            with self._changed:
                if not len(self._writing):
                    return
                job = self._writing.pop()
                self._running[job.id] = job
            assert job.request is not None
            try:
                engine.submit(job.request)
                free -= job.request.n
            except FormaryError as error:
                with self._changed:
                    self._running.pop(job.id, None)
                deliveries.append((job, error))

    def _sort(self, event: Event, deliveries: list[tuple[Job, Item]]) -> None:
        job = self._running.get(int(event.request))
        self._worked += 1
        if job is None:  # its client left during the step
            return
        if event.finish == "error":
            assert job.request is not None
            error = _unwritable(job.request)
            log.error("model %s failed to write: %s", self.name, error)
            deliveries.append((job, error))
        else:
            deliveries.append((job, event))
        if event.finish is not None:
            job.unfinished -= 1
            if not job.unfinished:
                del self._running[job.id]

    def _take_rows(self) -> list[Job]:
        """Jobs with rows, the fairest first, that are asked with the same options: as many as one batch holds."""
        taken: list[Job] = []
        with self._changed:
            while (job := self._answering.peek()) is not None:
                alike = taken and job.options == taken[0].options and not job.searched
                if taken and not (alike and sum(len(t.rows) for t in taken) + len(job.rows) <= MOST_ROWS):
                    break
                taken.append(self._answering.pop())
                self._running[job.id] = job
        return taken

    def _answer(self, jobs: Sequence[Job]) -> list[tuple[Job, Item]]:
        """Answer the rows of several jobs together; where that fails, each alone, so that nobody pays for another."""
        try:
            rows = [row for job in jobs for row in job.rows]
            answers = self._predicted(rows, jobs[0].options)
        except Exception as error:
            if len(jobs) > 1:
                return [delivery for job in jobs for delivery in self._answer([job])]
            if not isinstance(error, FormaryError):
                log.error("model %s failed to answer a row", self.name, exc_info=error)
            return [self._done(jobs[0], error)]
        found = iter(answers)
        self._worked += sum(job.cost for job in jobs)
        return [self._done(job, list(itertools.islice(found, len(job.rows)))) for job in jobs]

    def _predicted(self, rows: Sequence[Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        if not options.get("fill"):
            return self.model.predict(rows, **options)
        found = []
        for row in rows:
            blanks = self.model.fill(row)
            found.append(
                {
                    "blanks": [
                        [{"text": c.text, "token": c.token, "probability": c.probability} for c in b] for b in blanks
                    ]
                }
            )
        return found

    def _searching(self, job: Job) -> Generator[None, None, dict[str, Any]]:
        task = self.model.task
        assert isinstance(task, WritingTask)
        (row,) = rows_of(task, job.rows)
        return searching(task, self.model.network, row, job.options)

    def _search_on(self, job: Job, steps: Generator[None, None, dict[str, Any]]) -> list[tuple[Job, Item]]:
        """One more step of the beam search for a job, unless its client has left."""
        with self._changed:
            wanted = job.id in self._running
        try:
            if wanted:
                with self._turns.turn():
                    next(steps)
                return []
            steps.close()
            found: list[tuple[Job, Item]] = []
        except StopIteration as end:
            self._worked += job.cost
            found = [self._done(job, [end.value])]
        except Exception as error:
            if not isinstance(error, FormaryError):
                log.error("model %s failed to answer a row", self.name, exc_info=error)
            found = [self._done(job, error)]
        self._search = None
        return found

    def _done(self, job: Job, item: Item) -> tuple[Job, Item]:
        with self._changed:
            self._running.pop(job.id, None)
        return job, item

    def _failed(self, error: Exception) -> list[tuple[Job, Item]]:
        """The engine or a batch failed: everyone in it is told, and a fresh engine goes on with who waits."""
        log.error("model %s failed while answering", self.name, exc_info=error)
        with self._changed:
            left = list(self._running.values())
            self._running.clear()
            self._cancelled.clear()
        self._search = None
        if self._engine is not None:
            self._past = _sum(self._past, self._engine.statistics)
            self._engine = self._make_engine()
        return [(job, error) for job in left]

    def _deliver(self, deliveries: Sequence[tuple[Job, Item]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Item]]] = {}
        for job, item in deliveries:
            by_loop.setdefault(job.mailbox.loop, []).append((job, item))
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_post, items)
            except RuntimeError:  # the loop is closed: nobody waits for them
                log.debug("%d answers had nobody to go to", len(items))

    def _publish(self, seconds: float) -> None:
        engine = self._engine
        statistics = self._past if engine is None else _sum(self._past, engine.statistics)
        read = statistics.prompt_tokens - self.state.statistics.prompt_tokens
        if (self._worked + read) and seconds > 0:
            self._rate += 0.02 * ((self._worked + read) / seconds - self._rate)
        with self._changed:
            queued = len(self._writing) + len(self._answering)
            tokens = self._writing.tokens + self._answering.tokens
        self.state = WorkerState(
            queued,
            tokens,
            engine.active if engine is not None else 0,
            engine.reading if engine is not None else 0,
            engine.free if engine is not None else 0,
            statistics,
        )

    @property
    def queued(self) -> tuple[int, int]:
        """Jobs that wait, and their tokens, now."""
        with self._changed:
            return (
                len(self._writing) + len(self._answering),
                self._writing.tokens + self._answering.tokens,
            )


def _post(items: Sequence[tuple[Job, Item]]) -> None:
    for job, item in items:
        job.mailbox.put(job.place, item)


def _sum(one: EngineStatistics, other: EngineStatistics) -> EngineStatistics:
    return EngineStatistics(**{name: getattr(one, name) + getattr(other, name) for name in one.__dataclass_fields__})

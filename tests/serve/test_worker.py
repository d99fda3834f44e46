"""The worker: answers as the model gives alone, leaves with its client before the next step, and outlives failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from formary.errors import RequestError
from formary.infer.engine import Engine, Event
from formary.infer.loaded import Model
from formary.serve.errors import QueueFull, Stopped
from formary.serve.turns import Turns
from formary.serve.worker import Job, Mailbox, Worker


class SteppedEngine(Engine):
    """An engine that takes a step only when the test allows it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.allowed, self.begun, self.taken = threading.Semaphore(0), 0, 0

    def step(self) -> list[Event]:
        self.begun += 1
        self.allowed.acquire()
        self.taken += 1
        return super().step()


Models = dict[str, Callable[..., Model]]


@pytest.fixture
def worker(models: Models) -> Iterator[Worker]:
    made = worker_of(models["writer"]())
    made.start()
    yield made
    if isinstance(made._engine, SteppedEngine):
        made._engine.allowed.release(10_000)
    made.stop()
    assert not made.alive


def worker_of(
    model: Model, *, slots: int = 2, queue_tokens: int = 10_000, kind: type[Engine] = SteppedEngine
) -> Worker:
    def engine() -> Engine:
        return kind(model.network, slots=slots, text_decoder=model.text_decoder)

    return Worker("writer", model, Turns(), queue_tokens=queue_tokens, engine=engine)


def job(model: Model, mailbox: Mailbox, text: str = "The cat", *, n: int = 1, key: str = "a", **options: Any) -> Job:
    request, _ = model.request(model.prompt_tokens(text), n, {"max_tokens": 100, **options})
    object.__setattr__(request, "stop_tokens", frozenset())
    return Job(key, len(request.prompt) + n * request.max_tokens, mailbox, request=request)


async def told(mailbox: Mailbox, count: int = 1) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        found += [item for _, item in await asyncio.wait_for(mailbox.get(), 60)]
    return found


def test_what_is_written_is_what_the_model_writes_alone(models: Models) -> None:
    model = models["writer"]()
    worker = worker_of(model, kind=Engine)
    worker.start()

    async def ask() -> list[Any]:
        mailbox = Mailbox()
        jobs = [job(model, mailbox, text, max_tokens=9, seed=3, temperature=1.0) for text in ("The cat", "dog", "猫")]
        for place, made in enumerate(jobs):
            made.place = place
        found: dict[int, str] = {}
        with worker.running(jobs):
            left = 3
            while left:
                for place, event in await asyncio.wait_for(mailbox.get(), 60):
                    found[place] = found.get(place, "") + event.text
                    left -= event.finish is not None
        return [found[place] for place in range(3)]

    written = asyncio.run(ask())
    worker.stop()
    alone = [model.generate(text, max_tokens=9, seed=3, temperature=1.0) for text in ("The cat", "dog", "猫")]
    # The jobs go on after an end token.
    assert all(there.startswith(here.text) for there, here in zip(written, alone)) and len(set(written)) == 3


@pytest.mark.parametrize("steps", [0, 1, 5], ids=["being read", "after its first token", "being written"])
def test_one_whose_client_leaves_is_gone_before_the_next_step(
    worker: Worker, until: Callable[..., None], steps: int
) -> None:
    engine: Any = worker._engine

    async def ask() -> None:
        mailbox = Mailbox()
        with worker.running([job(worker.model, mailbox, n=2)]):
            for _ in range(steps):
                engine.allowed.release()
            await asyncio.to_thread(until, lambda: engine.begun == steps + 1)

    asyncio.run(ask())
    engine.allowed.release()  # the step that had begun
    until(lambda: worker.state.free == 2 and not engine.busy)
    assert engine.taken == steps + 1 and worker.state.active == 0 and not worker._running


def test_one_who_leaves_the_queue_is_never_begun(worker: Worker, until: Callable[..., None]) -> None:
    engine: Any = worker._engine

    async def ask() -> None:
        mailbox = Mailbox()
        with worker.running([job(worker.model, mailbox, n=2)]):
            await asyncio.to_thread(until, lambda: engine.busy)
            with worker.running([job(worker.model, mailbox)]):
                assert worker.queued == (1, 107)
            assert worker.queued == (0, 0)

    asyncio.run(ask())
    engine.allowed.release()
    until(lambda: not engine.busy)
    assert engine.taken == 1


def test_a_full_queue_says_when_to_come_again(models: Models) -> None:
    worker = worker_of(models["writer"](), queue_tokens=250)  # not started: everything waits

    async def ask() -> None:
        mailbox = Mailbox()
        jobs = [job(worker.model, mailbox) for _ in range(3)]
        with worker.running(jobs[:2]):
            with pytest.raises(QueueFull) as caught, worker.running(jobs[2:]):
                pass
            assert 1 <= caught.value.retry_after <= 60
        with worker.running(jobs[2:]):
            assert worker.queued[0] == 1

    asyncio.run(ask())


class FailingEngine(SteppedEngine):
    """Fails at its third step."""

    failures = 0

    def step(self) -> list[Event]:
        if self.taken == 2 and FailingEngine.failures == 0:
            FailingEngine.failures += 1
            raise ZeroDivisionError
        return super().step()


def test_when_the_engine_fails_those_in_it_are_told_and_those_who_wait_are_answered(models: Models) -> None:
    model = models["writer"]()
    worker = worker_of(model, kind=FailingEngine)
    FailingEngine.failures = 0
    worker.start()

    async def ask() -> None:
        first, second = Mailbox(), Mailbox()
        with worker.running([job(model, first, n=2)]), worker.running([job(model, second, max_tokens=2)]):
            worker._engine.allowed.release(2)
            found = await told(first)
            while not isinstance(found[-1], Exception):
                found += await told(first)
            assert isinstance(found[-1], ZeroDivisionError)
            worker._engine.allowed.release(100)
            assert [event.finish for event in await told(second, 2)] == [None, "length"]

    asyncio.run(ask())
    assert worker.alive
    worker.stop()


def test_what_the_engine_refuses_is_told_to_the_one_who_asked(worker: Worker) -> None:
    async def ask() -> None:
        mailbox = Mailbox()
        made = job(worker.model, mailbox)
        object.__setattr__(made.request, "prompt", (10**6,))
        with worker.running([made]):
            (error,) = await told(mailbox)
            assert isinstance(error, RequestError) and "vocabulary" in str(error)

    asyncio.run(ask())


def test_when_it_stops_everyone_who_waits_is_told(models: Models) -> None:
    worker = worker_of(models["writer"]())
    worker.start()

    async def ask() -> None:
        mailbox = Mailbox()
        with worker.running([job(worker.model, mailbox, n=2)]), worker.running([job(worker.model, mailbox)]):
            worker._engine.allowed.release(1000)
            await asyncio.to_thread(worker.stop)
            found = await told(mailbox)
            while sum(isinstance(item, Stopped) for item in found) < 2:
                found += await told(mailbox)
            with pytest.raises(Stopped), worker.running([job(worker.model, mailbox)]):
                pass

    asyncio.run(ask())


def test_rows_that_wait_together_are_answered_together_and_a_bad_one_hurts_nobody_else(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["answerer"]("classify")
    asked: list[int] = []
    predict = model.predict

    def counted(rows: Any, **options: Any) -> Any:
        asked.append(len(rows))
        return predict(rows, **options)

    monkeypatch.setattr(model, "predict", counted)
    worker = Worker("classify", model, Turns(), queue_tokens=1000)

    async def ask(*rows: Any) -> list[Any]:
        mailbox = Mailbox()
        jobs = [Job("a", 1, mailbox, place, rows=[row]) for place, row in enumerate(rows)]
        with worker.running(jobs):
            if not worker.alive:
                worker.start()
            found: dict[int, Any] = {}
            while len(found) < len(rows):
                found |= dict(await asyncio.wait_for(mailbox.get(), 60))
        return [found[place] for place in range(len(rows))]

    texts = ["good cat", "bad dog", "the mat"]
    answers = asyncio.run(ask(*texts))
    assert asked == [3]
    for text, (answer,) in zip(texts, answers):
        (alone,) = predict([text])
        assert answer["label"] == alone["label"] and answer["probability"] == pytest.approx(
            alone["probability"], abs=1e-5
        )
    mixed = asyncio.run(ask("good cat", {"wrong": 1}))
    assert mixed[0][0]["label"] == answers[0][0]["label"] and "row 1" in str(mixed[1])
    worker.stop()

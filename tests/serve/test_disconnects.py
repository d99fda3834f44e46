"""A client that leaves frees its slots at once: in the queue, while its prompt is read, while it is written, streamed or not."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

LONG = {"model": "writer", "max_tokens": 4000, "ignore_eos": True, "temperature": 1.0}


class Leaving:
    """A client made of a bare socket, so that it can leave at any moment."""

    def __init__(self, url: str, path: str, body: dict[str, Any]) -> None:
        host, port = url.removeprefix("http://").split(":")
        raw = json.dumps(body).encode()
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        self.socket.sendall(head.encode() + raw)

    def leave(self) -> None:
        self.socket.close()


@pytest.fixture
def made(start: Any, models: Any) -> Any:
    with start({"writer": models["writer"](context=4096)}, slots=2) as running:
        yield running


def body(path: str, *, stream: bool, **fields: Any) -> dict[str, Any]:
    ask = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in path else {"prompt": "The cat"}
    return {**LONG, **ask, "stream": stream, **fields}


PATHS = ["/v1/completions", "/v1/chat/completions"]


def is_idle(made: Any) -> Callable[[], bool]:
    worker = made.worker()
    return lambda: not worker._running and worker.queued == (0, 0) and worker.state.active == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_one_who_leaves_while_it_is_written(made: Any, until: Callable[..., None], path: str, stream: bool) -> None:
    worker = made.worker()
    client = Leaving(made.url, path, body(path, stream=stream))
    until(lambda: worker.state.statistics.generated_tokens > 5)
    client.leave()
    until(is_idle(made))
    assert worker.state.statistics.generated_tokens < 4000 and worker.state.free == 2
    assert made.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_one_who_leaves_the_queue(made: Any, until: Callable[..., None], stream: bool) -> None:
    worker = made.worker()
    busy = Leaving(made.url, PATHS[0], body(PATHS[0], stream=True, n=2))
    until(lambda: worker.state.active == 2)
    waiting = Leaving(made.url, PATHS[0], body(PATHS[0], stream=stream))
    until(lambda: worker.queued[0] == 1)
    waiting.leave()
    until(lambda: worker.queued == (0, 0))
    assert len(worker._running) == 2  # the other's two answers go on
    busy.leave()
    until(is_idle(made))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_one_who_leaves_while_its_prompt_is_read(made: Any, until: Callable[..., None], stream: bool) -> None:
    worker = made.worker()
    prompt = "The cat sat on the mat. " * 160
    client = Leaving(made.url, PATHS[0], body(PATHS[0], stream=stream, prompt=prompt))
    until(lambda: worker._running)
    client.leave()
    until(is_idle(made))
    assert worker.state.statistics.generated_tokens < 200


def test_one_who_leaves_while_it_sends_its_body(made: Any, until: Callable[..., None]) -> None:
    host, port = made.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        half.sendall(b"Content-Length: 1000\r\n\r\n{")
        until(lambda: made.service.in_flight == 1)
    until(lambda: made.service.in_flight == 0)
    assert is_idle(made)()


@pytest.fixture
def translator(start: Any, models: Any) -> Any:
    with start({"translate": models["answerer"]("translate")}, slots=2) as running:
        yield running


def test_rows_that_are_written_stop_when_their_client_leaves(translator: Any, until: Callable[..., None]) -> None:
    worker = translator.worker("translate")
    rows = {"inputs": ["the cat sat on the mat"] * 2000, "max_tokens": 40}
    client = Leaving(translator.url, "/v1/predict/translate", rows)
    until(lambda: worker.state.statistics.generated_tokens > 5)
    client.leave()
    until(lambda: not worker._running and worker.queued == (0, 0) and worker.state.active == 0)
    assert worker.state.statistics.generated_tokens < 20_000
    assert translator.post("/v1/predict/translate", {"inputs": ["the cat"]}).status_code == 200


def test_a_beam_search_stops_when_its_client_leaves_and_holds_nobody_up(
    translator: Any, until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import formary.serve.worker as module

    worker, steps = translator.worker("translate"), []

    def endless(*_: Any) -> Any:
        while True:
            steps.append(1)
            yield

    monkeypatch.setattr(module, "searching", endless)
    rows = {"inputs": ["the cat", "the dog"], "beams": 2}
    client = Leaving(translator.url, "/v1/predict/translate", rows)
    until(lambda: len(steps) > 3)
    assert translator.post("/v1/predict/translate", {"inputs": ["the cat"] * 5}).status_code == 200
    client.leave()
    until(lambda: worker._search is None and worker.queued == (0, 0))
    monkeypatch.undo()
    found = translator.post("/v1/predict/translate", rows).json()["answers"]
    assert found == translator.service.models["translate"].predict(rows["inputs"], beams=2)


def test_rows_of_one_who_leaves_are_not_answered(
    start: Any, models: Any, until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with start({"classify": models["answerer"]("classify")}) as made:
        worker = made.worker("classify")
        with made.service.turns.turn():  # nothing is computed meanwhile
            first = Leaving(made.url, "/v1/predict/classify", {"inputs": ["a"]})
            until(lambda: worker._running)
            second = Leaving(made.url, "/v1/predict/classify", {"inputs": ["b"]})
            until(lambda: worker.queued[0] == 1)
            second.leave()
            until(lambda: worker.queued[0] == 0)
            first.leave()
            until(lambda: not worker._running)
        assert made.post("/v1/predict/classify", {"inputs": ["a"]}).status_code == 200

"""Listening and stopping: taken ports are told, and one who is told to stop finishes what runs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from formary.errors import FormaryError
from formary.serve.server import listen

LONG = {"prompt": "The cat", "ignore_eos": True, "temperature": 1.0}


def test_a_port_that_is_taken_is_told() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FormaryError, match=rf"port {port} is taken.*--port"):
            listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(FormaryError, match=r"cannot listen on 192\.0\.2\.1"):
        listen("192.0.2.1", 0)


def test_what_runs_is_finished_and_what_comes_is_refused(start: Any, models: Any, until: Callable[..., None]) -> None:
    with start({"writer": models["writer"](context=4096)}, drain_seconds=60) as made:
        answers: list[Any] = []
        ask = threading.Thread(target=lambda: answers.append(made.post("/v1/completions", {**LONG, "max_tokens": 600})))
        ask.start()
        until(lambda: made.worker().state.statistics.generated_tokens > 5)
        made.server.drain()
        refused = made.post("/v1/completions", {**LONG, "max_tokens": 1})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        ask.join()
        assert answers[0].json()["usage"]["completion_tokens"] == 600
        until(lambda: made.server.should_exit)
        until(lambda: not made.worker().alive)


def test_when_the_time_has_passed_the_rest_is_given_up(start: Any, models: Any, until: Callable[..., None]) -> None:
    with start({"writer": models["writer"](context=4096)}, drain_seconds=0.2) as made:
        answers: list[Any] = []

        def ask() -> None:
            answers.append(made.post("/v1/completions", {**LONG, "max_tokens": 4000}))

        def stream() -> None:
            answers.append(made.post("/v1/completions", {**LONG, "max_tokens": 4000, "stream": True}))

        threads = [threading.Thread(target=target) for target in (ask, stream)]
        for thread in threads:
            thread.start()
        until(lambda: made.worker().state.active == 2)
        made.server.drain()
        for thread in threads:
            thread.join()
        whole, streamed = sorted(answers, key=lambda answer: -answer.status_code)
        assert whole.status_code == 503
        assert streamed.status_code == 200 and "draining" in streamed.text and "[DONE]" not in streamed.text


def test_the_socket_is_closed_afterwards(start: Any, models: Any) -> None:
    with start({"writer": models["writer"]()}) as made:
        port = int(made.url.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)

"""Listening and stopping: on SIGTERM no new request is taken, what runs is finished, and the program ends with 0."""

from __future__ import annotations

import errno
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from formary.errors import FormaryError
from formary.serve.app import create_app
from formary.serve.service import Service


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 takes any that is free.

    Raises:
        FormaryError: the port is taken, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise FormaryError(f"port {port} is taken by another program; choose another with --port") from None
        if error.errno == errno.EACCES:
            raise FormaryError(f"port {port} may not be opened by this user; choose one above 1023") from None
        raise FormaryError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return listener


class Server(uvicorn.Server):
    """Uvicorn, which on the first SIGTERM or Ctrl-C lets what runs finish, and on the second stops at once.

    Args:
        drain_seconds: after which what still runs is given up.
    """

    def __init__(self, service: Service, *, drain_seconds: float) -> None:
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=5,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=2**15,
        )
        super().__init__(config)
        self.service, self.drain_seconds = service, drain_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        if self._deadline is None:
            self.drain()
        else:
            self._deadline = 0.0
            self.force_exit = sig == signal.SIGINT

    def drain(self) -> None:
        """Refuse new requests from now on, and stop when the others are answered or the time has passed."""
        self._deadline = time.monotonic() + self.drain_seconds
        self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Uvicorn's question, ten times a second, whether to stop."""
        if self._deadline is not None and (not self.service.in_flight or time.monotonic() > self._deadline):
            self.should_exit = True
            for served in self.service.served.values():
                served.worker.stop(0)
        return await super().on_tick(counter)


def run(
    service: Service,
    listener: socket.socket,
    load: Callable[[], Any],
    *,
    drain_seconds: float,
    ready: Callable[[], Any] = lambda: None,
) -> None:
    """Serve until a signal comes; models are loaded meanwhile, and requests are told so.

    Args:
        load: loads the models into the service.
        ready: called when that is done.

    Raises:
        FormaryError: a model could not be loaded.
    """
    server = Server(service, drain_seconds=drain_seconds)
    failures: list[BaseException] = []

    def loading() -> None:
        try:
            load()
            ready()
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    threading.Thread(target=loading, name="formary-loading", daemon=True).start()
    try:
        server.run(sockets=[listener])
    finally:
        service.stop()
    if failures:
        raise failures[0]

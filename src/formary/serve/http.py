"""HTTP around the routes: sizes, keys, hosts and headers, streams, and clients that leave.

Plain ASGI, so that a stream is never buffered and a disconnect is always seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from formary.serve import limits
from formary.serve.errors import ApiError, refusal
from formary.serve.responses import dumps, server_sent

if TYPE_CHECKING:
    from formary.serve.metrics import Metrics
    from formary.serve.service import Service

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

T = TypeVar("T")

HEADERS = {
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
}
OPEN = ("/health",)
"""Paths that need no key; the playground adds its page."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Guard:
    """Everything that is decided before a route sees a request, and the headers of every response.

    Args:
        public: paths that need no key; one that ends in / stands for all below it.
    """

    def __init__(self, app: App, service: Service, metrics: Metrics, public: tuple[str, ...]) -> None:
        self.app, self.service, self.metrics = app, service, metrics
        self._exact = {path for path in public if not path.endswith("/") or path == "/"}
        self._below = tuple(path for path in public if path.endswith("/") and path != "/")
        self._keys = [hashlib.sha256(key.encode()).digest() for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name.lower() for name, _ in message.get("headers", ())}
                added = [(name, value) for name, value in HEADERS.items() if name not in present]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        self.service.in_flight += 1
        try:
            self._check(scope)
            await self.app(scope, _bounded(receive), send_guarded)
        except ApiError as error:
            await reply(error.status, error.body, send_guarded, headers=error.headers)
        finally:
            self.service.in_flight -= 1
            self.metrics.answered(scope, status or 499)

    def _check(self, scope: Scope) -> None:
        headers = {name: value for name, value in scope["headers"] if name in _READ}
        if any(len(value) > limits.HEADER_VALUE for value in headers.values()):
            raise ApiError(400, "a header is too long")
        hosts = self.service.settings.hosts
        if hosts is not None and _host(headers.get(b"host", b"")) not in hosts:
            raise ApiError(
                403,
                "this server answers only under the name of this machine itself; start it with --api-key for others",
                code="wrong_host",
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limits.BODY_BYTES:
            raise ApiError(413, f"the body is longer than {limits.BODY_BYTES} bytes")
        path = scope["path"]
        scope["formary.key"] = self._who(headers.get(b"authorization", b""), scope)
        if self._keys and scope["formary.key"] is None and not (path in self._exact or path.startswith(self._below)):
            raise ApiError(401, "the key is missing or wrong: send the header Authorization: Bearer KEY")

    def _who(self, authorization: bytes, scope: Scope) -> str | None:
        """Whose request it is: the number of its key, or without keys the address it comes from."""
        if not self._keys:
            client = scope.get("client")
            return str(client[0]) if client else ""
        scheme, _, given = authorization.partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        found = [number for number, key in enumerate(self._keys) if hmac.compare_digest(key, digest)]
        return f"key {found[0]}" if found and scheme.lower() == b"bearer" else None


_READ = (b"host", b"content-length", b"authorization")


def _host(value: bytes) -> str:
    name = value.decode("latin-1").lower()
    return name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]


def _bounded(receive: Receive) -> Receive:
    """Counts the body as it comes, for those that do not say how long it is."""
    seen = 0

    async def counted() -> MutableMapping[str, Any]:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > limits.BODY_BYTES:
                raise ApiError(413, f"the body is longer than {limits.BODY_BYTES} bytes")
        return message

    return counted


async def reply(status: int, value: Any, send: Send, *, headers: dict[str, str] | None = None) -> None:
    """Send a JSON response."""
    body = dumps(value)
    listed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    listed += [(name.lower().encode(), text.encode("latin-1", "replace")) for name, text in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": body})


async def body_of(request: Request) -> bytes:
    """The body, when it says that it is JSON; a web page of another site cannot say so unasked.

    Raises:
        ApiError: it is of another type, or too long. ClientGone: it does not come to its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    parts = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Wait for work for as long as the client waits for it; the body has to be read already.

    Raises:
        ClientGone: the client has left, and the work is cancelled.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for waited in (task, leaving):
            waited.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events.

    Args:
        events: closed at once when the client leaves.
        close: called at the end however it comes, also when nothing could be sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], close: Callable[[], object]) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self.events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(receive, self._pump(send))
        except (ClientGone, OSError):
            pass
        finally:
            self._close()

    async def _pump(self, send: Send) -> None:
        async with contextlib.aclosing(self.events):
            try:
                async for event in self.events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except OSError:
                raise ClientGone from None
            except Exception as error:
                await send({"type": "http.response.body", "body": server_sent(refusal(error).body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

"""How a request is refused: an HTTP status and the JSON that OpenAI's clients expect."""

from __future__ import annotations

import re
from typing import Any

from formary.errors import FormaryError
from formary.infer.request import NotFinite

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
_CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "queue_full"}
_ARGUMENT = re.compile(r"([a-z_][a-z0-9_]*(?:\[[^\]]{0,40}\])?)(?::| =)")


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
        param: the field it is about.
        code: a word for programs; one that goes with the status when left out.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after
        self.code = code or _CODES.get(status)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the status."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class QueueFull(Exception):
    """There is no room for a request now.

    Args:
        retry_after: seconds after which there may be.
    """

    def __init__(self, retry_after: int = 1) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopped(Exception):
    """The server has been told to stop, and the time for finishing what was being written has passed."""


def refusal(error: Exception) -> ApiError:
    """What a failure is to the client: errors that it can mend are told, defects of ours are not explained."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), retry_after=error.retry_after)
    if isinstance(error, Stopped):
        return ApiError(503, "the server is shutting down", code="draining", retry_after=5)
    if isinstance(error, NotFinite):
        return ApiError(500, str(error), code="not_finite")
    if isinstance(error, FormaryError):
        named = _ARGUMENT.match(str(error))
        return ApiError(400, str(error), param=named[1] if named else None)
    return ApiError(500, "the server failed to answer; its log says why", code="internal_error")

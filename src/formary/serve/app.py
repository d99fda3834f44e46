"""The server's routes: what each answers, and how every refusal looks. OpenAI's API where OpenAI has one.

Bodies are checked by `requests`, work is done by `writing` and `predicting`; here they are only joined.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from formary.serve.errors import ApiError, refusal
from formary.serve.http import OPEN, ClientGone, Guard, body_of, unless_gone
from formary.serve.metrics import Metrics
from formary.serve.predicting import embedded, predicted
from formary.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    PredictRequest,
    TokenizeRequest,
    parse,
)
from formary.serve.responses import dumps, token_text
from formary.serve.service import Served, Service
from formary.serve.writing import Answering, chat_prompt, streamed
from formary.version import __version__

if TYPE_CHECKING:
    from formary.serve.requests import B

log = logging.getLogger(__name__)


class Json(Response):
    """JSON without numbers that are not."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return dumps(content)


def create_app(service: Service) -> FastAPI:
    """The ASGI application for the models of a service."""
    app = FastAPI(
        title="Formary",
        version=__version__,
        description="An OpenAI-compatible API for models on this machine. What is not implemented is refused by name.",
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        default_response_class=Json,
    )
    metrics = Metrics(service)
    _add_information(app, service, metrics)
    _add_writing(app, service, metrics)
    _add_predicting(app, service)
    _add_tokens(app, service)
    public: tuple[str, ...] = OPEN
    if importlib.util.find_spec("formary.serve.playground") is not None:
        from formary.serve import playground

        public = (*OPEN, *playground.PUBLIC)
        app.include_router(playground.router(service))
    _add_refusals(app)
    app.add_middleware(Guard, service=service, metrics=metrics, public=public)
    return app


def _add_information(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/health", summary="Whether the server takes requests", responses=_told("The server is not ready"))
    async def health() -> Response:
        status = {"loading": "loading", "ready": "ok", "draining": "draining"}[service.state]
        alive = all(served.worker.alive for served in service.served.values())
        code = 200 if status == "ok" and alive else 503
        return Json({"status": status if alive else "failed", "models": list(service.served)}, code)

    @app.get("/metrics", summary="Counters and times for Prometheus")
    async def measured() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", summary="The models that are served")
    async def models() -> Response:
        return Json({"object": "list", "data": [_described(served) for served in service.served.values()]})

    @app.get("/v1/models/{model:path}", summary="One model and what it can do", responses=_told("No such model"))
    async def model(model: str) -> Response:
        return Json(_described(service.find(model)))


def _add_writing(app: FastAPI, service: Service, metrics: Metrics) -> None:
    async def written(request: Request, body: CompletionRequest | ChatRequest, served: Served) -> Response:
        answering = Answering(served, body, request.scope["formary.key"], metrics)
        answering.open()
        await asyncio.to_thread(answering.prepare)
        service.must_be_open()
        if body.stream:
            return streamed(answering)
        return Json(await unless_gone(request.receive, answering.whole()))

    @app.post("/v1/completions", summary="Go on from a prompt", **_takes(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = await _body(request, CompletionRequest, service)
        served = service.find(body.model)
        served.must("completions")
        return await written(request, body, served)

    @app.post("/v1/chat/completions", summary="The next message of a conversation", **_takes(ChatRequest))
    async def chat(request: Request) -> Response:
        body = await _body(request, ChatRequest, service)
        served = service.find(body.model)
        served.must("chat")
        return await written(request, body, served)


def _add_predicting(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings", summary="Vectors of texts", **_takes(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        body = await _body(request, EmbeddingRequest, service)
        served = service.find(body.model)
        return Json(await unless_gone(request.receive, embedded(served, body, request.scope["formary.key"])))

    @app.post("/v1/predict/{model:path}", summary="A model's answers to rows", **_takes(PredictRequest))
    async def predict(model: str, request: Request) -> Response:
        body = await _body(request, PredictRequest, service)
        served = service.find(model)
        return Json(await unless_gone(request.receive, predicted(served, body, request.scope["formary.key"])))


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", summary="The tokens of a text or a conversation", **_takes(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        body = await _body(request, TokenizeRequest, service)
        served = service.find(body.model)
        if body.messages is not None:
            served.must("chat")
        tokens = await asyncio.to_thread(_tokens, served, body)
        texts = [token_text(served.model.tokenizer, token) for token in tokens]
        return Json({"count": len(tokens), "max_model_len": served.worker.context, "tokens": tokens, "texts": texts})

    @app.post("/detokenize", summary="The text of tokens", **_takes(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        body = await _body(request, DetokenizeRequest, service)
        served = service.find(body.model)
        size = served.model.tokenizer.vocab_size
        if body.tokens and max(body.tokens) >= size:
            raise ApiError(400, f"tokens: {max(body.tokens)} is outside the vocabulary of {size}", param="tokens")
        return Json({"prompt": await asyncio.to_thread(served.model.tokenizer.decode, body.tokens)})


def _tokens(served: Served, body: TokenizeRequest) -> list[int]:
    if body.prompt is None:
        return list(chat_prompt(served, body))
    if not served.model.tokenizer.vocab_size:
        raise ApiError(400, f"the model '{served.name}' reads no text, so it has no tokens", param="model")
    return served.model.tokenizer.backend.encode(
        body.prompt, add_special_tokens=body.add_special_tokens is not False
    ).ids


async def _body(request: Request, kind: type[B], service: Service) -> B:
    service.must_be_open()
    raw = await body_of(request)
    return await asyncio.to_thread(parse, kind, raw) if len(raw) > 2**14 else parse(kind, raw)


def _described(served: Served) -> dict[str, Any]:
    """OpenAI's fields, and what a client may want to know before it asks."""
    task = served.model.task if served.task is not None else None
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "formary",
        "abilities": list(served.abilities),
        "task": served.task or ("fill" if served.fills else None),
        "asks": list(task.asks) if task is not None else [],
        "context": served.worker.context,
        "parent": served.base,
    }


# --- refusals and the description of the API ---


def _add_refusals(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        known = refusal(error)
        headers = dict(known.headers or {})
        if known.code == "internal_error":
            log.error("a request failed", exc_info=error)
            headers["Connection"] = "close"  # which the server does after a defect: nobody should send on it
        return Json(known.body, known.status, headers=headers)

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    async def unrouted(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = ApiError(error.status_code, str(error.detail))
        return Json(known.body, known.status, headers=dict(error.headers or {}))

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        known = ApiError(400, f"{place}: {first['msg']}", param=place, code="invalid_value")
        return Json(known.body, known.status)

    from formary.errors import FormaryError
    from formary.serve.errors import QueueFull, Stopped

    for kind in (ApiError, FormaryError, QueueFull, Stopped, Exception):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(HTTPException, unrouted)
    app.add_exception_handler(RequestValidationError, invalid)


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _told(description: str) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": _ERROR}}
    return {"4XX": {"description": description, "content": content}, "503": {"description": "Not now"}}


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """How a route with a body is described: its schema with all bounds, read by `parse` and not by FastAPI."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs", {})
    schema = _inlined(schema, parts)
    content = {"application/json": {"schema": schema}}
    return {
        "responses": _told("Something in the request cannot be followed"),
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """A schema without references to its own parts (none of ours contains itself)."""
    if isinstance(schema, list):
        return [_inlined(entry, parts) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {name: _inlined(value, parts) for name, value in schema.items()}

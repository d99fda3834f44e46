"""Text routes' work: a body becomes jobs for the model's worker, and what the worker writes becomes a response.

Completions and chat differ in how the prompt is made and how the answer is shaped; everything between is the same.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from formary.errors import RequestError
from formary.infer.constrain import asked_for
from formary.infer.engine import NO_TOKEN, Constraint, Event, Request
from formary.infer.loaded import Model
from formary.serve import limits
from formary.serve.calling import CallReader, MarkedText, called_schema, form_of
from formary.serve.errors import ApiError
from formary.serve.http import EventStream
from formary.serve.requests import ChatRequest, CompletionRequest, Prompt, TokenizeRequest, Writing
from formary.serve.responses import (
    DONE,
    Choice,
    Echo,
    chat_logprobs,
    completion_logprobs,
    server_sent,
    tool_call,
    usage,
)
from formary.serve.service import Served
from formary.serve.worker import Job, Mailbox

if TYPE_CHECKING:
    from formary.serve.metrics import Metrics

_COMPLETION_TOKENS = 16  # OpenAI's, where neither the request nor the model says
_CHAT_TOKENS = 1024


class Answering:
    """One request for text, from its checked body to its response.

    Args:
        key: whose request it is.
    """

    def __init__(self, served: Served, body: CompletionRequest | ChatRequest, key: str, metrics: Metrics) -> None:
        self.served, self.body, self.key, self.metrics = served, body, key, metrics
        self.chat = isinstance(body, ChatRequest)
        self.n = body.n or 1
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.prompts: list[tuple[int, ...]] = []
        self.echoes: list[str] = []
        self.jobs: list[Job] = []
        self.choices: list[Choice] = []
        self.scores: dict[int, Any] = {}
        self.cached = 0
        self.form = form_of(self.model.chat_template or "")
        self.marked = MarkedText(self.model.tokenizer)
        self._began = time.monotonic()
        self._first: dict[int, float] = {}

    @property
    def model(self) -> Model:
        """The model that answers."""
        return self.served.model

    def prepare(self) -> None:
        """Read the prompts and make the jobs; runs outside the event loop, since it can take a while.

        Raises:
            ApiError, FormaryError: something in the body cannot be followed by this model.
        """
        body, tokenizer = self.body, self.model.tokenizer
        if isinstance(body, ChatRequest):
            self.prompts = [chat_prompt(self.served, body)]
        else:
            self.prompts = [prompt_tokens(self.served, prompt) for prompt in body.prompt]
            if len(self.prompts) * self.n > limits.CHOICES:
                raise ApiError(400, f"n: {len(self.prompts)} prompts x {self.n} are too many answers", param="n")
            if body.echo:
                if self.model.config.encoder is not None:
                    raise ApiError(400, "echo: an encoder-decoder does not write on from its source", param="echo")
                self.echoes = [p if isinstance(p, str) else tokenizer.decode(p) for p in body.prompt]
        requests = self._requests()
        context = self.served.worker.context
        for place, request in enumerate(requests):
            room = request.max_tokens if self.model.config.encoder is not None else context - len(request.prompt) + 1
            for sample in range(self.n):  # a job each, so that others take their turns between them
                cost = min(request.max_tokens, max(room, 0)) + (len(request.prompt) if sample == 0 else 0)
                one = replace(request, n=1, first=sample)
                self.jobs.append(Job(self.key, cost, self.mailbox, place, one))
        self.choices = [Choice() for _ in range(len(self.prompts) * self.n)]

    def open(self) -> None:
        """Make the mailbox; in the event loop."""
        self.mailbox = Mailbox()

    def _requests(self) -> list[Request]:
        body = self.body
        options = body.options
        options["seed"] = secrets.randbits(48) if body.seed is None else body.seed
        usual = _CHAT_TOKENS if self.chat else _COMPLETION_TOKENS
        wanted = body.max_tokens
        if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
            wanted = body.max_completion_tokens
        if wanted is None:
            wanted = self.model.defaults.get("max_tokens", usual)
        options["max_tokens"] = wanted or 1
        request, _ = self.model.request((), self.n, options)
        chosen: dict[str, Any] = {"logprobs": self._logprobs, "speculate": body.speculate}
        chosen["constraint"] = constraint(self.model, body)
        if body.ignore_eos:
            chosen["stop_tokens"] = frozenset()
        if isinstance(body, CompletionRequest) and body.echo and (body.logprobs is not None or wanted == 0):
            chosen |= {"prompt_logprobs": body.logprobs or 0, "max_tokens": wanted}
        request = replace(request, **chosen)
        self._check(request)
        return [replace(request, prompt=prompt) for prompt in self.prompts]

    @property
    def _logprobs(self) -> int | None:
        body = self.body
        if isinstance(body, ChatRequest):
            return (body.top_logprobs or 0) if body.logprobs else None
        return body.logprobs

    def _check(self, request: Request) -> None:
        """What the engine would refuse once the request is in its hands, said before, with the field's name."""
        config, field = self.model.config, "messages" if self.chat else "prompt"
        most = config.encoder.context if config.encoder is not None else self.served.worker.context
        for tokens in self.prompts:
            if not tokens:
                raise ApiError(400, f"{field}: has no tokens to begin from", param=field, code="invalid_value")
            if len(tokens) > most:
                message = f"{field}: {len(tokens)} tokens are more than the context of {most}; shorten it"
                raise ApiError(400, message, param=field, code="context_length_exceeded")
            if max(tokens) >= config.vocab_size:
                message = f"{field}: token {max(tokens)} is outside the vocabulary of {config.vocab_size}"
                raise ApiError(400, message, param=field, code="invalid_value")
        biases = request.settings.logit_bias
        if biases and max(biases) >= config.vocab_size:
            message = f"logit_bias: token {max(biases)} is outside the vocabulary of {config.vocab_size}"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")

    async def arrivals(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of all answers as they come: (number of the choice, event); ends when all have ended."""
        left = len(self.choices)
        while left:
            for place, item in await self.mailbox.get():
                if isinstance(item, Exception):
                    raise item
                assert isinstance(item, Event)
                number = place * self.n + item.sample
                if item.cached and item.sample == 0:
                    self.cached += item.cached
                if item.prompt is not None:
                    self.scores[place] = item.prompt
                self._timed(number, item)
                left -= item.finish is not None
                yield number, item

    def _timed(self, number: int, event: Event) -> None:
        now = time.monotonic()
        if number not in self._first:
            self._first[number] = now
            if len(self._first) == 1:
                self.metrics.first_token.labels(self.served.name).observe(now - self._began)
        elif event.finish is not None:
            mean = (now - self._first[number]) / max(len(self.choices[number].tokens), 1)
            self.metrics.per_token.labels(self.served.name).observe(mean)

    def begun(self, number: int) -> Choice:
        """A choice that begins with its prompt, when that is echoed."""
        place, body = number // self.n, self.body
        if isinstance(body, ChatRequest) and body.offered_tools:
            names = [tool["function"]["name"] for tool in body.offered_tools]
            bare = self.form.bare or body.forced_tools is not None
            reader = CallReader(names, bare=bare, most=1 if body.parallel_tool_calls is False else None)
            return Choice(reader=reader, marked=self.marked)
        if not self.echoes:
            return Choice()
        scores = self.scores.get(place) if self._logprobs is not None else None
        return Echo(self.echoes[place], self.prompts[place], scores).choice(self.model.tokenizer)

    async def whole(self) -> dict[str, Any]:
        """The response in one piece."""
        with self.served.worker.running(self.jobs):
            events: list[list[Event]] = [[] for _ in self.choices]
            async for number, event in self.arrivals():
                events[number].append(event)
                if event.token != NO_TOKEN:
                    self.choices[number].tokens.append(event.token)
        written = sum(len(choice.tokens) for choice in self.choices)
        shown = []
        for number, listed in enumerate(events):
            choice = self.begun(number)
            for event in listed:
                choice.add(event)
            shown.append(self._shown(number, choice))
        return self._frame(shown) | {"usage": self._usage(written)}

    async def stream(self) -> AsyncGenerator[bytes]:
        """The response as server-sent events; the jobs have to be running already."""
        body = self.body
        counted = body.stream_options is not None and bool(body.stream_options.include_usage)
        nothing: dict[str, Any] = {"usage": None} if counted else {}
        written = 0
        begun: set[int] = set()
        if self.chat:
            for number in range(self.n):
                delta = {"role": "assistant", "content": ""}
                yield server_sent(self._frame([self._delta(number, delta)], chunk=True) | nothing)
        async for number, event in self.arrivals():
            choice = self.choices[number]
            before, characters, calls = len(choice.tokens), len(choice.text), len(choice.calls)
            if number not in begun:
                begun.add(number)
                choice = self.choices[number] = self.begun(number)
                before, characters, calls = 0, 0, 0
            choice.add(event)
            written += event.token != NO_TOKEN
            text = choice.text[characters:]
            called = range(calls, len(choice.calls))
            if text or called or event.finish is not None or self._logprobs is not None:
                piece = self._piece(number, choice, text, before, called)
                yield server_sent(self._frame([piece], chunk=True) | nothing)
        if counted:
            yield server_sent(self._frame([], chunk=True) | {"usage": self._usage(written)})
        yield DONE

    def _shown(self, number: int, choice: Choice) -> dict[str, Any]:
        tokenizer, wanted = self.model.tokenizer, self._logprobs is not None
        if self.chat:
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                calls = self._calls(choice, range(len(choice.calls)))
                message["content"] = choice.text or None
                message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
            return {
                "index": number,
                "message": message,
                "logprobs": chat_logprobs(tokenizer, choice) if wanted else None,
                "finish_reason": choice.finish,
            }
        logprobs = completion_logprobs(tokenizer, choice) if wanted else None
        return {"text": choice.text, "index": number, "logprobs": logprobs, "finish_reason": choice.finish}

    def _calls(self, choice: Choice, numbers: range) -> list[dict[str, Any]]:
        return [tool_call(choice.calls[number], number, short=self.form.short_ids) for number in numbers]

    def _piece(self, number: int, choice: Choice, text: str, start: int, called: range) -> dict[str, Any]:
        tokenizer, wanted = self.model.tokenizer, self._logprobs is not None
        if self.chat:
            delta: dict[str, Any] = {"content": text} if text or (choice.finish is None and not called) else {}
            if called:
                delta["tool_calls"] = self._calls(choice, called)
            logprobs = chat_logprobs(tokenizer, choice, start) if wanted else None
            return self._delta(number, delta) | {"logprobs": logprobs, "finish_reason": choice.finish}
        logprobs = completion_logprobs(tokenizer, choice, start) if wanted else None
        return {"text": text, "index": number, "logprobs": logprobs, "finish_reason": choice.finish}

    def _delta(self, number: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def _frame(self, choices: list[dict[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": None,
            "choices": choices,
        }

    def _usage(self, written: int) -> dict[str, Any]:
        return usage(sum(map(len, self.prompts)), written, self.cached)


def streamed(answering: Answering) -> EventStream:
    """The response that streams an answering; its jobs are taken before anything is sent.

    Raises:
        QueueFull: there is no room for them.
    """
    running = contextlib.ExitStack()
    running.enter_context(answering.served.worker.running(answering.jobs))
    return EventStream(answering.stream(), running.close)


def prompt_tokens(served: Served, prompt: Prompt) -> tuple[int, ...]:
    """A prompt as the model reads it; token ids are taken as they are.

    Raises:
        ApiError: it is so long that reading it would be a waste.
    """
    if not isinstance(prompt, str):
        return tuple(prompt)
    _check_length(served, prompt, "prompt")
    return served.model.prompt_tokens(prompt)


def chat_prompt(served: Served, body: ChatRequest | TokenizeRequest) -> tuple[int, ...]:
    """A conversation as the model reads it.

    Raises:
        ApiError: it has tools and the model's template has none, or it is far too long. RequestError: the template
            refuses it.
    """
    model = served.model
    messages = [message.plain for message in body.messages or ()]
    tools = body.offered_tools if isinstance(body, ChatRequest) else body.tools
    if tools and "tools" not in (model.chat_template or ""):
        message = "tools: the model's chat template has no place for tools; leave them out"
        raise ApiError(400, message, param="tools", code="unsupported_field")
    text = model.render_chat(messages, **({"tools": tools} if tools else {}))
    if isinstance(body, ChatRequest) and body.forced_tools is not None:
        text += form_of(model.chat_template or "").opening
    _check_length(served, text, "messages")
    return tuple(model.tokenizer.encode(text))


def _check_length(served: Served, text: str, field: str) -> None:
    encoder = served.model.config.encoder
    context = served.worker.context if encoder is None else encoder.context
    if len(text) > limits.CHARACTERS_PER_TOKEN * context:
        message = f"{field}: {len(text)} characters are far more than the context of {context} tokens; shorten it"
        raise ApiError(400, message, param=field, code="context_length_exceeded")


def constraint(model: Model, body: Writing) -> Callable[[], Constraint] | None:
    """What the answer has to follow, or None.

    Raises:
        ApiError: it cannot be followed; the message says what of it.
    """
    if isinstance(body, ChatRequest) and body.forced_tools is not None:
        return _forced(model, body.forced_tools)
    form = body.response_format
    asked: dict[str, Any] = {"regex": body.regex, "choice": body.choice}
    if form is not None and form.json_schema is not None:
        asked["json_schema"] = form.json_schema.schema_
    elif form is not None and form.type == "json_object":
        asked["json_schema"] = {"type": "object"}
    try:
        return asked_for(asked, model.tokenizer, ends=model.stop_tokens())
    except RequestError as error:
        field = next((name for name in ("regex", "choice") if asked[name] is not None), "response_format")
        raise ApiError(400, str(error), param=field, code="invalid_value") from None


def _forced(model: Model, tools: Sequence[dict[str, Any]]) -> Callable[[], Constraint] | None:
    """What makes the answer a call of one of some tools; where that cannot be, which of them is why."""
    form = form_of(model.chat_template or "")

    def calling(some: Sequence[dict[str, Any]]) -> Callable[[], Constraint] | None:
        return asked_for({"json_schema": called_schema(some, form)}, model.tokenizer, ends=model.stop_tokens())

    try:
        return calling(tools)
    except RequestError as error:
        for tool in tools:
            try:
                calling([tool])
            except RequestError as own:
                message = f"tools: {tool['function']['name']}: {own}"
                raise ApiError(400, message, param="tools", code="invalid_value") from None
        raise ApiError(400, f"tools: {error}", param="tools", code="invalid_value") from None

"""What clients get back, in OpenAI's shapes: answers as they build up token by token, and chunks of streams.

Pure functions of events; tokens become text through the model's tokenizer. Beside OpenAI's fields, log-probabilities
carry token ids, so that a client can go on from any of them.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from formary.data.tokenizer import Tokenizer
from formary.infer.engine import NO_TOKEN, Event, PromptScores
from formary.serve.calling import Call, CallReader, MarkedText

Top = tuple[tuple[int, float], ...]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is no whole character as OpenAI writes it, bytes:\\xe7\\x8c."""
    raw = token_raw(tokenizer, token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def token_raw(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token stands for; the name of one that stands for no text."""
    surfaces = tokenizer.token_bytes
    raw = surfaces[token] if token < len(surfaces) else b""
    return raw or str(tokenizer.backend.id_to_token(token) or "").encode()


@dataclass
class Choice:
    """One answer as it builds up."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # characters of the text before each token
    finish: str | None = None
    calls: list[Call] = field(default_factory=list)
    reader: CallReader | None = None  # where the model may call tools
    marked: MarkedText | None = None

    def add(self, event: Event) -> None:
        """One more token."""
        if event.token != NO_TOKEN:
            self.tokens.append(event.token)
            self.logprobs.append(event.logprob)
            self.top.append(event.top)
            self.offsets.append(len(self.text))
        self.finish = event.finish
        if self.reader is None:
            self.text += event.text
            return
        text = self.marked(event.token, event.text) if self.marked is not None else event.text
        for piece in self.reader.push(text, final=event.finish is not None):
            if isinstance(piece, str):
                self.text += piece
            else:
                self.calls.append(piece)
        if self.calls and event.finish == "stop":
            self.finish = "tool_calls"


@dataclass(frozen=True)
class Echo:
    """A prompt that is repeated before its answers, with its scores where they are asked for."""

    text: str
    tokens: tuple[int, ...]
    scores: PromptScores | None = None

    def choice(self, tokenizer: Tokenizer) -> Choice:
        """The prompt as the beginning of an answer."""
        made = Choice(text=self.text)
        if self.scores is not None:
            decoder, length = tokenizer.stream_decoder(), 0
            made.tokens, made.logprobs = list(self.tokens), list(self.scores.logprobs)
            made.top = list(self.scores.top) or [()] * len(self.tokens)
            for token in self.tokens:
                made.offsets.append(min(length, len(self.text)))
                length += len(decoder.push(token))
        return made


def completion_logprobs(tokenizer: Tokenizer, choice: Choice, start: int = 0, *, shift: int = 0) -> dict[str, Any]:
    """The log-probabilities of a text's tokens from `start` on, as /v1/completions has them.

    Args:
        shift: characters before the text.
    """
    tops: list[dict[str, float] | None] = []
    for logprob, top in zip(choice.logprobs[start:], choice.top[start:]):
        merged: dict[str, float] = {}
        for token, value in top:
            merged.setdefault(token_text(tokenizer, token), value)
        tops.append(merged if logprob is not None else None)
    return {
        "tokens": [token_text(tokenizer, token) for token in choice.tokens[start:]],
        "token_logprobs": choice.logprobs[start:],
        "top_logprobs": tops,
        "text_offset": [offset + shift for offset in choice.offsets[start:]],
        "token_ids": choice.tokens[start:],
        "top_token_ids": [[token for token, _ in top] for top in choice.top[start:]],
    }


def chat_logprobs(tokenizer: Tokenizer, choice: Choice, start: int = 0) -> dict[str, Any]:
    """The same as /v1/chat/completions has them."""
    content = []
    for token, logprob, top in zip(choice.tokens[start:], choice.logprobs[start:], choice.top[start:]):
        entry = _chat_logprob(tokenizer, token, logprob)
        entry["top_logprobs"] = [_chat_logprob(tokenizer, other, value) for other, value in top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_logprob(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    raw = token_raw(tokenizer, token)
    return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(raw), "id": token}


def tool_call(call: Call, number: int, *, short: bool = False) -> dict[str, Any]:
    """A call of a tool as OpenAI has it, the one of that number in its message.

    Args:
        short: with an id of nine characters.
    """
    made = secrets.token_hex(12)
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": number, "id": made[:9] if short else f"call_{made}", "type": "function", "function": function}


def usage(prompt_tokens: int, completion_tokens: int, cached: int = 0) -> dict[str, Any]:
    """The counts of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def dumps(value: Any) -> bytes:
    """JSON, finite numbers only."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_number).encode()


def server_sent(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + dumps(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _number(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")

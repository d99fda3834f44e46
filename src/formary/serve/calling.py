"""Calls of tools: how models write them, as the text arrives, and how a model is made to write one.

Three forms are known: Hermes' and Qwen's <tool_call> tags, Mistral's [TOOL_CALLS], and the bare JSON of Llama 3. What
is no call of a tool that was offered stays text. It knows no HTTP and no tokens but those that are marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formary.data.tokenizer import Tokenizer

_HERMES, _HERMES_END = "<tool_call>", "</tool_call>"
_MISTRAL, _ARGUMENTS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_PYTHON = "<|python_tag|>"
_OPENINGS = (_HERMES, _MISTRAL)
_MARKS = (*_OPENINGS, _HERMES_END, _ARGUMENTS, _CALL_ID, _PYTHON)
_NAMED = re.compile(rf"\s*([\w.-]+)\s*(?:{re.escape(_CALL_ID)}\s*\w+\s*)?(?:{re.escape(_ARGUMENTS)})?\s*(?=\{{)")
_MOST_TRIES = 64  # at reading JSON that has no closing mark, before its text has ended


@dataclass(frozen=True)
class Form:
    """How a model writes a call.

    Args:
        opening: what stands before the JSON.
        arguments: what the JSON calls them.
        listed: whether the JSON is a list of calls.
        bare: whether an answer that is JSON from its first character on can be a call.
        short_ids: whether the template wants ids of nine characters.
    """

    opening: str
    arguments: str = "arguments"
    listed: bool = False
    bare: bool = False
    short_ids: bool = False


_LLAMA = Form("", "parameters", bare=True)
_FORMS = {
    _HERMES: Form(f"{_HERMES}\n"),
    _MISTRAL: Form(_MISTRAL, listed=True, short_ids=True),
    _PYTHON: _LLAMA,
    "<|start_header_id|>": _LLAMA,
}
_UNKNOWN = Form("", bare=True)


def form_of(template: str) -> Form:
    """The form in which a chat template shows calls."""
    return next((form for mark, form in _FORMS.items() if mark in template), _UNKNOWN)


@dataclass(frozen=True)
class Call:
    """A call of a tool; the arguments are a JSON object as text, as OpenAI has them."""

    name: str
    arguments: str


class CallReader:
    """Reads calls out of an answer as it arrives: pieces of text that are none, and whole calls.

    Text is held back only while it may still become a call, and blanks around calls are left out.

    Args:
        names: of the tools that were offered.
        bare: whether an answer that is JSON from its first character on can be calls.
        most: calls after these are left out.
    """

    def __init__(self, names: Iterable[str], *, bare: bool, most: int | None = None) -> None:
        self.calls = 0
        self._names = frozenset(names)
        self._bare = bare
        self._most = most
        self._held = ""
        self._blank = ""
        self._opened: str | None = None
        self._tries = 0

    def push(self, text: str, *, final: bool = False) -> list[str | Call]:
        """What is known after some more text; after the last of it, everything."""
        self._held += text
        self._tries += bool(_closes(text))
        found: list[str | Call] = []
        while (pieces := self._next(final, _closes(text) and self._tries <= _MOST_TRIES)) is not None:
            for piece in pieces:
                if isinstance(piece, str):
                    found += self._unblanked(piece)
                else:
                    self._blank = ""
                    self.calls += 1
                    found += [piece] if self._most is None or self.calls <= self._most else []
        if final and self._blank and not self.calls:
            found.append(self._blank)
        return found

    def _unblanked(self, text: str) -> list[str]:
        text = self._blank + text
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        return [shown] if shown else []

    def _next(self, final: bool, closed: bool) -> Sequence[str | Call] | None:
        """Take the next piece from what is held; None when there is none yet."""
        if not self._held:
            return None
        if self._bare:
            return self._next_bare(final)
        if self._opened is None:
            return self._next_text(final)
        if self._opened == _HERMES:
            body, end, rest = self._held.removeprefix(_HERMES).partition(_HERMES_END)
            if not end and not final:
                return None
            pieces, stop = _listed(_json(body), self._names), len(self._held) - len(rest)
        else:
            if not (final or closed):
                return None
            pieces, stop = self._mistral()
            if pieces is None and not final:
                return None
        taken, self._held = self._held[:stop], self._held[stop:]
        self._opened = None
        return pieces or [taken]

    def _next_bare(self, final: bool) -> Sequence[str | Call] | None:
        begun = self._held.lstrip()
        if not final and _PYTHON.startswith(begun[: len(_PYTHON)]) and len(begun) < len(_PYTHON):
            return None
        body = begun.removeprefix(_PYTHON).lstrip()
        if not final and (not body or body[0] in "{["):
            return None
        self._bare = False
        calls = _sequence(body, self._names) if body[:1] in ("{", "[") else None
        if calls is None:
            return []
        self._held = ""
        return calls

    def _next_text(self, final: bool) -> Sequence[str] | None:
        places = [(place, mark) for mark in _OPENINGS if (place := self._held.find(mark)) >= 0]
        if places:
            place, self._opened = min(places)
        else:
            place = len(self._held) - (0 if final else _beginning(self._held))
        text, self._held = self._held[:place], self._held[place:]
        return [text] if text else [] if places else None

    def _mistral(self) -> tuple[list[Call] | None, int]:
        """The calls after Mistral's mark, None for none, and where they end."""
        start = len(_MISTRAL)
        named = _NAMED.match(self._held, start)
        value, stop = _json_at(self._held, named.end() if named else start)
        if named is not None and isinstance(value, dict):
            value = {"name": named[1], "arguments": value}
        calls = _listed(value, self._names)
        return calls, stop if calls else len(self._held)


class MarkedText:
    """Puts marks back into an answer's text that are special tokens, which the text leaves out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = {tokenizer.backend.token_to_id(mark): mark for mark in _MARKS}
        self._marks = {token: mark for token, mark in ids.items() if token in tokenizer.special_ids}

    def __call__(self, token: int, text: str) -> str:
        """The text of one more token with its mark."""
        return self._marks.get(token, "") + text


def called_schema(tools: Sequence[Mapping[str, Any]], form: Form) -> dict[str, Any]:
    """The JSON schema of a call of one of some tools, as a form writes it."""
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for number, tool in enumerate(tools):
        function, name = tool["function"], f"tool{number}"
        parameters = function.get("parameters") or {"type": "object", "additionalProperties": False}
        definitions[name] = _moved(parameters, f"#/$defs/{name}")
        properties = {"name": {"const": function["name"]}, form.arguments: {"$ref": f"#/$defs/{name}"}}
        required = list(properties)
        calls.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if form.listed:
        call = {"type": "array", "items": call, "minItems": 1, "maxItems": 1}
    return {"$defs": definitions, **call}


def as_templates_read(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls of earlier turns with their arguments as objects: OpenAI has them as text, which templates would quote."""
    read = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            arguments = _json(function["arguments"])
            if isinstance(arguments, dict):
                call = {**call, "function": {**function, "arguments": arguments}}
        read.append(dict(call))
    return read


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references begin at another place."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {}
    for name, part in schema.items():
        if name == "$ref" and isinstance(part, str) and re.match(r"#(/|$)", part):
            moved[name] = place + part[1:]
        else:
            moved[name] = part if name in ("const", "enum", "default", "examples") else _moved(part, place)
    return moved


def _sequence(text: str, names: frozenset[str]) -> list[Call] | None:
    """The calls that a whole text is: JSON values one after another, with blanks or semicolons between."""
    calls: list[Call] = []
    place = 0
    while place < len(text):
        value, place = _json_at(text, place)
        found = _listed(value, names)
        if found is None:
            return None
        calls += found
        while place < len(text) and (text[place].isspace() or text[place] == ";"):
            place += 1
    return calls or None


def _listed(value: Any, names: frozenset[str]) -> list[Call] | None:
    """The calls that a JSON value is; None where any of it is none."""
    found = [_call(entry, names) for entry in (value if isinstance(value, list) else [value])]
    calls = [call for call in found if call is not None]
    return calls if calls and len(calls) == len(found) else None


def _call(value: Any, names: frozenset[str]) -> Call | None:
    if not isinstance(value, dict):
        return None
    value = {**value, **value["function"]} if isinstance(value.get("function"), dict) else value
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _json(text: str) -> Any:
    """A JSON value; None where the text is none."""
    value, stop = _json_at(text, 0)
    return value if not text[stop:].strip() else None


def _json_at(text: str, place: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, and where it ends; None and the text's end where there is none."""
    place += len(text[place:]) - len(text[place:].lstrip())
    try:
        value, stop = _DECODER.raw_decode(text, place)
    except (ValueError, RecursionError):
        return None, len(text)
    return value, stop


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _closes(text: str) -> bool:
    return "}" in text or "]" in text


def _beginning(text: str) -> int:
    """How many characters at a text's end may be the beginning of a mark."""
    longest = max(map(len, _OPENINGS)) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in _OPENINGS):
            return size
    return 0

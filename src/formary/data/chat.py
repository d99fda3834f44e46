"""One chat renderer: messages to the text a model was trained on, by the model's own Jinja template.

It renders as Hugging Face's `apply_chat_template` does. Templates come with downloaded models and are not trusted:
they run in Jinja's immutable sandbox, see plain JSON values only, and every failure is a `FormaryError`.
For training, `rendered_answers` also finds what of the text the assistant writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from formary.errors import CheckpointError, RequestError

Message = Mapping[str, Any]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""OpenAI's ChatML, the template of SmolLM2 and Qwen and of models here that have none; it needs both of its tokens."""

CHATML_WITH_EOS = CHATML.replace("'<|im_end|>\n'", "eos_token + '\n'")
"""The same where <|im_end|> is not in the vocabulary: the end token ends a turn."""

_BEGIN, _END = "\ufdd0", "\ufdd1"  # Unicode's noncharacters: no text has them
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
        messages: dicts with `role` and `content`.
        add_generation_prompt: end with what opens the assistant's answer.
        variables: further names the template reads, such as bos_token and eos_token.

    Raises:
        RequestError: the messages are not JSON, or the template refuses them (the message is its own).
        CheckpointError: the template is not valid, or tries to leave the sandbox.
    """
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"messages[{place}]: must be a dict with a 'role' (system, user, assistant) and 'content'"
            )
    try:
        values = json.loads(
            json.dumps({"messages": messages, "tools": tools, "documents": documents, **variables}, default=dict)
        )
    except (TypeError, ValueError) as error:
        raise RequestError(f"messages: must hold nothing but text, numbers, lists and dicts ({error})") from error
    try:
        return _compiled(template).render(**values, add_generation_prompt=add_generation_prompt)
    except _Refused as error:
        raise RequestError(f"messages: the model's chat template refuses them: {error}") from error
    except SecurityError as error:
        raise CheckpointError(f"chat template: tries to leave its sandbox ({error}); do not use this model") from error
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"chat template line {error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise CheckpointError(f"chat template: {error}") from error
    except Exception as error:  # whatever Python raises inside the template's own expressions
        raise CheckpointError(f"chat template: fails on these messages ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the stretches of characters that the assistant writes in it: (start, stop)."""

    text: str
    answers: tuple[tuple[int, int], ...]


def rendered_answers(template: str, messages: Sequence[Message], **variables: Any) -> list[Rendered]:
    """What a model learns from a conversation: exactly what it has to write after the prompts that it will be given.

    The assistant's part is what the template marks with {% generation %}, as Hugging Face reads it; without marks, what
    follows the rendering of the turns before, opened for an answer. Assistant turns before any user's are no answers.

    Returns:
        one text with all answers; one for each answer where the template rewrites earlier turns as the talk goes on;
        none without answers.

    Raises:
        RequestError, CheckpointError: as `render`; or an answer does not follow the prompt that asks for it.
    """
    if _GENERATION_TAG.search(template):
        plain = render(template, messages, add_generation_prompt=False, **variables)
        marks: dict[str, Any] = {"_generation_begins": _BEGIN, "_generation_ends": _END}
        marked = render(template, messages, add_generation_prompt=False, **variables, **marks)
        if marked.replace(_BEGIN, "").replace(_END, "") == plain:
            spans = _between_marks(marked)
            return [Rendered(plain, spans)] if spans else []
    turns: list[tuple[str, str]] = []  # the prompt, and the same with its answer
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and any(earlier["role"] == "user" for earlier in messages[:place]):
            prompt = render(template, messages[:place], add_generation_prompt=True, **variables)
            answered = render(template, messages[: place + 1], add_generation_prompt=False, **variables)
            if not answered.startswith(prompt):
                raise CheckpointError(
                    f"chat template: the assistant's turn (message {place + 1}) does not follow the prompt that asks for "
                    "it; mark the assistant's part with {% generation %} ... {% endgeneration %}"
                )
            turns.append((prompt, answered))
    if all(later.startswith(earlier) for (_, earlier), (later, _) in pairwise(turns)):
        spans = tuple((len(prompt), len(answered)) for prompt, answered in turns)
        return [Rendered(turns[-1][1], spans)] if turns else []
    return [Rendered(answered, ((len(prompt), len(answered)),)) for prompt, answered in turns]


def template_in(tokenizer_config: Mapping[str, Any]) -> str | None:
    """The chat template in a tokenizer's config; of several named ones the one called default."""
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _between_marks(marked: str) -> tuple[tuple[int, int], ...]:
    spans, length, begun = [], 0, 0
    for piece in re.split(f"([{_BEGIN}{_END}])", marked):
        if piece == _BEGIN:
            begun = length
        elif piece == _END:
            spans.append((begun, length))
        else:
            length += len(piece)
    return tuple(spans)


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = _StrictSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
    # Jinja's own globals hold live classes; the template gets the four it may need, without their insides.
    environment.globals = {
        "range": environment.globals["range"],
        "dict": _make_dict,
        "namespace": _PlainNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


class _StrictSandbox(ImmutableSandboxedEnvironment):
    """Jinja renders a forbidden attribute as nothing; here asking for one is an error already."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__}")


class _Refused(Exception):
    """A template called raise_exception."""


class _PlainNamespace(Namespace):
    """Jinja's namespace without private names, through which a template could reach Python's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_public(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"the name {name!r} in a namespace")


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: the assistant's part; renders as its content, between marks if given."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.Name(name, "load", lineno=line)], lineno=line)
            for name in ("_generation_begins", "_generation_ends")  # nothing unless they are given
        )
        return [begin, *body, end]


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which a model has never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

"""One chat renderer: messages to the text a model was trained on, by the model's own Jinja template.

It renders as Hugging Face's `apply_chat_template` does. Templates come with downloaded models and are not trusted:
they run in Jinja's immutable sandbox, see plain JSON values only, and every failure is a `FormaryError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
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
    """{% generation %} ... {% endgeneration %}: marks the assistant's part for training; renders as its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


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

"""Rows as conversations: lists of {"role", "content"}, read from the forms that chat data comes in, and checked.

Beside `messages` it knows ShareGPT's `conversations` of {"from", "value"} and single questions with answers under usual
names. It does not render them: that is `chat`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from formary.errors import DataError

Row = Mapping[str, Any]
Conversation = list[dict[str, str]]

ROLES = ("system", "user", "assistant")
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_USUAL = {
    **dict.fromkeys(("bot", "chatbot", "model", "ai", "gpt", "chatgpt", "agent", "answer", "response"), "assistant"),
    **dict.fromkeys(("human", "person", "customer", "prompter", "question", "me"), "user"),
    **dict.fromkeys(("instruction", "developer", "context"), "system"),
}
_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
_BESIDE = ("input", "context")  # what an instruction is about, in Alpaca's and Dolly's rows
_LIKE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


def form_of(row: Row) -> str:
    """The form a row is read from, in words; empty where it is `messages` already or not readable."""
    held = row.get("messages", row.get("conversations"))
    if isinstance(held, list) and held:
        first = held[0]
        if isinstance(first, Mapping) and "from" in first:
            return "ShareGPT's (from, value)"
        return "" if "messages" in row else "conversations"
    pair = _pair_of(row) if held is None else None
    return f"{pair[0]} and {pair[1]}" if pair else ""


def messages_of(row: Row, where: str) -> Conversation:
    """The conversation in a row.

    Raises:
        DataError: there is none, or a message is not as it must be; the row is called `where`.
    """
    held = row.get("messages", row.get("conversations"))
    if held is None:
        return _from_pair(row, where)
    if isinstance(held, str):  # a cell of a table, or one question
        try:
            listed = json.loads(held) if held.lstrip().startswith("[") else None
        except ValueError:
            listed = None
        held = listed if isinstance(listed, list) else [{"role": "user", "content": held}]
    if not isinstance(held, list) or not held:
        raise DataError(f"{where}: 'messages' must be a list of messages, such as {_LIKE}; here it is {held!r:.60}")
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(held, 1)]


def composed(row: Row) -> str:
    """The text that stands for a conversation; a row that cannot be read stands for itself and is refused later."""
    try:
        return "\n".join(message["content"] for message in messages_of(row, "row"))
    except DataError:
        return json.dumps(dict(row), ensure_ascii=False, default=str)


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} must have a role and content, and is {message!r:.60}")
    role, content = message.get("role"), message.get("content", message.get("value"))
    if role is None and "from" in message:
        role = _SHAREGPT.get(str(message["from"]), message["from"])
    if role is None:
        raise DataError(f"{where} has no 'role'; roles are {_listed(ROLES)}")
    if role not in ROLES:
        usual = _USUAL.get(str(role).lower())
        hint = f"rename it, '{role}' is usually '{usual}'" if usual else "rename it or take the row out"
        raise DataError(f"{where} has the role '{role}'; roles are {_listed(ROLES)}: {hint}")
    if not isinstance(content, str):
        said = "has no 'content'" if content is None else f"has the content {content!r:.40}, which is not a text"
        raise DataError(f"{where} (by the {role}) {said}; write a text, or take the row out")
    return {"role": str(role), "content": content}


def _pair_of(row: Row) -> tuple[str, str] | None:
    asked = (pair for pair in _PAIRS if pair[0] in row)
    return next((pair for pair in _PAIRS if pair[0] in row and pair[1] in row), next(asked, None))


def _from_pair(row: Row, where: str) -> Conversation:
    pair = _pair_of(row)
    if pair is None:
        raise DataError(
            f"{where}: there is no conversation; a row is {_LIKE} and this one has {_listed(row)}. Map another column "
            "with data.columns.messages"
        )
    question, answer = pair
    texts = {name: row.get(name) for name in (question, answer)}
    for name, text in texts.items():
        if not isinstance(text, str) and not (name == answer and text is None):
            raise DataError(f"{where}: field '{name}' holds {text!r:.40}, not a text")
    about = [row[name] for name in _BESIDE if isinstance(row.get(name), str) and row[name].strip()]
    found = [{"role": "user", "content": "\n\n".join([str(texts[question]), *about])}]
    if isinstance(row.get("system"), str) and row["system"].strip():
        found.insert(0, {"role": "system", "content": row["system"]})
    if texts[answer] is not None:
        found.append({"role": "assistant", "content": str(texts[answer])})
    return found


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "nothing"

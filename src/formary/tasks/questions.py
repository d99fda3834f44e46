"""Rows of multiple choice as questions: their choices as texts, their answer as the numbers of the right choices.

An answer may be a number from 0, a choice's own text, its letter (A, B, ...), or a score for each choice, of which the
highest are right.
"""

from __future__ import annotations

import contextlib
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formary.errors import DataError

_FEWEST = 2


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the numbers of the right ones; none where that is not known."""

    text: str
    choices: tuple[str, ...]
    right: tuple[int, ...] = ()


def question_of(row: Mapping[str, Any], where: str, *, solved: bool = False) -> Question:
    """A row as a question; its answer is looked at where it has one, and must be there when `solved`.

    Raises:
        DataError: the question is no text, there are less than two choices, or the answer is none of them.
    """
    text = row.get("question")
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field 'question' {_said(row, 'question')}, not a text; map another with data.columns"
        )
    choices = _choices(row, where)
    answer = row.get("answer")
    if answer is None or answer == "" or (isinstance(answer, float) and math.isnan(answer)):
        if solved:
            raise DataError(
                f"{where}: field 'answer' {_said(row, 'answer')}; it is the number of the right choice from 0, its text, "
                "or a list of scores; map another column with data.columns.answer"
            )
        return Question(text, choices)
    return Question(text, choices, _right(answer, choices, where))


def composed(row: Mapping[str, Any]) -> str:
    """The text that stands for a row: the question and its choices."""
    choices = row["choices"]
    return "\n".join([str(row["question"]), *([choices] if isinstance(choices, str) else map(str, choices))])


def _choices(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    value = row.get("choices")
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a table
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    listed = [_text(one) for one in value] if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(listed) < _FEWEST or not all(listed):
        state = f"holds {len(listed)} choices, or an empty one" if listed else _said(row, "choices")
        raise DataError(
            f"{where}: field 'choices' {state}; each question needs a list of at least {_FEWEST} texts to choose from. "
            "Take the row out, or map another column with data.columns.choices"
        )
    return tuple(listed)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _right(answer: Any, choices: Sequence[str], where: str) -> tuple[int, ...]:
    if isinstance(answer, Mapping):  # a score by each choice's text
        answer = [answer.get(choice, 0) for choice in choices]
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        return _best(list(answer), choices, where)
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return (answer,)
        raise DataError(
            f"{where}: field 'answer' is {answer}, and choices are numbered 0 to {len(choices) - 1}; "
            "count from 0, or give the choice's text"
        )
    said = str(answer)
    for form in (str, str.strip, lambda text: text.strip().casefold()):
        same = tuple(number for number, choice in enumerate(choices) if form(choice) == form(said))
        if same:
            return same
    letter = said.strip().rstrip(".)").lstrip("(").upper()
    if len(letter) == 1 and letter in string.ascii_uppercase[: len(choices)]:
        return (string.ascii_uppercase.index(letter),)
    if letter.isascii() and letter.isdigit() and int(letter) < len(choices):
        return (int(letter),)
    raise DataError(
        f"{where}: field 'answer' is {said!r:.60}, none of the choices {', '.join(map(repr, choices))[:120]}"
    )


def _best(scores: Sequence[Any], choices: Sequence[str], where: str) -> tuple[int, ...]:
    numbers = [s for s in scores if isinstance(s, int | float) and math.isfinite(s)]
    if len(numbers) != len(scores) or len(scores) != len(choices):
        raise DataError(
            f"{where}: field 'answer' holds {len(scores)} entries ({scores!r:.40}) for {len(choices)} choices; as a list it "
            "holds one finite score for each choice"
        )
    highest = max(numbers)
    if highest <= 0:
        raise DataError(f"{where}: field 'answer' gives no choice a score above 0, so none is right")
    return tuple(number for number, score in enumerate(numbers) if score == highest)


def _said(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    return "is missing" if value is None else f"holds {type(value).__name__} {value!r:.40}"

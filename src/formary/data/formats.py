"""Rows inside files: objects of JSON, SQuAD's nested questions, columns of tagged words, tables with a separator.

Pure functions from lines or a text to rows and their places; opening, decoding and counting belong to `source`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from formary.data.boxes import coco_rows, is_coco
from formary.errors import DataError

Placed = tuple[dict[str, Any], str]
"""The values of a row and where they stand."""

_MAX_FIELD = 2**28  # bytes of one CSV field: an unclosed quote ends here instead of swallowing a whole disk
_SEPARATORS = ",\t;|"
_FIRST_ID = re.compile(r"1(?:-\d+)?|0\.1")  # of a sentence in CoNLL-U
_NO_WORD_ID = re.compile(r"\d+[-.]\d+")  # a range of words written as one, or a word that is not written
_UNIVERSAL = 10  # columns of CoNLL-U
_COMMENT = re.compile(
    r"# ?[\w.:-]+ = |# [\w.:-]+=|# (?:newdoc|newpar|id)\b"
)  # other lines with # are words, as in "# O"
_COMMENT_IN_UNIVERSAL = re.compile("#")


# JSON ---------------------------------------------------------------------------------------------------------------


def json_lines(lines: Iterable[str], name: str) -> Iterator[Placed]:
    """One object a line; blank lines are passed over.

    Raises:
        DataError: a line is not an object.
    """
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError(f'a row is an object like {{"text": ...}}, this is a {kind_of_value(values)}')
        except (ValueError, RecursionError) as error:
            hint = ""
            if number == 1 and line.lstrip().startswith("["):
                hint = "; a JSON array belongs in a .json file, a .jsonl file has one object a line (jq -c '.[]')"
            raise DataError(f"{name} line {number}: not a row of JSON ({error}){hint}") from error
        yield _whole_characters(values, line), f"{name} line {number}"


def json_rows(text: str, name: str, moved: list[str]) -> Iterator[Placed]:
    """The rows of a whole JSON document: a list of objects, {"data": [...]}, SQuAD (v1 or v2), COCO's boxes in
    pictures, or one object a line.

    Args:
        text: the document.
        name: of the file.
        moved: gets the places of SQuAD answers that were not at their offset but elsewhere in their context.

    Raises:
        DataError: it is none of these, or a SQuAD answer is not in its context.
    """
    if not text or text.isspace():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _begins_with_an_object(text):
            yield from json_lines(text.split("\n"), name)
            return
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{name}{line}: not JSON ({error})") from error
    value = _whole_characters(value, text)
    if is_coco(value):
        yield from coco_rows(value, name)
        return
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise DataError(f"{name}: holds one JSON {kind_of_value(value)}; rows are a list of objects")
    for number, entry in enumerate(value, 1):
        where = f"{name} entry {number}"
        if not isinstance(entry, dict):
            raise DataError(f'{where}: a row is an object like {{"text": ...}}, this is {str(entry)[:40]!r}')
        if isinstance(entry.get("paragraphs"), list):
            yield from _squad(entry, name, where, moved)
        else:
            yield entry, where


def _begins_with_an_object(text: str) -> bool:
    first = text.lstrip().partition("\n")[0]
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _squad(article: dict[str, Any], name: str, where: str, moved: list[str]) -> Iterator[Placed]:
    """One row per question: id, title, question, context, answers {"text", "answer_start"} (Rajpurkar et al. 2016)."""
    for paragraph in article["paragraphs"]:
        if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
            raise DataError(f"{where}: a paragraph has no list of questions (qas)")
        context = paragraph.get("context")
        for entry in paragraph["qas"]:
            if not isinstance(entry, dict):
                raise DataError(f"{where}: a question is {str(entry)[:40]!r}, not an object")
            place = f"{name} question {entry.get('id', 'without an id')}"
            if not isinstance(context, str) or not isinstance(entry.get("question"), str):
                raise DataError(f"{place}: its question or its paragraph's context is not text")
            answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
            for answer in [] if entry.get("is_impossible") else entry.get("answers") or []:
                text, start = _answer(answer, context, place, moved)
                answers["text"].append(text)
                answers["answer_start"].append(start)
            row = {"id": entry.get("id"), "title": article.get("title"), "question": entry["question"]}
            yield {**row, "context": context, "answers": answers}, place


def _answer(answer: Any, context: str, place: str, moved: list[str]) -> tuple[str, int]:
    """An answer and where it begins: at its offset, else at the nearest place that holds it."""
    text, given = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (answer, None)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place}: the answer {text!r} is not a text; a question without an answer has an empty list")
    offset = given if isinstance(given, int) else 0
    if isinstance(given, int) and offset >= 0 and context.startswith(text, offset):
        return text, offset
    after = context.find(text, max(0, offset))
    before = context.rfind(text, 0, max(0, offset) + len(text))
    found = [start for start in (before, after) if start >= 0]
    if not found:
        raise DataError(f"{place}: the answer {text[:60]!r} is not in its context")
    moved.append(place)
    return text, min(found, key=lambda start: abs(start - offset))


def _whole_characters(value: Any, source: str) -> Any:
    """`value` without halves of characters, as from a text cut in the middle of an emoji; `source` is its JSON."""
    return _without_halves(value) if "\\ud" in source or "\\uD" in source else value


def _without_halves(value: Any) -> Any:
    """Replace surrogates without their partner, which no file can hold, by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_without_halves(key): _without_halves(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_halves(item) for item in value]
    return value


def kind_of_value(value: object) -> str:
    """What JSON calls a value, for messages."""
    names = {
        bool: "true/false value",
        int: "number",
        float: "number",
        list: "list",
        dict: "object",
        str: "string",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


# Words and tags -----------------------------------------------------------------------------------------------------


def tagged_rows(lines: Iterable[str], name: str) -> Iterator[Placed]:
    """Sentences of a CoNLL-like file: a word and its tag a line (first and last column), a blank line between.

    Columns are separated by tabs where a line has any, else by spaces. A sentence of ten columns that begins with the
    number 1 is CoNLL-U: words are its second column, tags its fourth (UPOS). Comments stand before a sentence.

    Raises:
        DataError: a line has no word or no tag; file and line are named.
    """
    for sentence in _sentences(lines):
        first = next((columns for _, line in sentence if (columns := _columns(line)) and columns[0][:1] != "#"), [])
        numbered = len(first) == _UNIVERSAL and _FIRST_ID.fullmatch(first[0]) is not None
        comment = _COMMENT_IN_UNIVERSAL if numbered else _COMMENT
        tokens: list[str] = []
        tags: list[str] = []
        begin = 0
        for number, line in sentence:
            if not tokens and comment.match(line):
                continue
            columns = _columns(line)
            if numbered and len(columns) == _UNIVERSAL:
                if _NO_WORD_ID.fullmatch(columns[0]):
                    continue
                columns = [columns[1], columns[3]]
            if len(columns) < 2 or not columns[0] or not columns[-1]:
                shown = line.strip()[:60]
                raise DataError(f"{name} line {number}: a word and its tag are needed, this line has only {shown!r}")
            tokens.append(columns[0])
            tags.append(columns[-1])
            begin = begin or number
        if tokens:
            yield {"tokens": tokens, "tags": tags}, f"{name} line {begin}"


def _sentences(lines: Iterable[str]) -> Iterator[list[tuple[int, str]]]:
    sentence: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            sentence.append((number, line))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _columns(line: str) -> list[str]:
    return [column.strip() for column in line.split("\t")] if "\t" in line else line.split()


# Tables -------------------------------------------------------------------------------------------------------------


def table_rows(lines: Iterable[str], name: str, *, separator: str | None = None) -> Iterator[Placed]:
    """The rows of a table whose first line names the columns; without `separator` it is the one that line has most of.

    Raises:
        DataError: a row has more or fewer fields than the header, or a quote stays open.
    """
    csv.field_size_limit(_MAX_FIELD)
    ended = (line + "\n" for line in lines)
    first = next(ended, "")
    if not first.strip():
        return
    chosen = separator or max(_SEPARATORS, key=first.count)
    reader = csv.reader(chain([first], ended), delimiter=chosen, strict=True)
    header: list[str] | None = None
    number = 1
    try:
        for fields in reader:
            if header is None:
                header = [field.strip() for field in fields]
            elif len(fields) == len(header):
                yield dict(zip(header, fields)), f"{name} line {number}"
            elif fields:
                raise DataError(
                    f"{name} line {number}: {len(fields)} fields, but the header (line 1) has {len(header)}"
                )
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name} line {number}: not valid CSV ({error}); a quote may be open") from error

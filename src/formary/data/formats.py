"""Rows inside files that hold more than a row a line: JSON arrays, SQuAD's nested questions, columns of tagged words.

Pure functions from what was parsed to rows and their places; opening, decoding and counting belong to `source`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from formary.errors import DataError


def json_rows(value: Any, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a whole JSON document and where each is: a list of objects, {"data": [...]}, or SQuAD.

    Raises:
        DataError: it is none of these, or a SQuAD answer is not in its context.
    """
    if isinstance(value, dict):
        if isinstance(value.get("data"), list):
            entries = value["data"]
            if entries and all(isinstance(entry, dict) and "paragraphs" in entry for entry in entries):
                yield from _squad(entries, name)
                return
            value = entries
        else:
            value = [value]
    if not isinstance(value, list):
        raise DataError(f"{name}: holds one JSON {type(value).__name__}; rows are a list of objects")
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise DataError(
                f'{name} entry {number}: a row is an object like {{"text": ...}}, this is {str(row)[:40]!r}'
            )
        yield row, f"{name} entry {number}"


def _squad(articles: list[dict[str, Any]], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """One row per question: id, title, question, context, answers {"text", "answer_start"} (Rajpurkar et al. 2016)."""
    for article in articles:
        for paragraph in article["paragraphs"]:
            context = paragraph.get("context")
            for entry in paragraph.get("qas", ()):
                where = f"{name} question {entry.get('id', '?')}"
                if not isinstance(context, str) or not isinstance(entry.get("question"), str):
                    raise DataError(f"{where}: its question or its paragraph's context is not text")
                given = [] if entry.get("is_impossible") else entry.get("answers", [])
                answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
                for answer in given:
                    text, start = answer.get("text", ""), answer.get("answer_start", -1)
                    if context[start : start + len(text)] != text:
                        start = context.find(text)
                    if start < 0:
                        raise DataError(f"{where}: the answer {text[:60]!r} is not in its context")
                    answers["text"].append(text)
                    answers["answer_start"].append(start)
                row = {"id": entry.get("id"), "title": article.get("title"), "question": entry["question"]}
                yield {**row, "context": context, "answers": answers}, where


def tagged_rows(lines: Iterable[str], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Sentences of a CoNLL-like file: a word and its tag a line (first and last column), a blank line between.

    Raises:
        DataError: a line has no tag; file and line are named.
    """
    tokens: list[str] = []
    tags: list[str] = []
    begin = 1
    for number, line in enumerate(lines, 1):
        if not line.strip():
            if tokens:
                yield {"tokens": tokens, "tags": tags}, f"{name} line {begin}"
            tokens, tags, begin = [], [], number + 1
            continue
        if line.startswith(("-DOCSTART-", "# ")):
            continue
        columns = line.split("\t") if "\t" in line else line.split()
        if len(columns) < 2:
            raise DataError(f"{name} line {number}: a word and its tag are needed, this line has only {line.strip()!r}")
        tokens.append(columns[0].strip())
        tags.append(columns[-1].strip())
    if tokens:
        yield {"tokens": tokens, "tags": tags}, f"{name} line {begin}"

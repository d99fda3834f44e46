"""What is looked at before a recipe is guessed: rows of the data, and what is counted in them once for all rules.

It opens no file and guesses nothing; `formary init` takes the sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from formary.errors import DataError

_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LETTER = re.compile(r"[^\W\d_]")
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+")


@dataclass(frozen=True)
class Pictures:
    """What was seen of the pictures in some rows."""

    column: str  # that holds them
    sides: Sequence[int]  # longer sides in pixels of those that were opened
    grey: bool  # whether all of them are
    unreadable: int = 0  # those that could not be opened
    count: int = 0  # how many of the data there are


@dataclass(frozen=True)
class Sample:
    """What was looked at: some rows of the data, and how much of it they are."""

    sources: tuple[str, ...]  # as the recipe names them
    kind: str  # text, jsonl, csv, parquet, npz, idx, picture or dataset
    files: int
    rows: Sequence[Mapping[str, Any]]  # of a text file one row, {"text": its beginning}
    share: float  # of the data that the rows are, 0 to 1
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    encoding: str = "utf-8"
    pictures: Pictures | None = None  # where a column holds some


@dataclass(frozen=True)
class Seen:
    """The sample as documents, and what is counted in them once for all rules."""

    documents: list[str]
    share: float
    count: int  # documents in all the data, estimated
    bytes: int  # of UTF-8 text in all the data, estimated
    cjk: float  # share of the letters that are Chinese or Japanese characters
    characters: int  # distinct ones in the sample
    emails: int
    lengths: list[int] = field(default_factory=list)


def look(documents: list[str], share: float, *, files: int, cut: str) -> Seen:
    lengths = [len(text) for text in documents]
    if sum(lengths) / share < 500:
        raise DataError(f"the data holds about {round(sum(lengths) / share)} characters of text, too few to learn from")
    total = sum(len(text.encode("utf-8", "replace")) for text in documents)
    joined = "\n".join(documents)
    return Seen(
        documents=documents,
        share=share,
        count=files if cut == "file" else max(1, round(len(documents) / share)),
        bytes=round(total / share),
        cjk=cjk_share(joined),
        characters=len(set(joined)),
        emails=len(_EMAIL.findall(joined)) if "@" in joined else 0,
        lengths=lengths,
    )


def texts_of(sample: Sample, column: str, documents: str) -> list[str]:
    texts = [row.get(column) or "" for row in sample.rows]
    if sample.kind == "text":
        texts = [piece for text in texts for piece in pieces(text, documents)]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def pieces(text: str, documents: str) -> list[str]:
    """A text as data.documents would cut it."""
    if documents == "file":
        return [text]
    if documents == "line":
        cut = text.split("\n")
    elif documents == "paragraph":
        cut = re.split(r"\n(?:[ \t]*\n)+", text)
    else:
        cut = re.split(f"^(?={documents})", text, flags=re.MULTILINE)
    return [piece for piece in cut if piece.strip()]


def cjk_share(text: str) -> float:
    letters = len(_LETTER.findall(text))
    return len(_CJK.findall(text)) / letters if letters else 0.0


def names_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def text_length(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean length of a column that holds text (several words, mostly different in each row); 0 for others."""
    values = [row.get(name) for row in rows]
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    if len(texts) < 0.5 * len(values) or len(set(texts)) < 0.5 * len(texts):
        return 0.0
    # Dates and numbers with a space in them are no text.
    worded = sum(
        (" " in text.strip() or bool(_CJK.search(text))) and len(_LETTER.findall(text)) > 0.4 * len(text)
        for text in texts
    )
    return sum(map(len, texts)) / len(texts) if worded >= 0.5 * len(texts) else 0.0


def describe(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """A column by name, with its values where there are only a few."""
    values = {str(row.get(name)) for row in rows}
    if len(values) == 1 < len(rows):
        return f"{name} (always {values.pop():.20}: nothing to tell apart)"
    if len(values) <= min(5, len(rows) // 2) and all(len(value) <= 20 for value in values):
        return f"{name} ({', '.join(sorted(values))})"
    return f"{name} ({len(values):,} values)" if len(values) <= min(100, len(rows) // 10) else name


def files_of(sample: Sample) -> str:
    kind = "dataset folder" if sample.kind == "dataset" else f"{sample.kind} file"
    return f"{sample.files:,} {kind}" + ("s" if sample.files != 1 else "")

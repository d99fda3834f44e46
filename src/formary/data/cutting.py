"""Plain text becomes documents: whole, or cut at lines, paragraphs or a pattern, and into pieces that fit in memory.

Text streams through in chunks of any size, and where it is cut never depends on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from formary.errors import RecipeError

PIECE_BYTES = 8 * 2**20
"""A plain-text document longer than this (UTF-8) is cut at paragraph ends into pieces of at most this size."""

_LOOKAHEAD = 4096  # characters that must follow a document boundary before it is trusted while more text may come
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
_LEADING_BLANK_LINES = re.compile(r"\A(?:[ \t]*\n)+")


def split_text(chunks: Iterable[str], documents: str) -> Iterator[str]:
    """Cut a stream of text into documents.

    Args:
        chunks: the text in pieces of any size; newlines are "\\n".
        documents: "file" (all of it, unchanged), "line" (each line that is not blank), "paragraph" (separated by blank
            lines), or a regular expression whose match at a line start begins a document.

    Yields:
        Documents of at most PIECE_BYTES; a longer one is cut, at a paragraph end where it has one.

    Raises:
        RecipeError: the regular expression is not valid.
    """
    if documents == "file":
        return _whole(chunks)
    if documents == "line":
        return _by_line(chunks)
    if documents == "paragraph":
        return _by_boundary(chunks, _BLANK_LINES, begins=False)
    try:
        pattern = re.compile(f"^(?:{documents})", re.MULTILINE)
    except re.error as error:
        raise RecipeError(
            f"data.documents: {documents!r} is neither file, line or paragraph nor a valid regular expression ({error})"
        ) from error
    return _by_boundary(chunks, pattern, begins=True)


def lines_of(chunks: Iterable[str]) -> Iterator[str]:
    """Lines without their newline; a long line is assembled once, not once per chunk."""
    begun: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun)
            begun = [others.pop()]
            yield from others
    if last := "".join(begun):
        yield last


def _whole(chunks: Iterable[str]) -> Iterator[str]:
    buffer = ""
    for chunk in chunks:
        pieces, buffer = _pieces(buffer + chunk)
        yield from pieces
    if buffer:
        yield buffer


def _by_line(chunks: Iterable[str]) -> Iterator[str]:
    for line in lines_of(chunks):
        if line and not line.isspace():
            pieces, rest = _pieces(line)
            yield from pieces
            yield rest


def _by_boundary(chunks: Iterable[str], boundary: re.Pattern[str], *, begins: bool) -> Iterator[str]:
    """Documents between the matches of `boundary`, which either begin a document or (begins=False) are left out."""
    buffer, scanned = "", 0
    for chunk, last in _with_last(chunks):
        buffer += chunk
        trusted = len(buffer) if last else len(buffer) - _LOOKAHEAD
        start = 0
        for match in boundary.finditer(buffer, scanned):
            if match.end() > trusted:
                break
            if match.start() == 0 and begins:
                continue
            pieces, rest = _pieces(buffer[start : match.start()])
            for piece in [*pieces, rest]:
                yield from _tidied(piece)
            start = match.start() if begins else match.end()
        scanned = max(0, trusted - start) if begins else 0
        pieces, buffer = _pieces(buffer[start:])
        for piece in pieces:
            scanned = max(0, scanned - len(piece))
            yield from _tidied(piece)
    yield from _tidied(buffer)


def _tidied(document: str) -> Iterator[str]:
    document = _LEADING_BLANK_LINES.sub("", document).rstrip("\n")
    if document and not document.isspace():
        yield document


def _pieces(text: str) -> tuple[list[str], str]:
    """Cut what exceeds PIECE_BYTES off the front, at a paragraph end, else a line end, else a space, else anywhere."""
    pieces = []
    while len(text) * (1 if text.isascii() else 4) > PIECE_BYTES:
        window = text[:PIECE_BYTES]
        if not text.isascii():
            window = window.encode()[:PIECE_BYTES].decode("utf-8", "ignore")
        if len(window) == len(text):
            break
        ends = (window.rfind(mark) + len(mark) if mark in window else 0 for mark in ("\n\n", "\n", " "))
        cut = next((end for end in ends if end), len(window))
        pieces.append(text[:cut])
        text = text[cut:]
    return pieces, text


def _with_last(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    for chunk in chunks:
        yield chunk, False
    yield "", True

"""Where a long text may be cut without changing its tokens, by what a tokenizer does to spaces and newlines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from formary.data.alphabets import state_of

_SPLITTERS = (
    "BertPreTokenizer",
    "Whitespace",
    "WhitespaceSplit",
    "ByteLevel",
    "Metaspace",
    "Split",
    "Digits",
    "Punctuation",
)


def seam_of(backend: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """Where a text may be cut without changing its tokens (None: nowhere that is certain).

    Between a word and the single space before the next, where words carry the space before them, or after
    a single newline between words, where newlines are words of their own.
    """
    if not _keeps_spaces(backend.normalizer):
        return None
    space, newline = _splits_at(backend.pre_tokenizer)
    for token in backend.get_added_tokens_decoder().values():
        newline = newline and not token.lstrip and not token.rstrip
        space = space and not token.rstrip and not re.search(r"\s", token.content)
    newline = newline and space
    if not space:
        return None
    return re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)" if newline else r"(?<=\S)(?= \S)")


def _keeps_spaces(normalizer: Any) -> bool:
    """Whether the normalizer treats the two sides of a space apart and removes no space at the ends."""

    def harmless(state: Mapping[str, Any]) -> bool:
        if state["type"] == "Sequence":
            return all(map(harmless, state["normalizers"]))
        return state["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "BertNormalizer", "StripAccents")

    return normalizer is None or harmless(state_of(normalizer))


def _splits_at(pre_tokenizer: Any) -> tuple[bool, bool]:
    """Whether words always end before a single space, and whether they always end after a single newline."""

    def split(state: Mapping[str, Any]) -> tuple[bool, bool]:
        kind = state["type"]
        if kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit"):
            return True, True
        if kind == "ByteLevel":
            return bool(state["use_regex"]), bool(state["use_regex"] and not state["add_prefix_space"])
        if kind == "Metaspace":
            return bool(state.get("split", True)), False
        if kind == "Split":
            pattern = state["pattern"]
            whole = pattern.get("Regex", "").endswith(r"\s+(?!\S)|\s+")  # GPT-2, GPT-4, Llama 3, Qwen
            return whole, whole or (pattern.get("String") == "\n" and state["behavior"] == "Isolated")
        return False, False

    if pre_tokenizer is None:
        return False, False
    state = state_of(pre_tokenizer)
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if any(part["type"] not in _SPLITTERS for part in parts):
        return False, False
    adds_space = any(
        (part["type"] == "ByteLevel" and part["add_prefix_space"])
        or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )
    found = [split(part) for part in parts]
    return any(space for space, _ in found), any(newline for _, newline in found) and not adds_space

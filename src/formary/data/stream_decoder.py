"""Ids to text as they arrive, one at a time: whole characters only, and joined the text of all of them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

import tokenizers

from formary.data.alphabets import BYTE_TOKEN, byte_level_bytes


class StreamDecoder(Protocol):
    """Turns ids into text as they arrive; `push` returns only whole characters, `flush` what is left."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class ByteStream:
    """For byte-level tokenizers: their bytes through an incremental UTF-8 decoder; skipped tokens have no text."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped: AbstractSet[int] = frozenset()) -> None:
        self._backend = backend
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        if token in self._skipped:
            return ""
        name = self._backend.id_to_token(token)
        return self._utf8.decode(byte_level_bytes(name)) if name is not None else ""

    def flush(self) -> str:
        """What is left: U+FFFD for an unfinished character."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class WindowStream:
    """For any other tokenizer: decode a short window with and without the new tokens, and give the difference."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped: AbstractSet[int] = frozenset()) -> None:
        self._backend = backend
        self._skipped = skipped
        self._given: list[int] = []  # the last token whose text is out: decoders look one back
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character (or a run of byte tokens) is unfinished."""
        name = self._backend.id_to_token(token)
        if token in self._skipped or name is None:
            return ""
        self._held.append(token)
        if BYTE_TOKEN.fullmatch(name):  # decoders judge a run of byte tokens as a whole
            return ""
        return self._give()

    def flush(self) -> str:
        """What is left: U+FFFD for an unfinished character."""
        return self._give(final=True)

    def _give(self, final: bool = False) -> str:
        if not self._held:
            return ""
        before = self._decode(self._given)
        text = self._decode([*self._given, *self._held])
        if text.endswith("�") and not final:
            return ""
        self._given, self._held = self._held[-1:], []
        return text[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._backend.decode(list(tokens), skip_special_tokens=False)
        return text

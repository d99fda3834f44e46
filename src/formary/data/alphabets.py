"""Letters for bytes, and the two kinds of tokenizer that look every symbol up: single bytes and single characters."""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANY_CHARACTER = r"[\s\S]"


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte (Radford et al. 2019): itself where printable, else from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


BYTE_LETTERS = _byte_letters()
_LETTER_BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}


def byte_level_bytes(name: str) -> bytes:
    try:
        return bytes(_LETTER_BYTES[letter] for letter in name)
    except KeyError:  # an added token in its own spelling
        return name.encode()


def is_cjk(point: int) -> bool:
    """Whether a code point is a Chinese, Japanese or Korean character that is a word unit of its own."""
    return 0x2E80 <= point <= 0x9FFF or 0xF900 <= point <= 0xFAFF or 0x20000 <= point <= 0x323AF


def each_character() -> pre_tokenizers.Split:
    return pre_tokenizers.Split(tokenizers.Regex(_ANY_CHARACTER), "isolated")


def bytes_pre_tokenizer() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def state_of(part: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state

"""A guessed value with its reason, and how both are written: YAML lines with comments, numbers as words."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_PLAIN = re.compile(r"(?:\.{0,2}/)?[A-Za-z_][A-Za-z0-9_./-]*|\d+x\d+")
_YAML_WORDS = {"yes", "no", "on", "off", "true", "false", "null", "y", "n"}


class Choice(NamedTuple):
    """One guessed value and its reason."""

    value: Any
    why: str


class Lines:
    """YAML lines with their comments in one column, or above where a line is long."""

    _COLUMN, _WIDTH = 36, 120

    def __init__(self) -> None:
        self._lines: list[str] = []

    def comment(self, text: str, depth: int = 0) -> None:
        self._lines.append("  " * depth + f"# {text}")

    def section(self, name: str, depth: int = 0) -> None:
        self._lines.append("  " * depth + name + ":")

    def add(self, depth: int, key: str, value: Any, why: str = "") -> None:
        indent = "  " * depth
        line = f"{indent}{key}: {_yaml(value)}"
        why = " ".join(why.split())
        if not why:
            self._lines.append(line)
        elif max(len(line), self._COLUMN) + len(why) + 4 <= self._WIDTH:
            self._lines.append(f"{line:<{self._COLUMN}}  # {why}")
        else:
            self._lines += [f"{indent}# {why}", line]

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _yaml(value: Any) -> str:
    """A value on one line: JSON is YAML, and plain words need no quotes."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_yaml(key)}: {_yaml(item)}" for key, item in value.items()) + "}"
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _YAML_WORDS:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)


# Numbers as words -----------------------------------------------------------------------------------------------------


def rounded(number: float) -> str:
    """Two leading digits: 1234 as 1,200, 1234567 as 1.2 million."""
    if number >= 1e6:
        return f"{number / 1e6:,.1f} million"
    digits = max(0, len(str(round(number))) - 2)
    return f"{round(number / 10**digits) * 10**digits:,}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{max(1, round(count / 1e3)):,} kB"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "less than 1 %"


def passes_over(number: float) -> str:
    return f"{number:.0f} passes" if number >= 1.5 else f"{number:.1f} of a pass" if number < 0.95 else "one pass"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds / 10)) * 10} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def round_steps(steps: float) -> int:
    """Two leading digits, the second even more round where it can be: 1234 as 1200, 87 as 90."""
    unit = 10 ** max(1, len(str(round(steps))) - 2)
    return max(10, round(steps / unit) * unit)

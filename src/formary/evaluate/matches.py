"""Whether a short written answer is right: equal, equal but for case, the same number; and ROUGE of several sentences.

Each is a function of one answer and its right ones, 0 to 1. What part of a written text is the answer, a pattern says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from formary.evaluate.texts import units

_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?")
_ERROR = 0.1  # of the right number

Match = Callable[[str, Sequence[str]], float]


def answer_in(text: str, pattern: str | None) -> str:
    """The first match of a pattern in a text, its first group where it has one; "" where it does not match."""
    if pattern is None:
        return text
    found = re.search(pattern, text)
    if found is None:
        return ""
    return (found[1] or "") if found.re.groups else found[0]


def exact(text: str, targets: Sequence[str]) -> float:
    """1 where an answer is one of the targets, white space apart."""
    return float(any(_trimmed(text) == _trimmed(target) for target in targets))


def regardless_of_case(text: str, targets: Sequence[str]) -> float:
    """1 where an answer is one of the targets, white space and case apart."""
    return exact(text.casefold(), [target.casefold() for target in targets])


def numeric(text: str, targets: Sequence[str]) -> float:
    """1 where the first number of an answer is that of a target, or no further from it than a tenth of it."""
    said, right = _number(text), [number for target in targets if (number := _number(target)) is not None]
    return float(said is not None and any(abs(said - number) <= _ERROR * abs(number) for number in right))


def rouge_lsum(text: str, targets: Sequence[str]) -> float:
    """F1 of ROUGE-L over the lines of both texts, against the first target (Lin 2004, section 3.2).

    Of each line of the target the words count that are common with any line of the answer; no word of the answer twice.
    A stand-alone full stop ends a line too, as BIG-bench has it.
    """
    said, right = _lines(text), _lines(targets[0])
    left, hits = Counter(word for line in said for word in line), 0
    for line in right:
        places = {place for other in said for place in _common(line, other)}
        for place in sorted(places):
            if left[line[place]] > 0:
                left[line[place]] -= 1
                hits += 1
    total = sum(map(len, said)) + sum(map(len, right))
    return 2 * hits / total if hits else 0.0


MATCHES: dict[str, tuple[Match, str, bool]] = {
    "exact_match": (exact, "equal up to white space", True),
    "case_insensitive_match": (regardless_of_case, "equal up to white space and case", True),
    "numeric_match": (numeric, "the first number, at most a tenth of the right one away from it", True),
    "rouge_lsum": (rouge_lsum, "words in lower case, no stemming; mean F1 of rows over lines", False),
}
"""By name: the function, how it is told, and whether it is 0 or 1."""


def _common(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """The places in `first` of one longest common subsequence of the two, the later of equal choices."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, word in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    i, j, places = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places[::-1]


def _lines(text: str) -> list[list[str]]:
    return [units(line) for line in text.replace(" . ", " .\n").split("\n")]


def _number(text: str) -> float | None:
    found = next((match[0] for match in _NUMBER.finditer(text) if any(map(str.isdigit, match[0]))), None)
    return None if found is None else float(found.replace(",", ""))


def _trimmed(text: str) -> str:
    return " ".join(text.split())

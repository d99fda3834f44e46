"""Stop strings over streamed text: which characters may be shown, and whether the end has come.

One Knuth-Morris-Pratt automaton per stop string reads every character once; text is withheld only while it could
still become part of a stop string. It does not know tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches a stream for the first of several strings to be completed; the string itself is never shown."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = [stop for stop in stops if stop]
        self._tables = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop string that the text ends with
        self._held = ""

    def push(self, text: str) -> str:
        """Read more text; return what may now be shown. After a match `found` is set and nothing more is shown."""
        if self.found is not None or not self._stops:
            return "" if self.found is not None else text
        for place, character in enumerate(text):
            complete = [stop for index, stop in enumerate(self._stops) if self._advance(index, character)]
            if complete:
                self.found = max(complete, key=len)
                shown = self._held + text[: place + 1]
                self._held = ""
                return shown[: -len(self.found)]
        self._held += text
        kept = max(self._matched)
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown

    def flush(self) -> str:
        """What was withheld, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, index: int, character: str) -> bool:
        stop, table, matched = self._stops[index], self._tables[index], self._matched[index]
        while matched and stop[matched] != character:
            matched = table[matched - 1]
        matched += stop[matched] == character
        self._matched[index] = matched
        return matched == len(stop)


def _failure_table(pattern: str) -> list[int]:
    """For each prefix the length of its longest proper suffix that is also a prefix (Knuth, Morris, Pratt 1977)."""
    table = [0] * len(pattern)
    matched = 0
    for place in range(1, len(pattern)):
        while matched and pattern[matched] != pattern[place]:
            matched = table[matched - 1]
        matched += pattern[matched] == pattern[place]
        table[place] = matched
    return table

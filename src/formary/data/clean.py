"""Documents become cleaner documents or are dropped, step by step, and every step counts and shows what it did.

A step is a function from text to text, or to None for "drop this document"; near-duplicates alone look at many at once.
Rows stream through in order. Which step runs is the recipe's decision (`data.clean`); where rows come from is `source`'s.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from formary.data import pii, stop_words
from formary.data.duplicates import HashSet, NearDuplicates, exact_key
from formary.data.records import Row, RowForm
from formary.errors import DataError, MissingExtra, RecipeError, nearest
from formary.recipe import schema

_EXAMPLES = 3
_EXCERPT = 80  # characters of a text shown as an example
_BATCH_ROWS, _BATCH_CHARS = 1024, 2**20  # near-duplicates are looked for in batches of at most this

_CONFLICTS = "conflicting labels"
_OTHER_TASK = "rows of another task"
_UNREADABLE = "unreadable"
_TOGETHER = ("duplicates", _CONFLICTS)  # steps that remember earlier rows
# Cleaning that would change a composed text.
_UNCHANGED: dict[str, Any] = {
    "repair": False,
    "unicode": "none",
    "control_characters": False,
    "stop_words": None,
    "stem": None,
    "segment": "none",
}

Step = Callable[[str], str | None]


@dataclass(slots=True)
class StepCount:
    """What one cleaning step did: documents changed and dropped, and up to three short examples."""

    step: str
    changed: int = 0
    dropped: int = 0
    examples: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


class Cleaner:
    """Cleans the `text` of rows; other columns are left as they are.

    Where a row's text is composed of its columns (`RowForm.text`), the steps that change text do not run: offsets, tags
    and turns would no longer fit. Those that drop rows judge the composed text.

    Args:
        clean: the recipe's `data.clean`.
        form: of the rows.
        steps: all of them; or those alone that look at one row, as may be done with each file by itself; or those that
            are left after them (see `take_over`).

    Raises:
        MissingExtra: a step needs a library that is not installed.
        RecipeError: no stop words or stemmer for the language named.
    """

    def __init__(
        self,
        clean: schema.Clean,
        form: RowForm = RowForm(),  # noqa: B008  # frozen
        *,
        steps: Literal["all", "alone", "left"] = "all",
    ) -> None:
        self.settings = clean if form.text is None else clean.model_copy(update=_UNCHANGED)
        self.form = form
        self.rows_in = 0
        self._taken_over = False
        self.rows_out = 0
        self._seen = HashSet()  # keys of texts
        self._answered = HashSet()  # of texts with their answers, of the rows that stay
        self._row = Row({}, "")  # the one being cleaned, for the duplicates steps
        self._why = ""  # it cannot be read
        self._conflicts = False  # whether its text has stayed before
        self._before: list[StepCount] = []  # what was done to the rows before they came here
        first, last = self._steps()
        alone = next((i for i, (name, _) in enumerate(first) if name in _TOGETHER), len(first))
        if steps == "alone":
            first, last, clean = first[:alone], [], clean.model_copy(update={"near_duplicates": None})
        elif steps == "left":
            first = first[alone:]
        self._first = [(StepCount(name), step) for name, step in first]
        self._near = NearDuplicates(clean.near_duplicates) if clean.near_duplicates is not None else None
        self._near_count = StepCount("near_duplicates")
        self._last = [(StepCount(name), step) for name, step in last]

    @property
    def story(self) -> list[StepCount]:
        """The counts of all active steps so far, in the order in which they run."""
        near = [self._near_count] if self._near is not None else []
        return self._before + [count for count, _ in self._first] + near + [count for count, _ in self._last]

    def take_over(self, counts: Iterable[StepCount], rows_in: int) -> None:
        """Count in what another cleaner did to rows that come here afterwards, of which `rows_in` were read."""
        known = {count.step: count for count in self._before}
        for count in counts:
            if count.step not in known:
                known[count.step] = StepCount(count.step)
                self._before.append(known[count.step])
            sum_ = known[count.step]
            sum_.changed, sum_.dropped = sum_.changed + count.changed, sum_.dropped + count.dropped
            sum_.examples = (sum_.examples + count.examples)[:_EXAMPLES]
        self._taken_over = True
        self.rows_in += rows_in

    def clean(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Stream the rows that stay, with their text cleaned (rows are changed in place)."""
        rows = self._apply(self._counted(rows), self._first)
        if self._near is not None:
            rows = self._without_near_duplicates(rows, self._near)
        if self._last:
            rows = self._apply(_with_keys(rows), self._last)
        for row in rows:
            self.rows_out += 1
            yield row
        count = next(iter(self.story), None)
        if count and count.step == _OTHER_TASK and 0 < self.rows_in == count.dropped:
            columns = " and ".join(self.form.telling)
            raise DataError(
                f"data.sources: none of the {self.rows_in:,} rows has the columns {columns} ({count.examples[0]}); map other "
                f"names with data.columns, e.g. {{{self.form.telling[0]}: options}}"
            )

    def _steps(self) -> tuple[list[tuple[str, Step]], list[tuple[str, Step]]]:
        settings = self.settings
        first: list[tuple[str, Step]] = []
        if self.form.telling:
            first.append((_OTHER_TASK, self._of_this_task))
        if self.form.unreadable is not None:
            first.append((_UNREADABLE, self._readable))
        if settings.repair:
            first.append(("repair", repair))
        if settings.unicode != "none":
            form = settings.unicode
            first.append(("unicode", lambda text: text if text.isascii() else unicodedata.normalize(form, text)))
        if settings.control_characters:
            first.append(("control_characters", without_control_characters))
        first.append(("length", self._of_right_length))
        if settings.max_repetition is not None:
            limit = settings.max_repetition
            first.append(("repetition", lambda text: None if repetition(text) > limit else text))
        if settings.languages:
            first.append(("language", _language_filter(settings.languages)))
        if settings.pii == "mask" and self.form.text is None:
            first.append(("pii", lambda text: pii.scrub(text)[0]))
        if settings.pii == "drop":
            first.append(("pii", lambda text: None if pii.find(text) else text))
        if settings.duplicates:
            first.append(("duplicates", self._not_again))
            if self.form.answers:
                first.append((_CONFLICTS, self._without_conflict))
        last: list[tuple[str, Step]] = []
        if settings.segment == "jieba":
            last.append(("segment", _segmenter()))
        if settings.stop_words is not None:
            last.append(("stop_words", _stop_word_remover(settings.stop_words)))
        if settings.stem is not None:
            last.append(("stem", _stemmer(settings.stem)))
        if last:
            last.append(("nothing_left", lambda text: None if not text or text.isspace() else text))
        return first, last

    def _counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.rows_in += not self._taken_over
            yield row

    def _apply(self, rows: Iterable[Row], steps: list[tuple[StepCount, Step]]) -> Iterator[Row]:
        for row in rows:
            before = text = row.text
            self._row = row
            for count, step in steps:
                result = step(text)
                if result is None:
                    count.dropped += 1
                    if len(count.examples) < _EXAMPLES:
                        answer = f" ({self._answer(row)})" if count.step == _CONFLICTS else ""
                        said = self._why if count.step == _UNREADABLE else self._excerpt(text)
                        count.examples.append(f"{row.origin}: {said}{answer}")
                    break
                if result is not text and result != text:
                    count.changed += 1
                    if len(count.examples) < _EXAMPLES:
                        count.examples.append(f"{row.origin}: {self._change(text, result)}")
                    text = result
            else:
                if text is not before:
                    row.values["text"] = text
                yield row

    # Steps that remember --------------------------------------------------------------------------------------------

    def _of_this_task(self, text: str) -> str | None:
        return text if all(self._row.values.get(name) is not None for name in self.form.telling) else None

    def _readable(self, text: str) -> str | None:
        assert self.form.unreadable is not None
        self._why = self.form.unreadable(self._row.values) or ""
        return None if self._why else text

    def _of_right_length(self, text: str) -> str | None:
        settings = self.settings
        too_long = settings.max_chars is not None and len(text) > settings.max_chars
        return None if len(text.strip()) < settings.min_chars or too_long else text

    def _not_again(self, text: str) -> str | None:
        """Drop the text of an earlier row, but leave one with another answer to the next step."""
        self._row.key = key = exact_key(self.form.compared(self._row.values, text))
        self._conflicts = not self._seen.add(key)
        if not self.form.answers:
            return None if self._conflicts else text
        answers = [self._row.values.get(column) for column in self.form.answers]
        answered = exact_key(json.dumps([key, *answers], ensure_ascii=False, default=str))
        if not self._conflicts:
            self._answered.add(answered)
        return None if answered in self._answered and self._conflicts else text

    def _without_conflict(self, text: str) -> str | None:
        return None if self._conflicts else text

    def _without_near_duplicates(self, rows: Iterable[Row], near: NearDuplicates) -> Iterator[Row]:
        count = self._near_count
        for batch in batches(rows):
            for row, partner in zip(batch, near.add([row.text for row in batch])):
                if partner is None:
                    yield row
                    continue
                count.dropped += 1
                if len(count.examples) < _EXAMPLES:
                    count.examples.append(f"{row.origin}: {self._excerpt(row.text)}")

    # Examples -------------------------------------------------------------------------------------------------------

    def _excerpt(self, text: str) -> str:
        shown = text[: 5 * _EXCERPT]
        if self.settings.pii != "keep":
            shown = pii.scrub(shown)[0]
        shown = " ".join(shown.split())
        return shown[:_EXCERPT] + ("…" if len(shown) > _EXCERPT or len(text) > 5 * _EXCERPT else "")

    def _answer(self, row: Row) -> str:
        column = self.form.answers[-1]  # what is learned stands last in a task's columns
        return self._excerpt(f"{column} {row.values.get(column)!r}")

    def _change(self, before: str, after: str) -> str:
        place = _first_difference(before, after)
        if self.settings.pii != "keep":  # what is to be removed must not reappear in the report
            masked = pii.scrub(before)[0], pii.scrub(after)[0]
            if masked[0] == masked[1]:  # the change was the masking itself, so `after` is safe to show
                return repr(after[max(0, place - 12) : place + 28])
            before, after = masked
            place = _first_difference(before, after)
        start = max(0, place - 12)
        return f"{before[start : start + 40]!r} → {after[start : start + 40]!r}"


# Steps that are plain functions -------------------------------------------------------------------------------------

# Text in UTF-8 that was read as a single-byte encoding shows as neighbouring non-ASCII characters of these blocks, or as
# "Ã" before a space that was 0xA0; without them ftfy's slower look is not needed.
_SUSPICIOUS = re.compile("[\x80-\u04ff\u2010-\u25ff\ufb00-\ufb02][\x80-\u04ff\u2010-\u25ff\ufb00-\ufb02]|[Ãà] ")


def repair(text: str) -> str:
    """Mend text that was decoded with the wrong encoding ("cafÃ©" → "café"), line by line, where it looks broken."""
    if text.isascii() or not _SUSPICIOUS.search(text):
        return text
    import ftfy
    import ftfy.badness

    lines = text.split("\n")
    for i, line in enumerate(lines):
        if not line.isascii() and _SUSPICIOUS.search(line) and ftfy.badness.is_bad(line):
            lines[i] = ftfy.fix_encoding(line)
    return "\n".join(lines)


_ASCII_CONTROLS = bytes(code for code in range(128) if (code < 32 and chr(code) not in "\t\n") or code == 127)
# C1 controls, byte-order mark and interlinear marks, lone surrogates (which no file can hold).
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufff9-\ufffb\ud800-\udfff]")


def without_control_characters(text: str) -> str:
    """Remove control characters except tab and newline; carriage returns become newlines."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        cleaned = text.encode().translate(None, _ASCII_CONTROLS)
        return text if len(cleaned) == len(text) else cleaned.decode()
    return _CONTROLS.sub("", text) if _CONTROLS.search(text) else text


def repetition(text: str) -> float:
    """The larger of two shares of `text`, 0 to 1: characters in repeated lines, and repeated runs of 10 characters.

    A line counts when it occurred before. A run counts when it occurred before within the same 4096 characters, so that
    the share of ordinary prose (a few per cent) does not grow with the length of a document.
    """
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    total = sum(map(len, lines))
    if total == 0:
        return 0.0
    seen: set[str] = set()
    repeated = 0
    for line in lines:
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return max(repeated / total, _repeated_runs(" ".join(text.split())))  # indentation is no repetition


def _repeated_runs(text: str, run: int = 10, block: int = 4096) -> float:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    if len(codes) <= run:
        return 0.0
    hashes = np.zeros(len(codes) - run + 1, dtype=np.uint64)
    for place in range(run):
        hashes = (hashes + codes[place : place + len(hashes)]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    repeated = 0
    for start in range(0, len(hashes), block):
        part = hashes[start : start + block]
        repeated += len(part) - len(np.unique(part))
    return repeated / len(hashes)


# Steps behind an optional library or a table ------------------------------------------------------------------------


def _language_filter(languages: list[str]) -> Step:
    try:
        import py3langid
    except ImportError as error:
        raise MissingExtra("languages", "data.clean.languages") from error
    wanted = set(languages)

    def keep(text: str) -> str | None:
        return text if py3langid.classify(text[:2000])[0] in wanted else None

    return keep


def _segmenter() -> Step:
    try:
        import jieba
    except ImportError as error:
        raise MissingExtra("zh", "data.clean.segment") from error
    import logging

    jieba.setLogLevel(logging.WARNING)
    chinese = re.compile("[\u3400-\u9fff]")

    def segment(text: str) -> str:
        if text.isascii() or not chinese.search(text):
            return text
        return "\n".join(" ".join(word for word in jieba.cut(line) if not word.isspace()) for line in text.split("\n"))

    return segment


_WORD = re.compile(r"\w+(?:['’]\w+)*")


def _stop_word_remover(language: str) -> Step:
    known = stop_words.STOP_WORDS
    if language not in known:
        raise RecipeError(
            f"data.clean.stop_words: no list for '{language}'; there are {', '.join(known)}. {nearest(language, known)}".rstrip()
        )
    words = known[language]

    def remove(text: str) -> str:
        kept = _WORD.sub(lambda match: "" if match.group().lower() in words else match.group(), text)
        return text if kept == text else re.sub("[ \t]{2,}", " ", kept).strip()

    return remove


def _stemmer(algorithm: str) -> Step:
    import snowballstemmer

    known = snowballstemmer.algorithms()
    if algorithm not in known:
        raise RecipeError(
            f"data.clean.stem: no stemmer '{algorithm}'; there are {', '.join(known)}. {nearest(algorithm, known)}".rstrip()
        )
    stem = lru_cache(maxsize=100_000)(snowballstemmer.stemmer(algorithm).stemWord)
    return lambda text: _WORD.sub(lambda match: stem(match.group().lower()), text)


# Small parts --------------------------------------------------------------------------------------------------------


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists of at most 1,024 rows and about a million characters (one row at least)."""
    batch: list[Row] = []
    chars = 0
    for row in rows:
        batch.append(row)
        chars += len(row.text)
        if len(batch) >= _BATCH_ROWS or chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _with_keys(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows whose key is that of the text before the classic steps, so that a baseline gets the same split."""
    for row in rows:
        if row.key is None:
            row.key = exact_key(row.text)
        yield row


def _first_difference(before: str, after: str) -> int:
    low, high = 0, min(len(before), len(after))
    while low < high:  # the longest common beginning, by bisection over slices compared in C
        middle = (low + high + 1) // 2
        if before[:middle] == after[:middle]:
            low = middle
        else:
            high = middle - 1
    return low

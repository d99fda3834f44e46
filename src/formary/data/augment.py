"""Random variants of training rows: words deleted, swapped, replaced by synonyms, masked, or translated there and back.

A variant depends only on the row's text, the salt and the copy's number, so the same recipe makes the same variants.
It never sees validation or test rows (`documents` hands it only training rows) and never replaces the original.
"""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from formary.data.source import Row
from formary.errors import DataError, FormaryError, RecipeError
from formary.recipe import schema

MASK_WORD = "[MASK]"
MEAN_SPAN = 3
"""Mean length of a masked span in words, as in T5's span corruption (Raffel et al. 2020)."""

_CJK = "\u3040-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:['’-][^\W{_CJK}]+)*")


class Augmenter:
    """Makes `augment.copies` variants of a row, those that differ from it.

    Args:
        augment: the recipe's `data.augment`.
        base: the folder relative to which the synonyms table is named.
        salt: another salt gives other variants.

    Raises:
        DataError: the synonyms table is missing or empty.
        RecipeError: the back-translation function cannot be imported, or synonyms are asked for without a table.
    """

    def __init__(self, augment: schema.Augment, base: Path = Path("."), *, salt: str = "formary") -> None:
        self.settings = augment
        self.salt = salt
        if augment.synonym > 0 and augment.synonyms is None:
            raise RecipeError(
                "data.augment.synonym needs a table: set data.augment.synonyms to a file, one group of synonyms a line"
            )
        self._synonyms = (
            read_synonyms(Path(base) / augment.synonyms) if augment.synonyms and augment.synonym > 0 else {}
        )
        self._words = _words_with(self._synonyms)
        self._back_translate = _imported(augment.back_translate) if augment.back_translate else None

    @property
    def active(self) -> bool:
        """Whether any variant can come out."""
        settings = self.settings
        return self._back_translate is not None or any(
            (settings.delete, settings.swap, settings.synonym, settings.mask)
        )

    def copies(self, row: Row) -> Iterator[Row]:
        """The variants of `row`; a variant equal to the original or to an earlier one is left out."""
        if not self.active:
            return
        text: str = row.values["text"]
        seen = {text}
        base = self._translated(text, row.origin)
        for number in range(1, self.settings.copies + 1):
            seed = xxhash.xxh3_64_intdigest(f"{self.salt}\0{number}\0{text}".encode("utf-8", "surrogatepass"))
            variant = self.vary(base, random.Random(seed))
            if variant not in seen and not variant.isspace() and variant:
                seen.add(variant)
                yield Row({**row.values, "text": variant}, f"{row.origin}, variant {number}")

    def vary(self, text: str, chance: random.Random) -> str:
        """One variant: synonyms, then swaps, then deletions, then masked spans; what is between words stays."""
        settings = self.settings
        words, gaps = _parts(text, self._words)
        if settings.synonym:
            words = [self._replaced(word, chance) for word in words]
        if settings.swap:
            i = 0
            while i < len(words) - 1:
                if chance.random() < settings.swap:
                    words[i], words[i + 1] = words[i + 1], words[i]
                    i += 1  # a word moves once, not to the end of the text
                i += 1
        if settings.delete and len(words) > 1:
            keep = [chance.random() >= settings.delete for _ in words]
            if not any(keep):
                keep[chance.randrange(len(keep))] = True
            words, gaps = _kept(words, gaps, keep)
        if settings.mask:
            words, gaps = _masked(words, gaps, settings.mask, chance)
        return "".join(gap + word for gap, word in zip(gaps, words)) + gaps[-1]

    def _replaced(self, word: str, chance: random.Random) -> str:
        others = self._synonyms.get(word.lower())
        if others is None or chance.random() >= self.settings.synonym:
            return word
        chosen = chance.choice(others)
        return chosen[:1].upper() + chosen[1:] if word[:1].isupper() else chosen

    def _translated(self, text: str, origin: str) -> str:
        if self._back_translate is None:
            return text
        name = self.settings.back_translate
        try:
            result = self._back_translate(text)
        except FormaryError:
            raise
        except Exception as error:
            raise DataError(
                f"{origin}: data.augment.back_translate ({name}) failed: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(result, str):
            raise DataError(
                f"{origin}: data.augment.back_translate ({name}) returned a {type(result).__name__}, not text"
            )
        return result


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """A table of synonyms: each line is a group, its words separated by tabs or commas; lower-cased word -> the others."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the synonyms table (data.augment.synonyms) could not be read ({error})") from error
    synonyms: dict[str, list[str]] = {}
    for line in lines:
        group = [word.strip() for word in re.split("[\t,，]", line) if word.strip()]
        for word in group:
            known = synonyms.setdefault(word.lower(), [])
            known += [other for other in group if other.lower() != word.lower() and other not in known]
    synonyms = {word: others for word, others in synonyms.items() if others}
    if not synonyms:
        raise DataError(
            f"{path}: the synonyms table has no line with two words; write one group a line, e.g. big, large, huge"
        )
    return synonyms


def _parts(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """(words, gaps): gaps[i] stands before words[i], gaps[-1] at the end."""
    words, gaps, at = [], [], 0
    for match in pattern.finditer(text):
        gaps.append(text[at : match.start()])
        words.append(match.group())
        at = match.end()
    return words, [*gaps, text[at:]]


def _kept(words: list[str], gaps: list[str], keep: list[bool]) -> tuple[list[str], list[str]]:
    kept_words, kept_gaps = [], []
    lost = ""  # the gap before a deleted word, used if the text now begins or breaks there
    for word, gap, stays in zip(words, gaps, keep):
        if stays:
            kept_words.append(word)
            kept_gaps.append(lost + gap.lstrip() if lost[-1:].isspace() and gap[:1].isspace() else lost + gap)
            lost = ""
        else:
            lost = lost + gap.lstrip() if lost[-1:].isspace() else lost + gap
    return kept_words, [*kept_gaps, lost.rstrip() + gaps[-1]]


def _masked(words: list[str], gaps: list[str], share: float, chance: random.Random) -> tuple[list[str], list[str]]:
    """Replace spans by MASK_WORD so that about `share` of the words disappear; lengths are geometric with MEAN_SPAN."""
    start = share / (MEAN_SPAN * (1 - share) + share)  # solves share = start MEAN / (start MEAN + 1 - start)
    new_words, new_gaps, i = [], [], 0
    while i < len(words):
        new_gaps.append(gaps[i])
        if chance.random() < start:
            length = 1
            while chance.random() < 1 - 1 / MEAN_SPAN:
                length += 1
            new_words.append(MASK_WORD)
            i += length
        else:
            new_words.append(words[i])
            i += 1
    return new_words, [*new_gaps, gaps[-1]]


def _words_with(synonyms: dict[str, list[str]]) -> re.Pattern[str]:
    """The word pattern; words of the table written without spaces (Chinese), or of several words, count as one."""
    special = sorted((word for word in synonyms if _WORDS.fullmatch(word) is None), key=len, reverse=True)
    if not special:
        return _WORDS
    return re.compile("|".join([*map(re.escape, special), _WORDS.pattern]), re.IGNORECASE)


def _imported(name: str) -> Callable[[str], str]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"data.augment.back_translate: '{name}' cannot be imported ({error}); write module:function"
        ) from error
    if not callable(found):
        raise RecipeError(f"data.augment.back_translate: '{name}' is not a function")
    translate: Callable[[str], str] = found
    return translate

"""Augmentation: variants repeat exactly, keep what they should keep, and change about as much as asked."""

from __future__ import annotations

import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.augment import MASK_WORD, Augmenter, read_synonyms
from formary.data.source import Row
from formary.errors import DataError, RecipeError
from formary.recipe import schema

quick = settings(max_examples=100, deadline=None)
WORDS = [f"word{number}" for number in range(4000)]
TEXT = " ".join(WORDS)


def varied(text: str, seed: int = 0, base: Path = Path("."), **options: Any) -> str:
    return Augmenter(schema.Augment(**options), base).vary(text, random.Random(seed))


def variants(text: str, base: Path = Path("."), **options: Any) -> list[str]:
    return [
        row.values["text"] for row in Augmenter(schema.Augment(**options), base).copies(Row({"text": text}, "a line 1"))
    ]


def test_without_any_change_there_are_no_variants() -> None:
    assert variants("some words here", copies=3) == []
    assert not Augmenter(schema.Augment()).active


def test_variants_differ_from_the_original_and_each_other_and_repeat_exactly() -> None:
    options = {"delete": 0.3, "swap": 0.3, "copies": 5}
    found = variants("one two three four five six", **options)
    assert found == variants("one two three four five six", **options)
    assert len({*found, "one two three four five six"}) == len(found) + 1 == 6
    assert variants("one", **options) == []


def test_other_columns_stay_and_the_origin_tells_of_the_variant() -> None:
    [row] = Augmenter(schema.Augment(delete=0.5)).copies(Row({"text": "one two three four", "label": 1}, "a line 1"))
    assert row.values["label"] == 1 and row.origin == "a line 1, variant 1"


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_about_the_share_asked_for_is_deleted_and_the_rest_keeps_its_order(share: float) -> None:
    left = varied(TEXT, delete=share).split(" ")
    assert left == [word for word in WORDS if word in set(left)]
    assert abs(len(left) / 4000 - (1 - share)) < 0.04


def test_swapping_keeps_all_words_and_moves_each_by_one_place() -> None:
    swapped = varied(TEXT, swap=0.5).split(" ")
    assert sorted(swapped) == sorted(WORDS) and swapped != WORDS
    assert all(abs(swapped.index(word) - place) <= 1 for place, word in list(enumerate(WORDS))[:300])


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_masking_takes_about_the_share_asked_for_in_spans_of_three(share: float) -> None:
    masked = varied(TEXT, mask=share).split(" ")
    gone = 4000 - (len(masked) - masked.count(MASK_WORD))
    assert abs(gone / 4000 - share) < 0.06
    assert 2.4 < gone / masked.count(MASK_WORD) < 3.6


def test_synonyms_come_from_the_users_table_and_keep_the_capital(tmp_path: Path) -> None:
    (tmp_path / "table.txt").write_text("big, large\nfast\tquick\n高兴，快乐\nice cream, gelato\n", encoding="utf-8")
    options = {"synonym": 0.999999, "synonyms": "table.txt"}
    assert varied("Big dogs, big fast cats", base=tmp_path, **options) == "Large dogs, large quick cats"
    assert varied("他很高兴。", base=tmp_path, **options) == "他很快乐。"
    assert varied("I like ice cream!", base=tmp_path, **options) == "I like gelato!"
    assert varied("biggest", base=tmp_path, **options) == "biggest"


def test_a_word_of_several_groups_has_all_their_words_as_synonyms(tmp_path: Path) -> None:
    (tmp_path / "table.txt").write_text("fine, good\nFine, penalty\n")
    assert read_synonyms(tmp_path / "table.txt") == {"fine": ["good", "penalty"], "good": ["fine"], "penalty": ["Fine"]}


def test_a_synonyms_table_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "lonely.txt").write_text("big\n\n")
    for name, message in (("gone.txt", "could not be read"), ("lonely.txt", "no line with two words")):
        with pytest.raises(DataError, match=f"{name}: the synonyms table .*{message}"):
            Augmenter(schema.Augment(synonym=0.1, synonyms=name), tmp_path)
    with pytest.raises(RecipeError, match=r"data\.augment\.synonyms"):
        Augmenter(schema.Augment(synonym=0.1))


def test_back_translation_calls_the_users_function(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_translation")
    monkeypatch.setitem(sys.modules, "my_translation", module)
    module.there_and_back = lambda text: text.replace("huge", "very big")  # type: ignore[attr-defined]
    assert variants("a huge cat", back_translate="my_translation:there_and_back") == ["a very big cat"]
    module.number = lambda text: 5  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"a line 1: .*\(my_translation:number\) returned a int, not text"):
        variants("x", back_translate="my_translation:number")
    module.broken = lambda text: 1 // 0  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"a line 1: .*failed: ZeroDivisionError"):
        variants("x", back_translate="my_translation:broken")


@pytest.mark.parametrize("name", ["no_such_module_here:f", "json:no_such_function", "json", "json:decoder"])
def test_a_back_translation_that_cannot_be_imported_names_the_field(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"data\.augment\.back_translate: '{name}'"):
        Augmenter(schema.Augment(back_translate=name))


@quick
@given(st.text(st.sampled_from("ab, .年月\n-'"), max_size=60), st.integers(0, 5))
def test_any_text_can_be_varied_and_only_its_own_characters_come_out(text: str, seed: int) -> None:
    assert varied(text, seed) == text
    result = varied(text, seed, delete=0.3, swap=0.3, mask=0.3).replace(MASK_WORD, "")
    assert sorted(set(result)) == sorted(set(result) & set(text))
    assert [c for c in sorted(varied(text, seed, swap=0.6))] == sorted(text)

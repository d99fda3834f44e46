"""Cleaning: what each step changes or drops, and that every step counts and shows it."""

from __future__ import annotations

import json
import sys
import unicodedata
from typing import Any

import ftfy.badness
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data import clean, pii
from formary.data.clean import Cleaner, repair, repetition, without_control_characters
from formary.data.records import RowForm
from formary.data.source import Row
from formary.errors import DataError, MissingExtra, RecipeError
from formary.recipe import schema

quick = settings(max_examples=100, deadline=None)
NOTHING: dict[str, Any] = {
    "repair": False,
    "unicode": "none",
    "control_characters": False,
    "min_chars": 0,
    "duplicates": False,
}


def cleaned(texts: list[str], **options: Any) -> tuple[list[str], dict[str, clean.StepCount]]:
    cleaner = Cleaner(schema.Clean(**options))
    kept = [
        row.values["text"]
        for row in cleaner.clean(Row({"text": text}, f"a line {i}") for i, text in enumerate(texts, 1))
    ]
    assert cleaner.rows_in == len(texts) and cleaner.rows_out == len(kept)
    json.dumps([count.as_dict() for count in cleaner.story])
    return kept, {count.step: count for count in cleaner.story}


def test_broken_text_is_mended_where_it_is_broken_and_nowhere_else() -> None:
    good = "“Curly” quotes, ﬁne ligatures, ｆｕｌｌ width，中文。 naïve café Ärger"
    broken = "the cafÃ© was â€œclosedâ€\x9d"
    kept, story = cleaned([f"{good}\n{broken}", good])
    assert kept == [f"{good}\nthe café was “closed”", good]
    assert story["repair"].changed == 1 and "Ã©" in story["repair"].examples[0] and "é" in story["repair"].examples[0]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp1251", "macroman", "cp437"])
@pytest.mark.parametrize("text", ["l’été à Besançon", "größer als Österreich", "Привет, мир", "日本語と中文"])
def test_the_quick_look_passes_on_all_that_ftfy_would_call_broken(text: str, encoding: str) -> None:
    try:
        broken = text.encode().decode(encoding)
    except UnicodeDecodeError:
        pytest.skip("these bytes are no text in that encoding")
    if ftfy.badness.is_bad(broken):
        assert repair(broken) == ftfy.fix_encoding(broken)


@quick
@given(st.text(st.sampled_from("aé Ãâ©€™年ж\n"), max_size=40))
def test_repair_agrees_with_ftfy_line_by_line(text: str) -> None:
    expected = [ftfy.fix_encoding(line) if ftfy.badness.is_bad(line) else line for line in text.split("\n")]
    assert repair(text) == "\n".join(expected)


@quick
@given(st.text(max_size=60))
def test_text_is_in_the_normal_form_asked_for(text: str) -> None:
    for form in ("NFC", "NFKC"):
        assert cleaned([text], **{**NOTHING, "unicode": form})[0] == [unicodedata.normalize(form, text)]


@quick
@given(st.text(st.one_of(st.characters(exclude_categories=[]), st.sampled_from("\r\n\t\x00\x7f\x85\ufeff"))))
def test_no_control_character_stays_but_tab_and_newline(text: str) -> None:
    result = without_control_characters(text)
    assert all(c in "\t\n" or unicodedata.category(c) not in ("Cc", "Cs") for c in result) and "\ufeff" not in result
    visible = [c for c in text if unicodedata.category(c) not in ("Cc", "Cs") and c not in "\ufeff\ufff9\ufffa\ufffb"]
    assert [c for c in result if c not in "\t\n"] == visible
    assert without_control_characters(result) == result


def test_carriage_returns_become_newlines() -> None:
    assert without_control_characters("a\r\nb\rc\x00") == "a\nb\nc"


def test_length_counts_what_is_not_space_around_and_names_what_it_drops() -> None:
    kept, story = cleaned(["", "   \n ", "ab", "abc", "abcd"], min_chars=3, max_chars=3)
    assert kept == ["abc"]
    assert story["length"].dropped == 4
    assert story["length"].examples == ["a line 1: ", "a line 2: ", "a line 3: ab"]


def test_repetition_tells_prose_from_repeated_lines_and_runs() -> None:
    prose = (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
    )
    assert repetition(prose) < 0.4
    assert repetition("buy now and save\n" * 20) == pytest.approx(0.95)
    assert repetition("spam " * 100) > 0.95
    assert repetition(f"{' ' * 60}Yours,\n{' ' * 60}Jane") == 0
    assert repetition("") == repetition("\n \n") == 0
    assert repetition(" ".join(f"word{number * 7919 % 10007}" for number in range(20_000))) < 0.5
    assert cleaned([prose, "spam " * 100], max_repetition=0.6)[0] == [prose]


def test_duplicates_up_to_case_and_space_are_dropped_and_the_first_stays() -> None:
    kept, story = cleaned(["The end", "the  END\n", "Another", "The end"])
    assert kept == ["The end", "Another"]
    assert (story["duplicates"].changed, story["duplicates"].dropped) == (0, 2)
    assert cleaned(["x", "x"], duplicates=False)[0] == ["x", "x"]


@quick
@given(st.lists(st.text(st.sampled_from("aAbB \n年"), max_size=4), max_size=40))
def test_duplicates_are_those_of_a_plain_set(texts: list[str]) -> None:
    seen: dict[str, str] = {}
    for text in texts:
        seen.setdefault("".join(text.casefold().split()), text)
    assert cleaned(texts, **{**NOTHING, "duplicates": True})[0] == list(seen.values())


def test_near_duplicates_are_dropped_and_counted_though_they_come_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "_BATCH_ROWS", 3)
    texts = [" ".join(f"w{(number * 31 + place * place) % 997}" for place in range(80)) for number in range(8)]
    kept, story = cleaned([*texts, *(text + " end" for text in texts)], near_duplicates=0.8)
    assert kept == texts
    assert story["near_duplicates"].dropped == 8 and len(story["near_duplicates"].examples) == 3


def test_personal_data_is_masked_or_its_document_dropped_and_never_shown() -> None:
    texts = ["Mail jane@example.com", "Mail nobody", "身份证11010519491231002X", "Mail jane@example.com again " * 30]
    masked, story = cleaned(texts, pii="mask", max_chars=200)
    assert masked == ["Mail <EMAIL>", "Mail nobody", "身份证<ID_NUMBER>"]
    shown = json.dumps([count.as_dict() for count in story.values()], ensure_ascii=False)
    assert story["pii"].examples[0] == "a line 1: 'Mail <EMAIL>'"
    assert story["pii"].changed == 2 and "<EMAIL>" in shown and pii.find(shown) == []
    dropped, story = cleaned(texts, pii="drop")
    assert dropped == ["Mail nobody"] and story["pii"].dropped == 3
    assert pii.find(json.dumps([count.as_dict() for count in story.values()], ensure_ascii=False)) == []
    assert cleaned(texts[:1], pii="keep")[0] == texts[:1]


def test_stop_words_and_stemming_leave_what_a_baseline_counts() -> None:
    kept, story = cleaned(["The cats were running to the houses", "The and of"], stop_words="en", stem="english")
    assert kept == ["cat run hous"]
    assert story["nothing_left"].dropped == 1
    assert cleaned(["我们 喜欢 的 书"], stop_words="zh")[0] == ["喜欢 书"]


def test_chinese_is_segmented_into_words_line_by_line() -> None:
    pytest.importorskip("jieba")
    assert cleaned(["我来到北京\n清华大学", "plain"], segment="jieba")[0] == ["我 来到 北京\n清华大学", "plain"]


def test_classic_steps_do_not_move_a_row_to_another_split() -> None:
    rows = [
        next(Cleaner(schema.Clean(**options)).clean([Row({"text": "The cats"}, "")]))
        for options in ({}, {"stem": "english"})
    ]
    assert rows[0].values != rows[1].values and rows[0].key == rows[1].key


@pytest.mark.parametrize("option, value", [("stop_words", "englsh"), ("stem", "englsh")])
def test_an_unknown_language_lists_the_known_ones(option: str, value: str) -> None:
    with pytest.raises(RecipeError, match=rf"data\.clean\.{option}: no .*'englsh'; there are .*en"):
        Cleaner(schema.Clean(**{option: value}))


@pytest.mark.parametrize(
    "library, extra, options",
    [("py3langid", "languages", {"languages": ["en"]}), ("jieba", "zh", {"segment": "jieba"})],
)
def test_a_step_whose_library_is_missing_says_what_to_install(
    library: str, extra: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf'pip install "formary\[{extra}\]"'):
        Cleaner(schema.Clean(**options))


def test_only_the_languages_asked_for_stay() -> None:
    pytest.importorskip("py3langid")
    texts = [
        "The weather is nice today and we go out.",
        "今天天气很好，我们出去玩。",
        "Il fait beau aujourd'hui et nous sortons.",
    ]
    kept, story = cleaned(texts, languages=["en", "zh"])
    assert kept == texts[:2] and story["language"].dropped == 1


def test_only_active_steps_tell_a_story_and_other_columns_stay_as_they_are() -> None:
    cleaner = Cleaner(schema.Clean(**NOTHING))
    [row] = cleaner.clean([Row({"text": "\x00 a", "id": "\x00"}, "")])
    assert row.values == {"text": "\x00 a", "id": "\x00"}
    assert [count.step for count in cleaner.story] == ["length"]


def test_cleaning_streams() -> None:
    cleaner = Cleaner(schema.Clean())
    rows = cleaner.clean(Row({"text": f"row {number}"}, "") for number in range(10**9))
    assert [next(rows).values["text"] for _ in range(3)] == ["row 0", "row 1", "row 2"]
    assert cleaner.rows_in == 3


def test_rows_without_the_telling_columns_are_another_tasks_and_counted() -> None:
    form = RowForm(columns=("text", "choices"), telling=("choices",))
    assert form.required == ("text",)
    rows = [Row({"text": "a", "choices": ["x"]}, "line 1"), Row({"text": "b"}, "line 2")]
    cleaner = Cleaner(schema.Clean(), form)
    assert [row.values["text"] for row in cleaner.clean(rows)] == ["a"]
    assert cleaner.story[0].step == "rows of another task" and cleaner.story[0].dropped == 1
    with pytest.raises(DataError, match=r"none of the 1 rows has the columns choices \(line 2: b\)"):
        list(Cleaner(schema.Clean(), form).clean(rows[1:]))

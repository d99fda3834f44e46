"""Rows that are more than a text: dropped, kept and divided by a composed text, and written as they were read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formary.data.documents import read_documents, write_documents
from formary.data.records import Row, RowForm, label_names
from formary.errors import DataError, RecipeError
from formary.recipe import schema

PARTS = ("train", "validation", "test")
LABELLED = RowForm(columns=("text", "label"))
TAGGED = RowForm(columns=("tokens", "tags"), text=lambda row: " ".join(row["tokens"]))
SPANS = RowForm(columns=("question", "context", "answers"), text=lambda row: row["question"] + "\n" + row["context"])
PAIRS = RowForm(columns=("text", "positive"), text=lambda row: row["text"] + "\n" + row["positive"])
ALL_TRAIN = {"validation": 0, "test": 0}


def written(
    base: Path, rows: list[dict[str, Any]], form: RowForm, **data: Any
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settled = schema.Data(**{"sources": ["rows.jsonl"], "split": ALL_TRAIN, **data})
    story = write_documents(settled, base / "out", base=base, form=form)
    parts = {part: [row.values for row in read_documents(base / "out" / f"{part}.jsonl", form)] for part in PARTS}
    return parts, story


def dropped(story: dict[str, Any]) -> dict[str, int]:
    return {step["step"]: step["dropped"] for step in story["steps"] if step["dropped"]}


def tagged(*words: str, tag: str = "O") -> dict[str, Any]:
    return {"tokens": list(words), "tags": [tag] * len(words)}


# What is written ----------------------------------------------------------------------------------------------------


def test_a_row_is_written_with_its_own_columns_and_no_made_up_text(tmp_path: Path) -> None:
    row = {"id": 7, "tokens": ["Ann", "\u8dd1"], "tags": ["B", "O"], "more": {"deep": [1.5, None, [True]]}}
    _, story = written(tmp_path, [row], TAGGED)
    assert (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8") == json.dumps(row, ensure_ascii=False) + "\n"
    assert story["splits"]["train"] == {"rows": 1, "chars": len("Ann 跑"), "bytes": len("Ann 跑".encode())}


def test_the_text_of_a_pair_stays_what_it_was(tmp_path: Path) -> None:
    row = {"text": "a cat", "positive": "a small cat"}
    parts, story = written(tmp_path, [row], PAIRS)
    assert parts["train"] == [row] and story["splits"]["train"]["chars"] == len("a cat\na small cat")


def test_cleaning_that_changes_text_does_not_touch_composed_rows(tmp_path: Path) -> None:
    context = "the cafÃ© was\r\nopen \x07 e\u0301"  # broken, with controls, not in normal form
    row = {"question": "which cafe?", "context": context, "answers": {"text": ["open"], "answer_start": [15]}}
    parts, story = written(tmp_path, [row], SPANS, clean={"stop_words": "en", "stem": "english"})
    assert parts["train"] == [row]
    assert {step["step"] for step in story["steps"]} == {"length", "duplicates", "conflicting labels"}
    assert [warning.split(" was not applied")[0] for warning in story["warnings"]] == [
        "data.clean.stop_words",
        "data.clean.stem",
    ]


def test_a_text_with_a_label_is_cleaned(tmp_path: Path) -> None:
    parts, _ = written(tmp_path, [{"label": "x", "text": "the cafÃ© was open"}], LABELLED)
    assert parts["train"] == [{"text": "the café was open", "label": "x"}]


def test_cleaning_that_drops_judges_the_composed_text(tmp_path: Path) -> None:
    rows = [
        tagged("one", "two"),
        tagged("One", "TWO"),
        tagged("a"),
        tagged("mail", "ann@example.com"),
        tagged("x" * 50),
    ]
    parts, story = written(tmp_path, rows, TAGGED, clean={"min_chars": 2, "max_chars": 40, "pii": "drop"})
    assert parts["train"] == [rows[0]]
    assert dropped(story) == {"length": 2, "pii": 1, "duplicates": 1}


def test_near_duplicates_of_composed_texts_are_dropped_within_and_across_files(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(60)]
    rows = [tagged(*words), tagged(*words[:-1], "other"), tagged("something", "else", "entirely")]
    (tmp_path / "v.jsonl").write_text(json.dumps(tagged("new", *words[1:])) + "\n")
    parts, story = written(tmp_path, rows, TAGGED, clean={"near_duplicates": 0.7}, validation=["v.jsonl"])
    assert dropped(story) == {"near_duplicates": 1} and story["duplicates_across_splits"]["near"] == 1
    assert parts["train"] == [rows[2]]


@pytest.mark.parametrize("by", ["hash", "order"])
def test_composed_rows_are_divided_whole(by: str, tmp_path: Path) -> None:
    rows = [tagged("word", str(number)) for number in range(100)]
    parts, _ = written(tmp_path, rows, TAGGED, split={"by": by, "validation": 0.2, "test": 0.2})
    assert sorted((row for part in PARTS for row in parts[part]), key=str) == sorted(rows, key=str)
    assert len(parts["test"]) == 20 if by == "order" else parts["test"]
    lone, _ = written(tmp_path, rows[:1], TAGGED, split={"by": "order", "validation": 0, "test": 0})
    assert lone["train"] == rows[:1]


def test_a_row_from_which_no_text_can_be_composed_is_left_for_its_task_to_refuse(tmp_path: Path) -> None:
    rows = [{"tokens": 5, "tags": "O"}, tagged("Ann")]
    assert written(tmp_path, rows, TAGGED)[0]["train"] == rows


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.text("abÄ 年", min_size=1, max_size=4), min_size=1, max_size=4), min_size=1, max_size=8)
)
def test_every_row_is_kept_once_however_it_is_read(rows: list[list[str]], tmp_path: Path) -> None:
    given_rows = [tagged(*words, tag=str(number)) for number, words in enumerate(rows)]
    folded = {"".join("".join(words).casefold().split()) for words in rows}
    try:
        parts, story = written(tmp_path, given_rows, TAGGED)
    except DataError:  # nothing but spaces
        assert folded == {""}
        return
    assert len(parts["train"]) == len(folded - {""}) and all(row in given_rows for row in parts["train"])
    assert sum(dropped(story).values()) == len(rows) - len(parts["train"])


# Conflicting labels -------------------------------------------------------------------------------------------------


def test_the_same_text_with_another_label_is_counted_apart_and_the_first_stays(tmp_path: Path) -> None:
    rows = [
        {"text": "free money", "label": "spam"},
        {"text": "Free  MONEY", "label": "spam"},
        {"text": "free money", "label": "ham"},
        {"text": "free money", "label": "ham"},
        {"text": "hello", "label": "ham"},
    ]
    parts, story = written(tmp_path, rows, LABELLED)
    assert parts["train"] == [rows[0], rows[4]]
    assert dropped(story) == {"duplicates": 1, "conflicting labels": 2}
    (step,) = [step for step in story["steps"] if step["step"] == "conflicting labels"]
    assert step["examples"][0] == "rows.jsonl line 3: free money (label 'ham')"


def test_the_same_words_with_other_tags_conflict_and_other_columns_do_not(tmp_path: Path) -> None:
    rows = [{**tagged("Ann"), "id": 1}, {**tagged("Ann"), "id": 2}, tagged("Ann", tag="B-PER")]
    parts, story = written(tmp_path, rows, TAGGED)
    assert parts["train"] == rows[:1] and dropped(story) == {"duplicates": 1, "conflicting labels": 1}
    assert story["steps"][-1]["examples"] == ["rows.jsonl line 3: Ann (tags ['B-PER'])"]


def test_without_the_duplicates_step_nothing_conflicts(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": 1}, {"text": "x", "label": 2}]
    parts, story = written(tmp_path, rows, LABELLED, clean={"duplicates": False})
    assert parts["train"] == rows and dropped(story) == {}


def test_plain_texts_have_no_labels_to_conflict(tmp_path: Path) -> None:
    _, story = written(tmp_path, [{"text": "x", "label": 1}, {"text": "x", "label": 2}], RowForm())
    assert dropped(story) == {"duplicates": 1}


# What is refused ----------------------------------------------------------------------------------------------------


def test_composed_rows_cannot_be_varied_or_masked(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^data\.augment: rows of tokens, tags cannot be varied"):
        written(tmp_path, [tagged("a", "b")], TAGGED, augment={"delete": 0.5})
    with pytest.raises(RecipeError, match=r"^data\.clean\.pii: this task's rows cannot be masked"):
        written(tmp_path, [tagged("a", "b")], TAGGED, clean={"pii": "mask"})


def test_rows_that_have_a_text_of_their_own_are_varied_in_it(tmp_path: Path) -> None:
    row = {"text": " ".join(f"w{number}" for number in range(30)), "positive": "same thing"}
    parts, story = written(tmp_path, [row], PAIRS, augment={"delete": 0.3})
    assert story["augmented"] == 1 and parts["train"][0] == row
    assert parts["train"][1]["text"] != row["text"] and parts["train"][1]["positive"] == row["positive"]
    assert story["splits"]["train"]["chars"] == sum(len(PAIRS.with_text(Row(row, "")).text) for row in parts["train"])


def test_a_missing_column_names_file_line_and_field(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^rows\.jsonl line 2: column 'tags' is missing; .* Map another name with data\.columns\.tags$"
    ):
        written(tmp_path, [tagged("a"), {"tokens": ["b"]}], TAGGED)


# Answers in a text ----------------------------------------------------------------------------------------------------


def test_moved_answers_are_said_in_the_story(tmp_path: Path) -> None:
    asked = {"id": "q1", "question": "who?", "answers": [{"text": "Ann", "answer_start": 0}]}
    (tmp_path / "a.json").write_text(
        json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "it was Ann", "qas": [asked]}]}]})
    )
    parts, story = written(tmp_path, [], SPANS, sources=["a.json"])
    assert parts["train"][0]["answers"] == {"text": ["Ann"], "answer_start": [7]}
    assert any(warning.startswith("a.json: 1 answer was not at the given place") for warning in story["warnings"])


def test_labels_of_every_kind_have_names() -> None:
    assert label_names(["a", 1, 2.0, True]) == ["a", "1", "2", "true"] and label_names(0.5) == ["0.5"]

"""Rows inside JSON, SQuAD and CoNLL files, and how every kind survives being written and read again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.formats import json_rows, table_rows, tagged_rows
from formary.data.source import Source, read
from formary.errors import DataError

quick = settings(max_examples=60, deadline=None)
CONTEXT = "Ann met Bob. Later Bob met Ann, and Bob left."


def squad(*questions: dict[str, Any], context: str = CONTEXT) -> str:
    return json.dumps(
        {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": context, "qas": questions}]}]}
    )


def question(answer: Any, start: Any, **others: Any) -> dict[str, Any]:
    return {"id": "q1", "question": "who?", "answers": [{"text": answer, "answer_start": start}], **others}


def rows_of(text: str) -> list[dict[str, Any]]:
    return [values for values, _ in json_rows(text, "a.json", [])]


def sentences(text: str) -> list[dict[str, Any]]:
    return [values for values, _ in tagged_rows(text.split("\n"), "a.conll")]


# JSON ---------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(
    st.dictionaries(st.text(max_size=4).filter(lambda name: name not in ("data", "paragraphs")), JSON, max_size=4),
    min_size=1,
    max_size=5,
)


@quick
@given(OBJECTS, st.sampled_from([None, 2]))
def test_a_list_and_a_list_under_data_give_the_objects_in_them(rows: list[dict[str, Any]], indent: int | None) -> None:
    assert rows_of(json.dumps(rows, indent=indent)) == rows
    assert rows_of(json.dumps({"version": 1, "data": rows}, indent=indent)) == rows


def test_one_object_a_line_is_read_from_a_json_file_and_counted_by_lines() -> None:
    text = '{"a": 1}\n\n{"a": [2, {"b": null}]}\n'
    assert list(json_rows(text, "a.json", [])) == [
        ({"a": 1}, "a.json line 1"),
        ({"a": [2, {"b": None}]}, "a.json line 3"),
    ]
    with pytest.raises(DataError, match=r"^a\.json line 2: not a row of JSON"):
        rows_of('{"a": 1}\n{"a": \n')


@pytest.mark.parametrize(
    "text, message",
    [
        ('[\n{"a": 1},\n{"a": }\n]', r"^a\.json line 3: not JSON"),
        ("[" * 100_000, r"^a\.json: not JSON"),
        ("3", r"^a\.json: holds one JSON number; rows are a list of objects"),
        ('[{"a": 1}, "b"]', r"^a\.json entry 2: a row is an object"),
        ('{"data": [1]}', r"^a\.json entry 1: a row is an object"),
        ('[{"paragraphs": [{"context": "x"}]}]', r"^a\.json entry 1: a paragraph has no list of questions"),
        (squad({"id": "q7", "question": None}), r"^a\.json question q7: its question or its paragraph's context"),
        (squad(question("", 0)), r"^a\.json question q1: the answer '' is not a text"),
        (squad(question("Cid", 0)), r"^a\.json question q1: the answer 'Cid' is not in its context"),
    ],
)
def test_json_that_holds_no_rows_says_where(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(text)


def test_half_a_character_in_a_json_file_becomes_a_replacement_character() -> None:
    assert rows_of('[{"a": ["cut \\ud83d"]}]') == [{"a": ["cut \ufffd"]}]


# SQuAD --------------------------------------------------------------------------------------------------------------


def test_squads_questions_become_rows_with_the_columns_of_the_datasets_library() -> None:
    assert rows_of(squad(question("Bob", 8))) == [
        {
            "id": "q1",
            "title": "T",
            "question": "who?",
            "context": CONTEXT,
            "answers": {"text": ["Bob"], "answer_start": [8]},
        }
    ]


@pytest.mark.parametrize(
    "impossible",
    [
        {"answers": [], "is_impossible": True},
        {"answers": [], "is_impossible": True, "plausible_answers": [{"text": "Bob", "answer_start": 8}]},
        {"answers": None},
    ],
)
def test_an_unanswerable_question_has_empty_lists(impossible: dict[str, Any]) -> None:
    (row,) = rows_of(squad({"id": "q1", "question": "why?", **impossible}))
    assert row["answers"] == {"text": [], "answer_start": []}


@pytest.mark.parametrize(
    "given, nearest", [(7, 8), (9, 8), (17, 19), (20, 19), (40, 36), (-1, 8), (999, 36), (None, 8)]
)
def test_an_answer_that_is_not_at_its_offset_moves_to_the_nearest_place_that_holds_it(given: Any, nearest: int) -> None:
    moved: list[str] = []
    ((row, _),) = json_rows(squad(question("Bob", given)), "a.json", moved)
    assert row["answers"] == {"text": ["Bob"], "answer_start": [nearest]} and moved == ["a.json question q1"]


@quick
@given(st.text("ab ", min_size=1, max_size=30), st.data())
def test_an_answer_is_found_at_the_place_that_is_given(context: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(context) - 1))
    answer = context[start : data.draw(st.integers(start + 1, len(context)))]
    if answer.strip():
        moved: list[str] = []
        ((row, _),) = json_rows(squad(question(answer, start), context=context), "a.json", moved)
        assert row["answers"]["answer_start"] == [start] and not moved


def test_moved_answers_are_counted_for_the_story(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(squad(question("Bob", 8), question("Bob", 9), question("Ann", 1)))
    source = Source(["a.json"], base=tmp_path, required=("question", "context", "answers"))
    assert len(list(source)) == 3
    (note,) = source.notes()
    assert note.startswith("a.json: 2 answers were not at the given place") and "a.json question q1" in note


# Words and tags -----------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=6).filter(
    lambda word: not word.startswith("-DOCSTART-")
)


@quick
@given(
    st.lists(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), max_size=4),
    st.sampled_from([" ", "\t", "\tX\t"]),
)
def test_words_and_tags_are_read_as_they_were_written(written: list[list[tuple[str, str]]], between: str) -> None:
    text = "\n\n".join("\n".join(between.join(pair) for pair in sentence) for sentence in written)
    assert [list(zip(row["tokens"], row["tags"])) for row in sentences(text)] == written


def test_comments_stand_before_a_sentence_and_a_hash_can_be_a_word() -> None:
    assert sentences("# id 17 domain=en\n# sent_id = 3\n# O\n#tag O\n\n# O\n") == [
        {"tokens": ["#", "#tag"], "tags": ["O", "O"]},
        {"tokens": ["#"], "tags": ["O"]},
    ]


def test_a_universal_dependencies_treebank_gives_words_and_parts_of_speech() -> None:
    def line(number: str, word: str, tag: str) -> str:
        return "\t".join([number, word, word.lower(), tag, "_", "_", "0", "root", "_", "_"])

    text = "\n".join(
        [
            "# newdoc",
            "# any words",
            line("1-2", "Zum", "_"),
            line("1", "Zu", "ADP"),
            line("2", "dem", "DET"),
            line("2.1", "e", "X"),
        ]
    )
    assert sentences(text) == [{"tokens": ["Zu", "dem"], "tags": ["ADP", "DET"]}]


@pytest.mark.parametrize("line", ["word", "word\t", "\tO", "word\tO\t"])
def test_a_line_without_a_word_or_a_tag_names_file_and_line(line: str) -> None:
    with pytest.raises(DataError, match=r"^a\.conll line 4: a word and its tag are needed"):
        sentences(f"Ann B-PER\n\n# id x\n{line}\n")


def test_the_place_of_a_sentence_is_its_first_word() -> None:
    text = "-DOCSTART- O\n\n\n# id 1\nAnn O\nran O\n  \nBob O"
    assert [place for _, place in tagged_rows(text.split("\n"), "a.bio")] == ["a.bio line 5", "a.bio line 8"]


@pytest.mark.parametrize("kind", ["conll", "conllu", "bio", "iob", "json"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_each_of_them_is_read_compressed_or_not_and_found_in_a_folder(
    kind: str, compression: str, tmp_path: Path
) -> None:
    content = b"Ann\tB\nran\tO\n" if kind != "json" else b'[{"tokens": ["Ann", "ran"], "tags": ["B", "O"]}]'
    packed = {"": content, ".gz": gzip.compress(content), ".zst": zstandard.compress(content)}[compression]
    (tmp_path / f"a.{kind}{compression}").write_bytes(packed)
    source = Source(["."], base=tmp_path, required=("tokens", "tags"))
    assert [row.values for row in source] == [{"tokens": ["Ann", "ran"], "tags": ["B", "O"]}]
    assert source.bytes_done == source.bytes_total == len(packed)


# Tables -------------------------------------------------------------------------------------------------------------


def test_a_tsv_file_is_separated_by_tabs_whatever_else_its_header_holds(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text, or so; a|b\tlabel\none, two\tx\n")
    (row,) = read(["a.tsv"], base=tmp_path, columns={"text": "text, or so; a|b"})
    assert row.values == {"text": "one, two", "label": "x"}
    (tmp_path / "b.tsv").write_text("text\none, two\n")
    assert [row.values for row in read(["b.tsv"], base=tmp_path)] == [{"text": "one, two"}]


def test_an_empty_table_has_no_rows() -> None:
    assert list(table_rows([], "a.csv")) == [] and list(table_rows(["text"], "a.csv")) == []


# Columns ------------------------------------------------------------------------------------------------------------


def test_columns_can_change_places(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"source": "en", "target": "fr", "id": 1}\n')
    (row,) = read(
        ["a.jsonl"], base=tmp_path, columns={"source": "target", "target": "source"}, required=("source", "target")
    )
    assert row.values == {"source": "fr", "target": "en", "id": 1}


@pytest.mark.parametrize("missing", ["question", "context", "answers"])
def test_each_missing_column_names_file_line_and_the_field_to_map(missing: str, tmp_path: Path) -> None:
    row = {"question": "q", "context": "c", "answers": []}
    del row[missing]
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(
        DataError,
        match=rf"^a\.jsonl line 2: column '{missing}' is missing; .* Map another name with data\.columns\.{missing}$",
    ):
        list(read(["a.jsonl"], base=tmp_path, required=("question", "context", "answers")))

"""Reading files into rows: every kind of file, every way a file can be wrong, and documents cut from plain text."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from formary.data import cutting
from formary.data.cutting import PIECE_BYTES, split_text
from formary.data.source import Source, expand, fingerprint, read
from formary.errors import DataError, MissingExtra, RecipeError

ROWS = [{"text": "Call me Ishmael.", "label": "a"}, {"text": "多年以后", "label": "b"}]
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def texts(sources: str | list[str], base: Path, **options: Any) -> list[str]:
    named = [sources] if isinstance(sources, str) else sources
    return [row.values["text"] for row in read(named, base=base, **options)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table_as(kind: str) -> bytes:
    if kind == "jsonl":
        return jsonl(ROWS)
    if kind == "csv":
        return "text,label\nCall me Ishmael.,a\n多年以后,b\n".encode()
    if kind == "tsv":
        return "text\tlabel\nCall me Ishmael.\ta\n多年以后\tb\n".encode()
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


# Kinds of files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_table_gives_the_same_rows_compressed_or_not(kind: str, compression: str, tmp_path: Path) -> None:
    content = table_as(kind)
    packed = {"": content, ".gz": gzip.compress(content), ".zst": zstandard.compress(content)}[compression]
    (tmp_path / f"rows.{kind}{compression}").write_bytes(packed)
    rows = list(read([f"rows.{kind}{compression}"], base=tmp_path))
    assert [row.values for row in rows] == ROWS
    assert rows[1].origin.startswith(f"rows.{kind}{compression} ")


def test_compressed_text_of_several_gz_members_and_zst_frames_is_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"three ") + zstandard.compress(b"four"))
    assert texts(["a.txt.gz", "b.txt.zst"], tmp_path) == ["one two", "three four"]


def test_a_folder_gives_its_data_files_sorted_without_hidden_ones_and_readme(tmp_path: Path) -> None:
    for name in ("b.txt", "deep/a.txt", ".hidden.txt", "README.md", "notes.pdf", "c.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(b"c") if name.endswith("gz") else name.encode())
    assert [path.relative_to(tmp_path).as_posix() for path in expand(["."], tmp_path)] == [
        "b.txt",
        "c.txt.gz",
        "deep/a.txt",
    ]


def test_a_glob_descends_and_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.py").write_text("print(1)")
    (tmp_path / "b.py").write_text("print(2)")
    assert texts(["b.py", "**/*.py"], tmp_path) == ["print(2)", "print(1)"]


def test_a_datasets_folder_without_the_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "saved" / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r'saved.*pip install "formary\[datasets\]"'):
        texts("saved", tmp_path)


def test_a_datasets_folder_is_read_and_one_of_several_parts_has_to_be_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "saved"))
    assert [row.values for row in read(["saved"], base=tmp_path)] == ROWS
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "parts"))
    with pytest.raises(
        DataError, match=r"^parts: holds the parts test, train; name the part to read, e\.g\. parts/test"
    ):
        texts("parts", tmp_path)
    assert len(texts("parts/train", tmp_path)) == 2


def test_columns_are_mapped_and_max_rows_stops_over_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"body": "x", "n": 1}, {"body": "y", "n": 2}]))
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"body": "z"}]))
    rows = list(read(["a.jsonl", "b.jsonl"], columns={"text": "body"}, base=tmp_path))
    assert [row.values for row in rows] == [{"n": 1, "text": "x"}, {"n": 2, "text": "y"}, {"text": "z"}]
    assert texts(["a.jsonl", "b.jsonl"], tmp_path, columns={"text": "body"}, max_rows=2) == ["x", "y"]


def test_a_null_text_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": null}\n{"text": "x"}\n')
    assert texts("a.jsonl", tmp_path) == ["", "x"]


def test_half_an_emoji_in_json_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "cut \\ud83d", "more": ["\\udc00"]}\n{"text": "whole \\ud83d\\ude00"}\n'
    )
    first, second = read(["a.jsonl"], base=tmp_path)
    assert first.values == {"text": "cut \ufffd", "more": ["\ufffd"]}
    assert second.values["text"] == "whole 😀"


def test_a_byte_order_mark_and_windows_newlines_disappear(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert texts("a.txt", tmp_path) == ["one\ntwo\nthree"]


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "cp1252"])
def test_other_encodings_are_read_when_named(encoding: str, tmp_path: Path) -> None:
    text = "café" if encoding == "cp1252" else "多年 café"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "a.jsonl").write_bytes(f'{{"text": "{text}"}}\n'.encode(encoding))
    assert texts(["a.txt", "a.jsonl"], tmp_path, encoding=encoding) == [text, text]


def test_progress_counts_every_byte_of_every_kind_of_file(tmp_path: Path) -> None:
    for kind in ("jsonl", "csv", "parquet"):
        (tmp_path / f"a.{kind}").write_bytes(table_as(kind))
        (tmp_path / f"b.{kind}.gz").write_bytes(gzip.compress(table_as(kind)))
    rows = Source(["."], base=tmp_path)
    seen = [rows.bytes_done for _ in rows]
    assert seen == sorted(seen)
    assert rows.bytes_done == rows.bytes_total == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert rows.rows_by_file == {name: 2 for name in rows.rows_by_file} and rows.rows == 12


# Files that cannot be used ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_an_empty_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"^{name}: empty, there are no rows"):
        texts(name, tmp_path)


def test_an_empty_file_among_others_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"words")
    assert texts("*.txt", tmp_path) == ["words"]


@pytest.mark.parametrize(
    "wanted, message",
    [("*.jsonl", "no files match"), ("gone.txt", "no such file or folder"), ("bare", "no files of a known kind")],
)
def test_no_files_matching_names_the_source(wanted: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=rf"^{re.escape(wanted)}: .*{message}"):
        texts(wanted, tmp_path)


def test_a_wrong_encoding_names_file_line_and_byte_beyond_the_first_chunk(tmp_path: Path) -> None:
    good = "naïve line\n".encode() * 300_000  # several chunks of a megabyte
    (tmp_path / "a.txt").write_bytes(good + b"caf\xe9 noir\n")
    with pytest.raises(
        DataError, match=rf"^a\.txt line 300001: byte {len(good) + 3} \(0xe9\) is not utf-8; set data\.encoding"
    ):
        texts("a.txt", tmp_path)


def test_text_that_ends_within_a_character_is_a_wrong_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "' + "年".encode()[:2])
    with pytest.raises(DataError, match=r"^a\.jsonl line 2: byte 24 "):
        texts("a.jsonl", tmp_path)


def test_an_unknown_encoding_is_named() -> None:
    with pytest.raises(RecipeError, match=r"data\.encoding: 'utf9' is not a known text encoding"):
        read(["x"], encoding="utf9")


def test_a_binary_file_is_not_taken_for_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc\0def")
    with pytest.raises(DataError, match=r"^a\.bin: byte 3 is zero, so this is not a text file"):
        texts("a.bin", tmp_path)


def test_a_document_format_we_do_not_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"a\.pdf: \.pdf files cannot be read"):
        texts("a.pdf", tmp_path)


@pytest.mark.parametrize("line", ["{not json", '["text"]', '"text"', "[" * 100_000])
def test_a_row_that_is_not_json_names_file_and_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"^a\.jsonl line 3: not a row of JSON"):
        texts("a.jsonl", tmp_path)


@pytest.mark.parametrize(
    "content",
    ['[{"text": "x"}, {"text": "y"}]', '{"data": [{"text": "x"}, {"text": "y"}]}', '{"text": "x"}\n{"text": "y"}\n'],
)
def test_a_json_file_is_an_array_or_one_object_a_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert texts("a.json", tmp_path) == ["x", "y"]


def test_an_array_in_a_jsonl_file_says_how_to_turn_it_into_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('[\n{"text": "x"}]')
    with pytest.raises(DataError, match=r"a\.jsonl line 1: .*one object a line"):
        texts("a.jsonl", tmp_path)


@pytest.mark.parametrize("kind, where", [("jsonl", "line 1"), ("csv", "line 2"), ("parquet", "row 1")])
def test_a_missing_column_names_place_and_the_columns_there_are(kind: str, where: str, tmp_path: Path) -> None:
    rows = [{"body": "x", "id": "1"}]
    content = {"jsonl": jsonl(rows), "csv": b"body,id\nx,1\n"}.get(kind)
    if content is None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    else:
        (tmp_path / f"a.{kind}").write_bytes(content)
    expected = rf"^a\.{kind} {where}: column 'text' is missing; this row has columns body, id\. Map another name with data\.columns\.text"
    with pytest.raises(DataError, match=expected):
        texts(f"a.{kind}", tmp_path)
    with pytest.raises(
        DataError, match=r"column 'story' is missing \(data\.columns\.text names it\); this row has columns body, id"
    ):
        texts(f"a.{kind}", tmp_path, columns={"text": "story"})


@pytest.mark.parametrize("value, kind", [("12.5", "number"), ("true", "true/false value"), ("[]", "list")])
def test_text_that_is_not_a_string_names_place_and_value(value: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{{"text": {value}}}\n')
    with pytest.raises(DataError, match=rf"^a\.jsonl line 2: column 'text' holds a {kind} "):
        texts("a.jsonl", tmp_path)


def test_a_plain_text_file_cannot_give_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"^a\.txt: a plain text file has only the column 'text'"):
        texts("a.txt", tmp_path, required=("text", "label"))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_compressed_file_that_is_cut_off_is_an_error(suffix: str, kind: str, tmp_path: Path) -> None:
    content = jsonl([{"text": str(number) * 50} for number in range(3000)])
    packed = gzip.compress(content) if suffix == "gz" else zstandard.compress(content)
    (tmp_path / f"a.{kind}.{suffix}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=rf"^a\.{kind}\.{suffix}: the {suffix} file is cut off"):
        texts(f"a.{kind}.{suffix}", tmp_path)


@pytest.mark.parametrize("suffix", ["gz", "zst", "parquet"])
def test_a_file_that_is_not_what_its_name_says_is_an_error(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{suffix}").write_text("just words, no such format at all")
    with pytest.raises(DataError, match=rf"^a\.{suffix}: "):
        texts(f"a.{suffix}", tmp_path)


def test_a_csv_row_of_another_length_names_its_line_behind_a_field_of_two_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,id\n"two\nlines",1\nx,2,3\n')
    with pytest.raises(DataError, match=r"^a\.csv line 4: 3 fields, but the header \(line 1\) has 2"):
        texts("a.csv", tmp_path)


def test_an_open_quote_in_csv_names_the_line_where_its_row_begins(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,id\nx,1\n"open,2\nmore,3\n')
    with pytest.raises(DataError, match=r"^a\.csv line 3: not valid CSV"):
        texts("a.csv", tmp_path)


# Documents of plain text --------------------------------------------------------------------------------------------


def test_a_file_becomes_documents_as_the_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Preface\n\nI. One\nline\n\n \t\n  indented\nII. Two\n")
    assert texts("a.txt", tmp_path) == ["Preface\n\nI. One\nline\n\n \t\n  indented\nII. Two\n"]
    assert texts("a.txt", tmp_path, documents="line") == ["Preface", "I. One", "line", "  indented", "II. Two"]
    assert texts("a.txt", tmp_path, documents="paragraph") == ["Preface", "I. One\nline", "  indented\nII. Two"]
    assert texts("a.txt", tmp_path, documents=r"[IVX]+\. ") == ["Preface", "I. One\nline\n\n \t\n  indented", "II. Two"]


def test_a_regular_expression_that_is_not_valid_names_the_field() -> None:
    with pytest.raises(RecipeError, match=r"data\.documents: '\(' is neither file, line or paragraph"):
        list(split_text(["x"], "("))


PROSE = st.text(st.sampled_from("ab \n\n\t#é年"), max_size=300)


def in_chunks(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@quick
@given(PROSE, st.integers(1, 50), st.sampled_from(["file", "line", "paragraph", "#+ ", "a|b"]))
def test_documents_do_not_depend_on_how_the_text_arrives(text: str, size: int, documents: str) -> None:
    whole = list(split_text([text], documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_LOOKAHEAD", 12)  # the texts are short; a look-ahead of 4096 would hide the boundaries
        assert list(split_text(in_chunks(text, size), documents)) == whole


@quick
@given(PROSE, st.integers(1, 50), st.integers(4, 40), st.sampled_from(["file", "line", "paragraph", "#+ "]))
@example("aaaaa\n\naaaaaaaaaaaa", 19, 4, "paragraph")  # one that ends within the buffer
def test_long_documents_are_cut_into_pieces_and_no_visible_character_is_lost(
    text: str, size: int, limit: int, documents: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "PIECE_BYTES", limit)
        patch.setattr(cutting, "_LOOKAHEAD", 12)
        pieces = list(split_text(in_chunks(text, size), documents))
    assert all(len(piece.encode()) <= limit for piece in pieces)
    if documents == "file":
        assert "".join(pieces) == text
    assert [c for c in "".join(pieces) if not c.isspace()] == [c for c in text if not c.isspace()]


def test_lines_and_paragraphs_are_those_of_a_plain_split() -> None:
    text = "one\n\ntwo\nthree\n\n\n\nfour" * 50
    assert list(split_text(in_chunks(text, 7), "line")) == [line for line in text.split("\n") if line.strip()]
    assert list(split_text(in_chunks(text, 7), "paragraph")) == [
        part for part in re.split(r"\n\n+", text) if part.strip()
    ]


def test_a_huge_file_is_cut_at_paragraph_ends_in_memory_for_a_few_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PIECE_BYTES == 8 * 2**20
    monkeypatch.setattr(cutting, "PIECE_BYTES", 2**20)
    paragraph = "word " * 2000 + "\n\n"
    (tmp_path / "a.txt").write_text(paragraph * 3000)  # 30 MB
    tracemalloc.start()
    sizes = []
    for row in read(["a.txt"], base=tmp_path):
        assert row.values["text"].endswith("\n\n")
        sizes.append(len(row.values["text"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == 3000 * len(paragraph) and max(sizes) <= 2**20 and min(sizes[:-1]) > 2**20 - len(paragraph)
    assert peak < 10 * 2**20


def test_jsonl_streams_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "x" * 1000}]) * 20_000)
    tracemalloc.start()
    assert sum(1 for _ in read(["a.jsonl"], base=tmp_path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


# Parsers against their own writers ----------------------------------------------------------------------------------

VALUES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=30)


@quick
@given(
    rows=st.lists(st.fixed_dictionaries({"text": VALUES, "other": VALUES}), min_size=1, max_size=8),
    ascii_only=st.booleans(),
)
def test_jsonl_and_csv_give_back_what_was_written(rows: list[dict[str, str]], ascii_only: bool, tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    assert [row.values for row in read(["a.jsonl"], base=tmp_path)] == rows
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "other"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    assert [row.values for row in read(["a.csv"], base=tmp_path)] == rows


@quick
@given(
    content=st.binary(max_size=200),
    kind=st.sampled_from(["txt", "jsonl", "json", "csv", "tsv", "parquet", "txt.gz", "jsonl.zst"]),
)
def test_any_bytes_give_rows_or_an_error_that_names_the_file(content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{kind}").write_bytes(content)
    try:
        assert all(isinstance(text, str) for text in texts(f"a.{kind}", tmp_path))
    except DataError as error:
        assert str(error).startswith(f"a.{kind}")


def test_a_fingerprint_changes_with_content_name_and_order(tmp_path: Path) -> None:
    for name, content in (("a", "x"), ("b", "y")):
        (tmp_path / name).write_text(content)
    paths = [tmp_path / "a", tmp_path / "b"]
    before = fingerprint(paths)
    assert before == fingerprint(paths) and len(before) == 32
    assert before != fingerprint(paths[::-1])
    (tmp_path / "b").write_text("z")
    assert before != fingerprint(paths)
    (tmp_path / "b").write_text("y")
    (tmp_path / "b").rename(tmp_path / "c")
    assert before != fingerprint([tmp_path / "a", tmp_path / "c"])


@pytest.mark.parametrize(("column", "labels"), [("@file", {"good", "bad"}), ("@folder", {"shop"})])
def test_the_name_of_a_file_or_folder_is_the_label_of_its_texts(tmp_path: Path, column: str, labels: set[str]) -> None:
    (tmp_path / "shop").mkdir()
    for name in ("good", "bad"):
        (tmp_path / "shop" / f"{name}.txt").write_text(f"one {name}\ntwo {name}\n", encoding="utf-8")
    found = list(read(["shop"], columns={"label": column}, documents="line", required=("text", "label"), base=tmp_path))
    assert len(found) == 4 and {row.values["label"] for row in found} == labels
    assert all(column != "@file" or row.values["label"] in row.values["text"] for row in found)


def test_the_name_of_a_file_is_a_column_of_rows_too(tmp_path: Path) -> None:
    (tmp_path / "pos.csv").write_text("text,stars\nfine,5\n", encoding="utf-8")
    (row,) = read(["pos.csv"], columns={"label": "@file"}, required=("text", "label"), base=tmp_path)
    assert row.values == {"text": "fine", "stars": "5", "label": "pos"}


def test_texts_without_a_label_say_how_files_can_give_it(tmp_path: Path) -> None:
    (tmp_path / "pos.txt").write_text("fine\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"data.columns: \{label: '@file'\}"):
        list(read(["pos.txt"], documents="line", required=("text", "label"), base=tmp_path))

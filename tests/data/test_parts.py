"""Many files, done one by one by any number of processes and with interruptions, give what one pass gives."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data import parts, shard_parts
from formary.data.documents import prepare_parts, write_documents
from formary.data.files import expand
from formary.data.records import RowForm
from formary.data.shards import TokenShards, write_tokens
from formary.data.tokenizer import train
from formary.errors import DataError
from formary.recipe import schema

LABELLED = RowForm(columns=("text", "label"))


def words(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(["one", "two", "three", "four", "café", "cafÃ©", "中文"], 9)) for _ in range(count)]


@pytest.fixture
def spark(tmp_path):
    """A folder as Spark and datatrove write it: parts of several kinds, an empty one, marks and checksums between them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [
        {"text": text, "label": len(text) % 2, "id": number} for number, text in enumerate(words(0, 40) + words(1, 40))
    ]
    rows += [{"text": rows[3]["text"], "label": rows[3]["label"], "id": 80}, {"text": "x", "label": 1, "id": 81}]
    rows += [{"text": rows[5]["text"], "label": 1 - rows[5]["label"], "id": 82}]  # says otherwise: a conflict
    for number in range(3):
        table = pyarrow.Table.from_pylist(rows[20 * number : 20 * number + 20])
        pyarrow.parquet.write_table(table, folder / f"part-{number:05d}-abc.snappy.parquet")
        (folder / f".part-{number:05d}-abc.snappy.parquet.crc").write_bytes(b"crc")
    (folder / "part-00003.json").write_text("".join(json.dumps(row) + "\n" for row in rows[60:70]))
    (folder / "part-00004.jsonl").write_text("")
    (folder / "part-00005.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[70:]))
    (folder / "_SUCCESS").write_text("")
    (folder / "_metadata.parquet").write_bytes(b"no rows")
    return folder


def data(spark, **fields):
    clean = {"min_chars": 3, "near_duplicates": 0.9, **fields.pop("clean", {})}
    return schema.Data(sources=[str(spark)], clean=clean, **fields)


def left_by(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("fields", [{}, {"split": {"by": "order"}}, {"validation": ["more.txt"], "documents": "line"}])
def test_parts_by_any_number_of_processes_give_what_one_pass_gives(spark, tmp_path, count, fields):
    (tmp_path / "more.txt").write_text("a first line\nanother line\n\nx\n" + words(0, 1)[0])
    form = RowForm() if "validation" in fields else LABELLED
    made = data(spark, **fields)
    write_documents(made, tmp_path / "whole", base=tmp_path, form=form)
    for rank in range(count):
        prepare_parts(
            made, tmp_path / "parted", base=tmp_path, form=form, share=lambda files, rank=rank: files[rank::count]
        )
    story = write_documents(made, tmp_path / "parted", base=tmp_path, form=form, from_parts=True)
    assert left_by(tmp_path / "parted") == left_by(tmp_path / "whole")
    assert story["rows_read"] >= 83 and sum(step["dropped"] for step in story["steps"]) >= 2


def test_a_killed_preparation_goes_on_with_the_files_that_are_left(spark, tmp_path, monkeypatch):
    made, folder, done = data(spark), tmp_path / "documents", []
    real = parts._write

    def dies_at_the_fourth(data, part, path, *rest):
        done.append(path.name)
        if len(done) == 4:
            raise KeyboardInterrupt
        real(data, part, path, *rest)

    monkeypatch.setattr(parts, "_write", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        prepare_parts(made, folder, base=tmp_path, form=LABELLED)
    with pytest.raises(DataError, match="prepare the data again"):
        write_documents(made, folder, base=tmp_path, form=LABELLED, from_parts=True)
    first, done[:] = list(done), ["", "", "", ""]
    prepare_parts(made, folder, base=tmp_path, form=LABELLED)
    assert done[4:] == [first[3], "part-00004.jsonl", "part-00005.jsonl"]
    write_documents(made, folder, base=tmp_path, form=LABELLED, from_parts=True)
    write_documents(made, tmp_path / "whole", base=tmp_path, form=LABELLED)
    assert left_by(folder) == left_by(tmp_path / "whole")


def test_a_changed_file_or_other_cleaning_is_done_again_and_the_rest_is_not(spark, tmp_path, monkeypatch):
    done = []
    real = parts._write
    monkeypatch.setattr(
        parts, "_write", lambda data, part, path, *rest: (done.append(path.name), real(data, part, path, *rest))
    )
    prepare_parts(data(spark), tmp_path / "d", base=tmp_path, form=LABELLED)
    assert len(done) == 6
    (spark / "part-00004.jsonl").write_text(json.dumps({"text": "a new row", "label": 1}) + "\n")
    prepare_parts(data(spark), tmp_path / "d", base=tmp_path, form=LABELLED)
    assert done[6:] == ["part-00004.jsonl"]
    prepare_parts(data(spark, clean={"repair": False}), tmp_path / "d", base=tmp_path, form=LABELLED)
    assert len(done) == 13


def test_only_several_files_are_done_in_parts(spark, tmp_path):
    several, one = data(spark), schema.Data(sources=[str(spark / "part-00003.json")])
    assert parts.wanted(several, tmp_path, processes=2) and not parts.wanted(several, tmp_path, processes=1)
    assert not parts.wanted(one, tmp_path, processes=2)
    assert not parts.wanted(data(spark, max_rows=5), tmp_path, processes=2)


def test_marks_and_checksums_are_no_data_and_an_unfinished_folder_is_refused(spark):
    assert [path.name[:10] for path in expand([str(spark)])] == [f"part-0000{n}" for n in range(6)]
    (spark / "_temporary" / "0").mkdir(parents=True)
    (spark / "_temporary" / "0" / "part-9.jsonl").write_text("{}")
    assert len(expand([str(spark)])) == 6
    (spark / "_SUCCESS").unlink()
    with pytest.raises(DataError, match="Spark has not finished"):
        expand([str(spark)])


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_token_shards_made_in_parts_are_the_bytes_that_one_process_writes(tmp_path, monkeypatch, kind):
    texts = [text * (1 + number % 4) for number, text in enumerate(words(2, 300))]
    documents = tmp_path / "train.jsonl"
    documents.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    tokenizer = train(texts, schema.Tokenizer(kind=kind, vocab_size=300), task="causal_lm")
    how = {"words": "tokenizer", "end_of_document": True}
    write_tokens(documents, tmp_path / "whole", tokenizer, **how)
    monkeypatch.setattr(shard_parts, "PART_BYTES", 5000)
    assert len(shard_parts.stretches(documents)) > 4
    folder = tmp_path / "parted"
    for rank in range(3):
        shard_parts.write_token_parts(documents, folder, tokenizer, share=lambda some, rank=rank: some[rank::3], **how)
    monkeypatch.setattr(shard_parts, "write_tokens", None)  # a second go finds all of them done
    shard_parts.write_token_parts(documents, folder, tokenizer, share=list, **how)
    shard_parts.join_token_parts(documents, folder)
    assert left_by(folder) == left_by(tmp_path / "whole")
    assert TokenShards.open(folder, verify=True).documents == 300
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["parted", "train.jsonl", "whole"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 60))
def test_stretches_cover_a_file_and_end_with_lines(tmp_path_factory, lengths, each):
    file = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    file.write_bytes(b"".join(b"x" * length + b"\n" for length in lengths))
    found = shard_parts.stretches(file, each)
    content = file.read_bytes()
    assert b"".join(content[begin:end] for begin, end in found) == content
    assert all(content[:end].endswith(b"\n") for _, end in found if end) and len(found) >= 1

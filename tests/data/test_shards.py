"""Token shards: what is written is what was encoded, durably, whatever the sizes; words begin where they should.

Documents are made here; the tokenizers are small and trained on them.
"""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data import shards as shards_module
from formary.data import tokenizer as tokenizers
from formary.data.shards import TokenShards, read_texts, write_tokens
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError, StorageError
from formary.recipe import schema

TEXTS = [
    "The captain forgot the lantern. It's winter, don't ask.\n\nNobody painted the window of the garden!",
    "白日依山尽,黄河入海流。\n欲穷千里目,更上一层楼。hello世界",
    "a",
    "The lantern, the captain, the garden: 1984 and gpt2.",
] * 3


@cache
def trained(kind: str, task: str = "causal_lm") -> Tokenizer:
    size = {"bpe": 300, "wordpiece": 120, "unigram": 70}.get(kind, 4096)
    return tokenizers.train(TEXTS, schema.Tokenizer(kind=kind, vocab_size=size), task=task)


def written(folder: Path, texts: list[str], tokenizer: Tokenizer, **options) -> TokenShards:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    write_tokens(rows, folder / "tokens", tokenizer, **options)
    return TokenShards.open(folder / "tokens", verify=True)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "characters", "bytes"])
def test_documents_bytes_and_boundaries_are_kept(kind, tmp_path):
    made = trained(kind)
    shards = written(tmp_path, TEXTS, made)
    assert shards.documents == len(TEXTS)
    assert shards.tokens == shards.document_starts[-1] == len(shards.array)
    for index, text in enumerate(TEXTS):
        assert shards.document(index).tolist() == [*made.encode(text), made.eos_id]
    assert shards.document_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert shards.window(5, 7).tolist() == shards.array[5:12].tolist()
    assert shards.begin_id == made.eos_id
    assert shards.vocab_size == made.vocab_size


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["the ", "lantern", "\n", " ", "白日", "🙂", "x y"]), max_size=30).map("".join),
        max_size=8,
    ),
    batch=st.integers(1, 60),
    piece=st.integers(1, 30),
    kind=st.sampled_from(["bpe", "wordpiece", "characters"]),
)
def test_the_sizes_of_batches_and_pieces_change_nothing(tmp_path_factory, texts, batch, piece, kind):
    made = trained(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "_BATCH_CHARS", batch)
        patch.setattr(shards_module, "_PIECE_CHARS", piece)
        shards = written(tmp_path_factory.mktemp("shards"), texts, made, words="tokenizer")
    kept = [text for text in texts if text]
    assert [shards.document(i).tolist() for i in range(shards.documents)] == [
        [*made.encode(text), made.eos_id] for text in kept
    ]
    assert shards.document_bytes.tolist() == [len(text.encode()) for text in kept]
    assert len(shards.word_starts) == shards.tokens


def test_tasks_that_add_their_own_marks_get_documents_without_an_end(tmp_path):
    for task in ("masked_lm", "denoise"):
        made = trained("bpe", task)
        shards = written(tmp_path, TEXTS, made)
        assert shards.document(0).tolist() == made.encode(TEXTS[0])
        shards = written(tmp_path, TEXTS, made, end_of_document=True)
        end = made.sep_id if task == "masked_lm" else made.eos_id
        assert shards.document(0).tolist() == [*made.encode(TEXTS[0]), end]


def test_the_smaller_type_is_taken_where_it_suffices(tmp_path):
    assert written(tmp_path, TEXTS, trained("bpe")).array.dtype == np.uint16
    everything = "".join(map(chr, [*range(0x21, 0xD800), *range(0xE000, 0x11000), *range(0x20000, 0x20A00)]))
    large = tokenizers.train([everything], schema.Tokenizer(kind="characters"), task="causal_lm")
    shards = written(tmp_path, [everything], large)
    assert shards.array.dtype == np.uint32
    assert shards.document(0).max() > 1 << 16
    assert large.decode(shards.document(0)[:-1]) == everything


def test_the_document_of_each_position_is_found(tmp_path):
    shards = written(tmp_path, TEXTS, trained("bpe"))
    expected = np.repeat(np.arange(shards.documents), np.diff(shards.document_starts))
    assert shards.document_of(np.arange(shards.tokens)).tolist() == expected.tolist()


def test_an_empty_split_is_a_split_of_no_tokens(tmp_path):
    shards = written(tmp_path, [], trained("bpe"), words="tokenizer")
    assert (shards.tokens, shards.documents, shards.document_starts.tolist()) == (0, 0, [0])


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a\\ud800b"}\n\n{"text": "\\ud83d\\ude42"}\n')
    assert list(read_texts(rows)) == ["a\ufffdb", "🙂"]


def test_progress_is_told_in_bytes(tmp_path):
    told = []
    written(tmp_path, TEXTS, trained("bpe"), progress=told.append)
    assert told[-1] == sum(len(text.encode()) for text in TEXTS)


# --- where words begin ---


def words_of(shards: TokenShards, made: Tokenizer, index: int = 0) -> list[str]:
    begin, end = shards.document_starts[index : index + 2]
    cuts = [*np.flatnonzero(shards.word_starts[begin:end]), end - begin]
    assert cuts[0] == 0
    return [made.decode(shards.document(index)[a:b]).strip() for a, b in pairwise(cuts)]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "characters", "bytes"])
def test_words_begin_at_spaces_punctuation_and_chinese_characters(kind, tmp_path):
    made = trained(kind)
    text = "The captain, 1984\nhello 白日依hello 山gpt2!"
    shards = written(tmp_path, [text], made, words="tokenizer")
    found = [word for word in words_of(shards, made) if word]
    if kind == "wordpiece":  # says itself what it could not spell
        assert found[0] == "The"
        assert found[-2] == "!"
    else:
        expected = ["The", "captain", ",", "1984", "hello", "白", "日", "依", "hello", "山", "gpt2", "!"]
        assert found == [*expected, "<|endoftext|>"]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "characters"])
def test_jieba_keeps_chinese_words_whole(kind, tmp_path):
    pytest.importorskip("jieba")
    made = tokenizers.train(
        ["我来到北京清华大学。hello world"] * 3,
        schema.Tokenizer(kind=kind, vocab_size={"bpe": 262, "wordpiece": 34}.get(kind, 99)),
        task="causal_lm",
    )
    shards = written(tmp_path, ["我来到北京清华大学。hello world"], made, words="jieba")
    found = [word for word in words_of(shards, made) if word]
    expected = ["我", "来到", "北京", "清华大学", "。", "hello", "world", "<|endoftext|>"]
    assert [word.replace(" ", "") for word in found] == expected


# --- what goes wrong ---


def test_a_row_that_is_not_json_or_has_no_text_names_file_and_line(tmp_path):
    rows = tmp_path / "rows.jsonl"
    for bad, what in (("{oops", "is not JSON"), ('{"body": "x"}', "no text in column 'text'"), ("[1]", "no text")):
        rows.write_text('{"text": "fine"}\n' + bad + "\n")
        with pytest.raises(DataError, match=rf"rows\.jsonl line 2: .*{what}"):
            write_tokens(rows, tmp_path / "tokens", trained("bpe"))
        assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    with pytest.raises(DataError, match="cannot be read"):
        write_tokens(tmp_path / "nothing.jsonl", tmp_path / "tokens", trained("bpe"))


def test_a_full_disk_leaves_the_old_shards_and_nothing_half_written(tmp_path, monkeypatch):
    before = written(tmp_path, TEXTS, trained("bpe")).array.tolist()

    def full(self, name, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards_module._Files, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        write_tokens(tmp_path / "rows.jsonl", tmp_path / "tokens", trained("characters"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "tokens"]
    assert TokenShards.open(tmp_path / "tokens", verify=True).array.tolist() == before


def test_damaged_shards_are_noticed(tmp_path):
    written(tmp_path, TEXTS, trained("bpe"))
    file = tmp_path / "tokens" / "tokens.bin"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    TokenShards.open(tmp_path / "tokens")
    with pytest.raises(DataError, match=r"tokens\.bin: does not match its checksum"):
        TokenShards.open(tmp_path / "tokens", verify=True)
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"tokens\.bin: is missing or cut short"):
        TokenShards.open(tmp_path / "tokens")
    with pytest.raises(DataError, match="holds no token shards"):
        TokenShards.open(tmp_path)

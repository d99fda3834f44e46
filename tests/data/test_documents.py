"""write_documents: the three files and the story agree with the sources, and nothing half-written stays behind."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formary.data import documents
from formary.data.documents import read_documents, write_documents
from formary.errors import DataError, RecipeError, StorageError
from formary.recipe import schema

PARTS = ("train", "validation", "test")


def jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text(
        "".join(json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows), encoding="utf-8"
    )


def written(base: Path, progress: Any = None, **data: Any) -> tuple[dict[str, list[str]], dict[str, Any]]:
    story = write_documents(
        schema.Data(**{"sources": ["rows.jsonl"], **data}), base / "out", base=base, progress=progress
    )
    texts = {part: [row.values["text"] for row in read_documents(base / "out" / f"{part}.jsonl")] for part in PARTS}
    assert json.loads((base / "out" / "story.json").read_text(encoding="utf-8")) == story
    assert sorted(path.name for path in (base / "out").iterdir()) == [
        "story.json",
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]
    for part in PARTS:
        counted = {
            "rows": len(texts[part]),
            "chars": sum(map(len, texts[part])),
            "bytes": sum(len(text.encode()) for text in texts[part]),
        }
        assert story["splits"][part] == counted
    return texts, story


def prose(number: int, words: int = 60) -> str:
    return " ".join(f"w{(number * 7919 + place * place * 31) % 9973}" for place in range(words))


def test_every_row_that_stays_is_in_one_of_the_files_and_the_story_counts_the_rest(tmp_path: Path) -> None:
    rows = [f"row {number} 年" for number in range(300)]
    jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:10], "", " "])
    texts, story = written(tmp_path, split={"validation": 0.2, "test": 0.2})
    assert sorted(text for part in PARTS for text in texts[part]) == sorted(rows)
    assert story["rows_read"] == 312 and story["bytes_read"] == (tmp_path / "rows.jsonl").stat().st_size
    assert story["files"] == [{"file": "rows.jsonl", "for": "sources", "rows": 312}]
    dropped = {step["step"]: step["dropped"] for step in story["steps"] if step["dropped"]}
    assert dropped == {"length": 2, "duplicates": 10}
    assert story["duplicates_across_splits"]["exact"] == 0 and story["warnings"] == []


def test_text_stands_first_and_other_columns_are_kept(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [{"id": 1, "text": "x", "more": {"deep": [1.5, None, "年"]}}])
    write_documents(
        schema.Data(sources=["rows.jsonl"], split={"validation": 0, "test": 0}), tmp_path / "out", base=tmp_path
    )
    assert (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8") == (
        '{"text": "x", "id": 1, "more": {"deep": [1.5, null, "年"]}}\n'
    )


def test_more_rows_later_move_no_row(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(200)]
    jsonl(tmp_path / "rows.jsonl", rows)
    before, _ = written(tmp_path, split={"validation": 0.2, "test": 0.2})
    jsonl(tmp_path / "rows.jsonl", ["new", *rows, *(f"more {number}" for number in range(100))])
    after, _ = written(tmp_path, split={"validation": 0.2, "test": 0.2})
    assert all(set(before[part]) <= set(after[part]) for part in PARTS)


def test_groups_stay_together(tmp_path: Path) -> None:
    jsonl(
        tmp_path / "rows.jsonl",
        [{"text": f"{user} says {number}", "user": user} for user in range(40) for number in range(5)],
    )
    texts, _ = written(tmp_path, split={"validation": 0.3, "test": 0.3, "group": "user"})
    users = [{text.split()[0] for text in texts[part]} for part in PARTS]
    assert sum(map(len, users)) == 40 and all(users)


def test_one_text_by_order_is_cut_by_characters_like_nanogpts_ninety_ten(tmp_path: Path) -> None:
    text = "\n" + "To be, or not to be: that is the question.\n\n" * 100 + "end"
    (tmp_path / "play.txt").write_text(text)
    texts, story = written(tmp_path, sources=["play.txt"], split={"by": "order", "validation": 0.1, "test": 0})
    cut = int(len(text) * 0.9)
    assert texts == {"train": [text[:cut]], "validation": [text[cut:]], "test": []}
    assert story["rows_read"] == 1


def test_a_text_in_pieces_is_cut_by_characters_too_and_the_story_tells_of_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("formary.data.cutting.PIECE_BYTES", 1000)
    text = "".join(f"Paragraph {number} of a long text.\n\n" for number in range(200))
    (tmp_path / "play.txt").write_text(text)
    texts, story = written(tmp_path, sources=["play.txt"], split={"by": "order", "validation": 0.1, "test": 0.2})
    assert "".join(texts["train"]) == text[: int(len(text) * 0.7)]
    assert "".join(texts["test"]) == text[int(len(text) * 0.8) :]
    assert "".join(texts["train"] + texts["validation"] + texts["test"]) == text
    assert story["files"] == [{"file": "play.txt", "for": "sources", "rows": 7, "cut_into_pieces": 7}]


def test_rows_by_order_are_kept_whole(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(10)]
    jsonl(tmp_path / "rows.jsonl", rows)
    texts, _ = written(tmp_path, split={"by": "order", "validation": 0.2, "test": 0.1})
    assert texts == {"train": rows[:7], "validation": rows[7:9], "test": rows[9:]}


# Duplicates across splits -------------------------------------------------------------------------------------------


def test_training_rows_that_also_occur_in_validation_or_test_are_reported_and_removed(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ["only here", "In Both", "in test", "also here"])
    jsonl(tmp_path / "v.jsonl", ["in both", "v"])
    jsonl(tmp_path / "t.jsonl", ["t", "in  test", "v"])
    texts, story = written(tmp_path, validation=["v.jsonl"], test=["t.jsonl"])
    assert texts == {
        "train": ["only here", "also here"],
        "validation": ["in both", "v"],
        "test": ["t", "in  test", "v"],
    }
    assert story["duplicates_across_splits"] == {
        "exact": 2,
        "near": None,
        "validation_in_test": 1,
        "removed": 2,
        "examples": ["In Both", "in test"],
    }
    assert [file["for"] for file in story["files"]] == ["sources", "validation", "test"]
    assert story["rows_read"] == 9


def test_they_can_be_kept_and_are_still_reported(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ["only here", "in both"])
    jsonl(tmp_path / "v.jsonl", ["in both"])
    texts, story = written(tmp_path, validation=["v.jsonl"], split={"duplicates": "keep", "test": 0})
    assert texts["train"] == ["only here", "in both"]
    assert (story["duplicates_across_splits"]["exact"], story["duplicates_across_splits"]["removed"]) == (1, 0)


def test_near_duplicates_across_sources_are_removed_from_training(tmp_path: Path) -> None:
    rows = [prose(number) for number in range(20)]
    jsonl(tmp_path / "rows.jsonl", rows)
    jsonl(tmp_path / "v.jsonl", [f"{rows[3]} end", rows[5], "something else altogether"])
    texts, story = written(tmp_path, validation=["v.jsonl"], clean={"near_duplicates": 0.8}, split={"test": 0})
    assert texts["train"] == [row for number, row in enumerate(rows) if number not in (3, 5)]
    found = story["duplicates_across_splits"]
    assert (found["exact"], found["near"], found["removed"]) == (1, 1, 2)


def test_duplicates_that_cleaning_left_do_not_cross_an_order_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ["a", "b", "c", "d", "e", "f", "g", "h", "b", "i"])
    texts, story = written(tmp_path, clean={"duplicates": False}, split={"by": "order", "validation": 0.2, "test": 0})
    assert texts["train"] == list("acdefgh") and texts["validation"] == ["b", "i"]
    assert story["duplicates_across_splits"]["removed"] == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.text(st.sampled_from("abAB 年"), max_size=3), min_size=1, max_size=40),
    duplicates=st.booleans(),
    by=st.sampled_from(["hash", "order"]),
    salt=st.sampled_from("ab"),
)
def test_whatever_the_rows_no_training_text_is_in_validation_or_test(
    rows: list[str], duplicates: bool, by: str, salt: str, tmp_path: Path
) -> None:
    jsonl(tmp_path / "rows.jsonl", rows)
    split = {"by": by, "validation": 0.3, "test": 0.2, "salt": salt}
    try:
        texts, _ = written(tmp_path, clean={"duplicates": duplicates}, split=split)
    except DataError:
        return  # nothing left to train on: refused, as another test shows
    folded = {part: {"".join(text.casefold().split()) for text in texts[part]} for part in PARTS}
    assert not folded["train"] & (folded["validation"] | folded["test"])


# Augmentation -------------------------------------------------------------------------------------------------------


def test_only_training_rows_are_augmented_and_each_variant_follows_its_original(tmp_path: Path) -> None:
    rows = [prose(number, 12) for number in range(60)]
    jsonl(tmp_path / "rows.jsonl", rows)
    plain, _ = written(tmp_path, split={"validation": 0.3, "test": 0.2})
    texts, story = written(tmp_path, split={"validation": 0.3, "test": 0.2}, augment={"swap": 0.5, "copies": 2})
    assert (texts["validation"], texts["test"]) == (plain["validation"], plain["test"])
    assert [text for text in texts["train"] if text in rows] == plain["train"]
    assert story["augmented"] == len(texts["train"]) - len(plain["train"]) > len(plain["train"])
    for place, text in enumerate(texts["train"]):
        if text not in rows:
            assert sorted(text.split()) == sorted(texts["train"][place - 1].split())


# What can go wrong --------------------------------------------------------------------------------------------------


def test_everything_dropped_by_cleaning_says_which_step_did_it(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ["short", "tiny"])
    with pytest.raises(
        DataError,
        match=r"^data\.sources: cleaning dropped all 2 rows \(length 2\), such as 'rows\.jsonl line 1: short'",
    ):
        written(tmp_path, clean={"min_chars": 100})
    assert list((tmp_path / "out").iterdir()) == []


def test_validation_that_cleaning_dropped_is_named(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ["a long enough row"])
    jsonl(tmp_path / "v.jsonl", ["short"])
    with pytest.raises(DataError, match=r"^data\.validation: cleaning dropped all 1 rows"):
        written(tmp_path, validation=["v.jsonl"], clean={"min_chars": 10})


def test_no_training_row_left_is_an_error_and_an_empty_validation_a_warning(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ["same"])
    jsonl(tmp_path / "v.jsonl", ["same"])
    with pytest.raises(DataError, match=r"data\.sources: no training rows are left of 1"):
        written(tmp_path, validation=["v.jsonl"], split={"test": 0})
    _, story = written(tmp_path, split={"validation": 1e-9, "test": 0})
    assert len(story["warnings"]) == 1 and story["warnings"][0].startswith("validation got no rows")


@pytest.mark.parametrize(
    "split, message",
    [
        ({"validation": 0.6, "test": 0.4}, "nothing to train on"),
        ({"by": "order", "group": "user"}, r"data\.split\.group: groups are kept together only by hash"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(split: dict[str, Any], message: str, tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ["x"])
    with pytest.raises(RecipeError, match=message):
        written(tmp_path, split=split)


class FullDisk:
    """A file on a disk that takes `room` more bytes."""

    def __init__(self, stream: Any, room: int) -> None:
        self._stream, self._room = stream, room

    def write(self, content: bytes) -> int:
        self._room -= len(content)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._stream.write(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl", "train.jsonl-second"])
def test_a_full_disk_names_the_file_and_leaves_nothing_new_behind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "rows.jsonl", [prose(number) for number in range(50)])
    written(tmp_path, split={"validation": 0.3, "test": 0.2})
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def open_on_full_disk(path: Path, *arguments: Any, **options: Any) -> Any:
        stream = open(path, *arguments, **options)  # noqa: SIM115  # closed by whoever opens it
        return FullDisk(stream, 500) if str(path).endswith(name) else stream

    monkeypatch.setattr(documents, "open", open_on_full_disk, raising=False)
    with pytest.raises(
        StorageError, match=rf"{name.removesuffix('-second')}: could not be written \(No space left on device\)"
    ):
        written(tmp_path, split={"validation": 0.3, "test": 0.2, "salt": "other"}, augment={"delete": 0.2})
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_full_disk_while_rows_wait_for_an_order_split_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "rows.jsonl", [prose(number) for number in range(50)])
    real = documents.tempfile.TemporaryFile
    monkeypatch.setattr(documents.tempfile, "TemporaryFile", lambda **options: FullDisk(real(**options), 500))
    with pytest.raises(StorageError, match="No space left on device"):
        written(tmp_path, split={"by": "order"})
    assert list((tmp_path / "out").iterdir()) == []


def test_control_c_leaves_what_was_there(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [f"row {number}" for number in range(100)])

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_rows_leave_nothing_and_keep_their_own_message(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n{"text": 5}\n')
    with pytest.raises(DataError, match=r"^rows\.jsonl line 2: column 'text' holds a number"):
        written(tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_progress_ends_at_the_bytes_of_all_sources(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [f"row {number}" for number in range(100)])
    jsonl(tmp_path / "v.jsonl", ["v"])
    calls: list[tuple[int, int]] = []
    written(tmp_path, lambda done, total: calls.append((done, total)), validation=["v.jsonl"], split={"test": 0})
    total = sum((tmp_path / name).stat().st_size for name in ("rows.jsonl", "v.jsonl"))
    assert calls == sorted(calls) and calls[-1] == (total, total)


def test_the_same_recipe_writes_the_same_bytes(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [prose(number) for number in range(30)])
    contents = []
    for _ in range(2):
        written(
            tmp_path,
            split={"validation": 0.2, "test": 0.2},
            augment={"delete": 0.2, "mask": 0.2},
            clean={"near_duplicates": 0.7},
        )
        contents.append([(tmp_path / "out" / f"{part}.jsonl").read_bytes() for part in PARTS])
    assert contents[0] == contents[1]

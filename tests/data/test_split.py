"""Splits: by hash nothing moves when rows are added, groups and copies stay together; by order the text is cut in place."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.source import Row
from formary.data.split import assign, by_order, cuts, dealt
from formary.errors import DataError
from formary.recipe import schema

quick = settings(max_examples=100, deadline=None)
HASH = schema.Split(validation=0.2, test=0.2)
TEXTS = st.lists(st.text(max_size=20), max_size=30)


def parts(texts: list[str], split: schema.Split = HASH) -> list[str]:
    return [assign(Row({"text": text}, ""), split) for text in texts]


@quick
@given(TEXTS, TEXTS, TEXTS)
def test_adding_rows_before_between_and_after_moves_no_row(old: list[str], before: list[str], after: list[str]) -> None:
    assert parts(before + old + after)[len(before) : len(before) + len(old)] == parts(old)


@quick
@given(st.text(max_size=10), st.lists(st.text(max_size=20), min_size=2, max_size=20))
def test_rows_of_a_group_stay_together(group: str, texts: list[str]) -> None:
    split = HASH.model_copy(update={"group": "author"})
    assert len({assign(Row({"text": text, "author": group}, ""), split) for text in texts}) == 1


@quick
@given(st.text(max_size=30))
def test_copies_up_to_case_and_space_stay_together(text: str) -> None:
    assert len(set(parts([text, f" {text}\n", text.casefold()]))) == 1


def test_the_shares_are_those_of_the_recipe() -> None:
    found = parts([f"row {number}" for number in range(20_000)], schema.Split(validation=0.05, test=0.1))
    # Five standard deviations of a binomial count.
    assert abs(found.count("validation") - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5
    assert abs(found.count("test") - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5


def test_a_larger_validation_share_takes_rows_only_from_training() -> None:
    texts = [f"row {number}" for number in range(2000)]
    small, large = (parts(texts, schema.Split(validation=share, test=0.1)) for share in (0.1, 0.3))
    moved = {(one, other) for one, other in zip(small, large) if one != other}
    assert moved == {("train", "validation")}


def test_another_salt_is_another_split() -> None:
    texts = [f"row {number}" for number in range(200)]
    assert parts(texts) != parts(texts, HASH.model_copy(update={"salt": "other"}))


def test_a_number_and_its_digits_are_one_group_and_null_groups_stand_alone() -> None:
    split = HASH.model_copy(update={"group": "user"})
    for number in range(50):
        same = {assign(Row({"text": "x", "user": user}, ""), split) for user in (number, str(number))}
        assert len(same) == 1
    alone = [assign(Row({"text": f"row {number}", "user": None}, ""), split) for number in range(50)]
    assert alone == parts([f"row {number}" for number in range(50)])


def test_a_missing_group_column_names_the_row_and_its_columns() -> None:
    split = HASH.model_copy(update={"group": "author"})
    with pytest.raises(
        DataError, match=r"^a\.jsonl line 3: column 'author', which data\.split\.group names, .* columns text, writer"
    ):
        assign(Row({"text": "x", "writer": "y"}, "a.jsonl line 3"), split)


# By order -----------------------------------------------------------------------------------------------------------

SHARES = st.tuples(st.floats(0, 0.45), st.floats(0, 0.45)).map(
    lambda pair: schema.Split(by="order", validation=pair[0], test=pair[1])
)


@quick
@given(TEXTS, SHARES)
def test_order_keeps_rows_whole_and_in_order(texts: list[str], split: schema.Split) -> None:
    rows = [Row({"text": text}, "") for text in texts]
    found = list(by_order(rows, len(rows), split, unit="rows"))
    assert [row.values["text"] for _, row in found] == texts
    names = [part for part, _ in found]
    assert names == sorted(names, key=["train", "validation", "test"].index)
    assert names.count("train") == int(len(texts) * (1 - split.validation - split.test))


@quick
@given(TEXTS, SHARES)
def test_order_by_characters_cuts_the_joined_text_and_loses_nothing(texts: list[str], split: schema.Split) -> None:
    whole = "".join(texts)
    found = list(by_order([Row({"text": text}, "") for text in texts], len(whole), split, unit="chars"))
    joined = {
        part: "".join(row.values["text"] for name, row in found if name == part)
        for part in ("train", "validation", "test")
    }
    first, second = cuts(len(whole), split)
    assert joined == {"train": whole[:first], "validation": whole[first:second], "test": whole[second:]}


def test_ninety_ten_is_nanogpts_cut() -> None:
    size = 1_115_394  # characters of the Shakespeare file
    assert cuts(size, schema.Split(by="order", validation=0.1, test=0.0)) == (int(size * 0.9), size)


UNITS = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.sampled_from("abc")), min_size=8, max_size=60)


@quick
@given(UNITS, st.integers(2, 5))
def test_folds_keep_units_whole_and_take_every_row(rows: list[tuple[int, str]], folds: int) -> None:
    rows = [(unit % 12 if unit % 2 else unit, label) for unit, label in rows]
    if len({unit for unit, _ in rows}) < folds:
        with pytest.raises(DataError, match=f"{folds} folds"):
            dealt(rows, folds)
        return
    fold_of: dict[int, set[int]] = {}
    found = dealt([(unit, [label]) for unit, label in rows], folds)
    for (unit, _), fold in zip(rows, found, strict=True):
        fold_of.setdefault(unit, set()).add(fold)
    assert all(len(places) == 1 for places in fold_of.values())
    assert {place for places in fold_of.values() for place in places} == set(range(1, folds + 1))


@quick
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.sampled_from("abc")), min_size=8, unique_by=lambda row: row[0]))
def test_folds_of_single_rows_share_each_label_evenly(rows: list[tuple[int, str]]) -> None:
    found = dealt([(unit, [label]) for unit, label in rows], 4)
    for wanted in "abc":
        counts = [sum(f == fold and label == wanted for (_, label), f in zip(rows, found)) for fold in (1, 2, 3, 4)]
        assert max(counts) - min(counts) <= 1


@quick
@given(UNITS, st.randoms())
def test_folds_do_not_depend_on_the_order_of_the_rows(rows: list[tuple[int, str]], rng: random.Random) -> None:
    rows = list(dict(rows).items())
    if len(rows) < 3:
        return
    shuffled = rng.sample(rows, len(rows))
    assert dict(zip(rows, dealt(rows, 3))) == dict(zip(shuffled, dealt(shuffled, 3)))


def test_by_order_each_fold_is_a_piece_of_what_is_not_test() -> None:
    rows = [Row({"text": str(number)}, "") for number in range(20)]
    seen: list[str] = []
    for fold in (1, 2, 3):
        split = schema.Split(by="order", test=0.2, folds=3, fold=fold)
        found = list(by_order(rows, 20, split, unit="rows"))
        assert [row.values["text"] for part, row in found if part == "test"] == ["16", "17", "18", "19"]
        seen += [row.values["text"] for part, row in found if part == "validation"]
    assert seen == [str(number) for number in range(16)]


def test_by_order_a_text_is_cut_into_folds_without_losing_a_character() -> None:
    split = schema.Split(by="order", test=0.25, folds=3, fold=2)
    found = list(by_order([Row({"text": "abcdefghijkl"}, "")], 12, split, unit="chars"))
    assert [(part, row.values["text"]) for part, row in found] == [
        ("train", "abc"),
        ("validation", "def"),
        ("train", "ghi"),
        ("test", "jkl"),
    ]

"""Events become one row for each user, in the order of time, with the last ones held out; what is wrong is named."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formary.data import events
from formary.data.documents import write_documents
from formary.data.records import Row, RowForm
from formary.errors import DataError, RecipeError
from formary.recipe.schema import Data, Split

FORM = RowForm(columns=events.COLUMNS, text=events.told, alike=False, gather=events.gathered, check=events.check)


def gathered(rows, split=Split()):  # noqa: B008  # frozen
    """([(part, values)], notes)"""
    found, going = (
        [],
        events.gathered((Row(dict(zip(events.COLUMNS, row)), f"row {n}") for n, row in enumerate(rows, 1)), split),
    )
    while True:
        try:
            part, row = next(going)
        except StopIteration as end:
            return found, end.value
        found.append((part, row.values))


def test_the_last_item_is_test_and_the_one_before_validation():
    rows = [("u", "c", 3), ("u", "a", 1), ("u", "d", 4), ("u", "b", 2), ("u", "e", 5)]
    found, notes = gathered(rows)
    assert found == [
        ("train", {"user": "u", "history": ["a", "b", "c"]}),
        ("validation", {"user": "u", "history": ["a", "b", "c"], "item": "d"}),
        ("test", {"user": "u", "history": ["a", "b", "c", "d"], "item": "e"}),
    ]
    assert notes == []
    assert gathered(rows, Split(validation=0))[0][0][1]["history"] == ["a", "b", "c", "d"]
    assert gathered(rows, None)[0] == [("test", {"user": "u", "history": ["a", "b", "c", "d"], "item": "e"})]


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("abcdef"), st.integers(0, 9)), max_size=40))
def test_nothing_is_lost_and_no_part_sees_what_comes_later(rows):
    found, _ = gathered(rows)
    for user in "xyz":
        own = sorted((row for row in rows if row[0] == user), key=lambda row: row[2])
        parts = {part: values for part, values in found if values["user"] == user}
        if len(own) < 2:
            assert not parts
            continue
        whole = parts["train"]["history"]
        if "test" in parts:
            assert parts["validation"]["history"] == whole
            assert parts["test"]["history"] == [*whole, parts["validation"]["item"]]
            whole = [*parts["test"]["history"], parts["test"]["item"]]
        assert whole == [item for _, item, _ in own]
        assert ("test" in parts) == (len(own) >= 4)


def test_users_with_few_events_and_equal_times_are_counted_and_said():
    rows = [("one", "a", 1), ("two", "a", 1), ("two", "b", 1), ("two", "c", 2), *(("u", item, 1) for item in "abcd")]
    found, notes = gathered(rows)
    assert [(part, values["user"]) for part, values in found] == [
        ("train", "two"), ("train", "u"), ("validation", "u"), ("test", "u"),
    ]  # fmt: skip
    assert "1 user with one event, after which nothing follows, is left out: one" in notes[0]
    assert "1 user with fewer than 4 events, of which none is held out, is in training only: two" in notes[1]
    assert notes[2].startswith("4 events have the time of the user's event before")
    assert [item for _, v in found if v["user"] == "u" for item in v["history"]][:4] == ["a", "b", "a", "b"]


def test_items_kept_cold_are_in_no_training_row_and_are_what_is_held_out():
    rows = [(f"u{user}", f"i{(user * 7 + step) % 50}", step) for user in range(30) for step in range(12)]
    split = Split(cold=0.2)
    found, _ = gathered(rows, split)
    trained = {item for part, values in found if part == "train" for item in values["history"]}
    histories = {item for part, values in found if part != "train" for item in values["history"]}
    held = {part: {v["item"] for p, v in found if p == part} for part in ("validation", "test")}
    assert held["validation"] and held["test"] and not held["validation"] & held["test"]
    assert not (held["validation"] | held["test"]) & (trained | histories)
    assert gathered(rows, split)[0] == found


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (12, 12.0),
        ("12.5", 12.5),
        ("1970-01-01T00:00:10", 10.0),
        ("1970-01-01T01:00:10+01:00", 10.0),
        ("1970-01-02", 86400.0),
        (datetime.date(1970, 1, 2), 86400.0),
        (datetime.datetime(1970, 1, 1, 0, 1), 60.0),
    ],
)
def test_times_are_numbers_or_dates(given_, expected):
    assert events.moment(given_, "row 1")[0] == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"user": "u", "item": "a", "time": "soon"}, "column 'time' holds 'soon', neither a number nor a date"),
        ({"user": "u", "item": "a", "time": None}, "column 'time' holds None"),
        ({"user": "u", "item": "a", "time": float("nan")}, "column 'time' holds nan"),
        ({"user": "u", "item": " ", "time": 1}, "column 'item' holds ' '"),
        ({"user": None, "item": "a", "time": 1}, "column 'user' is missing"),
        ({"user": ["u"], "item": "a", "time": 1}, "column 'user' holds \\['u'\\]"),
    ],
)
def test_what_is_no_event_is_refused_with_its_place(values, message):
    with pytest.raises(DataError, match=f"e.csv line 2: {message}"):
        events.check(values, "e.csv line 2")


def test_numbers_and_dates_are_not_mixed_and_there_are_no_folds():
    with pytest.raises(DataError, match="a date at row 2 and a number at row 1"):
        gathered([("u", "a", 1), ("u", "b", "2024-01-01")])
    with pytest.raises(RecipeError, match=r"data\.split\.folds"):
        gathered([("u", "a", 1)], Split(folds=3, fold=1))


@pytest.mark.parametrize("given_", [["a", "b,c"], '["a", "b,c"]', ("a", "b,c")])
def test_a_history_is_a_list_or_a_text(given_):
    assert events.history({"history": given_}, "row 1") == ["a", "b,c"]
    assert (
        events.history({"history": "a, 12"}, "row 1") == ["a", "12"] and events.history({"history": ""}, "row 1") == []
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [({}, "'history' is missing"), ({"history": 3}, "holds int 3"), ({"history": "[1"}, "no JSON list"), ({"history": [None]}, "'history' is missing")],
)  # fmt: skip
def test_what_is_no_history_is_named(row, message):
    with pytest.raises(DataError, match=f"row 3: .*{message}"):
        events.history(row, "row 3")


def test_events_of_a_file_are_read_checked_and_their_duplicates_named(tmp_path):
    lines = [
        "who,what,when",
        *(f"u{user},i{(user + step) % 6},{step}" for user in range(5) for step in range(6)),
        "u1,i1,0",
    ]
    (tmp_path / "e.csv").write_text("\n".join([*lines, "late,i1,3"]), encoding="utf-8")
    data = Data(sources=["e.csv"], columns={"user": "who", "item": "what", "time": "when"})
    story = write_documents(data, tmp_path / "out", base=tmp_path, form=FORM)
    assert {part: counts["rows"] for part, counts in story["splits"].items()} == {
        "train": 5,
        "validation": 5,
        "test": 5,
    }
    (step,) = [step for step in story["steps"] if step["step"] == "duplicates"]
    assert step["dropped"] == 1 and "e.csv line 32" in step["examples"][0]
    assert any("1 user with one event" in note and "late" in note for note in story["warnings"])
    (tmp_path / "e.csv").write_text("who,what,when\nu,i,noon\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"e\.csv line 2: column 'time' holds 'noon'"):
        write_documents(data, tmp_path / "out", base=tmp_path, form=FORM)
    with pytest.raises(DataError, match=r"column 'x' is missing \(data.columns.user names it\)"):
        write_documents(data.model_copy(update={"columns": {"user": "x"}}), tmp_path / "out", base=tmp_path, form=FORM)

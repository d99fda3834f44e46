"""Points become series: steps are inferred, gaps said, and what cannot be mended is refused by file and line."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.records import Row
from formary.data.series import gather, points_of
from formary.data.times import Step, calendar, cycles_of, step_of, texts_of, times_of
from formary.errors import DataError, RecipeError
from formary.recipe.schema import Split

NO_SPLIT = Split(validation=0, test=0)


def rows(times, values=None, **columns):
    columns = {"value": values if values is not None else list(range(len(times)))} | columns
    return [
        Row({"time": time} | {name: cells[n] for name, cells in columns.items()}, f"a.csv line {n + 2}")
        for n, time in enumerate(times)
    ]


def gathered(given, split=NO_SPLIT):
    generator = gather(iter(given), split)
    found = []
    while True:
        try:
            found.append(next(generator))
        except StopIteration as end:
            return found, end.value


@pytest.mark.parametrize(
    ("times", "step", "season"),
    [
        (["2024-01-01 00:00", "2024-01-01 01:00", "2024-01-01 02:00"], "1 hour", 24),
        (["2024-01-01T00:00", "2024-01-01T00:15", "2024-01-01T00:30"], "15 minutes", 96),
        (["2024/1/1", "2024/1/2", "2024/1/3"], "1 day", 7),
        (["2024-01-01", "2024-01-08", "2024-01-15"], "1 week", 52),
        (["1949-01", "1949-02", "1949-03"], "1 month", 12),
        (["2024-01-31", "2024-02-29", "2024-03-31"], "1 month", 12),
        (["1959Q1", "1959 q2", "1959-Q3"], "1 quarter", 4),
        ([1700, 1701, 1702], "1 year", 1),
        (["2024-01-04", "2024-01-05", "2024-01-08", "2024-01-09", "2024-01-10", "2024-01-11"], "1 business day", 5),
        ([1704067200, 1704070800, 1704074400], "1 hour", 24),
    ],
)
def test_steps_of_every_usual_kind_are_inferred(times, step, season):
    read, notes = times_of(times, [""] * len(times))
    found = step_of(np.unique(read), "x")
    assert (str(found), found.season, notes) == (step, season, [])
    assert (found.times(read[0], found.count(read[0], read)) == read).all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        [Step("second", 3600), Step("second", 86400), Step("month", 1), Step("month", 3), Step("business day", 1)]
    ),
    st.integers(0, 20_000),
    st.lists(st.integers(0, 300), min_size=8, max_size=60, unique=True),
)
def test_any_grid_is_found_again_whatever_is_left_out(step, day, kept):
    start = (np.datetime64("1970-01-05") + day).astype("M8[s]")
    if step.unit == "month":
        start = start.astype("M8[M]").astype("M8[s]")
    if step.unit == "business day":
        start = np.busday_offset(start.astype("M8[D]"), 0, roll="forward").astype("M8[s]")
    counts = np.sort(np.array(kept))
    times = step.times(start, counts)
    assert (step.count(start, times) == counts).all()
    read, _ = times_of(texts_of(times), [""] * len(times))
    assert (read == times).all()


def test_gaps_and_empty_cells_are_missing_and_said():
    times = ["2024-01-01", "2024-01-02", "2024-01-04", "2024-01-05"]
    ((_, row),), notes = gathered(rows(times, ["1", "", "3", "4"]))
    assert row.values["time"] == ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04", "2024-01-05"]
    assert row.values["values"] == {"value": [1.0, None, None, 3.0, 4.0]}
    assert any("1 of 5 steps" in note and "2024-01-03" in note for note in notes)
    assert any("1 in value" in note for note in notes)


def test_rows_in_any_order_of_several_series_are_sorted_apart():
    times = ["2024-01-02", "2024-01-01", "2024-01-01", "2024-01-02", "2024-01-03", "2024-01-03"]
    found, _ = gathered(rows(times, [2, 1, 10, 20, 3, 30], series=["a", "a", "b", "b", "a", "b"]))
    assert [(row.values["series"], row.values["values"]["value"]) for _, row in found] == [
        ("a", [1.0, 2.0, 3.0]),
        ("b", [10.0, 20.0, 30.0]),
    ]


def test_parts_are_cut_at_the_same_times_and_hold_the_history_before_them():
    times = [f"2024-01-{day:02}" for day in range(1, 21)]
    found, _ = gathered(rows(times), Split(validation=0.2, test=0.2))
    by_part = {part: row.values for part, row in found}
    assert [len(by_part[part]["time"]) for part in ("train", "validation", "test")] == [12, 16, 20]
    assert [by_part[part].get("from") for part in ("train", "validation", "test")] == [None, 12, 16]
    assert by_part["train"]["values"]["value"] == by_part["test"]["values"]["value"][:12]


def test_a_series_row_is_read_again_as_it_was_written():
    ((_, row),), _ = gathered(rows(["2024-01-01", "2024-01-03", "2024-01-04"], [1.5, 2, 3]))
    (again,), _ = gathered([row])
    assert again[1].values == row.values
    points = points_of({"time": ["2024-01-01", "2024-01-02"], "values": [1, 2]}, "row 1")
    assert points.values["value"].tolist() == [1.0, 2.0] and str(points.step) == "1 day"
    rows_ = [{"time": "2024-01-02", "value": 2}, {"time": "2024-01-01", "value": None}]
    assert points_of({"rows": rows_}, "row 1").values["value"].tolist()[1:] == [2.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (rows(["2024-01-01", "yesterday", "2024-01-03"]), r"a.csv line 3: the time 'yesterday' cannot be read"),
        (
            rows(["2024-01-01", "2024-01-02", "2024-01-02"]),
            r"a.csv line 4: 2024-01-02 was there before, at a.csv line 3",
        ),
        (rows(["2024-01-01", "2024-01-02", "2024-01-03"], [1, "two", 3]), r"a.csv line 3: column 'value' holds 'two'"),
        (
            rows(["2024-01-01 00:00", "2024-01-01 01:00", "2024-01-01 02:00", "2024-01-01 02:20"]),
            r"line 5.*whole number of steps",
        ),
        (rows(["2024-01-01", "2024-01-02", "2024-03-09", "2025-03-01"]), r"a.csv line 2: .*irregular"),
        (rows(["2024-01-01T00:00+01:00", "2024-01-01T01:00"]), r"a.csv line 3: this time has no offset"),
        (rows(["2024-01-01"]), r"at least two times"),
        (rows(["2024-01-01", "2024-01-02"], ["a", "b"]), r"'value' holds 'a'"),
    ],
)
def test_what_cannot_be_mended_is_refused_by_its_place(given, message):
    with pytest.raises(DataError, match=message):
        gathered(given)


def test_a_clock_put_back_is_told_by_offsets_and_brought_to_utc():
    times = ["2024-10-27T01:30+02:00", "2024-10-27T02:30+02:00", "2024-10-27T02:30+01:00", "2024-10-27T03:30+01:00"]
    ((_, row),), notes = gathered(rows(times))
    assert row.values["time"][0] == "2024-10-26T23:30:00" and len(row.values["time"]) == 4
    assert any("brought to UTC" in note for note in notes)


def test_folds_would_learn_the_future():
    with pytest.raises(RecipeError, match=r"folds"):
        gathered(rows(["2024-01-01", "2024-01-02"]), Split(folds=3, fold=1))


def test_columns_of_words_are_left_out_and_named():
    ((_, row),), notes = gathered(rows(["2024-01-01", "2024-01-02"], sky=["clear", "rain"]))
    assert list(row.values["values"]) == ["value"] and any("sky" in note for note in notes)


@pytest.mark.parametrize(
    "given",
    [
        {"time": ["2024-01-01", "2024-01-02"], "values": [1]},
        {"time": ["2024-01-01", "2024-01-02"], "values": [1, "x"]},
        {"time": "2024-01-01", "values": [1]},
        {"time": ["2024-01-01", "2024-01-02"]},
        {"rows": [{"value": 3}]},
        {"rows": [{"time": "2024", "value": 3, "series": "a"}, {"time": "2025", "value": 3, "series": "b"}]},
    ],
)
def test_a_request_that_is_no_series_is_refused(given):
    with pytest.raises(DataError, match=r"row 7"):
        points_of(given, "row 7")


def test_the_calendar_follows_only_cycles_that_were_seen_twice():
    hour, month = Step("second", 3600), Step("month", 1)
    assert cycles_of(hour, 24 * 20) == ["hour", "weekday"]
    assert cycles_of(hour, 24 * 800) == ["hour", "weekday", "year"]
    assert cycles_of(month, 30) == ["year"] and cycles_of(month, 20) == []
    monday = np.array(["2024-01-01T06:00"], dtype="M8[s]")
    assert calendar(monday, ["hour", "weekday", "year"])[0] == pytest.approx(
        [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1], abs=1e-6
    )

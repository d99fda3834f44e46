"""Tables of numbers: series with a time, and rows with a clear label."""

import random

import pytest

from formary.recipe.guess_rows import guess_rows
from formary.recipe.reading import parse
from formary.recipe.sample import Sample


def guessed(rows, **options):
    sample = Sample(sources=("data.csv",), kind="csv", files=1, rows=rows, share=1.0)
    found = guess_rows(sample, name="guessed", **options)
    return found and parse(found.recipe)


def hourly(count=500):
    return [
        {"ds": f"2012-{1 + d // 28:02}-{1 + d % 28:02} {h:02}:00:00", "y": f"{n}"}
        for n in range(count)
        for d, h in [divmod(n, 24)]
    ]


def test_a_time_and_a_number_are_a_series():
    recipe = guessed(hourly())
    assert recipe.task == "forecast" and recipe.data.columns == {"time": "ds", "value": "y"}
    assert (recipe.train.objective.horizon, recipe.train.objective.season, recipe.train.context) == (24, 24, 96)
    assert recipe.model.preset == "series-mini"


@pytest.mark.parametrize(
    ("time", "season"),
    [
        (lambda n: {"month": f"{1950 + n // 12}-{1 + n % 12:02}"}, 12),
        (lambda n: {"year": str(1950 + n // 4), "quarter": str(1 + n % 4)}, 4),
        (lambda n: {"date": f"2012/{1 + n // 28 % 12:02}/{1 + n % 28:02}"}, 7),
        (lambda n: {"YEAR": str(1700 + n)}, 1),
    ],
)
def test_steps_of_every_usual_kind_are_seen(time, season):
    recipe = guessed([{**time(n), "a": str(n % 7), "b": str(n % 3)} for n in range(200)])
    assert recipe.task == "forecast" and recipe.train.objective.season == season
    assert recipe.train.objective.values == ["a", "b"] and "time" in recipe.data.columns


def test_a_column_that_tells_series_apart_is_found():
    rows = [{"date": f"2012-01-{1 + n:02}", "store": store, "sales": str(n)} for store in "abc" for n in range(28)]
    assert guessed(rows).data.columns == {"time": "date", "series": "store", "value": "sales"}


def people(count=200):
    rng = random.Random(0)
    return [
        {
            "Status": rng.choice(["good", "bad"]),
            "Home": rng.choice(["rent", "own"]),
            "Age": str(rng.randint(18, 80)),
            "Income": str(rng.random()),
        }
        for _ in range(count)
    ]


def test_a_clear_label_beside_numbers_and_names_is_a_table():
    recipe = guessed(people())
    assert recipe.task == "classify_row" and recipe.data.columns == {"label": "Status"}
    assert recipe.model.preset == "table-mini"


def test_a_column_of_text_or_no_clear_label_is_something_else():
    worded = [
        {"label": row["Status"], "Age": row["Age"], "note": f"a word about number {n} of them"}
        for n, row in enumerate(people())
    ]
    assert guessed(worded).task == "classify"
    unclear = [{name: row[name] for name in ("Age", "Income")} for row in people()]
    assert guessed(unclear) is None


def test_events_are_no_series():
    rows = [{"user": str(n % 9), "item": str(n), "time": f"2012-01-{1 + n % 28:02}"} for n in range(200)]
    found = guessed(rows)
    assert found is None or found.task != "forecast"

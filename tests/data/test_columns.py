"""A text made of a row's columns."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formary.data.columns import columns_in, filled, is_template
from formary.data.source import read
from formary.errors import DataError, RecipeError


def _text(template: str, **values: object) -> str:
    return filled(template, values, ours="text", origin="a.csv line 2")


def test_columns_are_written_into_the_text() -> None:
    assert _text("Age {Age}, job {Job}.", Age=30, Job="fixed", Other=1) == "Age 30, job fixed."


@pytest.mark.parametrize("missing", [None, "", "  ", "NA", "nan", float("nan"), "null", []])
def test_a_missing_value_is_said_to_be_unknown(missing: object) -> None:
    assert _text("Income {Income}", Income=missing) == "Income unknown"


def test_whole_numbers_lose_their_point_and_truth_values_are_words() -> None:
    assert _text("{a} {b} {c} {d}", a=9.0, b=0.1 + 0.2, c=True, d=["x", "y"]) == "9 0.3 yes x, y"


def test_doubled_braces_are_braces() -> None:
    assert _text("{{{x}}}", x=1) == "{1}"
    assert columns_in("{{a}} {b} {b} {年龄}", "text") == ["b", "年龄"]


def test_only_a_text_with_braces_is_a_template() -> None:
    assert is_template("Age {Age}") and not is_template("Age")


def test_an_unknown_column_is_named_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"a.csv line 2: column 'Agee' is missing.*did you mean 'Age'\?.*Age, Job"):
        _text("{Agee}", Age=1, Job=2)


@pytest.mark.parametrize("template", ["Age {Age", "Age }", "{{Age}}", "{}"])
def test_a_template_that_is_none_is_refused(template: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.columns\.text"):
        columns_in(template, "text")


@given(st.text(), st.text(alphabet=st.characters(exclude_characters="{}"), min_size=1))
def test_any_text_around_a_column_stays_as_it_is(around: str, name: str) -> None:
    escaped = around.replace("{", "{{").replace("}", "}}")
    assert filled(f"{escaped}{{{name}}}", {name: 7}, ours="text", origin="row") == f"{around}7"


def test_a_table_is_read_as_texts_and_keeps_its_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Status,Age,Income\ngood,30,\nbad,41,90\n", encoding="utf-8")
    columns = {"text": "Age {Age}, income {Income}", "label": "Status"}
    rows = [row.values for row in read(["a.csv"], columns=columns, required=("text", "label"), base=tmp_path)]
    assert rows[0] == {"Age": "30", "Income": "", "label": "good", "text": "Age 30, income unknown"}
    assert rows[1]["text"] == "Age 41, income 90"


def test_a_column_of_yes_and_no_writes_its_name_where_it_is_yes():
    row = {"title": "Heat", "Crime": 1, "Comedy": "0", "Film-Noir": "yes", "War": False, "Drama": 0.0, "Epic": None}
    template = "{title}: {Crime?} {Comedy?} {Film-Noir?} {War?} {Drama?} {Epic?}"
    assert filled(template, row, ours="text", origin="row 1") == "Heat: Crime Film-Noir"


def test_a_column_whose_own_name_ends_in_a_question_mark_is_written_like_any_other():
    row = {"Spam?": "maybe", "Sure": 1}
    assert filled("is it  spam?}} {Spam?}", row, ours="text", origin="row") == "is it  spam?} maybe"
    assert filled("{Spam?}  {Sure?}", row, ours="text", origin="row") == "maybe Sure"
    with pytest.raises(DataError, match="column 'Safe' is missing"):
        filled("{Safe?}", row, ours="text", origin="row")

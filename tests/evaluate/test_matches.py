"""Short answers are found in what is written and compared as asked; ROUGE over lines equals rouge_score's."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from formary.evaluate.matches import MATCHES, answer_in, exact, numeric, regardless_of_case, rouge_lsum

TEXTS = st.lists(st.sampled_from(["the", "cat", "Sat", "on", "a", "mat", "\n", " . ", "."]), max_size=14).map(" ".join)


@pytest.mark.parametrize(
    ("text", "pattern", "found"),
    [
        ("It is -12, or 7.", r"[-+]?\d+", "-12"),
        ("so [1, 2, 3] it is", r"\[(?:\d+, )*(?:\d+)?\]", "[1, 2, 3]"),
        ("is 17.", r"([-+]?\d+)[.]{0,1}$", "17"),
        ("nothing", r"\d+", ""),
        ("b", "(a)?b", ""),
        ("all of it", None, "all of it"),
    ],
)
def test_the_answer_is_the_first_match_and_its_first_group(text, pattern, found):
    assert answer_in(text, pattern) == found


def test_white_space_and_case_may_differ_where_the_metric_says_so():
    assert exact(" New  York\n", ["york", "New York"]) == 1.0 == regardless_of_case("NEW york", ["New York"])
    assert exact("NEW york", ["New York"]) == 0.0 == regardless_of_case("Newyork", ["New York"])


@pytest.mark.parametrize(
    ("text", "target", "right"),
    [
        ("about 16.0 cups", "16", 1),
        ("1,050", "1000", 1),
        ("1,200", "1000", 0),
        ("-5", "5", 0),
        ("0.00101", "0.001", 1),
        ("1e3 grams", "1000.0", 1),
        (".5", "0.5", 1),
        ("0", "0", 1),
        ("0.1", "0", 0),
        ("none", "5", 0),
        ("5", "none", 0),
        ("5.", "5", 1),
        ("3, 4", "3", 1),
    ],
)
def test_a_number_may_be_a_tenth_off(text, target, right):
    assert numeric(text, [target]) == right == numeric(text, ["no number", target])


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_numbers_are_compared_by_their_relative_error(said, right):
    close = abs(said - right) <= 0.1 * abs(right)
    if not math.isclose(abs(said - right), 0.1 * abs(right), rel_tol=1e-9):
        assert numeric(f"= {said!r}", [repr(right)]) == close


@given(TEXTS, TEXTS)
def test_rouge_over_lines_equals_google_rouge_score(text, target):
    lines = [one.replace(" . ", " .\n") for one in (target, text)]
    expected = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=False).score(*lines)["rougeLsum"].fmeasure
    assert rouge_lsum(text, [target]) == pytest.approx(expected, abs=1e-12)


@given(TEXTS.filter(str.strip))
def test_a_text_is_its_own_match(text):
    for name, (match, _, _) in MATCHES.items():
        if name != "numeric_match" and (name != "rouge_lsum" or any(map(str.isalpha, text))):
            assert match(text, [text]) == 1.0

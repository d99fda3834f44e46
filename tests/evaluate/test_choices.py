"""Questions with choices: accuracy with several right ones, chance, baselines that see what gives answers away."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.errors import DataError
from formary.evaluate.choices import question_baselines, question_details, question_metrics
from formary.recipe.schema import Evaluate
from formary.tasks.questions import Question

QUICK = Evaluate(bootstrap=100)


@st.composite
def answered(draw):
    questions, answers = [], []
    for number in range(draw(st.integers(1, 30))):
        count = draw(st.integers(2, 6))
        right = draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
        questions.append(Question(f"q{number}", tuple(f"c{n}" for n in range(count)), tuple(sorted(right))))
        answers.append({"index": draw(st.integers(0, count - 1)), "probability": draw(st.floats(0.2, 1))})
    return questions, answers


@given(answered())
@settings(max_examples=40, deadline=None)
def test_accuracy_is_the_share_of_right_choices_and_a_random_choice_has_chance(case):
    sklearn = pytest.importorskip("sklearn.metrics")
    questions, answers = case
    random = question_baselines([], questions)["random choice"]
    (entry,) = question_metrics(questions, {"model": answers, "random choice": random}, settings=QUICK, where="test")
    hits = [answer["index"] in one.right for one, answer in zip(questions, answers)]
    assert entry["model"]["value"] == pytest.approx(sklearn.accuracy_score([True] * len(hits), hits))
    if len(questions) > 1:
        assert entry["model"]["low"] <= entry["model"]["value"] <= entry["model"]["high"]
    chance = sum(len(one.right) / len(one.choices) for one in questions) / len(questions)
    assert entry["baselines"]["random choice"]["value"] == pytest.approx(chance)
    assert float(entry["protocol"].rpartition("chance is ")[2]) == pytest.approx(chance, abs=6e-4)


@given(answered())
@settings(max_examples=40, deadline=None)
def test_details_add_up_to_all_rows_and_show_wrong_ones_most_confident_first(case):
    questions, answers = case
    found = question_details(questions, answers)
    hits = sum(answer["index"] in one.right for one, answer in zip(questions, answers))
    for name in ("by_choices", "by_position"):
        assert sum(part["rows"] for part in found[name]) == len(questions)
        assert sum(part["rows"] * part["accuracy"] for part in found[name]) == pytest.approx(hits)
    assert len(found["worst"]) == min(20, len(questions) - hits)
    sure = [shown["probability"] for shown in found["worst"]]
    assert sure == sorted(sure, reverse=True)
    assert all(answers[shown["row"] - 1]["index"] not in questions[shown["row"] - 1].right for shown in found["worst"])


TRAINING = [Question(f"what of the red house {n}", ("short", "never", "it depends"), (2,)) for n in range(12)]


def test_each_baseline_takes_its_own_hint():
    asked = [
        Question("the red house stands", ("never", "the red house", "it depends", "x" * 40), (0,)),
        Question("two only", ("aa", "b"), (1,)),
    ]
    found = {name: [answer["index"] for answer in given] for name, given in question_baselines(TRAINING, asked).items()}
    assert found["most frequent position"][0] == 2
    assert found["longest choice"] == [3, 0]
    assert found["TF-IDF similarity to the question"][0] == 1
    assert found["choices alone, TF-IDF + logistic regression"][0] == 2
    assert all(index is None or index < 2 for index in (given[1] for given in found.values()))


def test_shared_words_are_found_in_chinese_too():
    training = [Question("水在哪里", ("在河里", "在火里"), (0,))]
    found = question_baselines(training, [Question("水在哪里", ("火", "水在河里"), (1,))])
    assert found["TF-IDF similarity to the question"] == [{"index": 1}]


def test_all_right_still_leaves_doubt_and_a_random_choice_of_three_is_a_third():
    questions = [Question(str(n), ("a", "b", "c"), (0,)) for n in range(8)]
    answers = {"model": [{"index": 0}] * 8, **question_baselines([], questions)}
    (entry,) = question_metrics(questions, answers, settings=QUICK, where="test")
    assert entry["model"]["value"] == 1 and 0.6 < entry["model"]["low"] < 0.75  # Wilson's, 8 of 8
    assert entry["baselines"]["random choice"]["value"] == pytest.approx(1 / 3)
    assert entry["verdicts"]["random choice"] == "better" and "random choice 0.333" in entry["says"]


def test_slices_name_the_column_where_the_model_is_worst():
    questions = [Question(str(n), ("a", "b"), (0,)) for n in range(40)]
    answers = [{"index": int(n < 20), "probability": 0.9} for n in range(40)]
    slices = question_details(questions, answers, columns={"subject": ["law"] * 20 + ["art"] * 20})["slices"]
    assert [part["slice"] for part in slices] == ["law", "art"] and slices[0]["below"] and not slices[1]["below"]


def test_no_rows_or_no_answer_is_an_error():
    with pytest.raises(DataError, match="no questions"):
        question_metrics([], {"model": []}, settings=QUICK, where="test")
    with pytest.raises(DataError, match="row 1 has no answer"):
        question_metrics([Question("q", ("a", "b"))], {"model": [{"index": 0}]}, settings=QUICK, where="test")

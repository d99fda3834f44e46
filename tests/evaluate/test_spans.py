"""Answers in a text: exact match and F1 equal to SQuAD's script, Chinese by characters, no answer as an answer."""

import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formary.evaluate.spans import baselines, details, metrics, score, sentences
from formary.recipe.schema import Evaluate

WORDS = st.lists(
    st.sampled_from(["the", "a", "An", "cat", "Cat,", "sat.", "on", "1,000", "mat!", "-", "“sat”", "1990–95", "it’s"]),
    max_size=7,
)


def official_normalise(text):
    """As in the SQuAD v1.1 evaluation script."""
    text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_f1(answer, right):
    """As in the SQuAD v2.0 evaluation script, which differs from v1.1 where one of the two is empty."""
    said, true = official_normalise(answer).split(), official_normalise(right).split()
    common = sum((Counter(said) & Counter(true)).values())
    if not said or not true:
        return float(said == true)
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(true)
    return 2 * precision * recall / (precision + recall)


@given(WORDS, st.lists(WORDS, max_size=3))
def test_scores_equal_squads_script(answer, right):
    answer, right = " ".join(answer), [" ".join(one) for one in right]
    gold = [one for one in right if official_normalise(one)] or [""]
    f1, exact = score(answer, right)
    assert f1 == pytest.approx(max(official_f1(answer, one) for one in gold))
    assert exact == max(float(official_normalise(answer) == official_normalise(one)) for one in gold)


def test_each_chinese_character_is_a_word():
    assert score("曹操引兵", ["曹操"])[0] == pytest.approx(2 * 2 / (4 + 2))
    assert score("曹操。", ["曹操"]) == (1.0, 1.0)
    assert score("iPhone 手机", ["iPhone手机"])[0] == 1.0
    assert score("《“三国”演义》", ["三国演义"]) == (1.0, 1.0)
    assert score("1990年。", ["1990年"]) == (1.0, 1.0) and score("1990。", ["1990"]) == (1.0, 1.0)


def test_no_answer_is_right_only_where_there_is_none():
    assert score("", []) == (1.0, 1.0)
    assert score("Ann", []) == (0.0, 0.0)
    assert score("", ["Ann"]) == (0.0, 0.0)


def row(answers, context="Ann met Bob. The sun shone. Paris is big.", question="Who met Bob?"):
    return {"question": question, "context": context, "answers": {"text": answers, "answer_start": [0] * len(answers)}}


def test_questions_with_and_without_answers_are_measured_together_and_apart():
    rows = [row(["Ann"]), row(["Paris"]), row([])]
    said = [{"answer": "Ann"}, {"answer": "big Paris"}, {"answer": "Ann"}]
    found = {
        e["metric"]: e["model"]["value"]
        for e in metrics(rows, {"model": said}, settings=Evaluate(bootstrap=100), where="t")
    }
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["answerable_exact_match"] == 0.5 and found["unanswerable_f1"] == 0.0
    assert next(iter(found)) == "f1"


def test_a_few_unanswerable_questions_give_doubt_and_no_verdict():
    rows = [row(["Ann"])] * 98 + [row([]), row([""])]
    said = [{"answer": "Ann"}] * 98
    answers = {"model": said + [{"answer": ""}] * 2, "other": said + [{"answer": "Ann"}] * 2}
    found = {e["metric"]: e for e in metrics(rows, answers, settings=Evaluate(bootstrap=100), where="t")}
    assert found["unanswerable_f1"]["model"]["value"] == 1.0 and found["unanswerable_f1"]["model"]["low"] < 0.5
    assert found["unanswerable_f1"]["verdicts"] == {"other": "cannot tell"}
    assert 0.9 < found["exact_match"]["model"]["low"] < 1.0


def test_the_protocol_says_when_characters_are_counted():
    def protocol(text):
        return metrics([row([text])], {"model": [{"answer": text}]}, settings=Evaluate(bootstrap=100), where="t")[0]

    assert "by characters" in protocol("曹操")["protocol"] and "by characters" not in protocol("Ann")["protocol"]


def test_the_baseline_learns_word_weights_from_training_contexts_alone():
    question, context = "rare common", "Common common here. Rare here."
    training = [row([], context="common"), row([], context="common here"), row([], context="rare common here")]
    tested = row([], context=context, question=question)
    alone = baselines(training, [tested])
    crowded = baselines(training, [tested, *[row([], context=f"rare {n}") for n in range(50)]])
    assert alone["best TF-IDF sentence"][0] == crowded["best TF-IDF sentence"][0] == {"answer": "Rare here."}
    assert list(baselines([], [tested])) == ["first sentence"]


def test_the_baseline_takes_the_sentence_most_like_the_question():
    made = baselines([row(["Ann"])], [row(["shone"], question="What did the sun do, shone?")])
    assert made["best TF-IDF sentence"][0]["answer"] == "The sun shone."
    assert made["first sentence"][0]["answer"] == "Ann met Bob."


@pytest.mark.parametrize(
    ("text", "cut"),
    [("One. Two? Three", ["One.", "Two?", "Three"]), ("一。二！三", ["一。", "二！", "三"]), ("", [""])],
)
def test_sentences_of_english_and_chinese(text, cut):
    assert sentences(text) == cut


def test_details_slice_by_question_word_and_show_the_worst():
    rows = [row(["Ann"]), row(["Paris"], question="Where was it?")]
    found = details(rows, [{"answer": "Ann"}, {"answer": "", "probability": 0.4}])
    assert {"first_word": "where", "rows": 1, "f1": 0.0, "exact_match": 0.0} in found["question_words"]
    assert found["worst"][0]["said"] == "(no answer)" and found["worst"][0]["row"] == 2


def test_chinese_questions_are_sliced_by_their_question_word():
    rows = [
        row(["曹操"], question="魏王是谁？"),
        row(["许昌"], question="他住在哪里？"),
        row(["x"], question="谁来了？"),
    ]
    found = details(rows, [{"answer": "曹操"}] * 3)["question_words"]
    assert [(one["first_word"], one["rows"]) for one in found] == [("谁", 2), ("哪", 1)]

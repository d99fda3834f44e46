"""Rows and answers as a reader of the report sees them."""

from types import SimpleNamespace

import pytest

from formary.pipeline.telling import asked, sample, told
from formary.tasks.answer_span import AnswerSpan
from formary.tasks.chat import Chat
from formary.tasks.classify import Classify
from formary.tasks.embed import Embed
from formary.tasks.multiple_choice import MultipleChoice
from formary.tasks.preference import Preference
from formary.tasks.tag import Tag

CHAT = SimpleNamespace(asks=Chat.asks, pair=lambda row: Chat.pair(None, row))
WORDS = ["Ann", "left", "."]


@pytest.mark.parametrize(
    ("task", "row", "answer", "prompt", "text"),
    [
        (Tag, {"tokens": WORDS}, {"tags": ["B", "O", "O"], "probabilities": [1]}, "Ann left .", "Ann/B left/O ./O"),
        (Tag, {"tokens": "Ann left."}, {"tags": ["B", "O", "O"], "tokens": WORDS}, "Ann left.", "Ann/B left/O ./O"),
        (Classify, {"text": "a\n b"}, {"label": "spam", "probability": 0.987}, "a b", "spam (99%)"),
        (Classify, {"text": "a"}, {"labels": ["x", "y"], "probabilities": {}}, "a", "x, y"),
        (Classify, {"text": "a"}, {"labels": [], "probabilities": {}}, "a", "(nothing)"),
        (Classify, {"text": "a"}, {"value": 2.34567}, "a", "2.346"),
        (AnswerSpan, {"question": "Who?", "context": "Ann."}, {"answer": "Ann"}, "Who? · Ann.", "Ann"),
        (
            MultipleChoice,
            {"question": "2?", "choices": ["a", "b"]},
            {"choice": "b", "index": 1, "probability": 0.5},
            "2? · choices: a / b",
            "b (50%)",
        ),
        (CHAT, {"instruction": "Hi", "output": "Ho"}, {"text": "Hello"}, "Hi", "Hello"),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}]}, {"text": ""}, "Hi", "(nothing)"),
        (Embed, {"text": "a"}, {"vector": [0.0] * 384}, "a", "a vector of 384 numbers"),
        (
            Preference,
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            {"preferred": "rejected", "margin": -0.12},
            "p · chosen: c · rejected: r",
            "rejected (by 0.120)",
        ),
    ],
)
def test_a_sample_shows_the_question_and_then_the_answer(task, row, answer, prompt, text):
    assert sample(task, row, answer) == {"prompt": prompt, "text": f" → {text}", "settings": {}}


def test_long_rows_are_cut_and_each_part_keeps_its_share():
    row = {"question": "why " * 300, "context": "because " * 300}
    shown = asked(AnswerSpan, row)
    assert len(shown) < 520 and "why" in shown and "because" in shown and shown.count("…") == 2


def test_an_answer_of_no_known_kind_is_not_told():
    assert told({}, {"odd": 1}) == ""

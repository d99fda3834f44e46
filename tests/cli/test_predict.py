"""What `formary predict` prints for one answer."""

import pytest

from formary.cli.predict import _line
from formary.tasks.classify import Classify
from formary.tasks.tag import Tag


@pytest.mark.parametrize("tokens", ["Ann left.", ["Ann", "left", "."]], ids=["a text", "words"])
def test_every_word_is_shown_with_its_tag_also_where_a_text_was_given(tokens):
    answer = {"tags": ["B-PER", "O", "O"], "probabilities": [0.9, 0.8, 0.7]}
    answer |= {"tokens": ["Ann", "left", "."]} if isinstance(tokens, str) else {}
    assert _line(Tag, {"tokens": tokens}, answer) == "Ann/B-PER left/O ./O"


def test_a_label_is_shown_with_its_probability_and_the_text():
    answer = {"label": "spam", "probability": 0.98765, "probabilities": {}}
    assert _line(Classify, {"text": "win  a\nprize"}, answer) == "spam\t0.988\twin a prize"

"""Conversations in the forms that chat data comes in, and rows that say what is wrong with them."""

import json

import pytest

from formary.data.conversations import composed, form_of, messages_of
from formary.errors import DataError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": TALK}, ""),
        ({"messages": json.dumps(TALK)}, ""),
        ({"conversations": TALK}, "conversations"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "ShareGPT's (from, value)"),
        ({"messages": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}, "ShareGPT's (from, value)"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "instruction and output"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt and completion"),
        ({"question": "Hi", "answer": "Hello", "id": 3}, "question and answer"),
    ],
)  # fmt: skip
def test_usual_forms_are_read_as_messages(row, form):
    assert messages_of(row, "row 1") == TALK
    assert form_of(row) == form
    assert composed(row) == "Hi\nHello"


def test_an_instruction_may_have_a_system_text_and_something_it_is_about_and_no_answer_yet():
    row = {"system": "Be brief.", "instruction": "Sum up.", "input": "A long text."}
    assert messages_of(row, "row 1") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sum up.\n\nA long text."},
    ]
    assert messages_of({"messages": "Hi"}, "row 1") == TALK[:1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "bot", "content": "x"}]}, r"row 1: message 1 has the role 'bot'; roles are system, user, assistant: rename it, 'bot' is usually 'assistant'"),
        ({"messages": [*TALK, {"role": "Human", "content": "x"}]}, r"message 3 has the role 'Human'.* 'Human' is usually 'user'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"has the role 'tool'.* rename it or take the row out"),
        ({"messages": [{"content": "x"}]}, r"message 1 has no 'role'"),
        ({"messages": [{"role": "user"}]}, r"message 1 \(by the user\) has no 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, r"message 1 \(by the user\) has no 'content'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"has the content \['x'\], which is not a text"),
        ({"messages": ["Hi"]}, r"message 1 must have a role and content, and is 'Hi'"),
        ({"messages": []}, r"'messages' must be a list of messages, such as \{\"messages\""),
        ({"messages": {"user": "Hi"}}, r"'messages' must be a list of messages"),
        ({"text": "Hi", "id": 1}, r"there is no conversation; a row is .* this one has text, id\. Map another column with data\.columns\.messages"),
        ({"instruction": 3, "output": "x"}, r"field 'instruction' holds 3, not a text"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read_say_why_and_what_to_do(row, said):
    with pytest.raises(DataError, match=said):
        messages_of(row, "row 1")
    assert composed(row) == json.dumps(row)  # and are not lost before they are refused

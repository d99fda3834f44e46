"""Bodies: every bound is held, every unknown or unfollowed field is named, and nothing gets past the parser as a crash."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formary.serve import limits
from formary.serve.errors import ApiError
from formary.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    PredictRequest,
    TokenizeRequest,
    parse,
)

HELLO = [{"role": "user", "content": "hello"}]
KINDS = [CompletionRequest, ChatRequest, EmbeddingRequest, PredictRequest, TokenizeRequest, DetokenizeRequest]


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "a", **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": HELLO, **fields}).encode())


def refused(make: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        make(**fields)
    assert caught.value.status == 400
    return caught.value


OUT_OF_BOUNDS: list[tuple[str, Any]] = [
    *(("n", value) for value in (0, -1, limits.N + 1, 10**30, 1.5, True, "2")),
    *(("max_tokens", value) for value in (-1, limits.MAX_TOKENS + 1, 10**400, 2.0)),
    *(("temperature", value) for value in (-0.1, 101, 1e308, "hot", True)),
    *(("top_p", value) for value in (0, 1.01, -1)),
    *(("top_k", value) for value in (-2, 2**40, 1.5)),
    *(("min_p", value) for value in (-0.1, 1.1)),
    *(("typical_p", value) for value in (0, 2)),
    *(("repetition_penalty", value) for value in (0, -1, 1000)),
    *(("presence_penalty", value) for value in (-2.1, 3)),
    *(("frequency_penalty", value) for value in (-2.1, 3)),
    *(("seed", value) for value in (2**63, -(2**63) - 1, 0.5, "x")),
    *(("stop", value) for value in (["x"] * 17, [""], "x" * 513, [1], {"a": 1}, [["x"]])),
    *(("logit_bias", value) for value in ({"1": 101}, {"-1": 1}, {"x": 1}, {"1": "y"}, {"²": 1}, [1], {"9" * 30: 1})),
    ("logit_bias", {str(token): 1 for token in range(limits.LOGIT_BIAS + 1)}),
    ("stream", "yes"),
    ("choice", []),
    ("choice", ["x"] * (limits.CHOICE_TEXTS + 1)),
    ("regex", "x" * (limits.PATTERN_CHARACTERS + 1)),
    ("user", "x" * (limits.NAME_CHARACTERS + 1)),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"a": "x" * limits.SCHEMA_BYTES}}}),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_BOUNDS, ids=lambda value: str(value)[:20])
def test_a_value_out_of_bounds_is_refused_by_its_field(name: str, value: Any) -> None:
    for make in (completion, chat):
        error = refused(make, **{name: value})
        assert (error.param or "").startswith(name) or "not valid JSON" in error.message
        assert name in error.message or "digits" in error.message


@pytest.mark.parametrize("name", ["logprobs", "best_of"])
@pytest.mark.parametrize("value", [-1, 10**6, True])
def test_bounds_of_completions_alone(name: str, value: Any) -> None:
    assert refused(completion, **{name: value}).param == name


def test_a_field_that_nobody_knows_is_named_with_the_one_that_is_meant() -> None:
    error = refused(completion, temprature=1)
    assert error.param == "temprature" and "temperature" in error.message and error.code == "unknown_field"


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, EmbeddingRequest])
def test_what_is_not_followed_is_refused_by_name_unless_it_asks_for_nothing(kind: Any) -> None:
    whole = {"prompt": "a", "messages": HELLO, "input": "a"}
    minimal = {name: value for name, value in whole.items() if name in kind.model_fields}
    assert kind.unfollowed
    for name, neutral in kind.unfollowed.items():
        for value in (None, *neutral):
            parse(kind, json.dumps({**minimal, name: value}).encode())
        with pytest.raises(ApiError, match=f"{name}: is not implemented") as caught:
            parse(kind, json.dumps({**minimal, name: "something else"}).encode())
        assert (caught.value.status, caught.value.param) == (400, name)


def test_best_of_is_followed_only_where_it_changes_nothing() -> None:
    for fields in ({"best_of": 1}, {"best_of": 3, "n": 3}, {"best_of": None}):
        completion(**fields)
    assert refused(completion, best_of=3).param == "best_of"


def test_null_is_as_good_as_leaving_out() -> None:
    for kind, make in ((CompletionRequest, completion), (ChatRequest, chat)):
        named = set(kind.model_fields) - {"prompt", "messages"}
        assert make(**dict.fromkeys(named)).options == make().options


def test_fields_that_contradict_each_other_are_refused() -> None:
    assert refused(completion, stream_options={"include_usage": True}).param == "stream_options"
    assert refused(completion, regex="a", choice=["b"]).param == "response_format"
    assert refused(completion, max_tokens=0).param == "max_tokens"
    assert refused(chat, top_logprobs=3).param == "top_logprobs"
    assert refused(chat, response_format={"type": "json_schema"}).param == "response_format"
    completion(max_tokens=0, echo=True)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_a_prompt_has_four_forms(prompt: Any, read: Any) -> None:
    assert completion(prompt=prompt).prompt == read


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], ["a", [1]], [-1], [True], [1.0], {"a": 1}, None, 3, [[1], [-2]], ["a"] * 2049]
)
def test_other_forms_of_a_prompt_are_refused(prompt: Any) -> None:
    assert refused(completion, prompt=prompt).param == "prompt"


def test_parts_of_text_are_joined_and_other_parts_are_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "developer", "content": parts}]).messages[0].plain == {
        "role": "system",
        "content": "ab",
    }
    error = refused(chat, messages=[*HELLO, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    assert error.param == "messages[1].content" and "part 0" in error.message


@pytest.mark.parametrize(("sent", "read"), [('{"a": "é"}', {"a": "é"}), ("{}", {}), ("no JSON", "no JSON"), ("3", "3")])
def test_arguments_of_tool_calls_come_to_the_template_as_objects(sent: str, read: Any) -> None:
    def calls(arguments: Any) -> list[Any]:
        return [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]

    plain = chat(messages=[{"role": "assistant", "content": None, "tool_calls": calls(sent)}]).messages[0].plain
    assert plain == {"role": "assistant", "content": None, "tool_calls": calls(read)}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"\\ud800": 1, "prompt": "a"}',
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "logit_bias": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    ],
    ids=lambda raw: raw[:24].decode("latin-1"),
)
def test_what_is_not_good_json_is_refused(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, raw)
    assert caught.value.status == 400
    json.dumps(caught.value.body).encode()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(KINDS), st.data())
def test_any_json_is_either_read_or_refused(kind: Any, data: st.DataObject) -> None:
    names = st.sampled_from(sorted({field.alias or name for name, field in kind.model_fields.items()})) | st.text()
    body = data.draw(st.dictionaries(names, anything, max_size=6))
    try:
        parse(kind, json.dumps(body).encode())
    except ApiError as error:
        assert error.status == 400 and error.message

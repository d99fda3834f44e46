"""Calls of tools as OpenAI's own client gets them, in every form that is known, streamed or not; the rest stays text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from formary.infer.loaded import Model
from formary.serve.calling import Call, CallReader, MarkedText, as_templates_read, called_schema, form_of

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "北京"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS: list[Any] = [WEATHER, CLOCK]
NAMES = ["get_weather", "clock"]
ROME = Call("get_weather", '{"city": "Rome", "days": 2}')
JSON = '{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}'
CLOCK_JSON = '{"name": "clock", "arguments": {}}'

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ message.role }}:"
    "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}\n"
    "{% endfor %}{# MARK #}assistant:"
)
HERMES, MISTRAL, LLAMA, UNKNOWN = "<tool_call>", "[TOOL_CALLS]", "<|start_header_id|>", "nothing"

# what a template shows, what the model writes, the text and the calls that it is
WRITTEN: list[tuple[str, str, str | None, list[Call]]] = [
    (HERMES, f"<tool_call>\n{JSON}\n</tool_call>", None, [ROME]),
    (HERMES, f"<tool_call>{JSON}", None, [ROME]),  # models may end without the closing mark
    (HERMES, f"Let me see.\n\n<tool_call>\n{JSON}\n</tool_call>\n", "Let me see.", [ROME]),
    (
        HERMES,
        f"<tool_call>\n{JSON}\n</tool_call>\n<tool_call>\n{CLOCK_JSON}\n</tool_call>",
        None,
        [ROME, Call("clock", "{}")],
    ),
    (HERMES, f"<tool_call>\n[{JSON}, {CLOCK_JSON}]\n</tool_call>", None, [ROME, Call("clock", "{}")]),
    (HERMES, "<tool_call>\n{'no': json}\n</tool_call> so.", "<tool_call>\n{'no': json}\n</tool_call> so.", []),
    (
        HERMES,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [],
    ),
    (HERMES, "a < b and <tool_ ", "a < b and <tool_ ", []),
    (HERMES, JSON, JSON, []),
    (MISTRAL, f"[TOOL_CALLS] [{JSON}]", None, [ROME]),
    (MISTRAL, f"[TOOL_CALLS][{JSON}, {CLOCK_JSON}]", None, [ROME, Call("clock", "{}")]),
    (
        MISTRAL,
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome", "days": 2}[TOOL_CALLS]clock[ARGS]{}',
        None,
        [ROME, Call("clock", "{}")],
    ),
    (MISTRAL, "[TOOL_CALLS]clock[CALL_ID]abcdefghi[ARGS]{}", None, [Call("clock", "{}")]),
    (MISTRAL, "[TOOL_CALLS] [1, 2", "[TOOL_CALLS] [1, 2", []),
    (LLAMA, '{"name": "get_weather", "parameters": {"city": "Rome", "days": 2}}', None, [ROME]),
    (LLAMA, '<|python_tag|>{"name": "clock", "parameters": {}}', None, [Call("clock", "{}")]),
    (
        LLAMA,
        '{"name": "clock", "parameters": {}}; {"name": "clock", "parameters": {}}',
        None,
        [Call("clock", "{}")] * 2,
    ),
    (LLAMA, '{"name": "clock"}', '{"name": "clock"}', []),
    (LLAMA, '{"name": "clock", "parameters": {}} is JSON', '{"name": "clock", "parameters": {}} is JSON', []),
    (LLAMA, "It is {hot}.", "It is {hot}.", []),
    (UNKNOWN, JSON, None, [ROME]),
    (UNKNOWN, '{"type": "function", "function": {"name": "clock", "arguments": "{}"}}', None, [Call("clock", "{}")]),
]


def model_of(models: Any, mark: str) -> Model:
    plain = models["writer"](chat=False, context=2048)
    return Model(plain.network, plain.tokenizer, chat_template=TEMPLATE.replace("MARK", mark))


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    from .conftest import running, writer

    models = {"writer": writer}
    marks = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA, "unknown": UNKNOWN}
    with (
        running({name: model_of(models, mark) for name, mark in marks.items()}) as made,
        openai.OpenAI(base_url=made.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


NAME_OF = {HERMES: "hermes", MISTRAL: "mistral", LLAMA: "llama", UNKNOWN: "unknown"}


def plain(calls: Any) -> list[Call]:
    assert all(call.type == "function" and call.id for call in calls or [])
    assert len({call.id for call in calls or []}) == len(calls or [])
    return [Call(call.function.name, call.function.arguments) for call in calls or []]


@pytest.mark.parametrize(("mark", "text", "content", "calls"), WRITTEN, ids=range(len(WRITTEN)))
def test_what_a_model_writes_is_calls_or_text(
    client: openai.OpenAI, mark: str, text: str, content: str | None, calls: list[Call]
) -> None:
    asked: dict[str, Any] = {"model": NAME_OF[mark], "messages": HELLO, "tools": TOOLS, "max_tokens": 400}
    asked["extra_body"] = {"choice": [text]}  # which makes it write just that
    found = client.chat.completions.create(**asked).choices[0]
    assert found.message.content == content and plain(found.message.tool_calls) == calls
    assert found.finish_reason == ("tool_calls" if calls else "stop")

    with client.chat.completions.stream(**asked) as stream:  # the client's own joining of deltas
        for _ in stream:
            pass
        joined = stream.get_final_completion().choices[0]
    assert (joined.message.content or None) == content and plain(joined.message.tool_calls) == calls
    assert joined.finish_reason == found.finish_reason


def test_without_tools_or_with_none_everything_is_text(client: openai.OpenAI) -> None:
    text = f"<tool_call>\n{JSON}\n</tool_call>"
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        found = client.chat.completions.create(
            model="hermes", messages=HELLO, max_tokens=400, extra_body={"choice": [text]}, **fields
        )
        assert found.choices[0].message.content == text and found.choices[0].message.tool_calls is None


def test_at_most_one_call_where_that_is_asked(client: openai.OpenAI) -> None:
    text = f"<tool_call>\n[{JSON}, {CLOCK_JSON}]\n</tool_call>"
    found = client.chat.completions.create(
        model="hermes",
        messages=HELLO,
        tools=TOOLS,
        parallel_tool_calls=False,
        max_tokens=400,
        extra_body={"choice": [text]},
    )
    assert plain(found.choices[0].message.tool_calls) == [ROME]


def test_an_answer_that_is_cut_says_so(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="hermes",
        messages=HELLO,
        tools=TOOLS,
        max_tokens=20,
        extra_body={"choice": [f"<tool_call>\n{JSON}\n</tool_call>"]},
    )
    assert found.choices[0].finish_reason == "length" and found.choices[0].message.tool_calls is None
    assert (found.choices[0].message.content or "").startswith("<tool_call>\n{")


@pytest.mark.parametrize("name", ["hermes", "mistral", "llama", "unknown"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "allowed"),
    [("required", NAMES), ({"type": "function", "function": {"name": "get_weather"}}, ["get_weather"])],
    ids=["required", "named"],
)
def test_a_call_that_has_to_come_comes_and_follows_the_schema(
    client: openai.OpenAI, name: str, stream: bool, choice: Any, allowed: list[str]
) -> None:
    asked: dict[str, Any] = {"model": name, "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "n": 3}
    asked |= {"temperature": 1.0, "seed": 4, "max_tokens": 200}
    if stream:
        with client.chat.completions.stream(**asked) as streamed:
            for _ in streamed:
                pass
            found = streamed.get_final_completion()
    else:
        found = client.chat.completions.create(**asked)
    for answer in found.choices:
        assert answer.finish_reason == "tool_calls" and not answer.message.content
        (call,) = answer.message.tool_calls
        assert call.function.name in allowed and (len(call.id) == 9) == (name == "mistral")
        arguments = json.loads(call.function.arguments)
        if call.function.name == "clock":
            assert arguments == {}
        else:
            assert arguments["city"] in ("Rome", "北京") and 1 <= arguments["days"] <= 9


STRICT = {"type": "function", "function": {"name": "f", "strict": True}}
RECURSIVE = {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "if": {}}}}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tool_choice": "required"}, "tool_choice", "no tool"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tool"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice", "'rm'"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "required"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "form",
        ),
        ({"tools": [STRICT]}, "tools", "strict"),
        ({"tools": [CLOCK, RECURSIVE], "tool_choice": "required"}, "tools", r"tools: g: .*'if'"),
        ({"tools": [{"type": "function"}]}, "tools", "tool 0: function"),
        ({"tools": [CLOCK, {"type": "function", "function": {"name": "a b"}}]}, "tools", "tool 1: function.name"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools", "tool 0: type"),
    ],
)
def test_what_cannot_be_followed_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.chat.completions.create(model="hermes", messages=HELLO, max_tokens=1, **fields)
    assert str(caught.value.param).startswith(param)


def test_a_strict_tool_can_be_called_where_it_has_to_be(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="hermes", messages=HELLO, tools=[STRICT], tool_choice="required", max_tokens=99
    )
    assert plain(found.choices[0].message.tool_calls) == [Call("f", "{}")]


def test_a_conversation_goes_on_after_a_call(client: openai.OpenAI, models: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "CET"}'}}
    messages: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    found = client.chat.completions.create(model="hermes", messages=messages, max_tokens=1)
    read = model_of(models, HERMES).render_chat(
        [HELLO[0], {**messages[1], "tool_calls": as_templates_read([call])}, messages[2]]
    )
    assert '"arguments": {"zone": "CET"}' in read  # an object to the template, not a text in quotes
    assert found.usage.prompt_tokens == len(model_of(models, HERMES).tokenizer.encode(read))


# --- the reader, without a server ---


def read(pieces: list[str], *, bare: bool) -> tuple[str, list[Call]]:
    reader = CallReader(NAMES, bare=bare)
    found = [one for piece in pieces for one in reader.push(piece)] + reader.push("", final=True)
    assert not reader._held
    return "".join(one for one in found if isinstance(one, str)), [one for one in found if isinstance(one, Call)]


@given(st.sampled_from(WRITTEN), st.data())
def test_it_does_not_matter_where_a_text_is_cut(case: Any, data: Any) -> None:
    mark, text, content, calls = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)])]
    assert read(pieces, bare=form_of(mark).bare) == (content or "", calls)


@given(
    st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "{", "}", "[", "]", " ", JSON, "clock", "é"]
        )
    ),
    st.booleans(),
)
def test_whatever_is_no_call_is_told_whole(pieces: list[str], bare: bool) -> None:
    text, calls = read(pieces, bare=bare)
    assert (text, calls) == read(["".join(pieces)], bare=bare)
    if not calls:
        assert text == "".join(pieces)


def test_text_comes_as_soon_as_it_can_be_no_call() -> None:
    reader = CallReader(NAMES, bare=True)
    assert reader.push("It") == ["It"] and reader.push(" is <") == [" is"] and reader.push("b") == [" <b"]
    reader = CallReader(NAMES, bare=False)
    assert reader.push(f"So <tool_call>{JSON}</tool_call") == ["So"] and reader.push(">") == [ROME]


def test_endless_brackets_are_not_read_again_and_again() -> None:
    reader = CallReader(NAMES, bare=False)
    for piece in ["[TOOL_CALLS]", *["[" * 20] * 3000, *["]"] * 60_000]:
        assert reader.push(piece) == []
    assert reader.push("", final=True) == ["[TOOL_CALLS]" + "[" * 60_000 + "]" * 60_000]


def test_marks_that_are_special_tokens_are_seen(models: Any) -> None:
    from formary.data import tokenizer as tokenizers
    from formary.recipe import schema

    words = tokenizers.train(["The cat"], schema.Tokenizer(kind="bytes", vocab_size=300), task="causal_lm")
    words.backend.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    fresh = type(words)(words.backend, words.config)
    mark = words.backend.token_to_id("[TOOL_CALLS]")
    marked, decoder = MarkedText(fresh), fresh.stream_decoder(skip_special_tokens=True)
    reader = CallReader(NAMES, bare=False)
    found = []
    for token in [mark, *fresh.encode(f"[{JSON}]")]:
        found += reader.push(marked(token, decoder.push(token)))
    assert found == [ROME]


def test_the_schema_of_a_call_is_that_of_its_tool() -> None:
    import jsonschema

    for name, form in ((HERMES, "arguments"), (LLAMA, "parameters")):
        made = called_schema(TOOLS, form_of(name))
        check = jsonschema.Draft202012Validator(made)
        assert check.is_valid({"name": "get_weather", form: {"city": "Rome", "days": 3}})
        assert not check.is_valid({"name": "get_weather", form: {"city": "Rome", "days": 30}})
        assert not check.is_valid({"name": "clock", form: {"city": "Rome", "days": 3}})
    assert jsonschema.Draft202012Validator(called_schema([CLOCK], form_of(MISTRAL))).is_valid([json.loads(CLOCK_JSON)])

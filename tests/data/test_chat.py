"""The chat renderer: what templates in the wild need, and nothing through which one could get out."""

from __future__ import annotations

from typing import Any

import pytest

from formary.data.chat import CHATML as OURS
from formary.data.chat import render, rendered_answers, template_in
from formary.errors import CheckpointError, FormaryError, RequestError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello <b>&"}]


def test_chatml_renders_messages_and_opens_the_answer() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello <b>&<|im_end|>\n"
    assert render(CHATML, messages) == text + "<|im_start|>assistant\n"
    assert render(CHATML, messages, add_generation_prompt=False) == text


def test_blocks_leave_no_blank_lines_and_loops_can_break() -> None:
    template = """{% for message in messages %}
    {% if loop.index > 1 %}
        {% break %}
    {% endif %}
{{ message.role }}
{% endfor %}
"""
    assert render(template, HELLO * 3) == "user\n"


def test_json_is_written_as_the_model_knows_it() -> None:
    assert render("{{ messages | tojson }}", [{"role": "user", "content": "é <b>"}]) == (
        '[{"role": "user", "content": "é <b>"}]'
    )
    assert render("{{ tools | tojson(indent=1) }}", HELLO, tools=[{"a": 1}]) == '[\n {\n  "a": 1\n }\n]'


def test_variables_namespaces_dates_and_the_generation_tag() -> None:
    template = (
        "{% set ns = namespace(count=0) %}{% for m in messages %}{% set ns.count = ns.count + 1 %}{% endfor %}"
        "{{ bos_token }}{{ ns.count }}{% generation %}a{{ dict(b=2).b }}{% endgeneration %}{{ strftime_now('%Y') | length }}"
    )
    assert render(template, HELLO * 2, bos_token="<s>") == "<s>2a24"


def test_what_the_template_refuses_is_said_in_its_words() -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message comes first') }}{% endif %}"
    with pytest.raises(RequestError, match="a system message comes first"):
        render(template, HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ ('%s' | attr('format'))('x').__class__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% set ns = namespace(**{'__class__': 1}) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append({'role': 'system', 'content': 'obey'}) }}",
        "{{ lipsum.__globals__ }}",
        "{{ cycler.__init__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str) -> None:
    with pytest.raises(CheckpointError):
        render(template, HELLO)


def test_a_format_string_does_not_reach_attributes() -> None:
    class Loud:
        secret = "secret"

    with pytest.raises(RequestError, match="nothing but text"):
        render("{{ messages[0].content.secret }}", [{"role": "user", "content": Loud()}])


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ undefined_function() }}", "{{ 1 / 0 }}", "{{ messages[0].content + 1 }}"]
)
def test_a_broken_template_is_a_clear_error(template: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        render(template, HELLO)


@pytest.mark.parametrize("messages", [["hi"], [{"content": "no role"}], [{"role": 3, "content": "x"}]])
def test_messages_of_another_shape_are_named(messages: list[Any]) -> None:
    with pytest.raises(FormaryError, match=r"messages\[0\]"):
        render(CHATML, messages)


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": " See you\n"},
    {"role": "user", "content": "So long"},
]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = (  # as Qwen3, which takes the thoughts out of earlier answers
    "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else m.content[:2] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def written(template: str, messages: list[dict[str, str]]) -> list[list[str]]:
    return [[r.text[start:stop] for start, stop in r.answers] for r in rendered_answers(template, messages)]


@pytest.mark.parametrize("template", [CHATML, SMOLLM2, OURS])
def test_the_assistant_writes_its_answers_and_what_ends_them(template: str) -> None:
    wanted = [["Hi!<|im_end|>\n", " See you\n<|im_end|>\n"]]
    assert written(template, TALK) == wanted
    assert written(template, TALK[1:]) == wanted  # where SmolLM2 puts a system message of its own
    (rendered,) = rendered_answers(template, TALK)
    assert rendered.text == render(template, TALK[:5], add_generation_prompt=False)
    for place, (start, stop) in zip((2, 4), rendered.answers, strict=True):
        assert rendered.text[:start] == render(template, TALK[:place])  # the prompt that asks for it
        assert rendered.text[:stop] == render(template, TALK[: place + 1], add_generation_prompt=False)


def test_marks_of_the_template_decide_where_it_has_them() -> None:
    assert written(MARKED, TALK) == [["Hi!</s>", " See you\n</s>"]]
    (rendered,) = rendered_answers(MARKED, TALK)
    assert rendered.text == render(MARKED, TALK, add_generation_prompt=False)
    assert written(MARKED, TALK[:2]) == []


def test_where_earlier_turns_are_rewritten_each_answer_is_a_text_of_its_own() -> None:
    talk = [{**message, "content": message["content"] * 2} for message in TALK]
    assert written(FORGETFUL, talk) == [["Hi!Hi!"], [" See you\n See you\n"]]
    assert rendered_answers(FORGETFUL, talk)[1].text.startswith(render(FORGETFUL, talk[:4]))


def test_answers_are_to_a_user_and_must_follow_their_prompt() -> None:
    assert written(CHATML, TALK[2:3]) == written(CHATML, TALK[:2]) == []
    assert written(CHATML, TALK[2:5]) == [[" See you\n<|im_end|>\n"]]
    backwards = "{% if add_generation_prompt %}>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(CheckpointError, match=r"message 3\) does not follow the prompt.*generation"):
        rendered_answers(backwards, TALK)


def test_the_default_of_several_templates_is_taken() -> None:
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert template_in({"chat_template": named}) == "b"
    assert template_in({"chat_template": "c"}) == "c" and template_in({}) is None

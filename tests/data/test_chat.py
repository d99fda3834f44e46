"""The chat renderer: what templates in the wild need, and nothing through which one could get out."""

from __future__ import annotations

from typing import Any

import pytest

from formary.data.chat import render
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

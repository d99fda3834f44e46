"""OpenAI's own client against a running server: what it gets is what the model gives in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from formary.infer.loaded import Model

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SAMPLED: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(served: Any) -> Model:
    return served.service.models["writer"]


def test_models_are_listed_and_found(client: openai.OpenAI, served: Any) -> None:
    listed = [entry.id for entry in client.models.list()]
    assert listed == list(served.service.models)
    found = client.models.retrieve("writer")
    assert (found.id, found.owned_by) == ("writer", "formary")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("options", [{"max_tokens": 12, "temperature": 0}, SAMPLED], ids=["greedy", "seeded"])
def test_a_completion_is_what_the_model_writes(client: openai.OpenAI, model: Model, options: dict[str, Any]) -> None:
    found = client.completions.create(model="writer", prompt="The cat", **options)
    alone = model.generate("The cat", **options)
    assert found.choices[0].text == alone.text and found.choices[0].finish_reason == alone.finish_reason
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (7, len(alone.tokens))
    assert found.object == "text_completion" and found.model == "writer"


def test_prompts_of_all_forms_and_n_come_in_order(client: openai.OpenAI, model: Model) -> None:
    texts = ["The cat", "dog", "猫"]
    tokens = [list(model.prompt_tokens(text)) for text in texts]
    alone = [made.text for text in texts for made in model.generate(text, n=2, **SAMPLED)]
    for prompt in (texts, tokens):
        found = client.completions.create(model="writer", prompt=prompt, n=2, **SAMPLED)
        assert [choice.text for choice in found.choices] == alone
        assert [choice.index for choice in found.choices] == list(range(6))
    one = client.completions.create(model="writer", prompt=tokens[0], **SAMPLED)
    assert one.choices[0].text == alone[0]


def test_more_answers_than_slots_are_those_of_the_model(client: openai.OpenAI, model: Model) -> None:
    alone = [made.text for text in ("The cat", "dog") for made in model.generate(text, n=11, **SAMPLED)]
    found = client.completions.create(model="writer", prompt=["The cat", "dog"], n=11, **SAMPLED)
    assert [choice.text for choice in found.choices] == alone and len(set(alone)) > 11
    texts = [""] * 22
    for chunk in client.completions.create(
        model="writer", prompt=["The cat", "dog"], n=11, stream=True, echo=True, logprobs=1, **SAMPLED
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["The cat" + text for text in alone[:11]] + ["dog" + text for text in alone[11:]]


def test_all_settings_reach_the_model(client: openai.OpenAI, model: Model) -> None:
    settings: dict[str, Any] = {"top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    ours: dict[str, Any] = {"top_k": 40, "min_p": 0.01, "typical_p": 0.95, "repetition_penalty": 1.2}
    options = {**SAMPLED, **settings}
    found = client.completions.create(
        model="writer", prompt="The", logit_bias={"70": 3}, stop=["xyz"], extra_body=ours, **options
    )
    alone = model.generate("The", logit_bias={70: 3.0}, stop=["xyz"], **options, **ours)
    assert found.choices[0].text == alone.text
    assert alone.text != model.generate("The", **options, **ours).text
    assert alone.text != model.generate("The", logit_bias={70: 3.0}, **options).text


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: openai.OpenAI, model: Model) -> None:
    whole = model.generate("The cat", max_tokens=30, temperature=1.0, seed=1).text
    stop = whole[5:7]
    found = client.completions.create(model="writer", prompt="The cat", max_tokens=30, temperature=1, seed=1, stop=stop)
    assert found.choices[0].text == whole[: whole.find(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_without_a_seed_answers_differ(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(model="writer", prompt="The", max_tokens=20, temperature=1).choices[0].text
        for _ in range(4)
    }
    assert len(texts) > 1


def test_logprobs_are_the_models_own(client: openai.OpenAI, model: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    found = client.completions.create(model="writer", prompt="The", logprobs=3, **options).choices[0]
    alone = model.generate("The", logprobs=3, **options)
    assert found.logprobs is not None and alone.logprobs is not None and alone.top_logprobs is not None
    assert found.logprobs.token_logprobs == pytest.approx(list(alone.logprobs))
    tops = found.logprobs.top_logprobs or []
    assert [max(top.values()) for top in tops if top] == pytest.approx([top[0][1] for top in alone.top_logprobs])
    assert found.logprobs.token_ids == list(alone.tokens)  # type: ignore[attr-defined]
    chat = client.chat.completions.create(model="writer", messages=HELLO, logprobs=True, top_logprobs=2, **options)
    spoken = model.chat(HELLO, logprobs=2, **options)
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert [entry.logprob for entry in content] == pytest.approx(list(spoken.logprobs))  # type: ignore[union-attr]
    assert [len(entry.top_logprobs) for entry in content] == [2] * 8


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_echo_repeats_the_prompt_with_its_scores(client: openai.OpenAI, model: Model, max_tokens: int) -> None:
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
    found = client.completions.create(model="writer", prompt="The cat", echo=True, logprobs=1, **options).choices[0]
    alone = model.generate("The cat", max_tokens=max(max_tokens, 1), temperature=0, echo=True, logprobs=1)
    assert found.logprobs is not None and alone.prompt_logprobs is not None and alone.logprobs is not None
    scores = [*alone.prompt_logprobs, *alone.logprobs][: 7 + max_tokens]
    assert found.logprobs.token_logprobs is not None
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:] == pytest.approx(scores[1:])
    assert (found.logprobs.text_offset or [])[:7] == list(range(7))
    assert found.text == (alone.text if max_tokens else "The cat")
    assert found.finish_reason == "length"


def test_echo_without_logprobs_and_without_writing(client: openai.OpenAI) -> None:
    found = client.completions.create(model="writer", prompt=["ab", "c"], echo=True, max_tokens=0)
    assert [choice.text for choice in found.choices] == ["ab", "c"] and found.choices[0].logprobs is None
    assert found.usage is not None and found.usage.completion_tokens == 0


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_joined_is_the_whole(client: openai.OpenAI, echo: bool) -> None:
    options: dict[str, Any] = {**SAMPLED, "n": 3, "logprobs": 2, "echo": echo}
    whole = client.completions.create(model="writer", prompt=["The cat", "猫"], **options)
    texts, tokens, finishes, usages = [""] * 6, [[] for _ in range(6)], [None] * 6, []
    for chunk in client.completions.create(
        model="writer", prompt=["The cat", "猫"], stream=True, stream_options={"include_usage": True}, **options
    ):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            finishes[choice.index] = finishes[choice.index] or choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]  # type: ignore[union-attr]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert usages[:-1] == [None] * (len(usages) - 1) and usages[-1].total_tokens == whole.usage.total_tokens


def test_a_chat_is_what_the_model_answers_streamed_or_not(client: openai.OpenAI, model: Model) -> None:
    alone = model.chat(HELLO, **SAMPLED)
    found = client.chat.completions.create(model="writer", messages=HELLO, **SAMPLED)
    assert found.choices[0].message.content == alone.text  # type: ignore[union-attr]
    assert found.choices[0].message.role == "assistant" and found.object == "chat.completion"
    chunks = list(client.chat.completions.create(model="writer", messages=HELLO, stream=True, **SAMPLED))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone.text  # type: ignore[union-attr]
    assert chunks[-1].choices[0].finish_reason == "length" and all(chunk.usage is None for chunk in chunks)


def test_max_completion_tokens_is_the_new_name(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="writer", messages=HELLO, max_completion_tokens=3, max_tokens=9)
    assert found.usage is not None and found.usage.completion_tokens == 3


def test_tools_are_written_into_the_prompt(client: openai.OpenAI, model: Model) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]

    def read(**fields: Any) -> int:
        found = client.chat.completions.create(model="writer", messages=HELLO, max_tokens=1, **fields)
        assert found.usage is not None
        return found.usage.prompt_tokens

    assert read(tools=tools) == len(model.chat_tokens(HELLO, tools=tools)) > read()
    assert read(tools=tools, tool_choice="none") == read()
    opened = model.render_chat(HELLO, tools=tools)  # this template shows no form of calls, so nothing opens one
    assert read(tools=tools, tool_choice="required") == len(model.tokenizer.encode(opened))


def test_a_template_without_tools_refuses_them(start: Any, models: Any) -> None:
    plain = models["writer"](chat=False)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = Model(plain.network, plain.tokenizer, chat_template=template)
    with start({"writer": model}) as made:
        body = {"messages": HELLO, "max_tokens": 1}
        assert made.post("/v1/chat/completions", body).status_code == 200
        found = made.post("/v1/chat/completions", {**body, "tools": [{"type": "function", "function": {"name": "f"}}]})
        assert found.status_code == 400 and found.json()["error"]["param"] == "tools"


def test_vectors_are_the_same_as_floats_and_as_base64(client: openai.OpenAI, served: Any) -> None:
    texts = ["a cat", "the mat", "red"]
    alone = [answer["vector"] for answer in served.service.models["embed"].predict(texts)]
    for form in ("float", "base64"):
        found = client.embeddings.create(model="embed", input=texts, encoding_format=form)  # type: ignore[arg-type]
        assert [entry.index for entry in found.data] == [0, 1, 2]
        for entry, vector in zip(found.data, alone):
            values = entry.embedding
            if isinstance(values, str):
                import base64

                import numpy as np

                values = np.frombuffer(base64.b64decode(values), dtype="<f4").tolist()
            assert values == pytest.approx(vector, abs=1e-5)
    assert found.usage.total_tokens > 0
    one = client.embeddings.create(model="embed", input="a cat")
    assert one.data[0].embedding == pytest.approx(alone[0], abs=1e-5)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="embed", input="a", dimensions=4)
    assert caught.value.param == "dimensions"


def test_the_wrong_route_says_what_the_model_can_do(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="/v1/predict/classify"):
        client.completions.create(model="classify", prompt="a")
    with pytest.raises(openai.BadRequestError, match=r"no chat template.*/v1/completions"):
        client.chat.completions.create(model="plain", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        client.embeddings.create(model="writer", input="a")


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="writer", prompt="a", suffix="b")
    assert caught.value.param == "suffix" and caught.value.code == "unsupported_field"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="writer", prompt=[10**6])
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="writer", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="writer", prompt="a", logit_bias={"999999": 1})
    assert caught.value.param == "logit_bias"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="../../etc/passwd", prompt="a")


def test_max_tokens_beyond_the_context_end_at_it(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="writer", prompt="x" * 500, max_tokens=10_000, extra_body={"ignore_eos": True}
    )
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None and 12 <= found.usage.completion_tokens <= 13


def test_defaults_are_the_models(start: Any, models: Any) -> None:
    plain = models["writer"]()
    defaults = {"do_sample": True, "temperature": 1.5, "top_k": 7, "max_new_tokens": 5}
    model = Model(plain.network, plain.tokenizer, defaults=defaults)
    with start({"writer": model}) as made:
        body: dict[str, Any] = {"prompt": "The cat", "seed": 3}
        alone = model.generate("The cat", seed=3)
        assert made.post("/v1/completions", body).json()["choices"][0]["text"] == alone.text
        greedy = made.post("/v1/completions", {**body, "temperature": 0, "max_tokens": 9}).json()["choices"][0]
        assert greedy["text"] == model.generate("The cat", temperature=0, max_tokens=9).text != alone.text

"""The routes that OpenAI's client does not know: rows, tokens, health, metrics, the description; constrained answers."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

TEXT = "The cat sat on the mat. The dog sat on the log."
ASKED: dict[str, list[Any]] = {
    "classify": ["good cat", {"text": "bad dog"}],
    "tag": [{"tokens": ["Ann", "sat"]}],
    "embed": ["a cat"],
    "translate": ["the cat", {"source": "the log"}],
    "answer_span": [{"question": "who sat", "context": "the cat sat"}],
}


@pytest.mark.parametrize("task", ASKED)
def test_rows_are_answered_as_the_model_answers_them(served: Any, task: str) -> None:
    found = served.post(f"/v1/predict/{task}", {"inputs": ASKED[task]})
    assert found.status_code == 200, found.text
    answered = found.json()
    assert (answered["model"], answered["task"]) == (task, task)
    alone = served.service.models[task].predict(ASKED[task])
    assert len(answered["answers"]) == len(alone)
    for ours, theirs in zip(answered["answers"], alone):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float):
                assert ours[name] == pytest.approx(value, abs=1e-4)
            elif isinstance(value, str | int):
                assert ours[name] == value


def test_more_rows_than_one_batch_come_in_order_and_a_bad_one_is_named(served: Any) -> None:
    texts = [f"the cat {number}" for number in range(150)]
    answers = served.post("/v1/predict/classify", {"inputs": texts}).json()["answers"]
    alone = served.service.models["classify"].predict(texts)
    assert [a["label"] for a in answers] == [a["label"] for a in alone]
    wrong = served.post("/v1/predict/classify", {"inputs": [*texts[:99], {"wrong": 1}]})
    assert wrong.status_code == 400 and "row 100" in wrong.json()["error"]["message"]


def test_requests_at_the_same_time_are_answered_each_with_its_own(served: Any) -> None:
    texts = [TEXT[number : number + 20] for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: served.post("/v1/predict/embed", {"inputs": [text]}).json(), texts))
    vectors = [tuple(answer["answers"][0]["vector"]) for answer in found]
    for vector, text in zip(vectors, texts):
        (expected,) = served.service.models["embed"].predict([text])
        assert vector == pytest.approx(expected["vector"], abs=1e-5)
    assert len(set(vectors)) == 24


def test_options_are_for_tasks_that_write(served: Any) -> None:
    beams = served.post("/v1/predict/translate", {"inputs": ["the cat"], "beams": 2, "max_tokens": 5})
    assert beams.status_code == 200
    (alone,) = served.service.models["translate"].predict(["the cat"], beams=2, max_tokens=5)
    assert beams.json()["answers"][0]["text"] == alone["text"]
    refused = served.post("/v1/predict/classify", {"inputs": ["a"], "beams": 2})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "beams"


def test_a_model_that_only_writes_predicts_nothing(served: Any) -> None:
    found = served.post("/v1/predict/writer", {"inputs": ["a"]})
    assert found.status_code == 400 and "/v1/completions" in found.json()["error"]["message"]


def test_tokens_come_and_go(served: Any) -> None:
    model = served.service.models["writer"]
    found = served.post("/tokenize", {"model": "writer", "prompt": "The 猫"}).json()
    assert found["tokens"] == list(model.prompt_tokens("The 猫")) and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 512 and found["texts"][:3] == ["T", "h", "e"]
    back = served.post("/detokenize", {"model": "writer", "tokens": found["tokens"]}).json()
    assert back["prompt"] == "The 猫"
    messages = [{"role": "user", "content": "hello"}]
    talk = served.post("/tokenize", {"model": "writer", "messages": messages}).json()
    assert talk["tokens"] == list(model.chat_tokens(messages))
    outside = served.post("/detokenize", {"model": "writer", "tokens": [10**6]})
    assert outside.status_code == 400 and "vocabulary" in outside.json()["error"]["message"]


def test_where_several_are_served_the_model_has_to_be_named(served: Any, start: Any, models: Any) -> None:
    assert served.post("/v1/completions", {"prompt": "a"}).json()["error"]["param"] == "model"
    with start({"only": models["writer"]()}) as made:
        assert made.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_models_say_what_they_can_do(served: Any) -> None:
    told = {entry["id"]: entry for entry in served.client.get("/v1/models").json()["data"]}
    assert told["writer"]["abilities"] == ["completions", "chat"] and told["plain"]["abilities"] == ["completions"]
    assert told["embed"]["abilities"] == ["predict", "embeddings"]
    assert told["answer_span"]["asks"] == ["question", "context"]


def test_metrics_count_what_happens(served: Any) -> None:
    def value(name: str, labels: str) -> float:
        found = re.search(rf"^formary_{name}\{{{re.escape(labels)}\}} (\S+)$", served.client.get("/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    route, model = 'route="/v1/completions",status="200"', 'model="writer"'
    before = value("requests_total", route), value("generated_tokens_total", model)
    body = {"model": "writer", "prompt": "The cat", "max_tokens": 5, "ignore_eos": True}
    assert served.post("/v1/completions", body).status_code == 200
    assert value("requests_total", route) == before[0] + 1
    assert value("generated_tokens_total", model) == before[1] + 5
    assert value("free_slots", model) == 8 and value("queued_tokens", model) == 0
    served.client.get("/no/such/path")
    assert "/no/such/path" not in served.client.get("/metrics").text


def test_health_says_whether_it_takes_requests(start: Any, models: Any) -> None:
    with start({"writer": models["writer"]()}) as made:
        assert made.client.get("/health").json() == {"status": "ok", "models": ["writer"]}
        for state in ("loading", "draining"):
            made.service.state = state
            assert (made.client.get("/health").status_code, made.client.get("/health").json()["status"]) == (503, state)
            for path in (
                "/v1/completions",
                "/v1/chat/completions",
                "/v1/embeddings",
                "/v1/predict/writer",
                "/tokenize",
            ):
                refused = made.post(path, {})
                assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0, path
                assert refused.json()["error"]["code"] == state


def test_the_description_names_every_field_with_its_bounds(served: Any) -> None:
    told = served.client.get("/openapi.json").json()
    schema = told["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is False and "prompt" in schema["required"]
    assert {"type": "integer", "minimum": 1, "maximum": 128} in schema["properties"]["n"]["anyOf"]
    assert "$ref" not in json.dumps(told["paths"]["/v1/chat/completions"]["post"]["requestBody"])
    for path in ("/docs", "/redoc"):
        assert served.client.get(path).status_code == 404


SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog"]}, "old": {"type": "boolean"}},
    "required": ["animal", "old"],
    "additionalProperties": False,
}


def test_an_answer_follows_the_form_that_is_asked_for(served: Any) -> None:
    def written(path: str, **fields: Any) -> str:
        ask = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
        body = {"model": "writer", "max_tokens": 200, "temperature": 1, "seed": 1, **ask, **fields}
        found = served.post(path, body)
        assert found.status_code == 200, found.text
        (choice,) = found.json()["choices"]
        assert choice["finish_reason"] == "stop"
        return choice["message"]["content"] if "chat" in path else choice["text"]

    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    for path in ("/v1/chat/completions", "/v1/completions"):
        made = json.loads(written(path, response_format=form))
        assert made.keys() == {"animal", "old"} and made["animal"] in ("cat", "dog") and made["old"] in (True, False)
        assert written(path, choice=["cat", "dog"]) in ("cat", "dog")
        assert re.fullmatch(r"[0-9]{3}-[a-c]{2}", written(path, regex=r"[0-9]{3}-[a-c]{2}"))


def test_a_form_that_cannot_be_followed_is_refused(served: Any) -> None:
    for fields in (
        {"regex": "("},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no such type"}}}},
    ):
        found = served.post("/v1/completions", {"model": "writer", "prompt": "a", **fields})
        assert found.status_code == 400, found.text


def test_a_masked_model_fills_in(start: Any, models: Any) -> None:
    from formary.infer.loaded import Model
    from formary.model.topologies import build
    from formary.recipe.presets import preset

    words = models["answerer"]("classify").tokenizer
    network = build(preset("bert-mini", vocab_size=words.vocab_size, context=64, size="1x32"), seed=0).eval()
    model = Model(network, words)
    with start({"filler": model}) as made:
        found = made.post("/v1/predict/filler", {"inputs": ["the [MASK]at"]}).json()
        (blanks,) = model.fill("the [MASK]at")
        assert found["task"] == "fill"
        assert [c["text"] for c in found["answers"][0]["blanks"][0]] == [c.text for c in blanks]
        assert made.post("/v1/predict/filler", {"inputs": ["no mask"]}).status_code == 400

"""What strangers may try: no key, other hosts, strange names, huge bodies, hostile templates. Nothing gives, nothing crashes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from formary.infer.loaded import Model
from formary.serve import limits

OPEN = {"/health", "/", "/static/{name}"}


def walked(made: Any) -> list[tuple[str, str]]:
    found = []

    def walk(routes: Any) -> None:
        for route in routes:
            inner = getattr(route, "original_router", route)  # of routes that were included
            if hasattr(inner, "routes") and not hasattr(route, "methods"):
                walk(inner.routes)
            for method in sorted(getattr(route, "methods", None) or ()):
                found.append((method, route.path))

    walk(app_of(made).routes)
    return found


def app_of(made: Any) -> Any:
    return made.server.config.app


def test_every_route_but_health_and_the_page_asks_for_the_key(start: Any, models: Any) -> None:
    with start({"writer": models["writer"]()}, api_keys=("first key", "second")) as made:
        routes = walked(made)
        known = {"/v1/completions", "/metrics", "/openapi.json", "/tokenize", "/playground/stages", "/static/{name}"}
        assert known <= {path for _, path in routes}
        for method, path in routes:
            real = path.replace("{model:path}", "writer").replace("{name}", "index.html")
            status = made.client.request(method, real).status_code
            if path in OPEN:
                assert status != 401, path
                continue
            assert status == 401, (method, path)
            for wrong in (
                "Bearer wrong",
                "Bearer first",
                "first key",
                "Basic first key",
                "Bearer first keyx",
                "Bearer",
            ):
                assert made.client.request(method, real, headers={"Authorization": wrong}).status_code == 401
            for key in ("first key", "second"):
                allowed = made.client.request(method, real, headers={"Authorization": f"Bearer {key}"})
                assert allowed.status_code != 401, (method, path)
        unknown = made.client.get("/no/such/path")
        assert unknown.status_code == 401
        error = unknown.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc%2fpasswd", "%00", "writer%00", "%2e%2e/writer", "a" * 3000, "%ff", "writer/"]
)
@pytest.mark.parametrize("path", ["/v1/models/", "/v1/predict/"])
def test_strange_names_are_names_of_no_model(served: Any, name: str, path: str) -> None:
    if path == "/v1/models/":
        found = served.client.get(path + name)
    else:
        found = served.post(path + name, {"inputs": ["a"]})
    assert found.status_code == 404 and "error" in found.json()


@pytest.mark.parametrize("name", ["../../etc/passwd", "writer\x00", "\u202ewriter", "", " writer"])
def test_strange_names_in_bodies_too(served: Any, name: str) -> None:
    found = served.post("/v1/completions", {"model": name, "prompt": "a"})
    assert found.status_code == 404 and found.json()["error"]["code"] == "model_not_found"


def test_large_bodies_are_refused_whether_they_say_so_or_not(served: Any) -> None:
    headers = {"Content-Type": "application/json"}
    raw = json.dumps({"model": "writer", "prompt": "x" * 10_000_000}).encode()
    assert served.client.post("/v1/completions", content=raw, headers=headers).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield raw[:100_000]

    with contextlib.suppress(httpx.TransportError):  # the server may hang up on one who goes on sending
        assert served.client.post("/v1/completions", content=pieces(), headers=headers).status_code == 413
    assert served.client.get("/health").status_code == 200


def test_a_long_prompt_within_the_bounds_is_told_to_be_too_long(served: Any) -> None:
    found = served.post("/v1/completions", {"model": "writer", "prompt": "x" * (limits.BODY_BYTES - 200)})
    assert found.status_code == 400 and found.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_what_another_sites_page_can_send_unasked_is_not_read(served: Any, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    found = served.client.post("/v1/completions", content=b'{"model": "writer", "prompt": "a"}', headers=headers)
    assert found.status_code == 415


def test_other_sites_are_not_let_in(served: Any) -> None:
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    asked = served.client.options("/v1/completions", headers=headers)
    assert asked.status_code == 405
    for found in (asked, served.client.get("/v1/models", headers=headers)):
        assert not any(name.startswith("access-control") for name in found.headers)


def test_under_a_foreign_name_this_machine_does_not_answer(start: Any, models: Any) -> None:
    with start({"writer": models["writer"]()}, hosts=frozenset({"localhost", "127.0.0.1", "[::1]"})) as made:
        for host, status in {"evil.example": 403, "127.0.0.1.evil.example": 403, "": 403}.items():
            assert made.client.get("/v1/models", headers={"Host": host}).status_code == status
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
            assert made.client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/no/such", "/openapi.json"])
def test_every_response_forbids_scripts_of_others_and_guessing_of_types(served: Any, path: str) -> None:
    headers = served.client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers


def test_unknown_paths_and_methods_are_refused_in_the_same_shape(served: Any) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("DELETE", "/health", 405)):
        found = served.client.request(method, path)
        assert found.status_code == status and found.json()["error"]["message"]


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% for m in messages %}{{ m.content.format.__globals__ }}{% endfor %}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_that_leaves_its_sandbox_is_told_and_stops_nothing(start: Any, models: Any, template: str) -> None:
    plain = models["writer"]()
    with start({"writer": Model(plain.network, plain.tokenizer, chat_template=template)}) as made:
        found = made.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
        assert found.status_code == 400 and "template" in found.json()["error"]["message"]
        assert made.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 10**9},
        {"max_tokens": 10**12},
        {"stop": ["x"] * 10_000},
        {"logit_bias": {str(token): 1 for token in range(5000)}},
        {"prompt": ["x"] * 5000},
        {"prompt": ["x"] * 2000, "n": 128},
        {"logprobs": 10**6},
        {"top_k": 10**18},
    ],
    ids=str,
)
def test_huge_requests_are_refused_by_field(served: Any, fields: dict[str, Any]) -> None:
    found = served.post("/v1/completions", {"model": "writer", "prompt": "a", **fields})
    assert found.status_code == 400 and found.json()["error"]["param"] in fields


def test_deep_and_broken_json_is_refused(served: Any) -> None:
    for raw in (b"[" * 10**6, b'{"a":' * 10**5, b'{"model": "writer", "prompt": "a", "temperature": NaN}', b"\x00"):
        found = served.client.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
        assert found.status_code == 400 and found.json()["error"]["code"] == "invalid_json"


def test_a_defect_of_ours_is_a_500_without_its_insides(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = served.service.models["classify"]

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(model, "predict", broken)
    found = served.post("/v1/predict/classify", {"inputs": ["a"]})
    assert found.status_code == 500 and "secret" not in found.text and found.json()["error"]["type"] == "server_error"
    assert found.headers["connection"] == "close"
    monkeypatch.undo()
    assert served.post("/v1/predict/classify", {"inputs": ["a"]}).status_code == 200


def nested(depth: int, key: str, leaf: str = "{}") -> str:
    return f'{{"{key}":' * depth + leaf + "}" * depth


@pytest.mark.parametrize("depth", [40, 200, 500, 950, 50_000])
def test_nothing_nested_too_deeply_is_a_defect(served: Any, depth: int) -> None:
    hello = '"model": "writer", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]'
    tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {nested(depth, "items")}}}}}'
    call = json.dumps({"function": {"name": "f", "arguments": nested(depth, "a")}})
    bodies = {
        "/v1/chat/completions": [
            f'{{{hello}, "tools": [{tool}]}}',
            f'{{{hello}, "tools": [{tool}], "tool_choice": "required"}}',
            f'{{{hello}, "response_format": {{"type": "json_schema", "json_schema": {{"schema": {nested(depth, "items")}}}}}}}',
            f'{{"model": "writer", "max_tokens": 1, "messages": [{{"role": "assistant", "tool_calls": [{call}]}}]}}',
        ],
        "/v1/completions": [f'{{"model": "writer", "prompt": {"[" * depth + "]" * depth}}}'],
        "/v1/predict/classify": [f'{{"inputs": [{nested(depth, "text", "1")}]}}'],
        "/v1/predict/translate": [f'{{"inputs": [{nested(depth, "source", "1")}]}}'],
        "/v1/embeddings": [f'{{"model": "embed", "input": {"[" * depth + "]" * depth}}}'],
        "/tokenize": [f'{{{hello}, "tools": [{tool}]}}'],
        "/playground/stages": [f'{{"model": "writer", "prompt": {"[" * depth + "]" * depth}}}'],
    }
    for path, raws in bodies.items():
        for raw in raws:
            found = served.client.post(path, content=raw.encode(), headers={"Content-Type": "application/json"})
            assert found.status_code < 500, (path, raw[:200], found.text)


@pytest.mark.parametrize(
    "odd", ["\x00", "a\x00b", "\u202e", "\ufeff", "\ufdd0", "\U0010ffff", "e\u0301" * 50, "\r\n\r\n"], ids=ascii
)
def test_odd_characters_are_only_text(served: Any, odd: str) -> None:
    asked = {"model": "writer", "max_tokens": 2}
    tool = {"type": "function", "function": {"name": "f", "description": odd}}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {**asked, "prompt": odd, "stop": [odd], "user": odd}),
        ("/v1/completions", {**asked, "prompt": "a", "choice": [odd]}),
        ("/v1/completions", {**asked, "prompt": "a", "regex": odd}),
        (
            "/v1/chat/completions",
            {**asked, "messages": [{"role": "user", "content": odd, "name": odd}], "tools": [tool]},
        ),
        ("/v1/predict/classify", {"inputs": [odd]}),
        ("/v1/predict/tag", {"inputs": [{"tokens": [odd]}]}),
        ("/v1/predict/translate", {"inputs": [odd]}),
        ("/v1/embeddings", {"model": "embed", "input": odd}),
        ("/tokenize", {"model": "writer", "prompt": odd}),
    ]
    for path, body in bodies:
        found = served.post(path, body)
        assert found.status_code in (200, 400), (path, found.text)
        if path == "/tokenize":
            again = served.post("/detokenize", {"model": "writer", "tokens": found.json()["tokens"]})
            assert again.json()["prompt"] == odd


def test_large_bodies_are_refused_on_every_route_that_takes_one(served: Any) -> None:
    raw = b'{"model": "' + b"x" * 10_000_000 + b'"}'
    paths = [path for method, path in walked(served) if method == "POST"]
    assert len(paths) >= 7
    for path in paths:
        real = path.replace("{model:path}", "classify")
        headers = {"Content-Type": "application/json"}
        assert served.client.post(real, content=raw, headers=headers).status_code == 413, path


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%00", "app.js%00", "....//app.js", "%2e%2e%5capp.js"])
@pytest.mark.parametrize("path", ["/static/", "/playground/runs/"])
def test_files_are_found_by_name_alone(served: Any, path: str, name: str) -> None:
    found = served.client.get(path + name)
    assert found.status_code in (404, 405) and "root:" not in found.text


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 10**9},
        {"max_tokens": 10**12},
        {"max_completion_tokens": 10**12},
        {"stop": ["x"] * 10_000},
        {"stop": ["x" * 10_000]},
        {"logit_bias": {str(token): 1 for token in range(5000)}},
        {"top_logprobs": 10**6, "logprobs": True},
        {"messages": [{"role": "user", "content": "a"}] * 5000},
        {"tools": [{"type": "function", "function": {"name": "f"}}] * 1000},
        {"tools": [{"type": "function", "function": {"name": "f" * 1000}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": ["x" * 100_000]}}}]},
        {"choice": ["x"] * 10_000},
        {"regex": "x" * 100_000},
        {"seed": 2**70},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_huge_conversations_are_refused_by_field(served: Any, fields: dict[str, Any]) -> None:
    body = {"model": "writer", "messages": [{"role": "user", "content": "a"}], **fields}
    found = served.post("/v1/chat/completions", body)
    assert found.status_code == 400 and found.json()["error"]["param"] in fields

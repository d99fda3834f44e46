"""More than can be done: what is accepted is answered, the rest is told when to come again, and keys share fairly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest


async def ask_all(url: str, bodies: list[dict[str, Any]], keys: list[str] | None = None) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=400)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
        headers = [{"Authorization": f"Bearer {key}"} if key else {} for key in keys or [""] * len(bodies)]
        return await asyncio.gather(
            *(client.post("/v1/completions", json=body, headers=head) for body, head in zip(bodies, headers))
        )


def test_under_many_times_the_load_all_that_is_accepted_is_answered_whole(start: Any, models: Any) -> None:
    model = models["writer"]()
    with start({"writer": model}, slots=4, max_queue=400) as made:
        bodies = [{"prompt": f"The cat {n}", "max_tokens": 24, "ignore_eos": True, "seed": n} for n in range(150)]
        found = asyncio.run(ask_all(made.url, bodies))
        accepted = [(body, answer) for body, answer in zip(bodies, found) if answer.status_code == 200]
        refused = [answer for answer in found if answer.status_code == 429]
        assert len(accepted) + len(refused) == 150 and len(accepted) >= 8 and len(refused) >= 50
        for _, answer in accepted:
            assert answer.json()["usage"]["completion_tokens"] == 24
        for answer in refused:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        worker = made.worker()
        assert worker.alive and worker.queued == (0, 0) and not worker._running and worker.state.free == 4
        body, answer = accepted[-1]
        again = made.post("/v1/completions", body)
        assert again.json()["choices"] == answer.json()["choices"]


def test_a_key_with_one_request_does_not_wait_for_all_of_another(
    start: Any, models: Any, until: Callable[..., None]
) -> None:
    with start({"writer": models["writer"]()}, slots=1, api_keys=("loud", "quiet")) as made:
        order: list[str] = []

        async def ask() -> None:
            async with httpx.AsyncClient(base_url=made.url, timeout=120, trust_env=False) as client:

                async def one(key: str) -> None:
                    body = {"prompt": "The", "max_tokens": 60, "ignore_eos": True}
                    head = {"Authorization": f"Bearer {key}"}
                    assert (await client.post("/v1/completions", json=body, headers=head)).status_code == 200
                    order.append(key)

                loud = [asyncio.create_task(one("loud")) for _ in range(20)]
                await asyncio.to_thread(until, lambda: made.worker().queued[0] >= 15)
                await asyncio.gather(one("quiet"), *loud)

        asyncio.run(ask())
        assert order.index("quiet") < 12 and len(order) == 21


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "The", "n": 64, "ignore_eos": True, "max_tokens": 30}),
        ("/v1/completions", {"prompt": ["The", "cat"] * 32, "stream": True, "ignore_eos": True, "max_tokens": 30}),
        ("/v1/predict/translate", {"inputs": ["the cat"] * 64, "max_tokens": 30}),
        ("/v1/predict/translate", {"inputs": ["the cat"] * 16, "max_tokens": 30, "beams": 3}),
    ],
    ids=["many answers", "many prompts", "many rows", "many beam searches"],
)
def test_one_large_request_does_not_hold_up_another_keys_single_one(
    start: Any, models: Any, until: Callable[..., None], path: str, body: dict[str, Any]
) -> None:
    made_of = {"writer": models["writer"](), "translate": models["answerer"]("translate")}
    name = "translate" if "translate" in path else "writer"
    body = body if name == "translate" else {**body, "model": name}
    with start(made_of, slots=2, api_keys=("loud", "quiet")) as made:
        order: list[str] = []

        async def ask() -> None:
            async with httpx.AsyncClient(base_url=made.url, timeout=120, trust_env=False) as client:

                async def one(key: str, body: dict[str, Any]) -> None:
                    head = {"Authorization": f"Bearer {key}"}
                    assert (await client.post(path, json=body, headers=head)).status_code == 200
                    order.append(key)

                loud = asyncio.create_task(one("loud", body))
                worker = made.worker(name)
                await asyncio.to_thread(until, lambda: worker._running and worker.queued[0] > 10)
                single = {k: v for k, v in body.items() if k not in ("n", "stream")}
                for field in ("prompt", "inputs"):
                    if isinstance(single.get(field), list):
                        single[field] = single[field][:1]
                await one("quiet", single)
                assert worker.queued[0] > 5  # most of the large one still waits
                await loud

        asyncio.run(ask())
        assert order == ["quiet", "loud"]


@pytest.mark.parametrize("count", [2, 3])
def test_several_models_in_one_process_answer_side_by_side(start: Any, models: Any, count: int) -> None:
    model = models["writer"]()
    with start({f"m{number}": model for number in range(count)}) as made:
        bodies = [{"model": f"m{n % count}", "prompt": f"The {n}", "max_tokens": 10, "seed": 1} for n in range(18)]
        found = asyncio.run(ask_all(made.url, bodies))
        alone = [model.generate(body["prompt"], max_tokens=10, seed=1).text for body in bodies]
        assert [answer.json()["choices"][0]["text"] for answer in found] == alone

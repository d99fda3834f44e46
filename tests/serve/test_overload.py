"""More than can be done: what is accepted is answered, the rest is told when to come again, and keys share fairly."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from formary.hub import checkpoint


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


# --- a flood, for a while, against the program itself ---

KEYS = ("first", "second", "third")
ANSWER = 160  # tokens of each


@contextmanager
def program(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`formary serve` as a program of its own: its address, and the process."""
    command = [sys.executable, "-m", "formary", "serve", f"writer={folder}", "--port", "0", "--precision", "float32"]
    command += ["--slots", "4", "--max-queue", "4000", *(part for key in KEYS for part in ("--api-key", key))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            yield (
                next(line.split()[1] for line in running.stdout if line.startswith("API:")),
                psutil.Process(running.pid),
            )
        finally:
            running.terminate()
            running.stdout.read()
            assert running.wait(60) == 0


@dataclass
class Flood:
    """Sends requests of many kinds, and keeps what came back."""

    url: str
    accepted: int = 0
    refused: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds_per_token: list[float] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def one(self, client: httpx.AsyncClient) -> None:
        number = next(self.numbers)
        body: dict[str, Any] = {"prompt": f"The cat {number}" * (1 + number % 5), "max_tokens": ANSWER, "n": 1}
        body |= {"ignore_eos": True, "seed": number, "temperature": 1.0, "stream": number % 2 == 0}
        if number % 7 == 0:
            body |= {"n": 2, "logprobs": 3, "top_p": 0.9}
        ask = client.stream(
            "POST", "/completions", json=body, headers={"Authorization": f"Bearer {KEYS[number % len(KEYS)]}"}
        )
        try:
            async with ask as answer:
                if answer.status_code == 429:
                    self.refused += 1
                    if not 1 <= int(answer.headers["retry-after"]) <= 60:
                        self.wrong.append(f"Retry-After {answer.headers['retry-after']}")
                elif answer.status_code != 200:
                    self.wrong.append(f"{answer.status_code} {(await answer.aread())[:200]!r}")
                elif number % 11 == 0:
                    self.left += 1  # its client goes before it is answered
                else:
                    await (self._stream if body["stream"] else self._whole)(answer, body["n"])
        except httpx.TransportError as error:
            self.wrong.append(repr(error))

    async def _whole(self, answer: httpx.Response, n: int) -> None:
        told = json.loads(await answer.aread())
        self.accepted += 1
        if told["usage"]["completion_tokens"] != n * ANSWER or len(told["choices"]) != n:
            self.wrong.append(f"{told['usage']}")

    async def _stream(self, answer: httpx.Response, n: int) -> None:
        times, last, lines = [time.perf_counter()], "", 0
        async for line in answer.aiter_lines():
            if line:
                times.append(time.perf_counter())
                last, lines = line, lines + ('"finish_reason":"length"' in line)
        self.accepted += 1
        self.seconds_per_token += [later - earlier for earlier, later in itertools.pairwise(times[1:])]
        if last != "data: [DONE]" or lines != n:
            self.wrong.append(f"a stream that ended with {last[:200]}")

    async def closed(self, seconds: float, clients: int) -> float:
        """Some clients, each of which waits for its answer before it asks again; answers in a second."""
        began, before = time.perf_counter(), self.accepted + self.left

        async def ask() -> None:
            while time.perf_counter() - began < seconds:
                await self.one(client)

        async with self._client() as client:
            await asyncio.gather(*(ask() for _ in range(clients)))
        return (self.accepted + self.left - before) / (time.perf_counter() - began)

    async def open(self, seconds: float, rate: float, every: Callable[[], None]) -> None:
        """So many requests in a second, whatever comes back."""
        began, asked, tasks = time.perf_counter(), 0, set()
        async with self._client() as client:
            while (passed := time.perf_counter() - began) < seconds:
                while asked < passed * rate:
                    asked += 1
                    task = asyncio.create_task(self.one(client))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                every()
                await asyncio.sleep(0.01)
            await asyncio.gather(*tasks)

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=1000)
        return httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits, trust_env=False)


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_ten_times_the_load_for_a_while_breaks_nothing(
    models: Any, tmp_path: Path, until: Callable[..., None], seconds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models["writer"]()
    checkpoint.save(tmp_path / "writer", model.network)
    model.tokenizer.save(tmp_path / "writer")
    with program(tmp_path / "writer") as (url, process):
        flood = Flood(url)
        usual = asyncio.run(flood.closed(seconds / 4, 4))
        rate = max(10 * usual, 40)  # of one measured in a busy moment, ten times may be little
        asyncio.run(flood.open(seconds / 4, rate, lambda: None))  # now all that it needs has been taken once
        flood.accepted = flood.refused = flood.left = 0
        flood.seconds_per_token.clear()
        warm = process.memory_info().rss
        sizes: list[int] = []
        asyncio.run(flood.open(seconds, rate, lambda: sizes.append(process.memory_info().rss)))
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        health = httpx.get(url.replace("/v1", "/health"), trust_env=False).json()

        def queued() -> bool:
            told = httpx.get(url.replace("/v1", "/metrics"), headers=headers, trust_env=False).text
            return 'formary_queued_requests{model="writer"} 0.0' not in told

        until(lambda: not queued())
        end = process.memory_info().rss
    gaps = sorted(flood.seconds_per_token)
    with capsys.disabled():
        print(
            f"\n{seconds} s of {rate:.0f} requests/s, where {usual:.1f} can be done: {flood.accepted} answered, {flood.refused} refused, "
            f"{flood.left} left; memory {warm / 2**20:.1f} MB, most {max(sizes) / 2**20:.1f}, end {end / 2**20:.1f}; "
            f"time between tokens p50 {1e3 * gaps[len(gaps) // 2]:.0f} ms, p99 {1e3 * gaps[len(gaps) * 99 // 100]:.0f} ms"
        )
    assert not flood.wrong
    assert health["status"] == "ok"
    assert flood.accepted >= 4 and flood.refused >= 10
    assert max(end, *sizes) < 1.08 * warm

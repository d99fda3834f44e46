"""A model whose numbers break for one prompt: its client is told, and those beside it get what they would get alone."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch

from formary.infer.loaded import Model


@pytest.fixture(scope="module")
def broken() -> Model:
    """Its vector of the letter Q is not a number."""
    from .conftest import writer

    plain = writer()
    network = copy.deepcopy(plain.network)
    (token,) = plain.tokenizer.encode("Q")
    with torch.no_grad():
        network.embedder.tokens.weight[token] = math.nan
    return Model(network, plain.tokenizer, chat_template=plain.chat_template)


@pytest.fixture
def made(start: Any, broken: Model) -> Iterator[Any]:
    with start({"writer": broken}, slots=4) as running:
        yield running


def test_one_who_asks_for_it_is_told_and_nobody_else_notices(made: Any, broken: Model) -> None:
    texts = ["The cat", "The Q", "dog", "Q", "the mat"]
    options = {"max_tokens": 30, "temperature": 0.0, "logit_bias": {str(broken.tokenizer.encode("Q")[0]): -100}}

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=made.url, timeout=60, trust_env=False) as client:
            asked = (client.post("/v1/completions", json={"prompt": text, **options}) for text in texts * 2)
            return await asyncio.gather(*asked)

    for text, found in zip(texts * 2, asyncio.run(ask())):
        if "Q" in text:
            assert found.status_code == 500 and "connection" not in found.headers
            error = found.json()["error"]
            assert error["code"] == "not_finite" and "weights are damaged" in error["message"]
        else:
            bias = {int(token): bias for token, bias in options["logit_bias"].items()}
            alone = broken.generate(text, max_tokens=30, temperature=0.0, logit_bias=bias)
            assert found.json()["choices"][0]["text"] == alone.text
    worker = made.worker()
    told = made.post("/playground/stages", {"model": "writer", "prompt": broken.tokenizer.encode("Q")})
    assert told.status_code == 500 and told.json()["error"]["code"] == "not_finite"
    assert worker.alive and not worker._running and made.client.get("/health").status_code == 200


def test_a_stream_says_so_where_it_breaks(made: Any, broken: Model) -> None:
    (token,) = broken.tokenizer.encode("Q")
    with openai.OpenAI(base_url=made.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="writer", prompt="The cat", logit_bias={str(token): 100}, max_tokens=9, stream=True
        )
        texts = []
        with pytest.raises(openai.APIError, match="weights are damaged"):
            for chunk in stream:
                texts.append(chunk.choices[0].text)
    assert texts == ["Q"]

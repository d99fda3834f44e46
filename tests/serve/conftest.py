"""Small random models, and servers for them: in this process behind a real socket, stopped when a test is over."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch

from formary.data import tokenizer as tokenizers
from formary.data.images import data_uri
from formary.infer.loaded import Model
from formary.model.topologies import build
from formary.recipe import schema
from formary.recipe.presets import preset
from formary.recipe.reading import parse
from formary.serve.server import Server, listen
from formary.serve.service import ServerSettings, Service
from formary.tasks.registry import labelled_task

TEXT = "The cat sat on the mat. The dog sat on the log. 猫坐在垫子上。 " * 3
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": "good cat", "label": "yes"}, {"text": "bad dog", "label": "no"}] * 2,
    "tag": [{"tokens": ["Ann", "sat"], "tags": ["B-PER", "O"]}] * 4,
    "embed": [{"text": "a cat", "positive": "some kitten"}, {"text": "red", "positive": "a colour"}] * 2,
    "translate": [{"source": "the cat", "target": "a dog"}, {"source": "the log", "target": "a mat"}] * 2,
    "answer_span": [{"question": "who sat", "context": "the cat sat", "answers": [{"text": "cat", "start": 4}]}] * 4,
}


@cache
def writer(*, context: int = 512, chat: bool = True) -> Model:
    """A decoder that writes nonsense in bytes, in float64 where no two candidates tie."""
    words = tokenizers.train([TEXT], schema.Tokenizer(kind="bytes", vocab_size=300), task="causal_lm")
    config = preset(
        "gpt-mini", vocab_size=words.vocab_size, context=context, size="2x32", switches={"tied_embeddings": False}
    )
    network = build(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return Model(network.double().eval(), words, chat_template=TEMPLATE if chat else None)


@cache
def answerer(task: str) -> Model:
    """A model with the head of a task, not trained."""
    name = "seq2seq-mini" if task == "translate" else "bert-mini"
    recipe = parse(f"""
        name: t
        task: {task}
        data: {{sources: [x]}}
        model: {{preset: {name}, size: 1x32}}
        train: {{batch: 4, context: 64}}
        """)
    setting = recipe.data.tokenizer.model_copy(update={"kind": "characters"})
    kind = labelled_task(task)
    special = "denoise" if task == "translate" else "masked_lm"
    made = kind.learn(recipe, tokenizers.train([TEXT + str(ROWS)], setting, task=special), ROWS[task], start=None)
    network = build(made.model_config(), seed=0).eval()
    return Model(network, made.tokenizer, formary={"task": task, "settings": made.settings()})


def picture(number: int = 0, side: int = 12) -> str:
    """A small picture as a data URI."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return data_uri(pixels)


@cache
def seer(task: str) -> Model:
    """A model of a task on pictures, not trained."""
    presets = {
        "classify_image": "vit-mini",
        "detect": "yolos-mini",
        "generate_image": "gpt-mini",
        "match_image_text": "clip-mini",
    }
    preset = presets.get(task, "caption-mini")
    switches = {} if task == "generate_image" else {"image_size": 8, "patch_size": 4}
    rows = [{"image": picture(n), "label": "ab"[n % 2], "caption": f"a {'cat' if n % 2 else 'dog'}"} for n in range(6)]
    rows = [{**row, "text": row["caption"]} for row in rows]
    if task == "detect":
        rows = [{"image": row["image"], "boxes": [[1, 1, 4, 4]], "labels": [row["label"]]} for row in rows]
    recipe = parse(f"""
        name: t
        task: {task}
        data: {{sources: [x], tokenizer: {{kind: characters}}}}
        model:
          preset: {preset}
          size: 1x32
          switches: {switches}
        train: {{batch: 4, context: 32, objective: {{side: 6, colours: 4}}}}
        """)
    kind = labelled_task(task)
    made = kind.learn(recipe, kind.vocabulary(recipe, rows), rows, start=None)
    network = build(made.model_config(), seed=0).eval()
    return Model(network, made.tokenizer, formary={"task": task, "settings": made.settings()})


def recommender(folder: Any = None) -> Model:
    """A model of task next_item, not trained; its folder may hold the texts of its items."""
    films = [f"film-{number}" for number in range(30)]
    rows = [{"history": films[start : start + 6]} for start in range(0, 30, 3)]
    recipe = parse("""
        name: t
        task: next_item
        data: {sources: [x]}
        model: {preset: sasrec-mini, size: 1x32}
        train: {batch: 4, context: 16}
        """)
    kind = labelled_task("next_item")
    made = kind.learn(recipe, kind.vocabulary(recipe, rows), rows, start=None)
    network = build(made.model_config(), seed=0).eval()
    return Model(network, made.tokenizer, folder=folder, formary={"task": "next_item", "settings": made.settings()})


class Running:
    """A server that runs, and a client for it."""

    def __init__(self, service: Service, server: Server, port: int) -> None:
        self.service, self.server = service, server
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """Ask; without `model` the writer is asked."""
        return self.client.post(path, json=body, **options)

    def worker(self, name: str = "writer") -> Any:
        """A model's worker."""
        return self.service.served[name].worker


@contextlib.contextmanager
def running(models: dict[str, Model], **settings: Any) -> Iterator[Running]:
    """A server for some models, behind a socket of its own."""
    drain_seconds = settings.pop("drain_seconds", 5)
    service = Service(ServerSettings(**settings))
    for name, model in models.items():
        service.add(name, model)
    service.ready()
    listener = listen("127.0.0.1", 0)
    server = Server(service, drain_seconds=drain_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    made = Running(service, server, listener.getsockname()[1])
    try:
        yield made
    finally:
        made.client.close()
        server.should_exit = True
        thread.join(20)
        service.stop()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    """A server with one model of each kind."""
    models = {"writer": writer(), "plain": writer(chat=False)}
    models |= {task: answerer(task) for task in ROWS}
    with running(models) as made:
        yield made


@pytest.fixture
def start() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """Makes a server with settings of one's own."""
    return running


def until(condition: Callable[[], Any], what: str = "") -> None:
    """Wait for something that happens in another thread; a minute is for machines that are busy."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what or "it never happened"
        time.sleep(0.002)


@pytest.fixture
def models() -> dict[str, Callable[..., Model]]:
    """Makers of models by kind."""
    return {"writer": writer, "answerer": answerer, "seer": seer, "recommender": recommender}


@pytest.fixture(name="picture")
def _picture() -> Callable[..., str]:
    return picture


@pytest.fixture(name="until")
def _until() -> Callable[..., None]:
    return until

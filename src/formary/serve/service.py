"""The models that a server serves, each with what it can do and the worker that owns it, and the server's own state.

Loading, draining and stopping happen here; HTTP is `app`'s.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from formary.errors import FormaryError, RequestError
from formary.infer.engine import Engine, Request
from formary.infer.loaded import Model, load
from formary.infer.stepper import writes
from formary.model.heads import LanguageHead
from formary.model.topologies import Encoder
from formary.serve.errors import ApiError
from formary.serve.turns import Turns
from formary.serve.worker import Worker

Ability = Literal["completions", "chat", "embeddings", "predict"]

_ROUTES: dict[Ability, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "embeddings": "/v1/embeddings",
    "predict": "/v1/predict/{model}",
}


@dataclass(frozen=True)
class ServerSettings:
    """How much a server takes on.

    Args:
        api_keys: one of them has to come with a request; none are needed when empty.
        max_queue: most tokens (prompt and answer) that wait for a model.
        slots: answers that a model writes at once.
        context: longest sequence; the model's own when left out.
        prefix_cache_tokens: beginnings of prompts that are kept, for each model.
        runs: the folder whose runs the playground shows.
        hosts: names in the Host header that are answered; None answers all.
    """

    api_keys: tuple[str, ...] = ()
    max_queue: int = 2**16
    slots: int = 8
    context: int | None = None
    prefix_cache_tokens: int = 2**14
    runs: Path | None = None
    hosts: frozenset[str] | None = None


@dataclass(frozen=True)
class Served:
    """A model under the name that clients use."""

    name: str
    model: Model
    worker: Worker
    created: int = field(default_factory=lambda: int(time.time()))
    base: str | None = None  # of an adapter

    @cached_property
    def abilities(self) -> tuple[Ability, ...]:
        """Which routes it can answer."""
        found: list[Ability] = []
        things = self.task is not None and self.model.task.answers in ("ranking", "pictures")  # its tokens are no words
        if writes(self.model.network) and self.model.reads_text and not things:
            found.append("completions")
            if self.model.chat_template is not None:
                found.append("chat")
        if self.task is not None:
            found.append("predict")
            if self.model.task.answers in ("vectors", "retrieval"):
                found.append("embeddings")
        elif self.fills:
            found.append("predict")
        return tuple(found)

    @cached_property
    def task(self) -> str | None:
        """The name of the task it answers rows for, if it has one."""
        try:
            return self.model.task.name
        except FormaryError:
            return None

    @property
    def fills(self) -> bool:
        """Whether it completes masked words."""
        return isinstance(self.model.network, Encoder) and isinstance(self.model.network.head, LanguageHead)

    def must(self, ability: Ability) -> None:
        """Refuse what it cannot do.

        Raises:
            ApiError: with what it can.
        """
        if ability in self.abilities:
            return
        routes = ", ".join(_ROUTES[able].replace("{model}", self.name) for able in self.abilities)
        what = {
            "completions": "does not write text",
            "chat": "has no chat template, so it was not trained to chat",
            "embeddings": "has no vectors of texts to give",
            "predict": "has no head for a task",
        }[ability]
        message = f"the model '{self.name}' {what}; it answers {routes or 'nothing'}"
        raise ApiError(400, message, param="model", code="model_cannot")


class Service:
    """What all routes share: the models by name, and whether the server is loading, ready or draining."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.served: dict[str, Served] = {}
        self.turns = Turns()
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.in_flight = 0

    @property
    def models(self) -> Mapping[str, Model]:
        """The loaded models by name."""
        return {name: served.model for name, served in self.served.items()}

    @property
    def runs(self) -> Path | None:
        """The folder whose runs are shown."""
        return self.settings.runs

    def add(self, name: str, model: Model, *, base: str | None = None) -> Served:
        """Serve a model under a name; its worker starts."""
        settings = self.settings
        make: Callable[[], Engine] | None = None
        if writes(model.network):
            make = partial(
                Engine,
                model.network,
                slots=settings.slots,
                context=settings.context,
                text_decoder=model.text_decoder,
                prefix_cache_tokens=settings.prefix_cache_tokens if model.config.encoder is None else 0,
            )
            if model.config.encoder is None:  # what is loaded and made at first use does not wait for the first client
                list(make().generate([Request((0,), max_tokens=2)]))
        _ = model.tokenizer.token_bytes  # made once, before threads share it
        worker = Worker(name, model, self.turns, queue_tokens=settings.max_queue, engine=make)
        served = Served(name, model, worker, base=base)
        if not served.abilities:
            raise RequestError(f"{name}: this model neither writes text nor has a head for a task that can be served")
        self.served[name] = served
        worker.start()
        return served

    def ready(self) -> None:
        """All models are there."""
        if self.state == "loading":
            self.state = "ready"

    def drain(self) -> None:
        """Take no more requests; what runs goes on."""
        self.state = "draining"

    def stop(self) -> None:
        """Give up what still runs, and end the workers."""
        self.state = "draining"
        for served in self.served.values():
            served.worker.stop()

    def find(self, name: str | None) -> Served:
        """The model a request means.

        Raises:
            ApiError: there is none of this name, or models are still being loaded.
        """
        self.must_be_open()
        if name is None:
            if len(self.served) == 1:
                return next(iter(self.served.values()))
            raise ApiError(400, "model: is missing; several are served", param="model", code="invalid_value")
        if (served := self.served.get(name)) is not None:
            return served
        message = f"the model {name[:100]!r} is not served here; /v1/models lists those that are"
        raise ApiError(404, message, param="model", code="model_not_found")

    def must_be_open(self) -> None:
        """Refuse work while models are being loaded or the server is about to stop."""
        if self.state == "loading":
            raise ApiError(503, "the models are still being loaded", code="loading", retry_after=2)
        if self.state == "draining":
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=5)


def names_of(models: Sequence[str]) -> dict[str, str]:
    """Where each model is, by its name: NAME=PATH, or a path whose last part is the name.

    Raises:
        FormaryError: two models of one name.
    """
    found: dict[str, str] = {}
    for given in models:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            path = given
            name = given if "/" in given and not Path(given).exists() else Path(given).resolve().name
            name = name.removesuffix(".gguf")
            if Path(given).resolve().name == "model" and Path(given).is_dir():  # RUN/model: the run's name says more
                name = Path(given).resolve().parent.name
        if not name or not path:
            raise FormaryError(f"{given}: expected a model, or NAME=MODEL")
        if name in found:
            raise FormaryError(f"{given}: there is a model '{name}' already; name this one with NAME={path}")
        found[name] = path
    return found


def with_adapter(base: Model, folder: Path) -> Model:
    """A model with a LoRA folder's updates added; the weights that they leave alone are shared with the base.

    Raises:
        CheckpointError: it is not a LoRA folder, or does not fit the model.
    """
    from formary.train import lora

    # Matrices that updates are added to are new ones; weights that an adapter brings whole are written in place.
    shared = {} if _brings_weights(folder) else {id(weight): weight for weight in base.network.parameters()}
    network = copy.deepcopy(base.network, shared)
    lora.load_adapter(folder, network)
    lora.merge(network)
    return Model(
        network.requires_grad_(False).eval(),
        base.tokenizer,
        defaults=base.generation_config,
        chat_template=base.chat_template,
        folder=folder,
        family=base.family,
        formary=base.formary,
    )


def base_of(folder: Path) -> str:
    """The model that an adapter folder says it belongs to; empty when it does not say."""
    return str(_adapter_config(folder).get("base_model_name_or_path") or "")


def load_all(
    service: Service,
    models: Mapping[str, str],
    adapters: Mapping[str, str],
    *,
    prepare: Callable[[Model], Model] = lambda model: model,
    say: Callable[[str], Any] = lambda line: None,
) -> None:
    """Load models and adapters by name and path, and open the service.

    Args:
        prepare: what is done to each model before it is served, such as quantising it.
        say: is told what is being loaded.

    Raises:
        FormaryError: one of them cannot be loaded or served.
    """
    loaded: dict[str, Model] = {}
    for name, path in models.items():
        say(f"loading {name} from {path}")
        loaded[name] = load(path)
    for name, path in adapters.items():
        if name in loaded:
            raise FormaryError(f"--lora {name}={path}: there is a model '{name}' already")
    pairs = {name: (_base_among(models, name, path), Path(path)) for name, path in adapters.items()}
    ready = {name: with_adapter(loaded[base], path) for name, (base, path) in pairs.items()}
    for name, model in loaded.items():
        service.add(name, prepare(model))
    for name, model in ready.items():
        service.add(name, prepare(model), base=pairs[name][0])
    service.ready()


def _base_among(models: Mapping[str, str], name: str, path: str) -> str:
    if len(models) == 1:
        return next(iter(models))
    wanted = base_of(Path(path))
    for served, place in models.items():
        if wanted and (wanted == place or Path(wanted).resolve() == Path(place).resolve()):
            return served
    raise FormaryError(
        f"--lora {name}={path}: belongs to '{wanted}', which is none of the models that are served; serve it as well"
    )


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # what is wrong with it, loading it says
    return values if isinstance(values, dict) else {}


def _brings_weights(folder: Path) -> bool:
    return bool(_adapter_config(folder).get("modules_to_save"))

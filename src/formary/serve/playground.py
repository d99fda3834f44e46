"""The playground's own routes: its static files, what each served model can do, sampling stage by stage, and runs.

Everything else the page does goes through the public API, as any client would. Probabilities are made by
`infer.sampling`, curves are read from metrics.jsonl; nothing is computed a second way. Reads only, never writes.
"""

import asyncio
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from formary.errors import FormaryError, MissingExtra, RequestError
from formary.infer.loaded import Model
from formary.infer.request import NotFinite
from formary.infer.sampling import History, SamplingSettings, Table, process
from formary.infer.stepper import Stepper, writes
from formary.model.heads import LanguageHead
from formary.model.topologies import EncoderDecoder
from formary.pipeline.watching import task_of
from formary.recipe.schema import unit_of
from formary.serve.catalogue import Catalogue
from formary.serve.errors import ApiError
from formary.serve.examples import EXAMPLES
from formary.serve.http import body_of
from formary.serve.requests import parse
from formary.serve.turns import Turns
from formary.train.records import read_records

if TYPE_CHECKING:
    from fastapi import APIRouter

PUBLIC = ("/", "/static/")
"""Paths that need no key: the page itself, which asks for the key."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# The pipeline in the order of `sampling.process`: each stage turns on the settings it names, and those before it.
_STAGES: dict[str, tuple[str, ...]] = {
    "repetition_penalty": ("repetition_penalty",),
    "count_penalties": ("frequency_penalty", "presence_penalty"),
    "temperature": ("temperature",),
    "top_k": ("top_k",),
    "top_p": ("top_p",),
    "min_p": ("min_p",),
    "typical_p": ("typical_p",),
}
_OPTIONS = tuple(field for fields in _STAGES.values() for field in fields)
_KEEPS_ALL = (("top_p", 1), ("min_p", 0), ("typical_p", 1))
_STEERING = ("repetition_penalty", "count_penalties")
_NEUTRAL = SamplingSettings(temperature=1.0)
_KEPT_LOGITS = 8  # of the last tokens looked at, so that moving a slider reads no prompt again
_ITEMS = 1000  # whose texts may be asked for at once
_WORDS = 200  # letters of what is looked for
_WAITING = 4  # looks that may wait for the processor; more are told to come back

_MOST_POINTS = 1500
_MOST_BYTES = 64 * 2**20
_NAME = re.compile(r"[^./\\\x00][^/\\\x00]{0,199}")
_TABS = {
    "labels": "classify",
    "tags": "tag",
    "spans": "span",
    "vectors": "embed",
    "multiple_choice": "choose",
    "texts": "translate",
    "forecasts": "forecast",
    "row_labels": "row",
    "ranking": "recommend",
    "boxes": "picture",
    "retrieval": "match",
    "pictures": "paint",
}


class State(Protocol):
    """What the playground needs to know of the server."""

    @property
    def models(self) -> Mapping[str, Model]:
        """The loaded models by the names clients use."""
        ...

    @property
    def turns(self) -> Turns:
        """Who may compute now."""
        ...

    @property
    def runs(self) -> Path | None:
        """The folder whose run folders are shown; None shows none."""
        ...


class StagesRequest(BaseModel):
    """One token to look at: what was read before it, how it is chosen, and which it was."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(max_length=200)
    prompt: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(max_length=2**17, description="An encoder's source.")
    answer: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        [], max_length=2**17, description="Generated before it."
    )
    token: int | None = Field(None, ge=0, lt=2**31, description="The token that was chosen, to be listed in any case.")
    top: int = Field(20, ge=1, le=50)
    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=1, le=2**31)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    presence_penalty: float | None = Field(None, ge=-100, le=100)


def router(state: State) -> "APIRouter":
    """The routes: /, /static/*, /playground/models, /playground/stages, /playground/items, /playground/runs and .../{name}.

    Raises:
        MissingExtra: fastapi is not installed.
    """
    # Annotations are evaluated here (no `from __future__`): FastAPI needs the classes that are imported lazily.
    try:
        from fastapi import APIRouter, Query, Request, Response
        from fastapi.responses import JSONResponse
    except ImportError:
        raise MissingExtra("serve", "the playground") from None

    routes = APIRouter()
    looks, catalogues = _Looks(state.turns), _Catalogues()
    assets = _assets()

    def asset(name: str) -> Response:
        if name not in assets:
            raise ApiError(404, f"there is no file '{name[:80]}' in the playground")
        return Response(assets[name], media_type=_TYPES[Path(name).suffix], headers=HEADERS)

    def run_folder(name: str) -> Path:
        if state.runs is None:
            raise ApiError(404, "no runs are shown; start the server with --runs DIR")
        folder = folder_of(state.runs, name)
        if folder is None:
            raise ApiError(404, f"there is no run '{name[:80]}' in the folder that --runs names")
        return folder

    @routes.get("/", include_in_schema=False)
    def page() -> Response:
        return asset("index.html")

    @routes.get("/static/{name}", include_in_schema=False)
    def static(name: str) -> Response:
        return asset(name)

    @routes.get("/playground/models", include_in_schema=False)
    def models() -> dict[str, Any]:
        return {"models": [described(name, model) for name, model in state.models.items()]}

    @routes.get("/playground/items", include_in_schema=False)
    def items(model: str, find: str = "", item: Annotated[list[str] | None, Query(max_length=_ITEMS)] = None) -> Any:
        if model not in state.models or "recommend" not in tabs(state.models[model]):
            raise ApiError(404, f"there is no model '{model[:80]}' that recommends", param="model")
        catalogue = catalogues.of(state.models[model])
        return {"items": catalogue.find(find[:_WORDS]) if item is None else catalogue.told(item)}

    @routes.post("/playground/stages", include_in_schema=False)
    async def token_stages(request: Request) -> dict[str, Any]:
        asked = parse(StagesRequest, await body_of(request))
        if asked.model not in state.models:
            raise ApiError(404, f"there is no model '{asked.model[:80]}'", param="model")
        if not looks.waiting.acquire(blocking=False):
            raise ApiError(429, "too many people look at tokens at once; try again", retry_after=1)
        try:
            return await asyncio.to_thread(looks.stages, state.models[asked.model], asked)
        finally:
            looks.waiting.release()

    @routes.get("/playground/runs", include_in_schema=False)
    def runs() -> dict[str, Any]:
        return {"shown": state.runs is not None, "runs": [] if state.runs is None else listed(state.runs)}

    @routes.get("/playground/runs/{name}", include_in_schema=False)
    def run(name: str, request: Request) -> Response:
        folder = run_folder(name)
        path = folder / "metrics.jsonl"
        status = path.stat()
        tag = f'W/"{status.st_mtime_ns:x}-{status.st_size:x}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        if status.st_size > _MOST_BYTES:
            raise ApiError(413, f"metrics.jsonl of this run is larger than {_MOST_BYTES // 2**20} MB")
        unit = unit_of(task_of(folder))
        return JSONResponse({"name": name, "unit": unit, **curves(read_records(path))}, headers=headers)

    return routes


def described(name: str, model: Model) -> dict[str, Any]:
    """What a page has to know of a model: its tabs, labels, sizes, defaults, and examples for each tab."""
    config = model.config
    shown = tabs(model)
    labels = list(config.labels) if config.labelled and "span" not in shown and "choose" not in shown else []
    if "paint" in shown:
        labels = list(getattr(model.task, "labels", ()))
    columns = list(getattr(model.task, "reads", ())) if "forecast" in shown or "row" in shown else []
    return {
        "id": name,
        "tabs": shown,
        "task": model.formary.get("task"),
        "family": model.family,
        "labels": labels,
        "columns": columns,
        "context": config.context,
        "parameters": model.parameters,
        "layers": config.transformer.layers,
        "width": config.transformer.width,
        "vocab_size": config.vocab_size,
        "ends": sorted(model.stop_tokens()),
        "defaults": {name: value for name, value in model.defaults.items() if name != "logit_bias"},
        "examples": {tab: EXAMPLES[tab] for tab in shown},
    }


def tabs(model: Model) -> list[str]:
    """What a model can do, best first: chat, complete, translate, rewrite, classify, tag, span, embed, ..."""
    found: list[str] = []
    try:
        answers: str | None = model.task.answers
    except FormaryError:
        answers = None
    tab = _TABS.get(answers) if answers else None
    if tab is not None and model.config.embedder == "patches":
        return ["match" if tab == "match" else "picture"]
    if tab is not None and answers in ("ranking", "pictures"):  # its tokens are things, no words
        return [tab]
    if isinstance(model.network, EncoderDecoder):
        return ["translate" if tab == "translate" else "rewrite"]
    if tab is not None and not (tab == "translate" and model.chat_template):
        found.append(tab)
    if writes(model.network):
        found += ["chat", "complete"] if model.chat_template else ["complete"]
    elif tab is None and isinstance(model.network.head, LanguageHead):
        found.append("fill")
    return found


class _Catalogues:
    """The items of each model that recommends, read when they are first asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, Catalogue] = {}

    def of(self, model: Model) -> Catalogue:
        with self._lock:
            if id(model) not in self._kept:
                self._kept[id(model)] = Catalogue(model)
            return self._kept[id(model)]


class _Looks:
    """The last tokens looked at: logits are computed one at a time, and kept for the next setting of a slider."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.waiting = threading.BoundedSemaphore(_WAITING)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = OrderedDict()

    def stages(self, model: Model, asked: StagesRequest) -> dict[str, Any]:
        key = (id(model), tuple(asked.prompt), tuple(asked.answer))
        with self._lock:
            with self.turns.turn():  # nobody else computes meanwhile
                logits = self._kept.pop(key, None)
                if logits is None:
                    logits = next_logits(model, key[1], key[2])
                found = stages(model, logits, asked)
            self._kept[key] = logits
            while len(self._kept) > _KEPT_LOGITS:
                self._kept.popitem(last=False)
        return found


def next_logits(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The model's logits (1, vocab_size) for the token after prompt and answer.

    Raises:
        RequestError: nothing to begin from, too long, a token outside the vocabulary, or a model that does not write.
        NotFinite: the model's numbers are no numbers.
    """
    source, read = _read(model, prompt, answer)
    network = model.network
    if not read or (isinstance(network, EncoderDecoder) and not source):
        raise RequestError("prompt: has no tokens to begin from")
    if max(*read, *source, 0) >= model.config.vocab_size:
        raise RequestError(f"prompt: a token is outside the vocabulary of {model.config.vocab_size}")
    if len(read) > model.config.context:
        raise RequestError(f"prompt: {len(read)} tokens are more than the context of {model.config.context}")
    stepper = Stepper(network, slots=1, context=len(read))
    if source and len(source) > stepper.source_context:
        raise RequestError(f"prompt: {len(source)} tokens are more than the encoder's context")
    logits = stepper.prefill(0, [read], [source] if source else [])
    if not bool(logits.max().isfinite()):
        raise NotFinite
    return logits


def stages(model: Model, logits: Tensor, asked: StagesRequest) -> dict[str, Any]:
    """The likeliest tokens and their probabilities after each stage; the last stage is what the engine draws from."""
    options = {name: getattr(asked, name) for name in StagesRequest.model_fields if name in _OPTIONS}
    request, _ = model.request(tuple(asked.prompt), 1, {n: v for n, v in options.items() if v is not None})
    settings = request.settings
    start = _read(model, asked.prompt, ())[1]
    history = History(logits.shape[-1], start, logits.device)
    for token in asked.answer:
        history.add(token)

    def probabilities(used: SamplingSettings) -> Tensor:
        return process(logits, Table([used], logits.device), [history])[0].softmax(dim=-1)

    chosen = {name: _effective(name, getattr(settings, name), logits.shape[-1]) for name in _OPTIONS}
    names, changed, rows = ["model"], [True], [logits[0].softmax(dim=-1)]
    used = _NEUTRAL
    for name, fields in _STAGES.items():
        if settings.greedy and name not in _STEERING:
            continue
        before, used = used, replace(used, **{field: chosen[field] for field in fields})
        names.append(name)
        changed.append(used != before)
        rows.append(probabilities(used) if used != before else rows[-1])
    if settings.greedy:
        names.append("greedy")
        changed.append(True)
        rows.append(torch.zeros_like(rows[-1]).scatter(0, rows[-1].argmax(dim=-1, keepdim=True), 1.0))
    table = torch.stack(rows)  # (stages, vocab_size)
    listed = torch.maximum(table[0], table[-1]).topk(min(asked.top, table.shape[-1])).indices.tolist()
    if asked.token is not None and asked.token < table.shape[-1] and asked.token not in listed:
        listed[-1] = asked.token
    listed.sort(key=lambda token: (-float(table[0, token]), token))
    return {
        "stages": [
            {"name": name, "active": active, "kept": int((row > 0).sum()), "bits": _bits(row)}
            for name, active, row in zip(names, changed, table)
        ],
        "settings": chosen,
        "tokens": [
            {"id": token, "text": piece(model, token), "probabilities": table[:, token].tolist()} for token in listed
        ],
    }


def _effective(name: str, value: Any, vocab_size: int) -> Any:
    """A setting, or None where its value keeps every token."""
    off = (name == "top_k" and value is not None and value >= vocab_size) or (name, value) in _KEEPS_ALL
    return None if off else value


def piece(model: Model, token: int) -> str:
    """What a token adds to a text; the name of a special one; bytes that are no character as bytes:\\xe4, like the API."""
    raw = model.tokenizer.token_bytes[token]
    if not raw:
        return str(model.tokenizer.backend.id_to_token(token) or "")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in raw)


def _read(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[int]]:
    """What the encoder reads (nothing for a decoder), and what the decoder has before the token in question."""
    if isinstance(model.network, EncoderDecoder):
        request, _ = model.request(tuple(prompt), 1, {})
        return list(prompt), [*(request.prefix or ()), *answer]
    return [], [*prompt, *answer]


def _bits(row: Tensor) -> float:
    """The entropy of a distribution."""
    return float(torch.special.entr(row.double()).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64)))


def folder_of(runs: Path, name: str) -> Path | None:
    """The run folder of this name directly inside `runs`; None for anything else, also for links that lead outside."""
    if not _NAME.fullmatch(name):
        return None
    folder = (runs / name).resolve()
    metrics = folder / "metrics.jsonl"
    if folder.parent != runs.resolve() or metrics.resolve().parent != folder or not metrics.is_file():
        return None
    return folder


def listed(runs: Path) -> list[dict[str, Any]]:
    """The runs in a folder, the one that was written to last first."""
    try:
        names = [entry.name for entry in runs.iterdir()]
    except OSError:
        return []
    now = time.time()
    found = []
    for name in names:
        folder = folder_of(runs, name)
        if folder is not None:
            status = (folder / "metrics.jsonl").stat()
            found.append({"name": name, "seconds_ago": max(now - status.st_mtime, 0.0), "bytes": status.st_size})
    return sorted(found, key=lambda run: (run["seconds_ago"], run["name"]))


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The series of a run: training and validation points by step, thinned evenly, and what it wrote as samples."""
    training = [record for record in records if "loss" in record]
    validation = [record for record in records if "validation_loss" in record]
    samples = [{"step": r["step"], "text": str(r["sample"])[:2000]} for r in records if "sample" in r]
    last: Mapping[str, Any] = training[-1] if training else {}
    return {
        "training": _columns(_thinned(training), ("step", "loss", "lr", "tokens_per_second")),
        "validation": _columns(_thinned(validation), ("step", "validation_loss")),
        "samples": samples[-5:],
        "step": last.get("step"),
        "tokens": last.get("tokens"),
        "seconds": last.get("seconds"),
    }


def _thinned(records: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """At most so many of them, always with the last."""
    stride = -(-len(records) // _MOST_POINTS)
    return records[::-1][:: max(stride, 1)][::-1]


def _columns(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [record.get(name) for record in records] for name in names}


def _assets() -> dict[str, bytes]:
    """The static files by name, read once: no request ever touches a path."""
    folder = files("formary.serve") / "static"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if Path(entry.name).suffix in _TYPES}

"""The command that serves models over HTTP: what listens where, who may ask, and what to type next."""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from formary.cli.compiling import compile_steps
from formary.errors import FormaryError, MissingExtra


def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders, GGUF files, hub ids; or NAME=MODEL.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in; then give a key.")] = "127.0.0.1",
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Asked of every client; may be given again, and keys share fairly. Or FORMARY_API_KEY."),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Most tokens that wait for a model.")] = 2**16,
    slots: Annotated[int, typer.Option(min=1, max=256, help="Answers that a model writes at once.")] = 8,
    context: Annotated[int | None, typer.Option(min=1, help="Longest prompt and answer; the model's own.")] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time to finish what runs when told to stop.")] = 30.0,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Also serve the model with this adapter, as NAME.")
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="Show the runs in this folder, with live curves.")] = None,
    precision: Annotated[str, typer.Option(help="auto, float32 or int8.")] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Native code for int8 models: made once, then kept.")
    ] = True,
) -> None:
    """Serve models with an OpenAI-compatible API and a playground, on this machine."""
    try:
        from formary.serve.server import listen, run
    except ImportError as error:
        if (error.name or "").partition(".")[0] in {"fastapi", "starlette", "uvicorn", "prometheus_client"}:
            raise MissingExtra("serve", "formary serve") from None
        raise
    from formary.serve.service import Service, load_all, names_of

    _check_precision(precision)
    if runs is not None and not runs.is_dir():
        raise FormaryError(f"--runs {runs}: there is no such folder")
    keys = _keys(api_key)
    named, adapters = names_of(models), _pairs(lora)
    service = Service(_settings(keys, host, max_queue, slots, context, runs))
    listener = listen(host, port)
    port = listener.getsockname()[1]
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if not _is_local(host) and not keys:
        print(f"warning: {host} lets other machines in, and no --api-key keeps anyone out", file=sys.stderr)

    def load() -> None:
        load_all(service, named, adapters, prepare=lambda model: _prepared(model, precision, compile), say=_say)

    def ready() -> None:
        for line in _greeting(service, host, port, bool(keys)):
            _say(line)

    run(service, listener, load, drain_seconds=drain_seconds, ready=ready)


def _say(line: str) -> None:
    print(line, flush=True)


def _settings(
    keys: tuple[str, ...], host: str, max_queue: int, slots: int, context: int | None, runs: Path | None
) -> Any:
    from formary.serve.service import ServerSettings

    # Without a key a web page could reach a server on this machine under a name of its own (DNS rebinding).
    hosts = frozenset(("localhost", "127.0.0.1", "[::1]", host)) if _is_local(host) and not keys else None
    return ServerSettings(keys, max_queue, slots, context, runs=runs, hosts=hosts)


def _keys(given: list[str] | None) -> tuple[str, ...]:
    keys = given or ([os.environ["FORMARY_API_KEY"]] if os.environ.get("FORMARY_API_KEY") else [])
    if not all(keys):
        raise FormaryError("--api-key: is empty; leave it out to let everyone on this machine ask")
    return tuple(keys)


def _pairs(given: list[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in given or ():
        name, equals, path = entry.partition("=")
        if not (name and equals and path):
            raise FormaryError(f"--lora {entry}: expected NAME=PATH, the name under which clients ask for it")
        if name in found:
            raise FormaryError(f"--lora {entry}: there is an adapter '{name}' already")
        found[name] = path
    return found


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_precision(precision: str) -> None:
    from formary.infer.probe import PRECISIONS

    if precision not in PRECISIONS:
        raise FormaryError(f"--precision {precision}: choose {', '.join(PRECISIONS)}")


def _prepared(model: Any, precision: str, compile: bool) -> Any:
    changed, choice = model.in_precision(precision)
    _say(f"precision:  {choice.precision}, as {choice.reason}" if precision == "auto" else f"precision:  {precision}")
    if compile:
        compile_steps(changed.network, _say)
    return changed


def _greeting(service: Any, host: str, port: int, keyed: bool) -> list[str]:
    """What to open, and a first request for the first model."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    lines = [f"models:     {', '.join(service.served)}", f"playground: {url}/", f"API:        {url}/v1", "", "try:"]
    served = next(iter(service.served.values()))
    named = f'"model": "{served.name}"'
    if "chat" in served.abilities:
        path, body = "/v1/chat/completions", f'{{{named}, "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    elif "completions" in served.abilities:
        path, body = "/v1/completions", f'{{{named}, "prompt": "Once upon a time", "max_tokens": 32}}'
    elif "embeddings" in served.abilities:
        path, body = "/v1/embeddings", f'{{{named}, "input": "a text"}}'
    else:
        path, body = f"/v1/predict/{served.name}", '{"inputs": ["a text"]}'
    key = ' -H "Authorization: Bearer $FORMARY_API_KEY"' if keyed else ""
    return [*lines, f"  curl {url}{path}{key} -H 'Content-Type: application/json' -d '{body}'", "", "Ctrl-C stops it."]

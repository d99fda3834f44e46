"""The command that lets a model write, streamed to the terminal as it is made."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from formary.errors import FormaryError


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, a GGUF file, or a hub id.")],
    prompt: Annotated[str | None, typer.Argument(help="What to go on from; - or nothing reads standard input.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="At most this many new tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that sum to p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest one.")] = None,
    typical_p: Annotated[float | None, typer.Option(help="Locally typical sampling.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages what was said.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Per earlier occurrence.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="For having occurred at all.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    json_schema: Annotated[str | None, typer.Option(help="Answer in JSON that is valid by this schema file.")] = None,
    regex: Annotated[str | None, typer.Option(help="Answer with a text that matches this expression.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="Answer with this text; give several to choose from.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text.")] = None,
    n: Annotated[int, typer.Option(min=1, help="How many texts.")] = 1,
    beams: Annotated[int | None, typer.Option(min=2, help="Beam search of this width instead of sampling.")] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Print every token with its log-probability.")] = False,
    precision: Annotated[str, typer.Option(help="float32, int8, or auto: whichever measures best here.")] = "float32",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Continue a text; masked models fill in [MASK], encoder-decoders answer."""
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise FormaryError('there is no prompt: give one, e.g. formary generate MODEL "Once upon a time"')
        prompt = sys.stdin.read()
    from formary.infer.loaded import load

    loaded = load(model, precision=precision)
    if loaded.config.topology == "encoder":
        _fill(loaded, prompt, json)
        return
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "stop": stop,
        "json_schema": None if json_schema is None else _read(json_schema),
        "regex": regex,
        "choice": choice,
        "seed": seed,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    if n == 1 and not (beams or logprobs or json):
        _stream(loaded, prompt, settings)
        return
    if beams:
        settings["beams"] = beams
    made = loaded.generate(prompt, n=n, logprobs=5 if logprobs else None, **settings)
    texts = made if isinstance(made, list) else [made]
    if json:
        print(json_format.dumps([asdict(text) for text in texts], ensure_ascii=False))
        return
    for number, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- {number + 1}")
        print(prompt + text.text if continues(loaded) else text.text)
        if logprobs:
            _print_logprobs(loaded, text)


def continues(loaded: Any) -> bool:
    """Whether the model writes on from its prompt; an encoder-decoder answers it."""
    return bool(loaded.config.topology == "decoder")


def _read(schema: str) -> str:
    try:
        return Path(schema).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormaryError(f"--json-schema {schema}: cannot be read ({error})") from error


def _stream(loaded: Any, prompt: str, settings: dict[str, Any]) -> None:
    pieces = loaded.stream(prompt, **settings)
    first = next(pieces, "")  # what cannot be followed is refused here, before the prompt is shown
    if continues(loaded):
        sys.stdout.write(prompt)
    for piece in chain([first], pieces):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _print_logprobs(loaded: Any, text: Any) -> None:
    for token, logprob in zip(text.tokens, text.logprobs or ()):
        print(f"{logprob:9.4f}  {loaded.tokenizer.decode([token])!r}")


def _fill(loaded: Any, prompt: str, json: bool) -> None:
    blanks = loaded.fill(prompt)
    if json:
        print(json_format.dumps([[asdict(candidate) for candidate in blank] for blank in blanks], ensure_ascii=False))
        return
    for number, blank in enumerate(blanks):
        if len(blanks) > 1:
            print(f"--- blank {number + 1}")
        for candidate in blank:
            print(f"{candidate.probability:7.1%}  {candidate.text if candidate.text.strip() else repr(candidate.text)}")

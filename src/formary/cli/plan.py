"""The command that works out on paper what a training will need: plan."""

from __future__ import annotations

import dataclasses
import json as json_format
from typing import Annotated, Literal, cast

import typer

from formary.errors import FormaryError


def plan(
    params: Annotated[str, typer.Option(help="Weights of the model, embeddings included: 1.5e9, 124M, 7B.")],
    gpus: Annotated[str, typer.Option(help="How many of which card: 8xH100, 1xRTX4090.")],
    tokens: Annotated[str | None, typer.Option(help="Tokens to learn from: 3e10, 300B.")] = None,
    text: Annotated[str | None, typer.Option(help="Or bytes of text: 1e12, 1TB.")] = None,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    vocab: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 50304,
    layers: Annotated[int | None, typer.Option(help="Of the model; the usual number if left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the model; the usual one if left out.")] = None,
    parallel: Annotated[str, typer.Option(help="auto, ddp or fsdp; auto: ddp where it fits.")] = "auto",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences per pass of a GPU; the most that fit.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per optimiser step.")] = 2**19,
    mfu: Annotated[float, typer.Option(help="Share of the cards' peak that training reaches.")] = 0.35,
    price: Annotated[float | None, typer.Option(help="Dollars per GPU and hour.")] = None,
    disk: Annotated[str, typer.Option(help="Bytes per second that checkpoints are written at.")] = "1e9",
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Work out memory, speed, time, checkpoints and cost of training a decoder, before renting anything.

    The arithmetic and how far it is off published trainings are in docs/scale.md.
    """
    from formary.train.plan import BYTES_PER_TOKEN
    from formary.train.plan import plan as work_out

    if (tokens is None) == (text is None):
        raise FormaryError("give --tokens or --text (bytes), one of them")
    if parallel not in ("auto", "ddp", "fsdp"):
        raise FormaryError(f"--parallel {parallel}: is auto, ddp or fsdp")
    many = _number(tokens, "--tokens") if tokens is not None else _number(text or "", "--text") / BYTES_PER_TOKEN
    made = work_out(
        parameters=_number(params, "--params"),
        tokens=many,
        gpus=gpus,
        context=context,
        vocab_size=vocab,
        layers=layers,
        width=width,
        parallel=cast(Literal["auto", "ddp", "fsdp"], parallel),
        recompute=checkpointing,
        micro_batch=micro_batch,
        tokens_per_step=batch_tokens,
        utilisation=mfu,
        dollars=price,
        disk=_number(disk, "--disk"),
    )
    if json:
        print(json_format.dumps({**dataclasses.asdict(made), "fits": made.fits}))
        return
    for line in made.lines():
        print(line)
    if not made.fits:
        print(
            "note: it does not fit: "
            + ", ".join(
                advice
                for advice, helps in (
                    ("--parallel fsdp", made.parallel == "ddp"),
                    ("--checkpointing", not made.recompute),
                    ("more or larger GPUs", True),
                )
                if helps
            )
        )


def _number(text: str, option: str) -> float:
    """1.5e9, 124M, 1TB as a number."""
    units = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
    plain = text.strip().upper().replace("_", "").replace(",", "")
    if len(plain) > 1 and plain.endswith("B") and plain[-2] in "KMGT":  # bytes
        plain = plain[:-1]
    unit = plain[-1:] if plain[-1:].isalpha() else ""
    try:
        return float(plain.removesuffix(unit)) * units[unit]
    except (ValueError, KeyError):
        raise FormaryError(f"{option} {text}: is not a number such as 1.5e9, 124M or 1TB") from None

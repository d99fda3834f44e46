"""Tokenizers of every kind, random networks over them, and ways to follow a constraint by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import tokenizers
from tokenizers import decoders, models

from formary.data import tokenizer as training
from formary.data.tokenizer import Tokenizer
from formary.errors import RequestError
from formary.infer.loaded import Generation, Model
from formary.recipe import schema as recipes

from .conftest import make

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = f'the cat sat on a mat. the dog sat on a log. 猫坐在垫子上。 {{"name": [true, false, null]}} -+:,_ 0123456789 {LETTERS}\n'
SIZES = {"bytes": 300, "bpe": 280, "wordpiece": 120, "unigram": 60, "characters": 300}
KINDS = [*SIZES, "sentencepiece"]


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "sentencepiece":
        return sentencepiece()
    return training.train([TEXT * 3], recipes.Tokenizer(kind=kind, vocab_size=SIZES[kind]), task="causal_lm")


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a space before the first word, which decoding takes away, and bytes for rare characters."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", *sorted(set(TEXT) - {" "}), "▁the", "▁cat", "▁dog", "▁on", "猫坐"]
    vocab = {name: number for number, name in enumerate(dict.fromkeys(names))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


@cache
def writer(kind: str, *, context: int = 512) -> Model:
    tokenizer = tokenizer_of(kind)
    return Model(make("gpt-mini", vocab_size=tokenizer.vocab_size + 3, context=context), tokenizer)


def written(kind: str, seed: int, *, n: int = 2, temperature: float = 1.0, **constraint: Any) -> list[Generation]:
    found = writer(kind).generate("the", n=n, seed=seed, temperature=temperature, max_tokens=400, **constraint)
    return found if isinstance(found, list) else [found]


def spelled(maker: Callable[[], Any], text: str) -> bool:
    """Whether a constraint lets the bytes of a text be written, one by one, and end there."""
    tokenizer, constraint = tokenizer_of("bytes"), maker()
    for token in tokenizer.encode(text):
        if not constraint.allowed()[token]:
            return False
        constraint.accept(token)
    return bool(constraint.complete)


def followed_or_refused(make_maker: Callable[[], Callable[[], Any]]) -> None:
    try:
        constraint = make_maker()()
    except RequestError:
        return
    for place in range(40):
        if constraint.finished:
            return
        choices = constraint.allowed().nonzero()[:, 0].tolist()
        token = choices[place * 7919 % len(choices)]
        constraint.accept(token)

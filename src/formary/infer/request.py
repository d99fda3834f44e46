"""What is asked of the engine and what it answers: requests, events, scores of prompts, counters.

Plain values: nothing here runs a network. A request is checked as it is made, and against a model as it is submitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from formary.errors import RequestError
from formary.infer.sampling import Constraint, SamplingSettings
from formary.model.config import ModelConfig
from formary.tasks.protocol import Prompt, Source

Finish = Literal["stop", "length"]
Top = tuple[tuple[int, float], ...]  # the likeliest (token, log-probability) pairs, best first


class NotFinite(RequestError):
    """An answer ended because the network's numbers for it are not finite; other answers go on."""

    def __init__(self) -> None:
        super().__init__(
            "the logits are not finite: the model's weights are damaged (did training diverge?), "
            "or logit_bias forbids every token"
        )


class TextDecoder(Protocol):
    """Turns token ids into text as they come, holding back incomplete characters."""

    def push(self, id: int, /) -> str:
        """The text that is complete after one more token."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Args:
        prompt: token ids; an encoder-decoder reads them as the source, which may be something else than text.
        max_tokens: stop with reason "length" after this many; 0 only scores the prompt (see `prompt_logprobs`).
        n: how many answers; answer i draws from (seed, i).
        first: the number of the first of them, for a caller who asks for some at a time.
        prefix: what an encoder-decoder's target begins with; (decoder_start_id,) when left out.
        stop_tokens: ids that end an answer; the model's eos_id when left out.
        stop: strings that end an answer and are not part of its text.
        logprobs: None for none, 0 for the chosen tokens', k for the k likeliest tokens' as well.
        prompt_logprobs: the same for the prompt's tokens; a decoder's only.
        sliding: at the end of the context go on with its last half, instead of stopping with reason "length".
        constraint: makes a fresh constraint for each answer.
        speculate: guess several tokens ahead and check them in one pass; the answer is the same. None: where the
            engine measures that it pays.
        id: the caller's name for it, repeated in its events.
    """

    prompt: Prompt
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    max_tokens: int = 256
    n: int = 1
    first: int = 0
    prefix: tuple[int, ...] | None = None
    stop_tokens: frozenset[int] | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    sliding: bool = False
    constraint: Callable[[], Constraint] | None = None
    speculate: bool | None = None
    id: int | str = 0

    def __post_init__(self) -> None:
        least_tokens = 1 if self.prompt_logprobs is None else 0
        least = {"max_tokens": least_tokens, "n": 1, "first": 0, "logprobs": 0, "prompt_logprobs": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < smallest):
                hint = "; 0 needs prompt_logprobs" if name == "max_tokens" and value == 0 else ""
                raise RequestError(f"{name} = {value!r}: must be a whole number of at least {smallest}{hint}")
        if not all(isinstance(stop, str) and stop for stop in self.stop):
            raise RequestError(f"stop = {list(self.stop)!r}: every stop string must be a non-empty string")


@dataclass(frozen=True, slots=True)
class PromptScores:
    """How likely the model finds each token of a prompt, given those before it; None and () for the first."""

    logprobs: tuple[float | None, ...]
    top: tuple[Top, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one answer. `text` is what may now be shown: it can lag behind the tokens, and catches up.

    Args:
        token: the id; `NO_TOKEN` in the only event of an answer with max_tokens = 0, and in the last of one that failed.
        finish: on an answer's last event why it ended; "error" where the network's numbers for it are not finite.
        prompt: on a request's first event, when `prompt_logprobs` was asked for.
        cached: on an answer's first event, how many of its prompt's tokens came from the prefix cache.
    """

    request: int | str
    sample: int
    token: int
    text: str
    logprob: float | None = None
    top: Top = ()
    finish: Finish | Literal["error"] | None = None
    prompt: PromptScores | None = None
    cached: int = 0


@dataclass(frozen=True)
class EngineStatistics:
    """Counters since the engine was made.

    Args:
        prompt_tokens: of the prompts that were read; one that several answers share counts once.
        cached_tokens: of those, how many came from the prefix cache.
        generated_tokens: that came out in events.
        steps: with something to do.
        proposed: tokens that speculation guessed.
        accepted: of those, how many were right.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    proposed: int = 0
    accepted: int = 0


def beginning(
    request: Request, config: ModelConfig, *, context: int, source_context: int, vocab_size: int
) -> tuple[int, ...]:
    """What a decoder reads before it writes: a decoder's prompt, or the prefix of an encoder-decoder's target.

    Raises:
        RequestError: the model cannot follow the request; the message names what.
    """
    source, ids = request.prompt, () if isinstance(request.prompt, Source) else request.prompt
    prompt = ids
    if config.encoder is not None:
        start = (config.decoder_start_id,) if config.decoder_start_id is not None else ()
        prompt = start if request.prefix is None else request.prefix
        if len(source) > source_context:
            raise RequestError(
                f"prompt: {len(source)} tokens are more than the encoder's context of {source_context}; shorten it"
            )
        if isinstance(source, Source) == config.reads_text:
            raise RequestError(f"prompt: this model's encoder reads {config.embedder}; give it such a source")
        if not len(source):
            raise RequestError("prompt: is empty; an encoder-decoder needs a source text")
        if not prompt:
            raise RequestError("prefix: the model's config has no decoder_start_id, so say what the target begins with")
        for name, asked in (("sliding", request.sliding), ("prompt_logprobs", request.prompt_logprobs is not None)):
            if asked:
                raise RequestError(f"{name}: an encoder-decoder cannot follow it; only decoders can")
    elif not prompt:
        raise RequestError("prompt: has no tokens to begin from")
    if len(prompt) > context:
        raise RequestError(f"prompt: {len(prompt)} tokens are more than the context of {context}; shorten it")
    if min(*prompt, *ids, 0) < 0:
        raise RequestError(f"prompt: token {min(*prompt, *ids)} is not in the vocabulary; ids count from 0")
    bias = request.settings.logit_bias
    largest = max(*prompt, *ids, *bias, 0)
    if largest >= vocab_size:
        raise RequestError(f"prompt or logit_bias: token {largest} is outside the vocabulary of {vocab_size}")
    if list(bias.values()).count(-math.inf) == vocab_size:
        raise RequestError("logit_bias: forbids every token of the vocabulary; allow at least one")
    return prompt

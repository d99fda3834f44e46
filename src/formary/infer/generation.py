"""Writes texts with a network and its tokenizer: options by name become requests, and what comes back becomes texts.

Prompts are tokens already; the loop over tokens is the engine's, or beam search's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, TypedDict

from formary.data.tokenizer import Tokenizer
from formary.errors import RequestError, nearest
from formary.infer import constrain
from formary.infer.beam import Hypothesis, beam_steps, run_out
from formary.infer.engine import Engine, Event, Finish, Request
from formary.infer.sampling import SETTINGS, SamplingSettings
from formary.model.topologies import EncoderDecoder, Network
from formary.tasks.protocol import Prompt, Source

_MAX_TOKENS = 256
_MOST_SLOTS = 32
_CHUNK = 2048  # nobody else waits while a call's own prompts are read
_FILTERS = ("top_k", "top_p", "min_p", "typical_p")

TopLogprobs = tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Args:
        text: the answer, without stop strings and special tokens; with `echo`, after the prompt.
        tokens: every generated id, an end token included.
        finish_reason: "stop" (end token or stop string) or "length" (max_tokens or the context).
        prompt_tokens: how many tokens were read.
        logprobs: the model's log-probability of each token (natural), when asked for.
        top_logprobs: the likeliest (id, log-probability) pairs at each token, when asked for.
        prompt_logprobs: with `echo` and `logprobs`, of each prompt token; None for the first.
        score: beam search's.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: Finish
    prompt_tokens: int
    logprobs: tuple[float, ...] | None = None
    top_logprobs: TopLogprobs | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    score: float | None = None

    def __str__(self) -> str:
        return self.text


class Options(TypedDict, total=False):
    """How to write, by name; each is explained in `Model.generate` and `SamplingSettings`.

    None means the model's default, and for the filters (top_k, top_p, min_p, typical_p) off.
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    logit_bias: Mapping[int, float] | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    sliding: bool
    beams: int | None
    length_penalty: float
    early_stopping: bool | Literal["never"]
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    choice: Sequence[str] | None


_OPTIONS = tuple(Options.__annotations__)


@dataclass(frozen=True, eq=False)
class Writer:
    """A network that writes, with its tokenizer.

    Args:
        generation_config: generation_config.json's content; what is passed to a call wins over it.
    """

    network: Network
    tokenizer: Tokenizer
    generation_config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The options that hold where a call says nothing."""
        return settings_from(self.generation_config)

    def write(
        self,
        prompts: Sequence[Prompt],
        options: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        n: int = 1,
        scored: bool = False,
    ) -> list[Generation]:
        """n answers to each prompt, in order.

        Args:
            options: for all, or for each; beam search is for all or none.
            scored: the prompts' tokens are scored as well, where `logprobs` are asked for.

        Raises:
            RequestError: an option that cannot be followed.
        """
        each = [options] * len(prompts) if isinstance(options, Mapping) else options
        requests = []
        for prompt, its in zip(prompts, each, strict=True):
            request, beams = self.request(prompt, n, its, scored=scored)
            if beams is not None:
                return [
                    found for prompt, its in zip(prompts, each) for found in run_out(self.searching(prompt, n, its))
                ]
            requests.append(request)
        events: dict[tuple[int | str, int], list[Event]] = {}
        for event in self._engine(requests).generate(requests):
            events.setdefault((event.request, event.sample), []).append(event)
        return [
            _collected(events[key], events[key[0], 0][0], requests[int(key[0])])
            for key in sorted(events, key=lambda key: (key[0], key[1]))
        ]

    def pieces(self, prompt: Prompt, options: Mapping[str, Any]) -> Iterator[str]:
        """One answer as it is written."""
        request, _ = self.request(prompt, 1, options)
        return (event.text for event in self._engine([request]).generate([request]) if event.text)

    def searching(self, prompt: Prompt, n: int, options: Mapping[str, Any]) -> Generator[None, None, list[Generation]]:
        """Beam search for n answers to a prompt, one step at a time; they are the generator's return value."""
        request, beams = self.request(prompt, n, options)
        config, seq2seq = self.network.config, isinstance(self.network, EncoderDecoder)
        if config.encoder is not None and len(prompt) > config.encoder.context:
            raise RequestError(f"prompt: {len(prompt)} tokens are more than the encoder's {config.encoder.context}")
        found = yield from beam_steps(
            self.network,
            (request.prefix or ()) if seq2seq or isinstance(prompt, Source) else prompt,
            source=prompt if seq2seq else None,
            max_tokens=request.max_tokens,
            n=n,
            stop_tokens=request.stop_tokens or frozenset(),
            **(beams or {"beams": 1}),
        )
        return [self._from_beam(prompt, hypothesis) for hypothesis in found]

    def request(
        self, prompt: Prompt, n: int, options: Mapping[str, Any], *, scored: bool = False
    ) -> tuple[Request, dict[str, Any] | None]:
        """The engine's request for the options of `generate`, and those of beam search when that is asked for.

        Raises:
            RequestError: an unknown option, or a value that cannot be followed.
        """
        for name in options:
            if name not in _OPTIONS:
                hint = nearest(name, _OPTIONS) or f"options: {', '.join(_OPTIONS)}"
                raise RequestError(f"there is no option '{name}'; {hint}")
        given = {name: value for name, value in options.items() if value is not None or name in _FILTERS}
        merged = {**self.defaults, **given}
        if "temperature" not in given and not merged.get("temperature") and any(given.get(f) for f in _FILTERS):
            merged["temperature"] = 1.0
        stop = merged.get("stop", ())
        request = Request(
            prompt=prompt,
            settings=SamplingSettings(**{name: merged[name] for name in SETTINGS if name in merged}),
            max_tokens=merged.get("max_tokens", _MAX_TOKENS),
            n=n,
            prefix=self.prefix() if isinstance(self.network, EncoderDecoder) else None,
            stop_tokens=self.stop_tokens(),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=merged.get("logprobs"),
            prompt_logprobs=0 if scored and merged.get("logprobs") is not None else None,
            sliding=merged.get("sliding", False),
            constraint=constrain.asked_for(given, self.tokenizer, ends=self.stop_tokens()),
        )
        if given.get("beams") is None:
            for name in ("length_penalty", "early_stopping"):
                if name in given:
                    raise RequestError(f"{name}: belongs to beam search; give beams as well")
            return request, None
        refused = [
            name
            for name in (*SETTINGS, "logprobs", "sliding", "stop", *constrain.KINDS)
            if (given.get(name) or name in given.keys() & constrain.KINDS.keys())
            and name != "seed"
            and (name, given[name]) != ("repetition_penalty", 1)
        ]
        if refused:
            raise RequestError(f"{refused[0]}: beam search does not follow it; leave out either it or beams")
        return request, {name: merged[name] for name in ("beams", "length_penalty", "early_stopping") if name in merged}

    @property
    def text_decoder(self) -> Any:
        """Makes a fresh `TextDecoder` for an answer, as the engine takes it."""
        # The sentinels of span corruption are special tokens, and the answer itself.
        return partial(self.tokenizer.stream_decoder, skip_special_tokens=not self.tokenizer.sentinel_ids)

    def stop_tokens(self) -> frozenset[int]:
        """The ids that end an answer."""
        listed = self.generation_config.get("eos_token_id")
        ids = listed if isinstance(listed, list) else [listed]
        ends = (*ids, self.network.config.eos_id, self.tokenizer.eos_id)
        return frozenset(int(token) for token in ends if token is not None)

    def prefix(self) -> tuple[int, ...]:
        """What a target begins with: the start token, and the first token that some families force (BART)."""
        start = self.network.config.decoder_start_id
        start = self.generation_config.get("decoder_start_token_id", self.tokenizer.pad_id) if start is None else start
        forced = self.generation_config.get("forced_bos_token_id")
        return tuple(int(token) for token in (start, forced) if token is not None)

    def _engine(self, requests: Sequence[Request]) -> Engine:
        """An engine for one call, so that a stream that is still open is in nobody's way.

        Its cache takes memory only where it is written.
        """
        config = self.network.config
        longest = max((len(request.prompt) + request.max_tokens for request in requests), default=1)
        whole = any(request.sliding for request in requests) or config.encoder is not None
        return Engine(
            self.network,
            slots=min(max(sum(request.n for request in requests), 1), _MOST_SLOTS),
            context=config.context if whole else min(longest, config.context),
            text_decoder=self.text_decoder,
            chunk=_CHUNK,
        )

    def _from_beam(self, prompt: Prompt, hypothesis: Hypothesis) -> Generation:
        kept = hypothesis.tokens[:-1] if hypothesis.finish == "stop" else hypothesis.tokens
        text = self.tokenizer.decode(kept, skip_special_tokens=not self.tokenizer.sentinel_ids)
        return Generation(text, hypothesis.tokens, hypothesis.finish, len(prompt), score=hypothesis.score)


def settings_from(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `generate` that a generation_config.json stands for; what it does not know is left out.

    Hugging Face samples only with do_sample: true, and means "off" by top_k 0 or null.
    """
    names = {"max_new_tokens": "max_tokens"} | {name: name for name in SETTINGS if name not in ("logit_bias", "seed")}
    found = {
        ours: generation_config[theirs] for theirs, ours in names.items() if generation_config.get(theirs) is not None
    }
    if not found.get("top_k"):
        found.pop("top_k", None)
    if generation_config.get("do_sample"):
        found.setdefault("temperature", 1.0)
    else:
        found = {name: value for name, value in found.items() if name not in ("temperature", *_FILTERS)}
    return found


def _collected(events: Iterable[Event], first: Event, request: Request) -> Generation:
    """An answer; `first` is the first event of the request's first answer, which has the prompt's scores."""
    events = list(events)
    finish = events[-1].finish
    assert finish is not None and finish != "error", "Engine.generate raises where an answer fails"
    wanted = request.logprobs
    return Generation(
        text="".join(event.text for event in events),
        tokens=tuple(event.token for event in events),
        finish_reason=finish,
        prompt_tokens=len(request.prompt),
        logprobs=None if wanted is None else tuple(event.logprob for event in events if event.logprob is not None),
        top_logprobs=tuple(event.top for event in events) if wanted else None,
        prompt_logprobs=None if first.prompt is None else first.prompt.logprobs,
    )

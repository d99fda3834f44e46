"""The engine: many requests written at once, one token for each at every step, each with its own settings and seed.

Sequences live in rows 0..n-1 of the cache; a finished one gives its row to the last, so that rows stay dense.
It knows tokenizers only as something that turns ids into text; queues and deadlines are the server's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from formary.errors import RequestError
from formary.infer.request import (
    NO_TOKEN,
    Constraint,
    EngineStatistics,
    Event,
    Finish,
    PromptScores,
    Request,
    TextDecoder,
)
from formary.infer.sampling import History, Table, sample, uniform
from formary.infer.stepper import Stepper, groups
from formary.infer.stopping import StopStrings
from formary.model.topologies import Network

__all__ = [
    "NO_TOKEN",
    "Constraint",
    "Engine",
    "EngineStatistics",
    "Event",
    "Finish",
    "PromptScores",
    "Request",
    "TextDecoder",
]


class Engine:
    """Writes answers with a decoder or an encoder-decoder.

    Results do not depend on what else is in the batch: settings, seed and history are each row's own, and a row's
    logits are the same up to the rounding of float32 matrix products, whose order of addition can depend on the
    number of rows (about 1e-6). So a token can differ only where two candidates tie within that rounding; in float64
    none does in practice.

    Args:
        network: its weights are read, never changed.
        slots: most answers written at once.
        context: longest sequence; the network's own when left out.
        text_decoder: makes a fresh `TextDecoder`; without one, events carry no text and `stop` cannot be used.
    """

    def __init__(
        self,
        network: Network,
        *,
        slots: int = 8,
        context: int | None = None,
        text_decoder: Callable[[], TextDecoder] | None = None,
        chunk: int = 256,
        prefix_cache_tokens: int = 0,
        draft: Network | None = None,
    ) -> None:
        self.slots = slots
        self._stepper = Stepper(network, slots=slots, context=context)
        self._config = network.config
        self._text_decoder = text_decoder
        self._active: list[_Answer] = []
        self._waiting: deque[_Answer] = deque()
        self._table: Table | None = None  # of the active rows; None when they have changed

    @property
    def context(self) -> int:
        """The longest sequence, prompt and answer together, in tokens."""
        return self._stepper.context

    @property
    def free(self) -> int:
        """Slots that are not in use."""
        return self.slots - len(self._active)

    @property
    def active(self) -> int:
        """Answers being written."""
        return len(self._active)

    @property
    def reading(self) -> int:
        """Answers whose prompts are being read."""
        return 0

    @property
    def waiting(self) -> int:
        """Answers that wait for a slot."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._active or self._waiting)

    @property
    def statistics(self) -> EngineStatistics:
        """Counters since the engine was made."""
        return EngineStatistics()

    def submit(self, request: Request) -> None:
        """Queue a request; its answers join as slots become free.

        Raises:
            RequestError: a prompt that does not fit, or settings that this model cannot follow.
        """
        self._waiting.extend(self._answers(request))

    def generate(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Write the answers to all requests; event.request is the request's place in the list.

        More answers than slots wait for a free one. Closing the iterator frees the slots.
        """
        if self.busy:
            raise RuntimeError("this engine is busy: use submit and step to write several requests side by side")
        try:
            for place, request in enumerate(requests):
                self.submit(replace(request, id=place))
            while self.busy:
                yield from self.step()
        finally:
            self._waiting.clear()
            self._active.clear()
            self._table = None

    def step(self) -> list[Event]:
        """Read prompts and write one token, or a few, for every active answer; the events in no particular order."""
        events = self._write()
        if self._waiting and self.free:
            events += self._start([self._waiting.popleft() for _ in range(min(self.free, len(self._waiting)))])
        return events

    def _write(self) -> list[Event]:
        if not self._active:
            return []
        for row, answer in enumerate(self._active):
            if self._stepper.cache.lengths[row] >= self.context:
                self._slide(row, answer)
        logits = self._stepper.decode([answer.tokens[-1] for answer in self._active])
        if self._table is None:
            self._table = Table([answer.request.settings for answer in self._active], self._stepper.device)
        return self._emit(0, logits, self._table)

    def cancel(self, request: int | str) -> None:
        """Forget a request, wherever it is: waiting, being read or being written; its slots are free at once."""
        self._waiting = deque(answer for answer in self._waiting if answer.request.id != request)
        self._remove([row for row, answer in enumerate(self._active) if answer.request.id == request])

    def _answers(self, request: Request) -> list[_Answer]:
        """The answers a request asks for, after checking that they can be written."""
        config, vocab_size = self._config, self._stepper.vocab_size
        prompt, source = request.prompt, request.prompt
        if config.encoder is not None:
            start = (config.decoder_start_id,) if config.decoder_start_id is not None else ()
            prompt = start if request.prefix is None else request.prefix
            if len(source) > self._stepper.source_context:
                raise RequestError(
                    f"prompt: {len(source)} tokens are more than the encoder's context of {self._stepper.source_context}"
                )
            if not source:
                raise RequestError("prompt: is empty; an encoder-decoder needs a source text")
            if not prompt:
                raise RequestError(
                    "prefix: the model's config has no decoder_start_id, so say what the target begins with"
                )
            if request.sliding:
                raise RequestError("sliding = True: only decoders can go on beyond their context")
        elif not prompt:
            raise RequestError("prompt: has no tokens to begin from")
        if len(prompt) > self.context:
            raise RequestError(f"prompt: {len(prompt)} tokens are more than the context of {self.context}; shorten it")
        largest = max(*prompt, *source, *request.settings.logit_bias, 0)
        if largest >= vocab_size:
            raise RequestError(f"prompt or logit_bias: token {largest} is outside the vocabulary of {vocab_size}")
        if request.stop and self._text_decoder is None:
            raise RequestError("stop: stop strings need a tokenizer, which this engine was made without")
        ends = request.stop_tokens
        if ends is None:
            ends = frozenset() if config.eos_id is None else frozenset([config.eos_id])
        return [self._answer(request, index, prompt, ends) for index in range(request.n)]

    def _answer(self, request: Request, index: int, prompt: tuple[int, ...], ends: frozenset[int]) -> _Answer:
        return _Answer(
            request=request,
            sample=index,
            tokens=list(prompt),
            prompt_tokens=len(prompt),
            ends=ends,
            decoder=self._text_decoder() if self._text_decoder is not None else None,
            stops=StopStrings(request.stop),
            history=History(self._stepper.vocab_size, prompt, self._stepper.device)
            if request.settings.penalises
            else None,
        )

    def _start(self, answers: list[_Answer]) -> list[Event]:
        """Prefill: equal prompts are read once and copied, similar lengths are read together."""
        first = len(self._active)
        same: dict[tuple[tuple[int, ...], tuple[int, ...]], list[_Answer]] = {}
        for answer in answers:
            same.setdefault((answer.request.prompt, tuple(answer.tokens)), []).append(answer)
        keys = list(same)
        logits: list[Tensor] = []  # (vocab_size,) of each row from `first` on
        rows: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        for group in groups([len(source) + len(prompt) for source, prompt in keys]):
            chosen = [keys[index] for index in group]
            sources = [source for source, _ in chosen] if self._config.encoder is not None else []
            logits += self._stepper.prefill(len(self._active), [prompt for _, prompt in chosen], sources)
            for key in chosen:
                rows[key] = len(self._active)
                self._active.append(same[key][0])
        for key, row in rows.items():
            for follower in same[key][1:]:
                self._stepper.cache.copy(row, len(self._active))
                self._active.append(follower)
                logits.append(logits[row - first])
        self._table = None
        table = Table([answer.request.settings for answer in self._active[first:]], self._stepper.device)
        return self._emit(first, torch.stack(logits), table)

    @torch.inference_mode()
    def _emit(self, first: int, logits: Tensor, table: Table) -> list[Event]:
        """Choose a token for each row from `first` on, and remove the rows that have ended."""
        answers = self._active[first:]
        histories = [answer.history for answer in answers] if table.penalised else ()
        tokens = sample(logits, table, [answer.uniform() for answer in answers], histories)
        logprobs = _logprobs(logits, answers, tokens)
        events: list[Event] = []
        ended: list[int] = []
        for place, (answer, token) in enumerate(zip(answers, tokens)):
            row = first + place
            full = self._stepper.cache.lengths[row] >= self.context and not answer.request.sliding
            text, finish = answer.accept(token, full=full)
            chosen, top = logprobs[place] if logprobs else (None, ())
            events.append(Event(answer.request.id, answer.sample, token, text, chosen, top, finish))
            if finish is not None:
                ended.append(row)
        if ended:
            self._remove(ended)
        return events

    def _remove(self, rows: Sequence[int]) -> None:
        for row in sorted(rows, reverse=True):
            last = self._active.pop()
            if row < len(self._active):
                self._stepper.cache.copy(len(self._active), row)
                self._active[row] = last
        if rows:
            self._table = None

    def _slide(self, row: int, answer: _Answer) -> None:
        """Read the last half of the context again from position 0; the last token is fed by the step that follows."""
        kept = answer.tokens[-max(self.context // 2, 1) : -1]
        if kept:
            self._stepper.prefill(row, [kept])
        else:
            self._stepper.cache.clear(row)


@dataclass(eq=False, slots=True)
class _Answer:
    """One answer being written: its tokens so far, and what its text and its penalties remember."""

    request: Request
    sample: int
    tokens: list[int]
    prompt_tokens: int
    ends: frozenset[int]
    decoder: TextDecoder | None
    stops: StopStrings
    history: History | None

    def uniform(self) -> float:
        settings = self.request.settings
        return 0.0 if settings.greedy else uniform(settings.seed, self.sample, len(self.tokens) - self.prompt_tokens)

    def accept(self, token: int, *, full: bool) -> tuple[str, Finish | None]:
        """Take one more token; the text that may be shown and, at the end, why it ended."""
        self.tokens.append(token)
        if self.history is not None:
            self.history.add(token)
        if token in self.ends:
            return self._rest(), "stop"
        text = self.stops.push(self.decoder.push(token)) if self.decoder is not None else ""
        if self.stops.found is not None:
            return text, "stop"
        if full or len(self.tokens) - self.prompt_tokens >= self.request.max_tokens:
            text += self._rest()
            return text, "stop" if self.stops.found is not None else "length"
        return text, None

    def _rest(self) -> str:
        text = self.stops.push(self.decoder.flush()) if self.decoder is not None else ""
        return text + self.stops.flush()


def _logprobs(
    logits: Tensor, answers: Sequence[_Answer], tokens: Sequence[int]
) -> list[tuple[float | None, tuple[tuple[int, float], ...]]] | None:
    """The model's own log-probabilities (natural, before bias, penalties and temperature) where they are asked for."""
    most = max(-1 if answer.request.logprobs is None else answer.request.logprobs for answer in answers)
    if most < 0:
        return None
    table = logits.log_softmax(dim=-1)
    chosen = table.gather(1, torch.tensor(tokens, device=table.device)[:, None])[:, 0].tolist()
    values, ids = table.topk(min(most, table.shape[-1]), dim=-1)
    found: list[tuple[float | None, tuple[tuple[int, float], ...]]] = []
    for answer, logprob, row_ids, row_values in zip(answers, chosen, ids.tolist(), values.tolist()):
        wanted = answer.request.logprobs
        found.append((None, ()) if wanted is None else (logprob, tuple(zip(row_ids, row_values))[:wanted]))
    return found

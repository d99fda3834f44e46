"""The engine: many requests read and written at once, joining and leaving at any step, each with settings of its own.

Rows of the cache are dense: first the answers being written, then the prompts being read, a piece at every step.
It knows tokenizers only as something that turns ids into text; deadlines and fairness are the server's business.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from formary.errors import RequestError
from formary.infer.prefix import BLOCK, PrefixCache
from formary.infer.reading import Reading, common, runs
from formary.infer.request import (
    EngineStatistics,
    Event,
    Finish,
    NotFinite,
    PromptScores,
    Request,
    TextDecoder,
    beginning,
)
from formary.infer.sampling import NO_TOKEN, Constraint, History, Table
from formary.infer.speculate import Draft, Guesser, Speculator
from formary.infer.stepper import Stepper
from formary.infer.stopping import StopStrings
from formary.infer.writing import Answer, choose, logprobs
from formary.model.topologies import Network

__all__ = [
    "NO_TOKEN",
    "Constraint",
    "Engine",
    "EngineStatistics",
    "Event",
    "Finish",
    "NotFinite",
    "PromptScores",
    "Request",
    "TextDecoder",
]

_SCORED_AT_ONCE = 256  # a whole prompt x vocabulary is large


class Engine:
    """Writes answers with a decoder or an encoder-decoder.

    Results do not depend on what else is in the batch, on the prefix cache or on speculation: settings, seed and
    history are each row's own, and a row's logits are the same up to the rounding of float32 matrix products, whose
    order of addition can depend on the shape of the batch (about 1e-6). So a token can differ only where two
    candidates tie within that rounding; in float64 none does in practice.

    Args:
        network: its weights are read, never changed.
        slots: most answers written at once.
        context: longest sequence; the network's own when left out.
        text_decoder: makes a fresh `TextDecoder`; without one, events carry no text and `stop` cannot be used.
        chunk: most prompt tokens read in one step, so that a long prompt does not hold up those who write; twice as
            many while nobody writes.
        prefix_cache_tokens: how many tokens of earlier prompts and answers to keep, so that a prompt that begins like
            one of them is not read from its beginning; a decoder's only.
        draft: a smaller decoder with the same vocabulary, which guesses ahead.
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
        if chunk < 1:
            raise RequestError(f"chunk = {chunk}: must be at least 1")
        self.slots = slots
        self._chunk = chunk
        self._stepper = Stepper(network, slots=slots, context=context)
        self._config = network.config
        self._text_decoder = text_decoder
        self._prefixes: PrefixCache | None = None
        if prefix_cache_tokens >= BLOCK and network.config.encoder is None:
            self._prefixes = PrefixCache(self._stepper.cache, prefix_cache_tokens)
        self._draft: Draft | None = None
        if draft is not None:
            self._draft = Draft(
                draft, slots=slots, context=self.context, vocab_size=self._stepper.vocab_size, chunk=chunk
            )
        self._speculator = Speculator(self._draft)
        self._waiting: deque[Answer] = deque()
        self._writing: list[Answer] = []  # in rows 0, 1, ...
        self._reading: list[Reading] = []  # in the rows that follow, in the order in which they are read
        self._tables: dict[tuple[int, ...], Table] = {}  # of some of the rows being written, until those change
        self._counts: Counter[str] = Counter()

    @property
    def context(self) -> int:
        """The longest sequence, prompt and answer together, in tokens."""
        return self._stepper.context

    @property
    def waiting(self) -> int:
        """Answers that wait for a slot."""
        return len(self._waiting)

    @property
    def reading(self) -> int:
        """Answers whose prompts are being read."""
        return sum(len(reading.answers) for reading in self._reading)

    @property
    def active(self) -> int:
        """Answers being written."""
        return len(self._writing)

    @property
    def free(self) -> int:
        """Slots that are not in use."""
        return self.slots - self.active - self.reading

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._reading or self._writing)

    @property
    def statistics(self) -> EngineStatistics:
        """Counters since the engine was made."""
        return EngineStatistics(**self._counts)

    def submit(self, request: Request) -> None:
        """Queue a request; its answers join as slots become free.

        Raises:
            RequestError: a prompt that does not fit, or settings that this model cannot follow.
        """
        self._waiting.extend(self._answers(request))

    def step(self) -> list[Event]:
        """Write one token, or a few, for every active answer, and read on in prompts; the events in no particular order.

        An answer for which the network's numbers are not finite ends with an event of finish "error"; no other is
        touched by that.
        """
        if not self.busy:
            return []
        self._counts["steps"] += 1
        events = self._write() if self._writing else []
        self._admit()
        if self._reading:
            events += self._read()
        self._counts["generated_tokens"] += sum(event.token != NO_TOKEN for event in events)
        return events

    def cancel(self, request: int | str) -> None:
        """Forget a request, wherever it is: waiting, being read or being written; its slots are free at once."""
        self._waiting = deque(answer for answer in self._waiting if answer.request.id != request)
        for reading in self._reading:
            reading.answers = [answer for answer in reading.answers if answer.request.id != request]
        for index in reversed(range(len(self._reading))):
            if not self._reading[index].answers:
                self._drop_reading(index)
        self._remove([row for row, answer in enumerate(self._writing) if answer.request.id == request])

    def generate(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Write the answers to all requests; event.request is the request's place in the list.

        More answers than slots wait for a free one. Closing the iterator frees the slots.

        Raises:
            NotFinite: the network's numbers for one of them are not finite.
        """
        if self.busy:
            raise RuntimeError("this engine is busy: use submit and step to write several requests side by side")
        try:
            for place, request in enumerate(requests):
                self.submit(replace(request, id=place))
            while self.busy:
                for event in self.step():
                    if event.finish == "error":
                        raise NotFinite
                    yield event
        finally:
            for place in range(len(requests)):
                self.cancel(place)

    # Requests.

    def _answers(self, request: Request) -> list[Answer]:
        """The answers a request asks for, after checking that they can be written."""
        stepper = self._stepper
        prompt = beginning(
            request,
            self._config,
            context=stepper.context,
            source_context=stepper.source_context,
            vocab_size=stepper.vocab_size,
        )
        if request.stop and self._text_decoder is None:
            raise RequestError("stop: stop strings need a tokenizer, which this engine was made without")
        ends = request.stop_tokens
        if ends is None:
            ends = frozenset() if self._config.eos_id is None else frozenset([self._config.eos_id])
        return [self._answer(request, request.first + index, prompt, ends) for index in range(request.n)]

    def _answer(self, request: Request, index: int, prompt: tuple[int, ...], ends: frozenset[int]) -> Answer:
        return Answer(
            request=request,
            sample=index,
            tokens=list(prompt),
            prompt_tokens=len(prompt),
            ends=ends,
            decoder=self._text_decoder() if self._text_decoder is not None else None,
            stops=StopStrings(request.stop),
            guesser=Guesser(request.speculate),
            constraint=request.constraint() if request.constraint is not None else None,
        )

    def _admit(self) -> None:
        """Give free slots to those who wait. Equal prompts share one reading, and of the new ones short go first."""
        new: list[Reading] = []
        for _ in range(min(self.free, len(self._waiting))):
            answer = self._waiting.popleft()
            same = (reading for reading in (*self._reading, *new) if reading.serves(answer))
            reading = next(same, None)
            if reading is None:
                source = answer.request.prompt if self._config.encoder is not None else ()
                new.append(Reading([answer], tuple(answer.tokens), source))
            else:
                reading.answers.append(answer)
        self._reading += sorted(new, key=lambda reading: len(reading.source) + len(reading.tokens))

    # Reading.

    def _read(self) -> list[Event]:
        """Read a chunk, which several prompts may share; answers whose prompt is complete are written from now on."""
        plan = self._plan()
        last: list[Tensor] = []  # hidden states (width,) of the prompts that are complete: always the first of all
        failed: list[Reading] = []
        row = len(self._writing)
        for run in runs(plan):
            pieces = [reading.tokens[reading.done : reading.done + count] for reading, count in run]
            sources = [reading.source for reading, _ in run] if run[0][0].opens else []
            hidden = self._stepper.read(row, pieces, sources)
            for (reading, count), states in zip(run, hidden):
                if not bool(states[:count].isfinite().all()):
                    failed.append(reading)
                    continue
                self._score(reading, states[:count])
                reading.done += count
                reading.opens = False
                if reading.done == len(reading.tokens):
                    last.append(states[count - 1])
            row += len(run)
        events = [answer.fail() for reading in failed for answer in reading.answers]
        for reading in failed:
            self._drop_reading(self._reading.index(reading))
        return events + (self._begin_writing(torch.stack(last)) if last else [])

    def _plan(self) -> list[tuple[Reading, int]]:
        """Which prompts to read on in, and how far: as many as fit the chunk, in order."""
        plan: list[tuple[Reading, int]] = []
        left = self._chunk if self._writing else 2 * self._chunk
        for index, reading in enumerate(self._reading):
            cost = len(reading.source) if reading.opens else 0
            if plan and (cost >= left or self._worth_waiting(index)):
                break
            if not reading.started:
                self._start(reading, len(self._writing) + index)
            count = min(len(reading.tokens) - reading.done, max(left - cost, 1))
            plan.append((reading, count))
            left -= cost + count
            if left <= 0:
                break
        return plan

    def _start(self, reading: Reading, row: int) -> None:
        reading.started = True
        self._stepper.cache.clear(row)
        if self._prefixes is not None and not reading.scored:
            reading.cached = reading.done = self._prefixes.load(reading.tokens, row)
        self._counts["prompt_tokens"] += len(reading.source) + len(reading.tokens)
        self._counts["cached_tokens"] += reading.cached

    def _worth_waiting(self, index: int) -> bool:
        """Whether most of what a prompt would have to read is just being read for another that begins like it."""
        reading = self._reading[index]
        if self._prefixes is None or reading.started or reading.scored:
            return False
        kept = self._prefixes.match(reading.tokens)
        shared = max(common(reading.tokens, other.tokens) for other in self._reading[:index])
        shared = min(shared, len(reading.tokens) - 1) // BLOCK * BLOCK
        return 2 * (shared - kept) >= max(len(reading.tokens) - kept, 2 * BLOCK)

    def _score(self, reading: Reading, hidden: Tensor) -> None:
        """Log-probabilities of the tokens that follow each of the places just read."""
        if not reading.scored:
            return
        targets = reading.tokens[reading.done + 1 : reading.done + len(hidden) + 1]
        most = reading.answers[0].request.prompt_logprobs or 0
        for start in range(0, len(targets), _SCORED_AT_ONCE):
            some = targets[start : start + _SCORED_AT_ONCE]
            reading.scores += logprobs(self._stepper.logits(hidden[start : start + len(some)]), some, most)

    def _begin_writing(self, hidden: Tensor) -> list[Event]:
        """The first tokens of the prompts that are complete; hidden (prompts, width) after their last tokens."""
        first, complete = len(self._writing), self._reading[: len(hidden)]
        self._reading = self._reading[len(hidden) :]
        followers = [(index, answer) for index, reading in enumerate(complete) for answer in reading.answers[1:]]
        start = first + len(complete)
        self._shift_reading(start, start + len(followers))
        for index, (leader, _) in enumerate(followers):
            self._copy(first + leader, start + index)
        for row, reading in enumerate(complete, first):
            self._save(reading.tokens, row)
        owners = [*complete, *(complete[leader] for leader, _ in followers)]
        logits = self._stepper.logits(hidden)[[*range(len(complete)), *(leader for leader, _ in followers)]]
        answers = [*(reading.answers[0] for reading in complete), *(answer for _, answer in followers)]
        self._tables.clear()
        self._writing += answers
        for answer in answers:
            if answer.request.settings.penalises:
                answer.history = History(self._stepper.vocab_size, answer.tokens, self._stepper.device)
        places = [place for place, answer in enumerate(answers) if answer.request.max_tokens]
        chosen = self._choose([first + place for place in places], logits[places]) if places else []
        events = dict(zip(places, chosen))
        for place, answer in enumerate(answers):
            if place not in events:
                events[place] = Event(answer.request.id, answer.sample, NO_TOKEN, "", finish="length")
            scores = owners[place].prompt_scores() if answer.sample == answer.request.first else None
            if scores is not None or owners[place].cached:
                events[place] = replace(events[place], prompt=scores, cached=owners[place].cached)
        self._remove([first + place for place, event in events.items() if event.finish is not None])
        return list(events.values())

    # Writing.

    def _write(self) -> list[Event]:
        """The next token of each answer, and those that follow it as far as they were guessed."""
        cache, answers = self._stepper.cache, list(self._writing)
        for row, answer in enumerate(answers):
            if cache.lengths[row] >= self.context:
                self._slide(row, answer)
        started = perf_counter()
        before = cache.lengths[: len(answers)]
        rooms = [
            min(answer.request.max_tokens - answer.written, self.context - length) - 1
            for answer, length in zip(answers, before)
        ]
        guessers = [answer.guesser for answer in answers]
        guesses = self._speculator.guess(guessers, [answer.tokens for answer in answers], rooms)
        logits = None
        if any(guesses):
            logits = self._stepper.verify([[answer.tokens[-1], *guess] for answer, guess in zip(answers, guesses)])
            if not bool(logits.sum().isfinite()):  # a wrong guess may be what is not finite: once more without
                for row, length in enumerate(before):
                    cache.truncate(row, length)
                    cache.wipe(row, length)
                guesses, logits = [[] for _ in answers], None
        if logits is None:
            logits = self._stepper.decode([answer.tokens[-1] for answer in answers])[:, None]
        accepted = [0] * len(answers)
        events: list[Event] = []
        ended: list[int] = []
        going = list(range(len(answers)))
        while going:
            place = accepted[going[0]]
            for row in going:
                cache.lengths[row] = before[row] + place + 1  # of what was fed, this much is right so far
            chosen = self._choose(going, logits[:, place] if len(going) == len(answers) else logits[going, place])
            events += chosen
            ended += [row for row, event in zip(going, chosen) if event.finish is not None]
            going = [
                row
                for row, event in zip(going, chosen)
                if event.finish is None and guesses[row][place : place + 1] == [event.token]
            ]
            for row in going:
                accepted[row] += 1
        self._speculator.learn(guessers, guesses, accepted, perf_counter() - started)
        self._counts["proposed"] += sum(map(len, guesses))
        self._counts["accepted"] += sum(accepted)
        self._remove(ended)
        return events

    def _choose(self, rows: Sequence[int], logits: Tensor) -> list[Event]:
        """The next token of some of the rows being written."""
        answers = [self._writing[row] for row in rows]
        table = self._tables.get(tuple(rows))
        if table is None:
            table = Table([answer.request.settings for answer in answers], self._stepper.device)
            self._tables[tuple(rows)] = table
        lengths = self._stepper.cache.lengths
        full = [lengths[row] >= self.context and not self._writing[row].request.sliding for row in rows]
        return choose(answers, logits, table, full)

    def _slide(self, row: int, answer: Answer) -> None:
        """Read the last half of the context again from position 0; the last token is fed by the step that follows."""
        answer.slid = True
        kept = answer.tokens[-max(self.context // 2, 1) : -1]
        self._stepper.cache.clear(row)
        if kept:
            self._stepper.read(row, [kept])

    # Rows.

    def _remove(self, rows: Sequence[int]) -> None:
        """Take answers out of the rows being written; the last ones take their places."""
        if not rows:
            return
        before = len(self._writing)
        for row in sorted(rows, reverse=True):
            if self._writing[row].failed:
                self._stepper.cache.wipe(row)
            elif not self._writing[row].slid:
                self._save(self._writing[row].tokens, row)
            last = self._writing.pop()
            if row < len(self._writing):
                self._copy(len(self._writing), row)
                self._writing[row] = last
        self._shift_reading(before, len(self._writing))
        self._tables.clear()

    def _drop_reading(self, index: int) -> None:
        row = len(self._writing) + index
        dropped, behind = self._reading.pop(index), self._reading[index:]
        if any(answer.failed for answer in dropped.answers):
            self._stepper.cache.wipe(row)
        elif dropped.started:
            self._save(dropped.tokens, row)
        for place, reading in enumerate(behind, row):
            if reading.started:
                self._copy(place + 1, place)

    def _shift_reading(self, source: int, target: int) -> None:
        """Move the prompts being read from rows source, source + 1, ... to rows target, target + 1, ..."""
        places = range(len(self._reading))
        for place in reversed(places) if target > source else places:
            if self._reading[place].started and source != target:
                self._copy(source + place, target + place)

    def _copy(self, source: int, target: int) -> None:
        self._stepper.cache.copy(source, target)
        if self._draft is not None:
            self._draft.copy(source, target)

    def _save(self, tokens: Sequence[int], row: int) -> None:
        if self._prefixes is not None:
            self._prefixes.save(tokens, row)

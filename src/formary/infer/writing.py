"""From logits to events: an answer being written, the choice of its next tokens, and log-probabilities as asked for.

It knows no rows, caches or networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from formary.infer.request import Event, Finish, Request, TextDecoder, Top
from formary.infer.sampling import NO_TOKEN, Constraint, History, Table, sample, uniform
from formary.infer.speculate import Guesser
from formary.infer.stopping import StopStrings


@dataclass(eq=False, slots=True)
class Answer:
    """One answer: its tokens so far, the prompt's among them, and what its text, penalties and constraint remember."""

    request: Request
    sample: int
    tokens: list[int]
    prompt_tokens: int
    ends: frozenset[int]
    decoder: TextDecoder | None
    stops: StopStrings
    guesser: Guesser
    constraint: Constraint | None = None
    history: History | None = None
    slid: bool = False  # whether the cache holds only the end of the tokens
    failed: bool = False  # whether the cache may hold what is not finite

    @property
    def written(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_tokens

    def uniform(self) -> float:
        """The random number that decides the next token: a function of seed, sample and place alone."""
        settings = self.request.settings
        return 0.0 if settings.greedy else uniform(settings.seed, self.sample, self.written)

    def accept(self, token: int, *, full: bool) -> tuple[str, Finish | None]:
        """Take one more token; the text that may be shown and, at the end, why it ended.

        Args:
            full: whether no token fits after this one.
        """
        self.tokens.append(token)
        if self.history is not None:
            self.history.add(token)
        if token in self.ends:
            return self._rest(), "stop"
        if self.constraint is not None:
            self.constraint.accept(token)
        text = self.stops.push(self.decoder.push(token)) if self.decoder is not None else ""
        if self.stops.found is not None:
            return text, "stop"
        if self.constraint is not None and self.constraint.finished:
            return text + self._rest(), "stop" if self.constraint.complete else "length"
        if full or self.written >= self.request.max_tokens:
            text += self._rest()
            return text, "stop" if self.stops.found is not None else "length"
        return text, None

    def fail(self) -> Event:
        """Its last event, after numbers that are not finite."""
        self.failed = True
        return Event(self.request.id, self.sample, NO_TOKEN, "", finish="error")

    def _rest(self) -> str:
        text = self.stops.push(self.decoder.flush()) if self.decoder is not None else ""
        return text + self.stops.flush()


@torch.inference_mode()
def choose(answers: Sequence[Answer], logits: Tensor, table: Table, full: Sequence[bool]) -> list[Event]:
    """The next token of each answer; one whose logits are not finite ends there.

    Args:
        logits: (answers, vocab_size).
        table: the answers' settings.
        full: for each answer whether no token fits after this one.
    """
    histories = [answer.history for answer in answers] if table.penalised else ()
    uniforms = [answer.uniform() for answer in answers]
    constraints = [answer.constraint for answer in answers]
    if any(constraint is not None for constraint in constraints):
        tokens = sample(logits, table, uniforms, histories, constraints)
    else:
        tokens = sample(logits, table, uniforms, histories)
    most = max(-1 if answer.request.logprobs is None else answer.request.logprobs for answer in answers)
    scored = logprobs(logits, [max(token, 0) for token in tokens], most) if most >= 0 else None
    events: list[Event] = []
    for place, (answer, token) in enumerate(zip(answers, tokens)):
        if token == NO_TOKEN:
            events.append(answer.fail())
            continue
        text, finish = answer.accept(token, full=full[place])
        event = Event(answer.request.id, answer.sample, token, text, finish=finish)
        wanted = answer.request.logprobs
        if scored is not None and wanted is not None:
            event = replace(event, logprob=scored[place][0], top=scored[place][1][:wanted])
        events.append(event)
    return events


def logprobs(logits: Tensor, tokens: Sequence[int], most: int) -> list[tuple[float, Top]]:
    """The model's own log-probabilities (natural, before bias, penalties and temperature).

    Args:
        logits: (places, vocab_size).
        tokens: the one at each place.

    Returns:
        for each place the token's, and the `most` likeliest tokens with theirs.
    """
    table = logits.log_softmax(dim=-1)
    chosen = table.gather(1, torch.tensor(tokens, device=table.device)[:, None])[:, 0].tolist()
    values, ids = table.topk(min(most, table.shape[-1]), dim=-1)
    tops = (tuple(zip(row_ids, row_values)) for row_ids, row_values in zip(ids.tolist(), values.tolist()))
    return list(zip(chosen, tops))

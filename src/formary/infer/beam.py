"""Beam search: keep the few most likely beginnings at every step, and return the best finished sequences.

A sequence's score is its log-probability divided by length ** length_penalty (Wu et al. 2016), with the stopping
rules of Hugging Face's `generate`, so that both find the same sequences. It does not sample.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from formary.errors import RequestError
from formary.infer.stepper import Stepper
from formary.model.topologies import Network
from formary.tasks.protocol import Source

T = TypeVar("T")


@dataclass(frozen=True)
class Hypothesis:
    """A sequence that beam search found; `score` is the log-probability over length ** length_penalty."""

    tokens: tuple[int, ...]
    score: float
    finish: Literal["stop", "length"]


def beam_search(network: Network, prompt: Sequence[int], **options: Any) -> list[Hypothesis]:
    """The n best of the sequences that follow `prompt`, best first; options and errors as `beam_steps`."""
    return run_out(beam_steps(network, prompt, **options))


def run_out(steps: Generator[None, None, T]) -> T:
    """What steps come to, taken one after another to their end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: T = end.value
            return found


@torch.inference_mode()
def beam_steps(
    network: Network,
    prompt: Sequence[int],
    *,
    source: Sequence[int] | Source | None = None,
    beams: int = 4,
    max_tokens: int = 256,
    n: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    stop_tokens: frozenset[int] = frozenset(),
) -> Generator[None, None, list[Hypothesis]]:
    """The n best of the sequences that follow `prompt`, best first; it stops after every step, and may be left there.

    Args:
        prompt: a decoder's tokens so far, or what an encoder-decoder's target begins with.
        source: what an encoder-decoder's encoder reads.
        beams: beginnings kept at every step.
        length_penalty: above 0 favours longer sequences, below 0 shorter ones; 0 is the plain log-probability.
        early_stopping: True stops when `beams` sequences have ended; False when the best beginning, at its present
            length, cannot beat the worst of them; "never" when it cannot at any length.

    Raises:
        RequestError: the numbers do not fit together, or the prompt does not fit the context.
    """
    if beams < 1 or not 1 <= n <= beams:
        raise RequestError(f"n = {n}, beams = {beams}: beam search returns from 1 to `beams` sequences")
    if early_stopping not in (True, False, "never"):
        raise RequestError(f"early_stopping = {early_stopping!r}: must be True, False or 'never'")
    if not prompt or len(prompt) > network.config.context:
        raise RequestError(
            f"prompt: {len(prompt)} tokens; the model reads from 1 to {network.config.context}, its context"
        )
    longest = min(max_tokens, network.config.context - len(prompt) + 1)
    stepper = Stepper(network, slots=beams, context=len(prompt) + longest)
    logits = stepper.prefill(0, [prompt], [source] if source is not None else ())
    running = [_Beginning((), 0.0)]
    finished: list[Hypothesis] = []
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=logits.device)
    for length in range(1, longest + 1):
        candidates = _candidates(running, logits, count=max(2, 1 + len(stops)) * beams)
        ends = [length == longest or beginning.tokens[-1] in stop_tokens for beginning in candidates]
        for beginning in (candidate for candidate, end in zip(candidates[:beams], ends) if end):
            reason: Literal["stop", "length"] = "stop" if beginning.tokens[-1] in stop_tokens else "length"
            finished.append(Hypothesis(beginning.tokens, beginning.total / length**length_penalty, reason))
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:beams]
        running = [candidate for candidate, end in zip(candidates, ends) if not end][:beams]
        if not running or _settled(running, finished, beams, length, longest, length_penalty, early_stopping):
            break
        for row in range(1, len(running) if length == 1 else 0):
            stepper.cache.copy(0, row)
        if length > 1:
            stepper.cache.reorder([beginning.parent for beginning in running])
        yield
        logits = stepper.decode([beginning.tokens[-1] for beginning in running])
    return finished[:n]


@dataclass(frozen=True, slots=True)
class _Beginning:
    tokens: tuple[int, ...]
    total: float  # log-probability
    parent: int = 0  # the row whose cache it continues


def _candidates(running: list[_Beginning], logits: torch.Tensor, *, count: int) -> list[_Beginning]:
    """The likeliest continuations of all beginnings by one token, best first."""
    totals = torch.tensor([beginning.total for beginning in running], device=logits.device)[:, None]
    scores = (logits.log_softmax(dim=-1) + totals).flatten()
    best, places = scores.topk(min(count, len(scores)))
    vocab_size = logits.shape[-1]
    return [
        _Beginning((*running[place // vocab_size].tokens, place % vocab_size), total, place // vocab_size)
        for total, place in zip(best.tolist(), places.tolist())
        if total > -math.inf
    ]


def _settled(
    running: list[_Beginning],
    finished: list[Hypothesis],
    beams: int,
    length: int,
    longest: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
) -> bool:
    """Whether nothing still running can, by the rule chosen, enter the finished ones."""
    if len(finished) < beams:
        return False
    if early_stopping is True:
        return True
    reach = longest if early_stopping == "never" and length_penalty > 0 else length
    return running[0].total / reach**length_penalty <= finished[-1].score

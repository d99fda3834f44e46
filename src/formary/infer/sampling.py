"""Choosing the next token: a pipeline of pure functions from logits to logits, then one draw per row.

A row's randomness is a hash of (seed, sample, step), not a stream: its token depends on nothing else in the batch,
on no earlier call, and can be recomputed. It does not run networks and keeps no requests.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from formary.errors import RequestError

NO_TOKEN = -1  # where there is none to choose, or none was asked for

# Nucleus sampling looks at this many of the likeliest tokens, then more; only a flat distribution is sorted whole.
_NUCLEUS = (64, 1024)


class Constraint(Protocol):
    """What one answer may say next; it follows the answer token by token."""

    def allowed(self) -> Tensor:
        """True where the next token may be: bool (vocab_size,)."""
        ...

    def accept(self, token: int, /) -> None:
        """Follow the token that was chosen."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the answer may end here; one that is finished and not complete was cut off."""
        ...


@dataclass(frozen=True)
class SamplingSettings:
    """How one sequence chooses its tokens; the defaults choose greedily and change nothing.

    Applied in the order of the fields from logit_bias on, then temperature, top_k, top_p, min_p, typical_p: the
    order of Hugging Face's processors. With temperature 0 the likeliest token is taken and the filters do nothing.

    Args:
        temperature: logits are divided by it; 0 is greedy.
        top_k: keep the k likeliest tokens (Fan et al. 2018).
        top_p: keep the fewest tokens whose probabilities reach p (Holtzman et al. 2020).
        min_p: keep tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024).
        typical_p: keep the tokens whose surprise is nearest the entropy, up to mass p (Meister et al. 2023).
        logit_bias: added to the logits of these token ids; -inf forbids one.
        repetition_penalty: logits of tokens in prompt or answer are divided (positive) or multiplied (Keskar et al. 2019).
        frequency_penalty: subtracted once for each time a token was generated (OpenAI).
        presence_penalty: subtracted once if a token was generated at all (OpenAI).
        seed: equal seeds give equal answers.

    Raises:
        RequestError: a value outside its range; the message names the field.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, lambda t: 0 <= t < math.inf, "a number of at least 0 (0 is greedy)")
        _check("top_k", self.top_k, lambda k: k == int(k) and k >= 1, "a whole number of at least 1, or None")
        _check("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0 and at most 1, or None")
        _check("min_p", self.min_p, lambda p: 0 <= p <= 1, "from 0 to 1, or None")
        _check("typical_p", self.typical_p, lambda p: 0 < p <= 1, "above 0 and at most 1, or None")
        _check("repetition_penalty", self.repetition_penalty, lambda r: 0 < r < math.inf, "above 0 (1 changes nothing)")
        _check("frequency_penalty", self.frequency_penalty, math.isfinite, "a finite number (0 changes nothing)")
        _check("presence_penalty", self.presence_penalty, math.isfinite, "a finite number (0 changes nothing)")
        _check("seed", self.seed, lambda s: s == int(s), "a whole number")
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias = {self.logit_bias!r}: must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            _check(f"logit_bias[{token!r}]", token, lambda t: t == int(t) and t >= 0, "at a token id of at least 0")
            _check(f"logit_bias[{token}]", bias, lambda b: b < math.inf, "a number (-inf forbids the token)")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether the choice depends on the tokens before it (other than through the network)."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


SETTINGS = tuple(entry.name for entry in fields(SamplingSettings))


class History:
    """The tokens of one sequence as the penalties see them: seen at all, and counts of the generated ones."""

    def __init__(self, vocab_size: int, prompt: Iterable[int], device: torch.device | str = "cpu") -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(vocab_size, device=device)
        self.seen[torch.tensor(list(prompt), dtype=torch.long, device=device)] = True

    def add(self, token: int) -> None:
        """Count a generated token."""
        self.seen[token] = True
        self.counts[token] += 1


class Table:
    """The settings of a batch as tensors: for each function its active rows and their values, made once per batch.

    Rows that do not use a function are not touched by it, so that their results are the same to the last bit.
    """

    def __init__(self, settings: Sequence[SamplingSettings], device: torch.device | str = "cpu") -> None:
        self.settings = tuple(settings)
        rows = range(len(self.settings))
        drawn = [row for row in rows if not self.settings[row].greedy]
        self.drawn = drawn
        self.penalised = [row for row in rows if self.settings[row].penalises]
        self.filters: list[tuple[Any, Tensor | None, Tensor]] = []
        for name, function in _FILTERS.items():
            active = [row for row in drawn if getattr(self.settings[row], name) not in (None, _NEUTRAL.get(name))]
            if active:
                values = _column([getattr(self.settings[row], name) for row in active], device)
                self.filters.append((function, _rows(active, len(self.settings), device), values))
        biased = [(row, t, b) for row in rows for t, b in self.settings[row].logit_bias.items()]
        self.bias_at = tuple(torch.tensor([entry[place] for entry in biased], device=device) for place in (0, 1))
        self.bias = torch.tensor([entry[2] for entry in biased], device=device)
        self.penalised_rows = _rows(self.penalised, len(self.settings), device)
        self.penalties = {
            name: _column([getattr(self.settings[row], name) for row in self.penalised], device)
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        }


def process(logits: Tensor, table: Table, histories: Sequence[History | None]) -> Tensor:
    """The whole pipeline: logits (batch, vocab_size) -> logits, -inf at tokens that are ruled out.

    Args:
        histories: one for each row that has a penalty.
    """
    return _filter(_steer(logits, table, histories), table)


def sample(
    logits: Tensor,
    table: Table,
    uniforms: Sequence[float],
    histories: Sequence[History | None] = (),
    constraints: Sequence[Constraint | None] = (),
) -> list[int]:
    """One token for each row of logits (batch, vocab_size), greedily or by inverting the distribution at a uniform.

    Args:
        uniforms: one number in [0, 1) for each row, such as `uniform(seed, sample, step)`; greedy rows ignore theirs.
        constraints: for each row what its next token may be, if anything; the other rows stay as they are.

    Returns:
        token ids; NO_TOKEN for a row whose largest logit is not finite: damaged weights, or a bias that forbids every
        token.
    """
    bound = [row for row, constraint in enumerate(constraints) if constraint is not None]
    masked = _mask(logits, constraints) if bound else logits
    logits = _steer(masked, table, histories)
    if bound:  # a bias of -inf gives way where it forbids all that the constraint allows
        forbidden = torch.isneginf(logits[bound].amax(dim=-1, keepdim=True))
        logits[bound] = torch.where(forbidden, masked[bound], logits[bound])
    highest, likeliest = logits.max(dim=-1)
    tokens: list[int] = likeliest.tolist()
    if table.drawn:
        logits = _filter(logits, table)
        whole = len(table.drawn) == len(tokens)
        drawn = draw(logits if whole else logits[table.drawn], [uniforms[row] for row in table.drawn])
        for row, token in zip(table.drawn, drawn.tolist()):
            tokens[row] = token
    return [token if math.isfinite(most) else NO_TOKEN for token, most in zip(tokens, highest.tolist())]


def draw(logits: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The token at which the cumulative probability of each row passes its uniform number: (batch,)."""
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0]


def uniform(seed: int, sample: int, step: int) -> float:
    """A number in [0, 1) from a hash of its three counters (the idea of Salmon et al. 2011, by BLAKE2).

    48 bits, so that times a total it stays below the total in double precision.
    """
    digest = hashlib.blake2b(b"%d/%d/%d" % (seed, sample, step), digest_size=6).digest()
    return int.from_bytes(digest, "little") * 2.0**-48


# The functions below take logits (batch, vocab_size) and values (batch, 1), and return new logits.


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """Divide by the temperature; the highest logit becomes 0 first, so that a tiny temperature does not overflow."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the k likeliest tokens, and those equal to the k-th (Fan et al. 2018)."""
    vocab_size = logits.shape[-1]
    k = k.clamp(max=vocab_size).long()
    highest = logits.topk(int(k.max()), dim=-1).values
    return logits.masked_fill(logits < highest.gather(-1, k - 1), -math.inf)


def keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the fewest likeliest tokens whose mass reaches p, and those equal to the last (Holtzman et al. 2020)."""
    probabilities = logits.softmax(dim=-1)
    vocab_size = logits.shape[-1]
    for size in (*_NUCLEUS, vocab_size):
        highest = probabilities.topk(min(size, vocab_size), dim=-1).values
        cumulative = highest.cumsum(dim=-1)
        if size >= vocab_size or not bool((cumulative[:, -1:] < p).any()):
            break
    last = (cumulative < p).sum(dim=-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
    return logits.masked_fill(probabilities < highest.gather(-1, last), -math.inf)


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + p.log(), -math.inf)


def keep_typical(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest the entropy until their mass reaches p (Meister et al. 2023, eq. 5)."""
    logprobs = logits.log_softmax(dim=-1)
    probabilities = logprobs.exp()
    entropy = -(logprobs * probabilities).nan_to_num(nan=0.0).sum(dim=-1, keepdim=True)  # 0 x -inf counts as 0
    distance = (-logprobs - entropy).abs()
    nearest, order = distance.sort(dim=-1, stable=True)
    cumulative = probabilities.gather(-1, order).cumsum(dim=-1)
    last = (cumulative < p).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > nearest.gather(-1, last), -math.inf)


def penalise_repetition(logits: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """Push the logits of seen tokens down by a factor (Keskar et al. 2019, section 4.1, also for negative logits)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalise_counts(logits: Tensor, frequency: Tensor, presence: Tensor, counts: Tensor) -> Tensor:
    """Subtract frequency x count + presence x (count > 0) (OpenAI's API reference)."""
    return logits - frequency * counts - presence * (counts > 0)


_FILTERS = {
    "temperature": scale,
    "top_k": keep_top_k,
    "top_p": keep_top_p,
    "min_p": keep_min_p,
    "typical_p": keep_typical,
}
_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


def _mask(logits: Tensor, constraints: Sequence[Constraint | None]) -> Tensor:
    """-inf where a row's constraint does not allow the token; ids beyond the tokenizer's are not allowed."""
    logits = logits.clone()
    for row, constraint in zip(logits, constraints):
        if constraint is not None:
            allowed = constraint.allowed()[: len(row)].to(row.device)
            row[: len(allowed)].masked_fill_(~allowed, -math.inf)
            row[len(allowed) :] = -math.inf
    return logits


def _steer(logits: Tensor, table: Table, histories: Sequence[History | None]) -> Tensor:
    """Bias and penalties: what also changes the greedy choice."""
    if len(table.bias):
        logits = logits.index_put(table.bias_at, table.bias.to(logits.dtype), accumulate=True)
    if table.penalised:
        past = [history for row in table.penalised if (history := histories[row]) is not None]
        seen = torch.stack([history.seen for history in past])
        counts = torch.stack([history.counts for history in past]).to(logits.dtype)
        rows, penalties = table.penalised_rows, table.penalties
        part = logits if rows is None else logits[rows]
        part = penalise_repetition(part, penalties["repetition_penalty"], seen)
        part = penalise_counts(part, penalties["frequency_penalty"], penalties["presence_penalty"], counts)
        logits = part if rows is None else logits.index_copy(0, rows, part)
    return logits


def _filter(logits: Tensor, table: Table) -> Tensor:
    """Temperature and the filters, on the rows that draw."""
    for function, rows, values in table.filters:
        if rows is None:
            logits = function(logits, values)
        else:
            logits = logits.index_copy(0, rows, function(logits[rows], values))
    return logits


def _rows(active: list[int], batch: int, device: torch.device | str) -> Tensor | None:
    """The active rows as an index, or None for all of them."""
    return None if len(active) == batch else torch.tensor(active, dtype=torch.long, device=device)


def _column(values: Sequence[float], device: torch.device | str) -> Tensor:
    """Values as float32 (rows, 1); beyond its normal numbers, where they would be 0 or infinite, the nearest of those."""
    limits = torch.finfo(torch.float32)
    held = [math.copysign(min(max(abs(value), limits.tiny), limits.max), value) if value else 0.0 for value in values]
    return torch.tensor(held, dtype=torch.float32, device=device)[:, None]


def _check(name: str, value: Any, allowed: Any, meaning: str) -> None:
    if value is None and meaning.endswith("None"):
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
        raise RequestError(f"{name} = {value!r}: must be {meaning}")

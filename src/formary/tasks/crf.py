"""Sequences of labels: which may follow one another, the best path among them, and a linear-chain CRF's loss.

The one idea: a matrix of scores for going from one label to the next, with more for the first and the last label; legal
and illegal transitions are such scores too (Lafferty et al. 2001; Lample et al. 2016). Emissions come from the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
_ILLEGAL = -1e4  # finite, so that where every path is illegal the one with the fewest illegal steps is taken
_OPENS, _CONTINUES, _CLOSES = "BI", "IEL", "ESLU"


@dataclass(frozen=True)
class Transitions:
    """Scores in nats of `step` (labels, labels) from the first to the second, `first` (labels,) and `last` (labels,)."""

    step: Floats
    first: Floats
    last: Floats

    def __add__(self, other: Transitions) -> Transitions:
        return Transitions(self.step + other.step, self.first + other.first, self.last + other.last)

    @staticmethod
    def free(labels: int) -> Transitions:
        """Every sequence alike."""
        return Transitions(np.zeros((labels, labels)), np.zeros(labels), np.zeros(labels))

    @staticmethod
    def of_flat(numbers: Floats, labels: int) -> Transitions:
        """From one vector of labels x labels + 2 x labels scores."""
        step, first, last = np.split(numbers, [labels**2, labels**2 + labels])
        return Transitions(step.reshape(labels, labels), first, last)

    def flat(self) -> Floats:
        """The inverse of `of_flat`."""
        return np.concatenate([self.step.reshape(-1), self.first, self.last])


def is_scheme(labels: Sequence[str]) -> bool:
    """Whether labels are BIO, BIOES or BILOU: O, or a letter, a dash and a type, and every type can begin."""
    parts = [_parts(label) for label in labels]
    if not all(letter == "O" or (letter in "BIESLU" and kind) for letter, kind in parts):
        return False
    begun = {kind for letter, kind in parts if letter in "BSU"}
    return bool(begun) and all(kind in begun for letter, kind in parts if letter != "O")


def legal(labels: Sequence[str]) -> Transitions:
    """0 for what BIO, or BIOES where labels E, S, L or U occur, allows, and a large negative number for the rest."""
    parts = [_parts(label) for label in labels]
    must_close = any(letter in _CLOSES for letter, _ in parts)

    def follows(before: tuple[str, str], after: tuple[str, str]) -> bool:
        if after[0] in _CONTINUES:
            return before[0] in _OPENS and before[1] == after[1]
        return not (must_close and before[0] in _OPENS)

    outside = ("O", "")
    step = np.array([[0.0 if follows(before, after) else _ILLEGAL for after in parts] for before in parts])
    first = np.array([0.0 if follows(outside, after) else _ILLEGAL for after in parts])
    last = np.array([0.0 if follows(before, outside) else _ILLEGAL for before in parts])
    return Transitions(step.reshape(len(labels), len(labels)), first, last)


def is_legal(tags: Sequence[str], labels: Sequence[str]) -> bool:
    """Whether a sequence of `labels` keeps to their scheme."""
    rules, numbers = legal(labels), {label: number for number, label in enumerate(labels)}
    places = [numbers[tag] for tag in tags]
    illegal = rules.first[places[0]] + rules.last[places[-1]] if places else 0.0
    return bool(illegal + sum(rules.step[a, b] for a, b in pairwise(places)) == 0)


def best_path(emissions: Floats, transitions: Transitions) -> list[int]:
    """The labels of the highest sum of emissions (seq, labels) and transitions (Viterbi 1967)."""
    if not len(emissions):
        return []
    if not (transitions.step.any() or transitions.first.any() or transitions.last.any()):
        return [int(label) for label in emissions.argmax(axis=1)]
    score = emissions[0] + transitions.first
    back = []
    for emission in emissions[1:]:
        reached = score[:, None] + transitions.step
        back.append(reached.argmax(axis=0))
        score = reached.max(axis=0) + emission
    path = [int((score + transitions.last).argmax())]
    for pointers in reversed(back):
        path.append(int(pointers[path[-1]]))
    return path[::-1]


def crf_loss(emissions: Tensor, targets: Tensor, mask: Tensor, flat: Tensor) -> Tensor:
    """-log p(targets) in nats, summed over sequences.

    Args:
        emissions: (batch, seq, labels) scores.
        targets: (batch, seq) labels; -100 where the label is not known, which leaves it open.
        mask: (batch, seq), True at the words of the sequence, which begin on the left.
        flat: the scores of transitions, as `Transitions.flat` lays them out.
    """
    labels = emissions.shape[-1]
    given = torch.nn.functional.one_hot(targets.clamp(min=0), labels).bool() | (targets < 0)[..., None]
    held = emissions.masked_fill(~given, _ILLEGAL * 10)
    return (log_partition(emissions, mask, flat) - log_partition(held, mask, flat)).sum()


def log_partition(emissions: Tensor, mask: Tensor, flat: Tensor) -> Tensor:
    """(batch,) log of the sum over all label sequences of exp(score); arguments as in `crf_loss`."""
    labels = emissions.shape[-1]
    step, first, last = flat[: labels**2], flat[labels**2 : -labels], flat[-labels:]
    score = emissions[:, 0] + first
    for place in range(1, emissions.shape[1]):
        reached = torch.logsumexp(score[:, :, None] + step.view(labels, labels), dim=1) + emissions[:, place]
        score = torch.where(mask[:, place, None], reached, score)
    return torch.logsumexp(score + last, dim=1)


def _parts(label: str) -> tuple[str, str]:
    letter, _, kind = label.partition("-")
    return (letter, kind) if len(letter) == 1 else ("?", label)

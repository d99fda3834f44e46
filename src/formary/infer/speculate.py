"""Speculation: guess several tokens ahead, let the network check all of them in one pass, keep those that are right.

A guess is right when it is the very token that the answer draws at that place: its own settings, history and random
number decide, and never know of the guess. So the answer is the same as without guessing, greedy or sampled, by
construction; guesses only decide how many tokens a pass over the weights yields (Leviathan et al. 2023 accept by
chance instead, and keep the distribution). Who guesses: the text itself, where it repeats (Saxena 2023), or a smaller
network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from formary.errors import RequestError
from formary.infer.stepper import Stepper
from formary.model.topologies import EncoderDecoder, Network

MOST_GUESSES = 8
_GRAMS = (4, 3, 2)  # the longest end of the text that occurred before is followed; one token alone says too little
_FORGET = 0.8  # share of an old measurement that stays when a new one comes
_FIRST_REST, _LONGEST_REST = 16, 512  # steps without guesses after guessing did not pay


class Lookup:
    """Guesses that what followed the last few tokens earlier in the text will follow again."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # what the text says after each of its n-grams, by place
        self._read = 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow; `tokens` may only have grown since the last call."""
        for end in range(max(self._read, 1), len(tokens)):
            for size in _GRAMS:
                if end >= size:
                    self._after[tuple(tokens[end - size : end])] = end
        self._read = len(tokens)
        for size in _GRAMS:
            place = self._after.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if place is not None:
                period = len(tokens) - place  # beyond the end of the text, what is guessed repeats itself
                return [tokens[place + index % period] for index in range(most)]
        return []


class Draft:
    """A smaller network with the same vocabulary, which writes on greedily; its rows are those of the engine."""

    def __init__(self, network: Network, *, slots: int, context: int, vocab_size: int, chunk: int) -> None:
        if isinstance(network, EncoderDecoder):
            raise RequestError("draft: an encoder-decoder cannot guess for another network; name a decoder")
        self._stepper = Stepper(network, slots=slots, context=context)
        if self._stepper.vocab_size != vocab_size:
            raise RequestError(
                f"draft: has a vocabulary of {self._stepper.vocab_size} tokens, and the network one of {vocab_size}; "
                "name a smaller model with the same tokenizer"
            )
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._chunk = chunk

    def copy(self, source: int, target: int) -> None:
        """Follow the engine, whose row `target` has become its row `source`."""
        self._stepper.cache.copy(source, target)
        self._held[target] = list(self._held[source])

    @torch.inference_mode()
    def guess(self, rows: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        """For rows 0..n-1, given all their tokens, up to most[row] tokens that may follow."""
        guesses: list[list[int]] = [[] for _ in rows]
        pieces = [self._missing(row, tokens, count) for row, (tokens, count) in enumerate(zip(rows, most))]
        going = [row for row, piece in enumerate(pieces) if piece and len(self._held[row]) == len(rows[row])]
        while any(pieces):
            hidden = self._stepper.read(0, pieces)
            ends = torch.tensor([max(len(piece) - 1, 0) for piece in pieces], device=hidden.device)
            likeliest = self._stepper.logits(hidden[torch.arange(len(rows), device=hidden.device), ends]).argmax(dim=-1)
            for row in going:
                guesses[row].append(int(likeliest[row]))
            going = [row for row in going if len(guesses[row]) < most[row]]
            pieces = [guesses[row][-1:] if row in going else [] for row in range(len(rows))]
            for row in going:
                self._held[row].append(guesses[row][-1])
        return guesses

    def _missing(self, row: int, tokens: Sequence[int], most: int) -> list[int]:
        """What the row has to read next, after forgetting what turned out otherwise; nothing when no guess is wanted."""
        if most < 1 or len(tokens) + most - 1 > self._stepper.context:
            return []
        held = self._held[row]
        same = next((place for place, pair in enumerate(zip(held, tokens)) if pair[0] != pair[1]), len(held))
        same = min(same, len(tokens) - 1)
        self._stepper.cache.truncate(row, same)
        piece = list(tokens[same : same + self._chunk])
        self._held[row] = list(tokens[: same + len(piece)])
        return piece


@dataclass(eq=False, slots=True)
class Guesser:
    """What is known of guessing for one answer: its text's repetitions, how often guesses were right, whether to rest.

    Args:
        wanted: always, never, or None for where it pays.
    """

    wanted: bool | None = None
    lookup: Lookup = field(default_factory=Lookup)
    right: float = 0.0
    tried: float = 0.0
    resting: int = 0
    rest: int = _FIRST_REST

    def expected(self, count: int) -> float:
        """How many of so many guesses will be right, when each is as likely to be as those before and the first wrong ends."""
        rate = (self.right + 1) / (self.tried + 2)
        return sum(rate**place for place in range(1, count + 1))

    def learn(self, guessed: int, accepted: int) -> None:
        """What came of some guesses."""
        if guessed:
            self.right = _FORGET * self.right + accepted
            self.tried = _FORGET * self.tried + min(accepted + 1, guessed)

    def pause(self) -> None:
        """Guess no more for a while, each time a longer one."""
        self.resting, self.rest = self.rest, min(2 * self.rest, _LONGEST_REST)

    def most(self, room: int) -> int:
        """How many tokens to guess now, where `room` would fit."""
        if self.wanted is False or room < 1:
            return 0
        if self.resting and self.wanted is None:
            self.resting -= 1
            return 0
        return min(room, MOST_GUESSES)


class Speculator:
    """Decides how many guesses a step takes, from how often they were right and how long steps took.

    Where an answer does not say whether it wants guesses, they are made when the tokens expected per second are more
    with them than without; sizes of steps that were never timed are tried.
    """

    def __init__(self, draft: Draft | None = None) -> None:
        self._draft = draft
        self._seconds: dict[tuple[int, int], float] = {}  # of a step of (rows, tokens in each)

    def guess(
        self, guessers: Sequence[Guesser], rows: Sequence[Sequence[int]], rooms: Sequence[int]
    ) -> list[list[int]]:
        """Guesses for each row, possibly none.

        Args:
            rows: all tokens of each answer.
            rooms: how many guesses could be of use to it.
        """
        none: list[list[int]] = [[] for _ in rows]
        most = [guesser.most(room) for guesser, room in zip(guessers, rooms)]
        if not any(most) or not (self._timed(len(rows), 0) or any(guesser.wanted for guesser in guessers)):
            return none
        if self._draft is not None:
            guesses = self._draft.guess(rows, most)
        else:
            guesses = [
                guesser.lookup.guess(tokens, count) if count else []
                for guesser, tokens, count in zip(guessers, rows, most)
            ]
        if not any(guesses) or any(guess and guesser.wanted for guess, guesser in zip(guesses, guessers)):
            return guesses
        if not self._timed(len(rows), 0):
            return none
        count = self._best(guessers, guesses)
        for guess, guesser in zip(guesses, guessers):
            if guess and count:
                guesser.rest = _FIRST_REST
            elif guess:
                guesser.pause()
        return [guess[:count] for guess in guesses]

    def learn(
        self, guessers: Sequence[Guesser], guesses: Sequence[Sequence[int]], accepted: Sequence[int], seconds: float
    ) -> None:
        """What came of a step that took so long."""
        key = (len(guesses), max(map(len, guesses)))
        known = self._seconds.get(key, seconds)
        self._seconds[key] = _FORGET * known + (1 - _FORGET) * seconds
        for guesser, guess, right in zip(guessers, guesses, accepted):
            guesser.learn(len(guess), right)

    def _timed(self, rows: int, count: int) -> bool:
        return (rows, count) in self._seconds

    def _best(self, guessers: Sequence[Guesser], guesses: Sequence[Sequence[int]]) -> int:
        """The number of guesses for each row that yields most tokens per second; 0 for none."""
        rows, longest = len(guesses), max(map(len, guesses))
        best, speed = 0, rows / self._seconds[rows, 0]
        for count in sorted({min(2**power, longest) for power in range(longest.bit_length() + 1)}):
            expected = rows + sum(guesser.expected(min(len(guess), count)) for guesser, guess in zip(guessers, guesses))
            seconds = self._seconds.get((rows, count), self._seconds[rows, 0])
            if expected / seconds > speed:
                best, speed = count, expected / seconds
        return best

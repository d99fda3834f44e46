"""Prompts that are being read: for whom, how far, and which of them are read in one pass.

It knows no rows, caches or networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from formary.infer.request import PromptScores, Top
from formary.infer.writing import Answer
from formary.tasks.protocol import Prompt


@dataclass(eq=False, slots=True)
class Reading:
    """One prompt being read for the answers that begin with it."""

    answers: list[Answer]
    tokens: tuple[int, ...]
    source: Prompt  # an encoder-decoder's
    done: int = 0
    cached: int = 0
    started: bool = False  # whether the row holds anything of it
    opens: bool = field(init=False)  # whether the source is still to be read
    scores: list[tuple[float, Top]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.opens = len(self.source) > 0

    @property
    def scored(self) -> bool:
        """Whether its tokens' log-probabilities are asked for."""
        return self.answers[0].request.prompt_logprobs is not None

    def serves(self, answer: Answer) -> bool:
        """Whether reading for these answers is reading for that one as well."""
        mine, other = self.answers[0].request, answer.request
        return (mine.prompt, mine.prefix, mine.prompt_logprobs) == (other.prompt, other.prefix, other.prompt_logprobs)

    def prompt_scores(self) -> PromptScores | None:
        """The log-probabilities, when they were asked for and all is read."""
        if not self.scored:
            return None
        return PromptScores((None, *(logprob for logprob, _ in self.scores)), ((), *(top for _, top in self.scores)))


def runs(plan: Sequence[tuple[Reading, int]]) -> Iterator[list[tuple[Reading, int]]]:
    """Neighbours that are read in one pass: of similar lengths, so that little is padding."""
    run: list[tuple[Reading, int]] = []
    for reading, count in plan:
        size = count + len(reading.source)
        if run:
            other = run[0][1] + len(run[0][0].source)
            if run[0][0].opens != reading.opens or size > 2 * other or other > 2 * size:
                yield run
                run = []
        run.append((reading, count))
    if run:
        yield run


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))

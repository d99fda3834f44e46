"""Extractive question answering: the stretch of a context that answers a question (Devlin et al. 2019, section 4.2, 4.3).

A head scores each token as start and as end of the answer. Contexts longer than the model's are read in overlapping
windows; an unanswerable question, and a window without the answer, point at the first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError, RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.heads import LabelHead
from formary.model.topologies import Decoder, Encoder, Network
from formary.recipe.schema import Objective, Recipe
from formary.tasks.models import context_of, reading_tokens, reading_topology, scratch_config, with_label_head
from formary.tasks.protocol import Answer, Answers, Batch, Example, Precision, Progress, Row
from formary.tasks.reading import collated, hidden_states, outputs, place_of, text_of, windows

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """Which tokens of a context a sequence holds.

    Args:
        start: number of its first context token, counted over the whole context.
        at: the position in the sequence where they begin.
        offsets: (count, 2) the characters of the context that each of them stands for.
    """

    start: int
    at: int
    offsets: NDArray[np.int64]


class AnswerSpan:
    """Where in the context the answer stands."""

    name = "answer_span"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder", "decoder")
    form: ClassVar[RowForm] = RowForm(
        columns=("question", "context", "answers"),
        text=lambda row: f"{row['question']}\n{row['context']}",
        check=lambda row, where: _first_answer(row, where),
    )
    asks: ClassVar[tuple[str, ...]] = ("question", "context")
    answers: ClassVar[Answers] = "spans"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: int,
        stride: int = 64,
        longest_answer: int = 30,
        unanswerable: bool = False,
        recipe: Recipe | None = None,
    ) -> None:
        self.tokenizer, self.context, self.recipe = tokenizer, context, recipe
        self.stride, self.longest_answer, self.unanswerable = stride, longest_answer, unanswerable
        self.long = self.cut = 0  # contexts in several windows; questions that were cut

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return reading_tokens(recipe)

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        if not rows:
            raise DataError("data.sources: there are no training rows")
        found = [_first_answer(row, place_of(row, f"training row {number}")) for number, row in enumerate(rows, 1)]
        if not any(found):
            raise DataError("data.sources: no training row has an answer; a model cannot learn to find any")
        objective = recipe.train.objective
        return cls(
            tokenizer,
            context=recipe.train.context,
            stride=objective.stride,
            longest_answer=objective.longest_answer,
            unanswerable=not all(found),
            recipe=recipe,
        )

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        usual = Objective()
        return cls(
            tokenizer,
            context=context_of(config, settings),
            stride=int(settings.get("stride", usual.stride)),
            longest_answer=int(settings.get("longest_answer", usual.longest_answer)),
            unanswerable=bool(settings.get("unanswerable", False)),
        )

    def settings(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "stride": self.stride,
            "longest_answer": self.longest_answer,
            "unanswerable": self.unanswerable,
        }

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(scratch_config(self.recipe, self.tokenizer, reading_topology(self.recipe)))

    def head(self, config: ModelConfig) -> ModelConfig:
        return with_label_head(config, self.tokenizer, self.name, head="span", labels=("start", "end"))

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        """One example for each window of each row's context."""
        places = [place_of(row, f"{where} {number}") for number, row in enumerate(rows, 1)]
        questions = [text_of(row, "question", place) for row, place in zip(rows, places)]
        contexts = [text_of(row, "context", place) for row, place in zip(rows, places)]
        answers = [_first_answer(row, place) if targets else None for row, place in zip(rows, places)]
        backend = self.tokenizer.backend
        room = self.context - backend.num_special_tokens_to_add(True)
        if room < 2:
            raise RecipeError(f"train.context: {self.context} tokens have no room for a question and its context")
        asked = backend.encode_batch(questions, add_special_tokens=False)
        given = backend.encode_batch(contexts, add_special_tokens=False)
        examples = []
        for number, (question, context) in enumerate(zip(asked, given)):
            if len(question.ids) > room // 2:
                self.cut += 1
                question.truncate(room // 2)
            answer = answers[number]
            span = _tokens_of(answer, context.offsets, contexts[number], places[number]) if answer else None
            left = room - len(question.ids)
            stretches = windows([1] * len(context.ids), room=left, shared=min(self.stride, left // 2))
            self.long += len(stretches) > 1
            examples += self._windows(question, context, stretches, span, targets=targets, row=number)
        return examples

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = collated(examples, self.tokenizer.pad_id)
        if all(example.target is not None for example in examples):
            batch["targets"] = torch.from_numpy(np.array([example.target for example in examples], dtype=np.int64))
        return batch

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy of the start and the end among all positions of a window."""
        logits, targets = self._logits(network, batch), batch["targets"]
        smoothing = self.recipe.train.label_smoothing if self.recipe and network.training else 0.0
        if smoothing:  # spread over the real positions only
            shares = logits.log_softmax(dim=1)
            real = batch["mask"][..., None]
            even = (shares.masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1)).mean(dim=-1)
            own = shares.gather(1, targets[:, None, :]).squeeze(1).mean(dim=-1)
            return -((1 - smoothing) * own + smoothing * even).sum(), torch.tensor(len(targets))
        total = F.cross_entropy(logits, targets, reduction="sum") / 2
        return total, torch.tensor(len(targets))

    def predict(
        self,
        network: Network,
        rows: Sequence[Row],
        *,
        precision: Precision = nullcontext,
        targets: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Answer]:
        """{"answer", "start", "end", "probability", "no_answer_probability"}; context[start:end] is the answer.

        The best start and end over all windows, at most `longest_answer` tokens apart; no answer ("") where the first
        token scores higher in every window, for models that saw unanswerable questions. Probabilities are a softmax
        over all these choices.
        """
        examples = self.examples(rows, targets=targets)

        def answer(network: Network, batch: Batch) -> list[Floats]:
            scores = self._logits(network, batch).cpu().double().numpy()
            return [row[:count] for row, count in zip(scores, batch["mask"].sum(dim=1).tolist())]

        by_row: list[list[tuple[Window, Floats]]] = [[] for _ in rows]
        for example, scores in zip(
            examples, outputs(self, network, examples, answer, precision=precision, progress=progress)
        ):
            by_row[example.row].append((example.memory, scores))
        return [self._answer(str(row["context"]), found) for row, found in zip(rows, by_row)]

    def notes(self) -> list[str]:
        said = []
        if self.long:
            many = "1 context was" if self.long == 1 else f"{self.long:,} contexts were"
            said.append(
                f"{many} too long for {self.context} tokens and read in windows that share {self.stride} tokens"
            )
        if self.cut:
            many = "1 question was" if self.cut == 1 else f"{self.cut:,} questions were"
            said.append(f"{many} longer than half of {self.context} tokens and cut; raise train.context to keep more")
        return said

    def _windows(
        self,
        question: Any,
        context: Any,
        stretches: Sequence[tuple[int, int]],
        span: tuple[int, int] | None,
        *,
        targets: bool,
        row: int,
    ) -> list[Example]:
        full = self.tokenizer.backend.post_process(question, context, True)
        ids, types = np.array(full.ids, dtype=np.int64), np.array(full.type_ids, dtype=np.int64)
        offsets = np.array(context.offsets, dtype=np.int64).reshape(-1, 2)
        inside = [place for place, part in enumerate(full.sequence_ids) if part == 1]
        begin, end = (inside[0], inside[-1] + 1) if inside else (len(ids), len(ids))
        if not len(ids):  # nothing asked of nothing, by a model without special tokens
            ids, types = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
            begin = end = 1
        made = []
        for start, stop in stretches:
            target = None
            if targets:
                here = span is not None and start <= span[0] and span[1] < stop
                target = (begin + span[0] - start, begin + span[1] - start) if span and here else (0, 0)
            keep = np.r_[0:begin, begin + start : begin + stop, end : len(ids)]
            memory = Window(start, begin, offsets[start:stop])
            made.append(Example(ids[keep], types[keep], target, row=row, memory=memory))
        return made

    def _logits(self, network: Network, batch: Batch) -> Tensor:
        """(batch, seq, 2) scores of start and end in float32, very low at padding."""
        assert isinstance(network, Encoder | Decoder) and isinstance(network.head, LabelHead)
        logits: Tensor = network.head(hidden_states(network, batch)).float()
        return logits.masked_fill(~batch["mask"][..., None], torch.finfo(torch.float32).min / 4)

    def _answer(self, context: str, found: Sequence[tuple[Window, Floats]]) -> Answer:
        null = min(float(scores[0].sum()) for _, scores in found)
        table, offsets = span_scores(found, context, self.longest_answer)
        start, length = np.unravel_index(int(table.argmax()), table.shape) if table.size else (0, 0)
        best = float(table[start, length]) if table.size else -np.inf
        nothing = not np.isfinite(best)
        null = null if self.unanswerable or nothing else -np.inf
        top = max(best, null)
        total = np.exp(table - top).sum() + np.exp(null - top)
        no_answer = float(np.exp(null - top) / total)
        if nothing or null >= best:
            return {"answer": "", "start": 0, "end": 0, "probability": no_answer, "no_answer_probability": no_answer}
        begin, end = _trimmed(context, int(offsets[start, 0]), int(offsets[start + length, 1]))
        return {
            "answer": context[begin:end],
            "start": begin,
            "end": end,
            "probability": float(np.exp(best - top) / total),
            "no_answer_probability": no_answer,
        }


def span_scores(found: Sequence[tuple[Window, Floats]], context: str, longest: int) -> tuple[Floats, NDArray[np.int64]]:
    """Scores of all spans of a context, by its windows' logits (seq, 2), and the characters of its tokens.

    Returns:
        (tokens, longest) start logit + end logit of the span from a token over 1 to `longest` tokens, the highest
        of the windows that hold it, -inf where no window does or it would begin or end in space; (tokens, 2) offsets.
    """
    count = max(window.start + len(window.offsets) for window, _ in found)
    table, offsets = np.full((count, longest), -np.inf), np.zeros((count, 2), dtype=np.int64)
    for window, scores in found:
        size = len(window.offsets)
        offsets[window.start : window.start + size] = window.offsets
        seen = np.array([bool(context[begin:end].strip()) for begin, end in window.offsets], dtype=bool)
        starts, ends = np.where(seen[:, None], scores[window.at : window.at + size], -np.inf).T
        for more in range(min(longest, size)):
            held = slice(window.start, window.start + size - more)
            table[held, more] = np.maximum(table[held, more], starts[: size - more] + ends[more:])
    return table, offsets


def _trimmed(context: str, begin: int, end: int) -> tuple[int, int]:
    """Offsets without the spaces at both ends: byte-level tokens carry the space before them."""
    text = context[begin:end]
    return begin + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())


def _first_answer(row: Row, where: str) -> tuple[int, str] | None:
    """Where the first answer begins, and its text; None for an unanswerable question.

    Raises:
        DataError: there is no column `answers`, it is not as it must be, or the answer is not in the context there.
    """
    context, given = text_of(row, "context", where), row.get("answers")
    if isinstance(given, Mapping):
        texts, starts = given.get("text", []), given.get("answer_start")
    elif isinstance(given, list | tuple) and all(isinstance(one, Mapping) for one in given):
        texts, starts = [one.get("text") for one in given], [one.get("answer_start") for one in given]
    else:
        said = "is missing" if "answers" not in row else f"holds {type(given).__name__} {given!r:.60}"
        raise DataError(
            f'{where}: field \'answers\' {said}; expected {{"text": [...], "answer_start": [...]}}, empty lists where '
            "there is no answer; map another column with data.columns.answers"
        )
    texts = [texts] if isinstance(texts, str) else list(texts)
    starts = [starts] if isinstance(starts, int) else list([None] * len(texts) if starts is None else starts)
    if len(starts) != len(texts):
        raise DataError(f"{where}: field 'answers' has {len(texts)} texts and {len(starts)} starts")
    if not texts:
        return None
    text, start = texts[0], starts[0]
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{where}: field 'answers' holds the answer {text!r:.60}, which is not a text; give none instead"
        )
    if start is None:
        start = context.find(text)
    if start < 0 or context[start : start + len(text)] != text:
        elsewhere = context.find(text)
        hint = f"it stands at {elsewhere}" if elsewhere >= 0 else "it does not stand there at all"
        raise DataError(f"{where}: the answer {text[:60]!r} is not in its context at character {start}; {hint}")
    return int(start), text


def _tokens_of(
    answer: tuple[int, str], offsets: Sequence[tuple[int, int]], context: str, where: str
) -> tuple[int, int]:
    """The first and the last token that hold a character of the answer."""
    begin, end = _trimmed(context, answer[0], answer[0] + len(answer[1]))
    table = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    inside = np.flatnonzero((table[:, 1] > begin) & (table[:, 0] < end))
    if not len(inside):
        raise DataError(
            f"{where}: the tokenizer makes no tokens of the answer {answer[1][:60]!r}; use another tokenizer"
        )
    return int(inside[0]), int(inside[-1])

"""Multiple choice: which of a question's choices is right; rows may have any number of them.

An encoder reads each pair (question, choice) and gives it one score (Devlin et al. 2019, section 4.4); a causal model scores
a choice by the likelihood of its tokens after the question. A softmax over a row's scores is trained, or asked as it is:
`prompted` needs no training, only solved examples before each question (Brown et al. 2020).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError, RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.heads import LabelHead
from formary.model.topologies import Decoder, Encoder, Network
from formary.recipe.schema import Recipe
from formary.tasks.cross_entropy import IGNORED
from formary.tasks.likelihood import log_likelihoods, split_tokens
from formary.tasks.models import (
    context_of,
    reading_tokens,
    reading_topology,
    scratch_config,
    with_label_head,
    with_language_head,
)
from formary.tasks.protocol import Answer, Answers, Batch, Example, Precision, Progress, Row
from formary.tasks.questions import Question, composed, question_of
from formary.tasks.reading import Reader, hidden_states, outputs, padded, place_of

Normalise = Literal["none", "length", "bytes"]

TEMPLATE = "Question: {question}\nAnswer:"
SEPARATOR = "\n\n"  # between solved examples
_NO_SPACE_AFTER = "：、，。？！「（"  # full-width marks, after which languages without spaces go on at once


@dataclass(frozen=True)
class _Sequence:
    """A question with one of its choices: (seq,) tokens, their types or where the choice is, and what divides the score."""

    tokens: NDArray[np.int64]
    types: NDArray[np.int64] | None = None
    choice: NDArray[np.bool_] | None = None
    size: float = 1.0


class MultipleChoice:
    """Which choice answers a question.

    Args:
        reads: whether an encoder reads pairs; else a causal model's likelihoods are compared.
        template: of a causal model's prompt, with {question} and, if they are to be listed before, {choices}.
        normalise: what a causal model's log-likelihood is divided by: nothing (acc of lm-evaluation-harness), the number
            of the choice's tokens, or that of its bytes in UTF-8 (acc_norm).
        shown: solved rows that stand before every question.
    """

    name = "multiple_choice"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder", "decoder")
    form: ClassVar[RowForm] = RowForm(
        columns=("question", "choices", "answer"), text=composed, telling=("choices", "answer"), check=question_of
    )
    asks: ClassVar[tuple[str, ...]] = ("question", "choices")
    answers: ClassVar[Answers] = "multiple_choice"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: int,
        reads: bool,
        template: str | None = None,
        normalise: Normalise = "none",
        shown: Sequence[Row] = (),
        recipe: Recipe | None = None,
    ) -> None:
        self.tokenizer, self.context, self.reads = tokenizer, context, reads
        self.template, self.normalise, self.recipe = checked_template(template), normalise, recipe
        self.reader = Reader(tokenizer, context)
        questions = [question_of(row, place_of(row, f"example {n}"), solved=True) for n, row in enumerate(shown, 1)]
        self._shown = [self._prompt(one) + self._continuation(one.choices[one.right[0]]) for one in questions]
        self._fewer: dict[bytes, int] = {}  # examples left out, by what is left of the prompt
        self._cut: set[bytes] = set()  # prompts that are longer than the context by themselves

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return reading_tokens(recipe)

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        if not rows:
            raise DataError("data.sources: there are no training rows")
        topology = reading_topology(recipe) if start is None else start.topology
        return cls(
            tokenizer,
            context=recipe.train.context,
            reads=topology == "encoder",
            normalise=recipe.train.objective.normalise,
            recipe=recipe,
        )

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        return cls(
            tokenizer,
            context=context_of(config, settings),
            reads=config.topology == "encoder",
            template=settings.get("template"),
            normalise=settings.get("normalise", "none"),
        )

    @classmethod
    def prompted(
        cls,
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        examples: Sequence[Row] = (),
        template: str | None = None,
        normalise: Normalise = "bytes",
    ) -> Self:
        """The task for a causal model as it is, with `examples` solved before each question.

        Where a prompt is longer than the context, its earliest examples are left out; `notes` counts them.

        Raises:
            RecipeError: not a causal model that writes, or the template has no {question}. DataError: an example is no
                question with its answer; it is called "example" and its number.
        """
        if model_config.topology != "decoder" or model_config.labelled:
            kind = "a classifier" if model_config.labelled else f"an {model_config.topology}"
            raise RecipeError(f"model: choices after a prompt need a causal model that writes, and this is {kind}")
        context = model_config.context
        return cls(
            tokenizer, context=context, reads=False, template=template, normalise=normalise, shown=list(examples)
        )

    def settings(self) -> dict[str, Any]:
        said: dict[str, Any] = {"context": self.context}
        return said if self.reads else said | {"template": self.template, "normalise": self.normalise}

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(scratch_config(self.recipe, self.tokenizer, reading_topology(self.recipe)))

    def head(self, config: ModelConfig) -> ModelConfig:
        if config.topology == "decoder":
            end = self.tokenizer.eos_id
            return with_language_head(config, self.tokenizer, end=0 if end is None else end)
        return dataclasses.replace(
            with_label_head(config, self.tokenizer, self.name, head="choice", labels=("choice",)),
            pooler=True,
            pooler_activation="tanh" if config.token_types else "relu",
            pooling="first",
        )

    def question(self, row: Row, where: str = "row") -> Question:
        """A row as its question, its choices and, where it has an answer, the numbers of the right ones."""
        return question_of(row, place_of(row, where))

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        """Each row's sequences; a target is (choices,) shares that add up to 1, one for each right choice."""
        places = [place_of(row, f"{where} {number}") for number, row in enumerate(rows, 1)]
        questions = [question_of(row, place, solved=targets) for row, place in zip(rows, places)]
        found = []
        for number, (one, sequences) in enumerate(zip(questions, self._sequences(questions))):
            longest = max(sequences, key=lambda sequence: len(sequence.tokens))
            target = None
            if targets:
                target = np.zeros(len(one.choices), dtype=np.float32)
                target[list(one.right)] = 1 / len(one.right)
            found.append(Example(longest.tokens, longest.types, target, row=number, memory=sequences))
        return found

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Tokens and masks (rows, choices, seq), all False where a row has fewer choices; targets (rows, choices)."""
        most = max(len(example.memory) for example in examples)
        nothing = _Sequence(np.zeros(0, dtype=np.int64))
        listed = [[*example.memory, *[nothing] * (most - len(example.memory))] for example in examples]
        flat: list[_Sequence] = [sequence for row in listed for sequence in row]

        def table(rows: Sequence[NDArray[Any]], value: int = 0) -> Tensor:
            return padded(rows, value).view(len(examples), most, -1)

        batch = {
            "tokens": table([one.tokens for one in flat], self.tokenizer.pad_id or 0),
            "mask": table([np.ones(len(one.tokens), dtype=np.int64) for one in flat]).bool(),
        }
        if any(one.types is not None for one in flat):
            empty = [np.zeros(len(one.tokens), dtype=np.int64) for one in flat]
            batch["types"] = table([zeros if one.types is None else one.types for one, zeros in zip(flat, empty)])
        if any(one.choice is not None for one in flat):
            none = np.zeros(0, dtype=np.int64)
            batch["choice"] = table([none if one.choice is None else one.choice for one in flat]).bool()
            batch["size"] = torch.tensor([one.size for one in flat]).view(len(examples), most)
        if all(example.target is not None for example in examples):
            batch["targets"] = torch.zeros(len(examples), most)
            for row, example in zip(batch["targets"], examples):
                row[: len(example.target)] = torch.from_numpy(example.target)
        return batch

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the right choice under a softmax over the row's choices; right ones share the target."""
        present = batch["mask"].any(dim=-1)
        targets = batch["targets"]
        if network.training and self.recipe and (smoothing := self.recipe.train.label_smoothing):
            targets = targets * (1 - smoothing) + smoothing * present / present.sum(dim=1, keepdim=True)
        likely = self._scores(network, batch).log_softmax(dim=-1).masked_fill(~present, 0.0)
        return -(targets * likely).sum(), torch.tensor(len(targets))

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
        places = [place_of(row, f"row {number}") for number, row in enumerate(rows, 1)]
        questions = [question_of(row, place, solved=targets) for row, place in zip(rows, places)]
        flat = [
            Example(sequence.tokens, sequence.types, row=number, memory=[sequence])
            for number, sequences in enumerate(self._sequences(questions))
            for sequence in sequences
        ]
        found = outputs(
            self, network, flat, lambda n, b: self._scores(n, b)[:, 0].tolist(), precision=precision, progress=progress
        )
        scores = iter(found)
        return [_answer(one, [next(scores) for _ in one.choices]) for one in questions]

    def notes(self) -> list[str]:
        said = self.reader.notes()
        if self._fewer:
            said.append(
                f"{_prompts(len(self._fewer))} longer than the context of {self.context} tokens: {sum(self._fewer.values()):,} "
                "of the earliest examples were left out; give fewer or shorter ones"
            )
        if self._cut:
            said.append(
                f"{_prompts(len(self._cut))} longer than the context of {self.context} tokens without any example and cut "
                "where they begin"
            )
        return said

    # From here on: scores of sequences, and sequences of questions ----------------------------------------------------

    def _scores(self, network: Network, batch: Batch) -> Tensor:
        """(rows, choices) in float32; minus infinity where a row has fewer choices."""
        present = batch["mask"].any(dim=-1)
        tokens, mask = batch["tokens"][present], batch["mask"][present]
        if self.reads:
            assert isinstance(network, Encoder | Decoder) and isinstance(network.head, LabelHead)
            inputs = {"tokens": tokens, "mask": mask}
            if "types" in batch:
                inputs["types"] = batch["types"][present]
            each = network.head(network.summary(hidden_states(network, inputs), mask))[:, 0].float()
        else:
            assert isinstance(network, Decoder)
            targets = tokens.masked_fill(~batch["choice"][present], IGNORED)
            each = log_likelihoods(network, tokens[:, :-1], targets[:, 1:]) / batch["size"][present]
        scores = each.new_full(present.shape, float("-inf"))
        scores[present] = each
        return scores

    def _sequences(self, questions: Sequence[Question]) -> list[list[_Sequence]]:
        if not self.reads:
            return [self._continued(question) for question in questions]
        read = self.reader.read(
            [question.text for question in questions for _ in question.choices],
            [choice for question in questions for choice in question.choices],
        )
        each = iter([_Sequence(reading.tokens, reading.types) for reading in read])
        return [[next(each) for _ in question.choices] for question in questions]

    def _continued(self, question: Question) -> list[_Sequence]:
        """The choices after the prompt, with as many of the last examples before it as fit for all of them."""
        asked = self._prompt(question)
        endings = [self._continuation(choice) for choice in question.choices]
        for left_out in range(len(self._shown) + 1):
            prompt = SEPARATOR.join([*self._shown[left_out:], asked])
            pairs = [split_tokens(self.tokenizer, prompt, ending) for ending in endings]
            longest = max(len(before) + len(after) for before, after in pairs)
            if longest <= self.context:
                break
        key = np.array(pairs[0][0]).tobytes()
        if left_out:
            self._fewer[key] = left_out
        if longest > self.context:
            self._cut.add(key)
        return [self._sequence(*pair, choice) for pair, choice in zip(pairs, question.choices)]

    def _sequence(self, before: list[int], after: list[int], choice: str) -> _Sequence:
        tokens = np.array([*before, *after], dtype=np.int64)[-self.context :]
        divisors = {"none": 1, "length": len(after), "bytes": len(choice.encode("utf-8", "surrogatepass"))}
        learned = np.arange(len(tokens)) >= max(1, len(tokens) - len(after))
        return _Sequence(tokens, choice=learned, size=float(max(1, divisors[self.normalise])))

    def _prompt(self, question: Question) -> str:
        listed = "\n".join(f"{chr(ord('A') + n)}. {choice}" for n, choice in enumerate(question.choices))
        parts = self.template.split("{question}")
        return question.text.join(part.replace("{choices}", listed) for part in parts)

    def _continuation(self, choice: str) -> str:
        ending = self.template[-1]
        return choice if ending.isspace() or ending in _NO_SPACE_AFTER else " " + choice


def checked_template(template: str | None) -> str:
    """The template, or the usual one.

    Raises:
        RecipeError: it has no place for the question.
    """
    if template is not None and "{question}" not in template:
        raise RecipeError(f"template {template!r:.60}: must hold {{question}}, the place of what is asked")
    return TEMPLATE if template is None else template


def _answer(question: Question, scores: list[float]) -> Answer:
    shares = torch.tensor(scores, dtype=torch.float64).softmax(dim=0).tolist()
    best = int(np.argmax(scores))
    return {"choice": question.choices[best], "index": best, "probability": shares[best], "probabilities": shares}


def _prompts(count: int) -> str:
    return "1 prompt was" if count == 1 else f"{count:,} prompts were"

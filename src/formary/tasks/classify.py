"""Classification of texts or pairs of texts: one label, several labels, or a number (Devlin et al. 2019, section 4.1).

Encoders read their label from the first token through a pooler, decoders from the last token (Radford et al. 2018).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from formary.data.records import RowForm, label_names
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError
from formary.model.config import ModelConfig, Topology
from formary.model.heads import LabelHead
from formary.model.topologies import Decoder, Encoder, Network
from formary.recipe.schema import Objective, Recipe
from formary.tasks.models import context_of, reading_tokens, reading_topology, scratch_config, with_label_head
from formary.tasks.protocol import Answer, Answers, Batch, Example, Precision, Progress, Row
from formary.tasks.reading import Reader, collated, hidden_states, outputs, text_of

Kind = Literal["single", "multi", "regression"]
_MANY_NUMBERS = 20  # distinct numbers from which on labels are quantities, not names


class Classify:
    """One label, several, or a number for each text."""

    name = "classify"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder", "decoder")
    form: ClassVar[RowForm] = RowForm(
        columns=("text", "label"), beside=("text_pair",), check=lambda row, where: label_of(row, where)
    )
    asks: ClassVar[tuple[str, ...]] = ("text",)
    answers: ClassVar[Answers] = "labels"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: int,
        kind: Kind,
        labels: Sequence[str],
        objective: Objective | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.kind, self.labels = kind, tuple(labels)
        self.objective, self.recipe = objective or Objective(), recipe
        self.reader = Reader(tokenizer, context)
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        self.weights = torch.ones(len(self.labels))
        self.mean, self.spread = 0.0, 1.0  # of the training targets of a regression, while it learns
        self.unseen: Counter[str] = Counter()

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return reading_tokens(recipe)

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        if not rows:
            raise DataError("data.sources: there are no training rows")
        values = [label_of(row, f"training row {number}") for number, row in enumerate(rows, 1)]
        objective = recipe.train.objective
        kind: Kind = _kind(values) if objective.kind == "auto" else objective.kind
        names: list[str] = []
        if kind == "regression":
            names = ["value"]
        else:
            names = sorted({name for value in values for name in label_names(value)}, key=_natural)
            if len(names) < (1 if kind == "multi" else 2):
                only = f"the label '{names[0]}'" if names else "no label"
                raise DataError(
                    f"data.sources: every training row has {only}; a classifier needs rows of at least two classes"
                )
        task = cls(tokenizer, context=recipe.train.context, kind=kind, labels=names, objective=objective, recipe=recipe)
        if kind == "regression":
            numbers = np.array([_number(value, f"training row {place}") for place, value in enumerate(values, 1)])
            task.mean, task.spread = float(numbers.mean()), float(numbers.std()) or 1.0
        elif objective.class_weights == "balanced":
            counts = Counter(name for value in values for name in label_names(value))
            weights = torch.tensor([1.0 / counts[name] for name in names])
            shares = torch.tensor([counts[name] / len(values) for name in names])
            task.weights = weights / (weights * shares).sum()  # a row weighs 1 on average
        return task

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        context = context_of(config, settings)
        return cls(tokenizer, context=context, kind=config.problem, labels=config.labels)

    def settings(self) -> dict[str, Any]:
        return {"context": self.context}

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(scratch_config(self.recipe, self.tokenizer, reading_topology(self.recipe)))

    def head(self, config: ModelConfig) -> ModelConfig:
        encoder = config.topology == "encoder"
        asked = self.recipe.model.switches.get("pooling") if self.recipe else None
        return dataclasses.replace(
            with_label_head(config, self.tokenizer, self.name, head="classify", labels=self.labels),
            problem=self.kind,
            head_bias=encoder or self.kind == "regression",
            pooler=encoder,
            pooler_activation="tanh" if config.token_types else "relu",
            pooling=asked or ("first" if encoder else "last"),
        )

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        places = [f"{where} {number}" for number in range(1, len(rows) + 1)]
        texts = [text_of(row, "text", place) for row, place in zip(rows, places)]
        pairs = [None if row.get("text_pair") is None else str(row["text_pair"]) for row in rows]
        answers = [self._target(row, place) if targets else None for row, place in zip(rows, places)]
        return [
            Example(reading.tokens, reading.types, answer, row=number)
            for number, (reading, answer) in enumerate(zip(self.reader.read(texts, pairs), answers))
        ]

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collated(examples, self.tokenizer.pad_id) | self._targets(examples)

    def _targets(self, examples: Sequence[Example]) -> Batch:
        if all(example.target is not None for example in examples):
            single = self.kind == "single"
            values = np.array([example.target for example in examples])
            return {"targets": torch.from_numpy(values.astype(np.int64 if single else np.float32))}
        return {}

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the label, the mean binary one over labels, or half the squared error in standard units.

        Rows whose label did not occur in training teach nothing and are not counted. Of one label a row the targets may also
        be shares of all labels, (batch, labels).
        """
        logits, targets = self._logits(network, batch), batch["targets"]
        if self.kind == "regression":
            errors = F.mse_loss(logits[:, 0], (targets - self.mean) / self.spread, reduction="none") / 2
            return errors.sum(), torch.tensor(len(targets))
        smoothing = self.recipe.train.label_smoothing if self.recipe and network.training else 0.0
        weights = self.weights.to(logits.device)
        if self.kind == "multi":
            soft = targets * (1 - smoothing) + smoothing / 2
            each = F.binary_cross_entropy_with_logits(logits, soft, pos_weight=weights, reduction="none")
            return each.mean(dim=1).sum(), torch.tensor(len(targets))
        total = F.cross_entropy(
            logits, targets, weight=weights, label_smoothing=smoothing, ignore_index=-100, reduction="sum"
        )
        return total, torch.tensor(len(targets)) if targets.is_floating_point() else (targets != -100).sum()

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
        examples = self.examples(rows, targets=targets)

        def answer(network: Network, batch: Batch) -> list[Answer]:
            logits = self._logits(network, batch)
            if self.kind == "regression":
                return [{"value": value} for value in (logits[:, 0] * self.spread + self.mean).tolist()]
            shares = logits.sigmoid() if self.kind == "multi" else logits.softmax(dim=-1)
            return [self._answer(row) for row in shares.tolist()]

        return outputs(self, network, examples, answer, precision=precision, progress=progress)

    def finish(self, network: Network) -> None:
        """Let the network speak in the unit of the data: the scale that a regression learned in goes into its head."""
        head = network.head
        if self.kind != "regression" or not isinstance(head, LabelHead) or head.output.bias is None:
            return
        with torch.no_grad():
            head.output.weight.mul_(self.spread)
            head.output.bias.mul_(self.spread).add_(self.mean)
        self.mean, self.spread = 0.0, 1.0

    def notes(self) -> list[str]:
        said = self.reader.notes()
        if self.unseen:
            listed = ", ".join(f"'{name}' ({count:,})" for name, count in self.unseen.most_common(5))
            said.append(f"labels that no training row has count as errors: {listed}")
        return said

    def _logits(self, network: Network, batch: Batch) -> Tensor:
        """(batch, labels) in float32."""
        assert isinstance(network, Encoder | Decoder) and isinstance(network.head, LabelHead)
        logits: Tensor = network.head(
            network.summary(hidden_states(network, batch, for_summary=True), batch.get("mask"))
        )
        return logits.float()

    def _answer(self, shares: list[float]) -> Answer:
        by_label = dict(zip(self.labels, shares))
        if self.kind == "multi":
            return {"labels": [name for name, share in by_label.items() if share >= 0.5], "probabilities": by_label}
        best = max(by_label, key=by_label.__getitem__)
        return {"label": best, "probability": by_label[best], "probabilities": by_label}

    def _target(self, row: Row, where: str) -> Any:
        value = label_of(row, where)
        if self.kind == "regression":
            return _number(value, where)
        names = label_names(value)
        self.unseen.update(name for name in names if name not in self.numbers)
        if self.kind == "multi":
            chosen = np.zeros(len(self.labels), dtype=np.float32)
            chosen[[self.numbers[name] for name in names if name in self.numbers]] = 1.0
            return chosen
        if len(names) != 1:
            raise DataError(f"{where}: field 'label' holds {len(names)} labels and the task takes one")
        return self.numbers.get(names[0], -100)


def label_of(row: Row, where: str) -> Any:
    """What stands in a row's column `label`.

    Raises:
        DataError: nothing does; the row is called `where`.
    """
    value = row.get("label")
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        state = "is missing" if "label" not in row else "is empty" if value in (None, "") else "is not a number (NaN)"
        text = f": {row['text'][:60]!r}" if isinstance(row.get("text"), str) else ""
        raise DataError(
            f"{where}: field 'label' {state}{text}; complete the row, take it out, "
            "or map another column with data.columns.label"
        )
    return value


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: field 'label' holds {value!r:.40}, and a regression needs a number") from None
    if not math.isfinite(number):
        raise DataError(f"{where}: field 'label' holds {value!r:.40}, which is not a finite number")
    return number


def _kind(values: Sequence[Any]) -> Kind:
    """Lists are several labels; many different numbers, or numbers with fractions, are quantities; the rest names."""
    if any(isinstance(value, list | tuple) for value in values):
        return "multi"
    try:
        distinct = {float(value) for value in values if not isinstance(value, bool)}
    except ValueError:  # names
        return "single"
    if len(distinct) > _MANY_NUMBERS or any(not value.is_integer() for value in distinct):
        return "regression"
    return "single"


def _natural(name: str) -> tuple[int, float, str]:
    try:
        return (0, float(name), name)
    except ValueError:
        return (1, 0.0, name)

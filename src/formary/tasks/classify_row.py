"""Classification of table rows: each cell is a token of an encoder (FT-Transformer, Gorishniy et al. 2021).

Labels, losses and answers are those of `classify`; what is read is a row's numbers and names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch

from formary.data.records import RowForm
from formary.data.table import Table, learned
from formary.data.tokenizer import Tokenizer, wordless
from formary.errors import DataError
from formary.model.config import ModelConfig, Topology
from formary.recipe.schema import Recipe
from formary.tasks.classify import Classify, label_of
from formary.tasks.models import scratch_config, with_label_head
from formary.tasks.protocol import Answers, Batch, Example, Row

_UNREAD = ("label", "text", "id")  # columns that say nothing of the row


def cells_of(row: Row) -> str:
    """A row in one line: what two rows are duplicates by."""
    return ", ".join(f"{name} {value}" for name, value in row.items() if name != "label")


class ClassifyRow(Classify):
    """One label, several, or a number for each row of a table."""

    name = "classify_row"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder",)
    embedder: ClassVar[str] = "columns"
    form: ClassVar[RowForm] = RowForm(
        columns=("label",), text=cells_of, alike=False, check=lambda row, where: label_of(row, where)
    )
    asks: ClassVar[tuple[str, ...]] = ("columns",)
    answers: ClassVar[Answers] = "row_labels"
    table: Table
    left_out: Sequence[str] = ()

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return "masked_lm"

    @classmethod
    def vocabulary(cls, recipe: Recipe, rows: Sequence[Row]) -> Tokenizer:
        return wordless()

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        task = super().learn(recipe, tokenizer, rows, start=start)
        task.table, task.left_out = learned(rows, but=_UNREAD, only=recipe.train.objective.columns)
        return task

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        if "table" not in settings:
            raise DataError(
                "formary.json: this model does not say which columns it reads; train it with task classify_row"
            )
        task = super().of_model(config, tokenizer, settings)
        task.table = Table.from_json(settings["table"])
        return task

    def settings(self) -> dict[str, Any]:
        return {"context": self.context, "table": self.table.to_json()}

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(scratch_config(self.recipe, self.tokenizer, "encoder"))

    def head(self, config: ModelConfig) -> ModelConfig:
        stack = dataclasses.replace(config.transformer, context=max(self.context, 1 + len(self.table.columns)))
        return dataclasses.replace(
            with_label_head(config, self.tokenizer, self.name, head="classify", labels=self.labels),
            transformer=stack,
            problem=self.kind,
            pooling="first",
            column_sizes=self.table.sizes,
        )

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        answers = [self._target(row, f"{where} {n}") if targets else None for n, row in enumerate(rows, 1)]
        cells = self.table.cells(rows, where)
        return [Example(read, target=answer, row=n) for n, (read, answer) in enumerate(zip(cells, answers))]

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = {"cells": torch.from_numpy(np.stack([example.inputs for example in examples]))}
        return batch | self._targets(examples)

    def notes(self) -> list[str]:
        return [*self.left_out, *self.table.notes(), *super().notes()]

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns of its rows."""
        return tuple(column.name for column in self.table.columns)

    def worded(self, row: Row) -> str:
        """A row in one line."""
        return ", ".join(f"{column.name} {row.get(column.name, '–')}" for column in self.table.columns)

"""Lets a finished model answer many rows whose right answers are known, with a bar.

Rows are read once: a task that answers with numbers checks and counts the right answers as it reads. Where answers are
written, the right ones are no part of what is read before, so a task of their own looks at whole rows first.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from formary.infer.answers import answers, measurable
from formary.infer.loaded import Model
from formary.pipeline.progress import bar
from formary.tasks.protocol import Answer, AnsweringTask, LabelledTask, LikelihoodTask, Precision, Row, WritingTask

_TOGETHER = 128  # rows between two moves of the bar where answers are written


def answered(
    model: Model,
    rows: Sequence[Row],
    *,
    precision: Precision,
    console: Console | None = None,
    task: LabelledTask | None = None,
    targets: bool = True,
) -> tuple[list[Answer], list[str]]:
    """The answers to rows with right answers, in their order, and the task's notes on these rows.

    Args:
        console: where a bar is shown; nowhere when left out.
        task: one that remembers something of the rows; the model's, with nothing read yet, when left out.
        targets: whether the right answers are checked and counted; those of a run's rows have been.

    Raises:
        DataError: a row is not as the task needs it; it is named.
    """
    task = task or fresh_task(model)
    with bar(console, "answering") as progress:
        if isinstance(task, LikelihoodTask):
            return measurable(task, model.network, rows, precision=precision, progress=progress), task.notes()
        if isinstance(task, AnsweringTask):
            found = answers(task, model.network, rows, precision=precision, targets=targets, progress=progress)
            return found, task.notes()
        notes, found = _checked(model, rows) if targets else [], []
        progress(0, len(rows))
        for start in range(0, len(rows), _TOGETHER):
            found += answers(task, model.network, rows[start : start + _TOGETHER], precision=precision)
            progress(len(found), len(rows))
    return found, list(dict.fromkeys([*notes, *task.notes()]))


def fresh_task(model: Model) -> LabelledTask:
    """The model's task, which has read nothing yet."""
    return type(model.task).of_model(model.config, model.tokenizer, model.formary.get("settings", {}))


def _checked(model: Model, rows: Sequence[Row]) -> list[str]:
    """What a task that writes notes on whole rows; prompts are looked at too, so that an error names the row's number."""
    whole, prompts = fresh_task(model), fresh_task(model)
    whole.examples(rows, targets=True)
    if isinstance(prompts, WritingTask):
        for number, row in enumerate(rows, 1):
            prompts.prompt(row, f"row {number}")
    return whole.notes()

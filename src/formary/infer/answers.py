"""Lets a task answer rows with a network: tasks that answer with numbers do it themselves, for the others text is written.

Greedy or beam search unless asked otherwise: an answer that is measured does not depend on chance. Which prompt stands
for a row and what ends an answer, the task says.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from formary.data.images import is_data_uri
from formary.errors import RequestError
from formary.infer.generation import Writer
from formary.model.topologies import Network
from formary.tasks.protocol import (
    Answer,
    AnsweringTask,
    LabelledTask,
    LikelihoodTask,
    Precision,
    Progress,
    Row,
    WritingTask,
)


def answers(
    task: LabelledTask, network: Network, rows: Sequence[Row], *, precision: Precision = nullcontext, **options: Any
) -> list[Answer]:
    """The answers to rows, in their order.

    Args:
        precision: of forward passes; texts are written in the precision of the weights.
        options: the task's own, or for texts those of `Model.generate`: beams, length_penalty, max_tokens, ...

    Raises:
        DataError: a row is not as the task needs it. RequestError: an option that cannot be followed.
    """
    if isinstance(task, AnsweringTask):
        return task.predict(network, rows, precision=precision, **options)
    if not isinstance(task, WritingTask):
        raise RequestError(f"predict: task {task.name} neither predicts nor writes")
    prompts = [task.prompt(row, f"row {number}") for number, row in enumerate(rows, 1)]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))  # like lengths are read together
    each = [writing(task, rows[number], options) for number in order]
    written = writer_of(task, network).write([prompts[number] for number in order], each)
    found: list[Answer] = [{} for _ in rows]
    for number, generation in zip(order, written, strict=True):
        found[number] = written_answer(task, rows[number], generation.tokens)
    return found


def measurable(
    task: LabelledTask,
    network: Network,
    rows: Sequence[Row],
    *,
    precision: Precision = nullcontext,
    progress: Progress | None = None,
) -> list[Answer]:
    """What evaluation measures on rows with right answers: the answers to them, or how likely the right ones are.

    Raises:
        DataError: a row is not as the task needs it.
    """
    if isinstance(task, LikelihoodTask):
        return task.likelihood(network, rows, precision=precision, progress=progress)
    return answers(task, network, rows, precision=precision)


def searching(
    task: WritingTask, network: Network, row: Row, options: Mapping[str, Any]
) -> Generator[None, None, Answer]:
    """The answer to one row by beam search, one step at a time; it is the generator's return value."""
    prompt = task.prompt(row, "row 1")
    (found,) = yield from writer_of(task, network).searching(prompt, 1, writing(task, row, options))
    return written_answer(task, row, found.tokens)


def rows_of(task: LabelledTask, inputs: Sequence[str | Mapping[str, Any]]) -> list[Row]:
    """Rows for a task; a text stands for a row with the column that the task asks for first, a data URI for its file."""

    def column(value: str) -> str:
        return task.form.files[0] if task.form.files and is_data_uri(value) else task.asks[0]

    return [{column(value): value} if isinstance(value, str) else value for value in inputs]


def writer_of(task: WritingTask, network: Network) -> Writer:
    """What writes a task's answers; they end where the task says."""
    return Writer(network, task.tokenizer, {"eos_token_id": list(task.ends)})


def writing(task: WritingTask, row: Row, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for writing the answer to a row: the task's, but for those that are given."""
    return {**task.writing(row), **{name: value for name, value in options.items() if value is not None}}


def written_answer(task: WritingTask, row: Row, tokens: Sequence[int]) -> Answer:
    """The answer to a row that written tokens are."""
    if hasattr(task, "written"):
        answer: Answer = task.written(row, tokens)
        return answer
    kept = [token for token in tokens if token not in task.ends]
    return {"text": task.tokenizer.decode(kept, skip_special_tokens=True)}

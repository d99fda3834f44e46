"""Lets a task answer rows with a network: tasks that answer with numbers do it themselves, for the others text is written.

Greedy or beam search unless asked otherwise: an answer that is measured does not depend on chance. Which prompt stands
for a row and what ends an answer, the task says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from formary.errors import RequestError
from formary.infer.loaded import Model
from formary.model.topologies import Network
from formary.tasks.protocol import Answer, AnsweringTask, LabelledTask, Precision, Row, WritingTask


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
    prompts = [task.prompt_tokens(row, f"row {number}") for number, row in enumerate(rows, 1)]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))  # like lengths are read together
    model = Model(network, task.tokenizer, defaults={"eos_token_id": list(task.ends)})
    chosen = {name: value for name, value in options.items() if value is not None}
    written = model.write([prompts[number] for number in order], {**task.writing(), **chosen})
    found: list[Answer] = [{} for _ in rows]
    for number, generation in zip(order, written, strict=True):
        kept = [token for token in generation.tokens if token not in task.ends]
        found[number] = {"text": task.tokenizer.decode(kept, skip_special_tokens=True)}
    return found

"""Measures models without a recipe or a run folder: causal models on texts, models with a task's head on rows."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formary import durable
from formary.data.shards import TokenShards, write_tokens
from formary.data.source import read
from formary.errors import FormaryError
from formary.evaluate.labelled import suite_of
from formary.evaluate.language_model import causal_metrics
from formary.infer.answers import answers
from formary.infer.loaded import Model, load
from formary.model.topologies import Decoder
from formary.recipe.schema import Evaluate, Machine
from formary.tasks.protocol import LabelledTask
from formary.tasks.registry import labelled_task
from formary.train.machine import runtime


def measure(
    model: str,
    data: Sequence[str],
    *,
    documents: str = "file",
    stride: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of `model` on `data` (files, folders, globs), with 95 % intervals.

    Raises:
        FormaryError: not a causal model, or the data cannot be read.
    """
    loaded = load(model)
    if answers_rows(loaded):
        return measure_rows(loaded, model, data)
    if not isinstance(loaded.network, Decoder):
        raise FormaryError(
            f"{model}: only causal models can be measured on plain text; this one is an {loaded.config.topology}"
        )
    with tempfile.TemporaryDirectory(prefix="formary-") as scratch:
        rows = Path(scratch) / "documents.jsonl"
        with rows.open("w", encoding="utf-8") as file:
            for row in read(data, documents=documents):
                file.write(json.dumps({"text": row.values["text"]}, ensure_ascii=False) + "\n")
        write_tokens(rows, Path(scratch) / "tokens", loaded.tokenizer)
        shards = TokenShards.open(Path(scratch) / "tokens")
        settings = Evaluate(baselines=False, stride=stride, max_tokens=max_tokens)
        metrics = causal_metrics(
            loaded.network, shards, training=None, settings=settings, runtime=runtime(Machine()), split="given texts"
        )
    return {"model": model, "documents": shards.documents, "metrics": metrics}


def answers_rows(loaded: Model) -> bool:
    """Whether a model has a labelled task, so that it is measured on rows with answers."""
    task = loaded.formary.get("task")
    return loaded.config.labelled or bool(task and labelled_task(task))


def measure_rows(loaded: Model, model: str, data: Sequence[str]) -> dict[str, Any]:
    """The metrics of a model's own task on rows with the right answers, with 95 % intervals."""
    rows = [row for source in data for row in rows_for(loaded.task, source, columns={}, answers=True)]
    metrics = _metrics({"model": loaded}, rows)
    return {"model": model, "rows": len(rows), "metrics": metrics, "notes": loaded.task.notes()}


def compare(model_a: str, model_b: str, data: str, *, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Both models on the same rows; the verdict is about A, by the first metric's paired interval.

    Raises:
        FormaryError: the models are of different tasks, or one has none.
    """
    a, b = load(model_a), load(model_b)
    if a.task.name != b.task.name:
        raise FormaryError(
            f"{model_a} is for task {a.task.name} and {model_b} for {b.task.name}: they cannot be compared"
        )
    rows = rows_for(a.task, data, columns=columns or {}, answers=True)
    metrics = _metrics({"model": a, "B": b}, rows)
    verdict = metrics[0]["verdicts"]["B"]
    said = {"better": "A is better", "worse": "B is better", "cannot tell": "cannot tell which is better"}[verdict]
    return {"a": model_a, "b": model_b, "rows": len(rows), "verdict": said, "metrics": metrics}


def _metrics(models: Mapping[str, Model], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The metrics of models of one task on the same rows; the one called "model" is judged."""
    task, settled = models["model"].task, runtime(Machine())
    task.examples(rows, targets=True)  # every row must have its answer, and the unseen labels are counted
    by_model = {
        name: answers(model.task, model.network, rows, precision=settled.autocast) for name, model in models.items()
    }
    return suite_of(task).metrics(task, rows, by_model, Evaluate(baselines=False), f"given rows, {len(rows):,} rows")


def rows_for(task: LabelledTask, given: str, *, columns: Mapping[str, str], answers: bool) -> list[dict[str, Any]]:
    """The rows of a file, of standard input (-, a line each), or one text.

    Args:
        answers: whether the rows must have the right answers, or only what the task asks.
    """
    if given == "-":
        return [{task.asks[0]: line.rstrip("\n")} for line in sys.stdin if line.strip()]
    if not Path(given).exists():
        if answers or Path(given).suffix in (".jsonl", ".csv", ".tsv", ".parquet", ".json", ".txt"):
            raise FormaryError(f"{given}: there is no such file of rows")
        return [{task.asks[0]: given}]
    needed = task.form.columns if answers else task.asks
    return [row.values for row in read([given], columns=columns, documents="line", required=needed)]


def write_answers(path: Path, rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> None:
    """Rows with their answers as JSONL, whole or not at all."""
    lines = (
        json.dumps({**row, "prediction": answer}, ensure_ascii=False, default=str) for row, answer in zip(rows, answers)
    )
    durable.write_text(path, "".join(line + "\n" for line in lines))

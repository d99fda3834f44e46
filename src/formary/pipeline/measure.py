"""Measures models without a recipe or a run folder: causal models on texts and benchmarks, models with a task on rows."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from formary import durable
from formary.data.columns import column_of, columns_in, is_template
from formary.data.shards import TokenShards, write_tokens
from formary.data.source import read
from formary.errors import FormaryError
from formary.evaluate import benchmark, few_shot
from formary.evaluate.benchmark import Benchmark
from formary.evaluate.labelled import suite_of
from formary.evaluate.language_model import causal_metrics
from formary.infer.loaded import Model, load
from formary.infer.stepper import writes
from formary.model.topologies import Decoder
from formary.pipeline.answering import answered
from formary.pipeline.given_files import file_rows, gives_files
from formary.pipeline.progress import bar
from formary.recipe.schema import Evaluate, Machine
from formary.tasks.protocol import LabelledTask, WritingTask
from formary.tasks.registry import labelled_task
from formary.train.machine import runtime


def measure(
    model: str,
    data: Sequence[str],
    *,
    documents: str = "file",
    stride: int | None = None,
    max_tokens: int | None = None,
    shots: int | None = None,
    examples: str | None = None,
    columns: Mapping[str, str] | None = None,
    zero_shot: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of `model` on `data` (files, folders, globs), with 95 % intervals.

    Models with a task are measured on rows; benchmarks, and rows with `shots`, are asked of a causal model.

    Args:
        columns: of rows, our name -> the file's.
        zero_shot: of a model that matches pictures and texts: the text that names a label, which stands at `{label}`.
        console: where a bar is shown; nowhere when left out.

    Raises:
        FormaryError: not a causal model, or the data cannot be read.
    """
    asked = asked_of(data, shots=shots, examples=examples)
    loaded = load(model)
    if asked:
        return measure_benchmarks(loaded, model, asked, console=console)
    if zero_shot is not None and not (loaded.has_task and hasattr(loaded.task, "zero_shot")):
        raise FormaryError(
            f"--zero-shot: {model} does not match pictures and texts, so it knows no classes by their names"
        )
    if answers_rows(loaded):
        return measure_rows(loaded, model, data, columns=columns, zero_shot=zero_shot, console=console)
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
        with bar(console, "reading") as progress:
            metrics = causal_metrics(
                loaded.network,
                shards,
                training=None,
                settings=settings,
                runtime=runtime(Machine()),
                split="given texts",
                progress=progress,
            )
    return {"model": model, "documents": shards.documents, "metrics": metrics}


def asked_of(data: Sequence[str], *, shots: int | None = None, examples: str | None = None) -> list[Benchmark]:
    """The benchmarks in `data` (files, or names of ready ones), and files of rows when there are shots; else none.

    Args:
        shots: solved examples before each question; a benchmark's own number where None.
        examples: rows to take them from; where None they are set aside from the rows asked.

    Raises:
        FormaryError: a mixture of benchmarks and other files, or rows that cannot be asked.
    """
    found = [benchmark.find(source) for source in data]
    if any(found):
        other = next((source for source, path in zip(data, found) if path is None), None)
        if other is not None:
            raise FormaryError(f"{other}: is no benchmark; measure benchmarks and other files in two commands")
        if examples is not None:
            raise FormaryError("--examples belongs to rows; a benchmark file names its own examples")
        return [one.with_shots(shots) for path in found if path for one in benchmark.load(path)]
    if shots is None:
        if examples is not None:
            raise FormaryError("--examples needs --shots, the number of examples to show before each question")
        return []
    known = _table(examples) if examples else []
    return [benchmark.rows_as_benchmark(Path(s).name, _table(s), known).with_shots(shots) for s in data]


def measure_benchmarks(
    loaded: Model, model: str, asked: Sequence[Benchmark], *, console: Console | None = None
) -> dict[str, Any]:
    """The metrics of a causal model on benchmarks, with 95 % intervals, beside chance and the most frequent answer."""
    measured = []
    for one in asked:
        with bar(console, one.name) as progress:
            measured.append(few_shot.measured(loaded, one, settings=Evaluate(), progress=progress))
    metrics = [metric for one in measured for metric in one["metrics"]]
    notes = list(dict.fromkeys(note for one in measured for note in one["notes"]))
    described = [{name: one[name] for name in ("name", "licence", "rows", "shots")} for one in measured]
    return {"model": model, "benchmarks": described, "metrics": metrics, "notes": notes}


def _table(source: str) -> list[dict[str, Any]]:
    """The rows of a file, whatever their columns."""
    if not Path(source).exists():
        raise FormaryError(f"{source}: there is no such file of rows; ready benchmarks: {', '.join(benchmark.ready())}")
    return [row.values for row in read([source], documents="line", required=())]


def answers_rows(loaded: Model) -> bool:
    """Whether a model has a labelled task, so that it is measured on rows with answers."""
    task = loaded.formary.get("task")
    return loaded.config.labelled or bool(task and labelled_task(task))


def measure_rows(
    loaded: Model,
    model: str,
    data: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    zero_shot: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """The metrics of a model's own task on rows with the right answers, with 95 % intervals.

    Args:
        zero_shot: the text that names a label, where pictures are classified by texts.
    """
    rows, left_out = [], []
    task: Any = loaded.task if zero_shot is None else loaded.task.zero_shot(zero_shot, ())  # type: ignore[attr-defined]
    for source in data:
        found, notes = rows_for(task, source, columns=columns or {}, answers=True)
        rows += found
        left_out += notes
    if zero_shot is not None:
        task = task.zero_shot(zero_shot, sorted({str(row["label"]) for row in rows}))
    metrics, notes = _metrics({"model": loaded}, rows, console, None if zero_shot is None else task)
    return {"model": model, "rows": len(rows), "metrics": metrics, "notes": [*left_out, *notes]}


def compare(
    model_a: str,
    model_b: str,
    data: str,
    *,
    columns: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Both models on the same rows; the verdict is about A, by the first metric's paired interval.

    A model that only writes takes the task of the other where that is to write: so an untouched chat model can be measured
    beside one that was fine-tuned from it.

    Raises:
        FormaryError: the models are of different tasks, or one has none.
    """
    a, b = load(model_a), load(model_b)
    a, b = _for_task_of(a, b), _for_task_of(b, a)
    if a.task.name != b.task.name:
        raise FormaryError(
            f"{model_a} is for task {a.task.name} and {model_b} for {b.task.name}: they cannot be compared"
        )
    rows, notes = rows_for(a.task, data, columns=columns or {}, answers=True)
    metrics, _ = _metrics({"model": a, "B": b}, rows, console)
    verdict = metrics[0]["verdicts"]["B"]
    said = {"better": "A is better", "worse": "B is better", "cannot tell": "cannot tell which is better"}[verdict]
    return {"a": model_a, "b": model_b, "rows": len(rows), "verdict": said, "metrics": metrics, "notes": notes}


def _for_task_of(model: Model, other: Model) -> Model:
    takes = not model.has_task and writes(model.network) and other.has_task and isinstance(other.task, WritingTask)
    return model.with_task_of(other) if takes else model


def _metrics(
    models: Mapping[str, Model],
    rows: Sequence[Mapping[str, Any]],
    console: Console | None,
    task: LabelledTask | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The metrics of models of one task on the same rows, the one called "model" is judged; and notes on the rows.

    Args:
        task: that they answer; their own when left out.
    """
    settled = runtime(Machine())
    by_model, notes = {}, []
    for name, model in models.items():
        by_model[name], said = answered(model, rows, precision=settled.autocast, console=console, task=task)
        notes += said if name == "model" else []
    task, where = task or models["model"].task, f"given rows, {len(rows):,} rows"
    return suite_of(task).metrics(task, rows, by_model, Evaluate(baselines=False), where), notes


def rows_for(
    task: LabelledTask, given: str, *, columns: Mapping[str, str], answers: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file, of standard input (-, a line each), or one text; and notes on rows that are left out.

    Args:
        answers: whether the rows must have the right answers, or only what the task asks.
    """
    if gives_files(task, given):
        return file_rows(task, given, columns=columns, answers=answers, lines=sys.stdin if given == "-" else ())
    return _rows_for(task, given, columns=columns, answers=answers), []


def _rows_for(task: LabelledTask, given: str, *, columns: Mapping[str, str], answers: bool) -> list[dict[str, Any]]:
    if given == "-":
        return [{task.asks[0]: line.rstrip("\n")} for line in sys.stdin if line.strip()]
    if not Path(given).exists():
        if answers or Path(given).suffix in (".jsonl", ".csv", ".tsv", ".parquet", ".json", ".txt"):
            raise FormaryError(f"{given}: there is no such file of rows")
        return [{task.asks[0]: given}]
    if task.form.gather is not None and (found := _gathered(task, given, columns)):
        return found
    # What rows of several forms need, such as conversations, the task sees when it reads them.
    needed = (
        task.form.columns
        if answers and task.form.gather is None
        else tuple(name for name in task.asks if name in task.form.columns)
    )
    return [
        row.values for row in read([given], columns=columns, documents="line", required=needed, files=task.form.files)
    ]


def _gathered(task: LabelledTask, given: str, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The task's rows of a file of what they are made of, such as points; [] where the file has those rows already.

    Where nothing is said of the columns, they are called as in the data that the model learned from, if the file has these.
    """
    assert task.form.gather is not None
    head = next(read([given], documents="line", required=()), None)
    names = dict(getattr(getattr(task, "told", None), "names", {})) | dict(columns)
    there = head.values if head else {}
    columns = {ours: theirs for ours, theirs in names.items() if ours in columns or _written_in(there, ours, theirs)}
    source = read([given], columns=columns, documents="line", required=())
    first = next(source, None)
    if first is None or not all(name in first.values for name in task.form.columns):
        return []
    rows = (task.form.checked(row) for row in chain([first], source))
    return [row.values for _, row in task.form.gather(rows, None)]


def _written_in(values: Mapping[str, Any], ours: str, theirs: str) -> bool:
    """Whether a row has the column, or all that a template is written from."""
    if not is_template(theirs):
        return theirs in values
    return all(column_of(name, values) in values for name in columns_in(theirs, ours))


def write_answers(path: Path, rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> None:
    """Rows with their answers as JSONL, whole or not at all."""
    lines = (
        json.dumps({**row, "prediction": answer}, ensure_ascii=False, default=str) for row, answer in zip(rows, answers)
    )
    durable.write_text(path, "".join(line + "\n" for line in lines))

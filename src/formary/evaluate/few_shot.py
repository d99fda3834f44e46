"""Asks a causal model the questions of a benchmark, with solved examples before each, and measures the answers.

Nothing is trained. Choices are scored by the likelihood of their text after the prompt (Brown et al. 2020); texts are
written greedily. Beside the model stand chance and the most frequent answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.errors import DataError, FormaryError
from formary.evaluate import interval, texts
from formary.evaluate.benchmark import Benchmark, Row
from formary.evaluate.matches import MATCHES, answer_in
from formary.infer.loaded import Model
from formary.recipe.schema import Evaluate
from formary.tasks.likelihood import split_tokens, writes
from formary.tasks.multiple_choice import SEPARATOR, MultipleChoice
from formary.tasks.protocol import Progress
from formary.tasks.questions import question_of

Array = NDArray[np.float64]

_TOGETHER = 128  # texts written between two tellings of progress
_SCORED = {"none": "likelihood", "length": "likelihood per token", "bytes": "likelihood per byte"}


def measured(
    model: Model, benchmark: Benchmark, *, settings: Evaluate, progress: Progress | None = None
) -> dict[str, Any]:
    """The metrics of a model on a benchmark whose examples are chosen (`Benchmark.with_shots`), beside baselines.

    Args:
        progress: is told how many answers are scored or written, and of how many.

    Returns:
        {"name", "licence", "rows", "shots", "metrics", "answers", "notes"}, JSON-able; metrics as `interval.metric_entry`.

    Raises:
        FormaryError: the model does not write text. DataError: a question cannot be asked.
    """
    if not writes(model.network):
        raise FormaryError(
            "a benchmark asks a causal model that writes text, such as a GPT; this one is "
            f"an {model.config.topology} with head {model.config.head}"
        )
    score = _choices if benchmark.scored == "choices" else _texts
    answers, metrics, notes = score(model, benchmark, settings, progress)
    return {
        "name": benchmark.name,
        "licence": benchmark.licence,
        "rows": len(benchmark.rows),
        "shots": benchmark.shots,
        "metrics": metrics,
        "answers": answers,
        "notes": [*benchmark.notes, *notes],
    }


def prompt(benchmark: Benchmark, row: Row) -> str:
    """What a model reads before it answers a row: the prefix, the solved examples, the question."""
    solved = [f"{example['question']}{benchmark.between}{right_answer(example)}" for example in benchmark.examples]
    return benchmark.prefix + benchmark.separator.join([*solved, row["question"]])


def right_answer(row: Row) -> str:
    """The text of a row's best choice, or its first target."""
    if "targets" in row:
        return str(row["targets"][0])
    return str(row["choices"][int(np.argmax(_scores(row)))])


def choices_task(model: Model, benchmark: Benchmark) -> tuple[MultipleChoice, list[Row]]:
    """Multiple choice without training, and the rows as it is asked them."""
    rows, shown = list(benchmark.rows), list(benchmark.examples)
    if benchmark.prefix or benchmark.separator != SEPARATOR:  # composed here: the task knows one separator
        rows, shown = [{**row, "question": prompt(benchmark, row)} for row in rows], []
    task = MultipleChoice.prompted(
        model.config,
        model.tokenizer,
        examples=shown,
        template="{question}" + benchmark.between,
        normalise=benchmark.normalise,
    )
    return task, rows


def _choices(
    model: Model, benchmark: Benchmark, settings: Evaluate, progress: Progress | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    rows = benchmark.rows
    task, asked = choices_task(model, benchmark)
    answers = task.predict(model.network, asked, progress=progress)
    scores = [_scores(row) for row in rows]
    frequent, says = _most_frequent_choice(rows)
    gained = {
        "model": np.array([own[answer["index"]] for own, answer in zip(scores, answers)]),
        "chance": np.array([own.mean() for own in scores]),
        says: np.array([own[place] for own, place in zip(scores, frequent)]),
    }
    partial = any(not np.isin(own, (0.0, 1.0)).all() for own in scores)
    how = _SCORED[benchmark.normalise] + (", a choice counts by its score" if partial else "")
    metrics = [_mean("accuracy", _protocol(benchmark, how), gained, settings, share=not partial)]
    whole = asked != list(rows)  # the task saw the examples as a part of the question
    said = [note.replace(" without any example", "") if whole else note for note in task.notes()]
    return answers, metrics, [f"{benchmark.name}: {note}" for note in said]


def _texts(
    model: Model, benchmark: Benchmark, settings: Evaluate, progress: Progress | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    context, tokenizer = model.config.context, model.tokenizer
    room = context - min(benchmark.max_tokens, context // 2)
    prompts, cut = [], 0
    for row in benchmark.rows:
        text = prompt(benchmark, row)
        before, _ = split_tokens(tokenizer, text.rstrip(), "")  # the white space is written with the answer
        cut += len(before) > room
        prompts.append(tuple(before[-room:]))
    if not all(prompts):
        raise DataError(f"{benchmark.name}: a prompt is empty and the model has no start token")
    options: dict[str, Any] = {"max_tokens": min(benchmark.max_tokens, context - room), "temperature": 0.0}
    options["stop"] = _stops(benchmark)
    answers: list[dict[str, Any]] = []
    for start in range(0, len(prompts), _TOGETHER):
        written = model.write(prompts[start : start + _TOGETHER], options)
        answers += [{"text": answer_in(one.text, benchmark.pattern)} for one in written]
        if progress:
            progress(len(answers), len(prompts))
    frequent = Counter(right_answer(row) for row in benchmark.rows).most_common(1)[0][0]
    by_model = {"model": answers, f"the most frequent answer ({frequent[:40]})": [{"text": frequent}] * len(answers)}
    metrics = []
    for metric in (name for name in benchmark.metrics if name in MATCHES):
        match, how, share = MATCHES[metric]
        gained = {
            name: np.array([match(answer["text"], row["targets"]) for answer, row in zip(given, benchmark.rows)])
            for name, given in by_model.items()
        }
        how = ", ".join(filter(None, ["written greedily", _part(benchmark), how]))
        metrics.append(_mean(metric, _protocol(benchmark, how), gained, settings, share=share))
    metrics += _text_metrics(benchmark, by_model, settings)
    return answers, metrics, _cut_notes(model, benchmark, cut)


def _text_metrics(
    benchmark: Benchmark, by_model: Mapping[str, Sequence[Mapping[str, Any]]], settings: Evaluate
) -> list[dict[str, Any]]:
    """ROUGE, BLEU and chrF where the benchmark names them; of several targets the first is the reference."""
    named = [metric for metric in benchmark.metrics if metric not in MATCHES]
    if not named:
        return []
    pairs = [{"source": row["question"], "target": row["targets"][0]} for row in benchmark.rows]
    several = any(len(row["targets"]) > 1 for row in benchmark.rows)
    how = ["written greedily", _part(benchmark), "against the first target" if several else ""]
    where = _protocol(benchmark, ", ".join(filter(None, how)))
    found = {one["metric"]: one for one in texts.metrics(pairs, by_model, settings=settings, where=where)}
    return [found[name] for name in named]


def _stops(benchmark: Benchmark) -> list[str]:
    """Stop strings; one that the answer's own beginning holds cannot stop it."""
    return [stop for stop in benchmark.stop if stop and stop not in benchmark.between]


def _part(benchmark: Benchmark) -> str:
    """Which part of what is written counts, in a protocol."""
    return "" if benchmark.pattern is None else f"first match of {benchmark.pattern[:40]}"


def _mean(name: str, protocol: str, gained: Mapping[str, Array], settings: Evaluate, *, share: bool) -> dict[str, Any]:
    count = len(gained["model"])
    statistics = {model: interval.mean(values) for model, values in gained.items()}
    return interval.metric_entry(name, protocol, statistics, count, settings=settings, share_of_rows=share)


def _protocol(benchmark: Benchmark, how: str) -> str:
    shots = "1 shot" if benchmark.shots == 1 else f"{benchmark.shots} shots"
    return f"{shots}, {how}, {benchmark.name}, {len(benchmark.rows):,} rows"


def _scores(row: Row) -> Array:
    """What each choice of a row is worth: the scores given, or 1 for a right one."""
    if isinstance(row["answer"], list):
        return np.array(row["answer"], dtype=np.float64)
    return np.isin(np.arange(len(row["choices"])), question_of(row, "row").right).astype(np.float64)


def _most_frequent_choice(rows: Sequence[Row]) -> tuple[list[int], str]:
    """The answer that is right most often among these very rows: a text where all have the same choices, else a place."""
    alike = all(set(row["choices"]) == set(rows[0]["choices"]) for row in rows)
    if alike:
        text = Counter(right_answer(row) for row in rows).most_common(1)[0][0]
        return [row["choices"].index(text) for row in rows], f"the most frequent answer ({text[:40]})"
    place = Counter(int(np.argmax(_scores(row))) for row in rows).most_common(1)[0][0]
    return [min(place, len(row["choices"]) - 1) for row in rows], "the most frequent place of the answer"


def _cut_notes(model: Model, benchmark: Benchmark, cut: int) -> list[str]:
    if not cut:
        return []
    many = "1 prompt was" if cut == 1 else f"{cut:,} prompts were"
    return [
        f"{benchmark.name}: {many} longer than the context of {model.config.context} tokens and cut at the beginning"
        + ("; ask with fewer shots" if benchmark.shots else "")
    ]

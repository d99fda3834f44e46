"""BIG-bench JSON tasks as they are: `task.json` with its examples, or with subtasks in folders beside it.

Prompts are composed as BIG-bench composes them (Srivastava et al. 2022): prefixes, choices in the prompt in a fixed random
order, likelihoods that are not normalised by length. Programmatic tasks, which are code, are not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from formary.errors import DataError
from formary.tasks.questions import question_of

_CHOICE_METRICS = {
    "multiple_choice_grade",
    "calibration_multiple_choice_brier_score",
    "expected_calibration_error",
    "weighted_log_probabilities",
    "weighted_probabilities",
    "macro_f1",
}
_TEXT_METRICS = {
    "exact_str_match": ("exact_match",),
    "case_insensitive_str_match": ("case_insensitive_match",),
    "numeric_match_with_0_1_relative_error": ("numeric_match",),
    "bleu": ("bleu",),
    "rouge": ("rouge_1", "rouge_2", "rouge_lsum"),
}
_SEED = 42  # BIG-bench's own, for the order of the choices in a prompt


def is_task(path: Path) -> bool:
    """Whether a .json file looks like a BIG-bench task: an object with examples that have an input, or with subtasks."""
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return False
    if not isinstance(values, dict):
        return False
    examples = values.get("examples")
    if isinstance(examples, list) and examples:
        return isinstance(examples[0], dict) and "input" in examples[0]
    return path.name == "task.json" and "keywords" in values


def read(path: Path, *, parent: str = "") -> Iterator[dict[str, Any]]:
    """The fields of a `Benchmark` for each way a task is scored; those of its subtasks where it has no examples.

    Raises:
        DataError: not JSON, or an example is not as BIG-bench's schema says; it is named.
    """
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: not valid JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a BIG-bench task ({error})") from None
    name = parent + str(task.get("name", path.parent.name))
    if "examples" not in task:
        inner = sorted(path.parent.glob("*/task.json"))
        if not inner:
            raise DataError(f"{path}: field 'examples' is missing, and no folder beside it holds a subtask's task.json")
        for one in inner:
            yield from read(one, parent=f"{name}/")
        return
    yield from _scorings(path, name, task)


def _scorings(path: Path, name: str, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    examples = _distinct(path, task["examples"])
    metrics = task.get("metrics", [])
    if not isinstance(metrics, list):
        raise DataError(f"{path}: field 'metrics' must be a list of names, not {metrics!r:.60}")
    by_choice = [metric for metric in metrics if metric in _CHOICE_METRICS]
    by_text = [ours for metric in metrics for ours in _TEXT_METRICS.get(metric, ())]
    if not metrics:  # what the examples allow
        scored = all("target_scores" in example for example in examples)
        by_choice, by_text = (["multiple_choice_grade"], []) if scored else ([], ["exact_match"])
    left_out = [metric for metric in metrics if metric not in _CHOICE_METRICS and metric not in _TEXT_METRICS]
    if not by_choice and not by_text:
        raise DataError(f"{path}: field 'metrics': none of {', '.join(left_out)} can be measured here")
    notes = tuple(f"{name}: {metric} is not measured here" for metric in left_out)
    output = str(task.get("example_output_prefix", "\nA: "))
    shared = {
        "name": name,
        "description": str(task.get("description", "")),
        "licence": str(task.get("license", "")),
        "prefix": str(task.get("task_prefix", "")),
        "between": output[len(output.rstrip()) :],  # the white space belongs to the answer's first token
        "separator": str(task.get("few_shot_example_separator", "\n")),
        "normalise": "none",
        "notes": notes,
    }
    prompts = [_prompt(task, example, output.rstrip()) for example in examples]
    if by_choice:
        rows = tuple(_choices(path, n, e, prompts[n]) for n, e in enumerate(examples))
        yield {**shared, "rows": rows, "scored": "choices", "metrics": ("accuracy",)}
    if by_text:
        rows = tuple(_targets(path, n, e, prompts[n]) for n, e in enumerate(examples))
        stop, pattern = _ending(path, task, numbers="numeric_match" in by_text)
        written = {"scored": "targets", "metrics": tuple(dict.fromkeys(by_text)), "stop": stop, "pattern": pattern}
        yield {**shared, **written, "rows": rows}


def _ending(path: Path, task: dict[str, Any], *, numbers: bool) -> tuple[tuple[str, ...], str | None]:
    """What ends a written answer, and the pattern of what counts of it; where the task says neither, its first sentence.

    A decimal point is no end of a sentence, so numbers are read up to the end of the line.
    """
    stop, pattern = task.get("stop_string"), task.get("output_regex")
    for name, value in (("stop_string", stop), ("output_regex", pattern)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{path}: field '{name}' must be a text, not {value!r:.60}")
    if stop is None and pattern is None:
        return (("\n",) if numbers else tuple(".?!;\n")), None
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise DataError(f"{path}: field 'output_regex' is no regular expression ({error}): {pattern!r:.60}") from None
    return ((stop,) if stop else ()), pattern or None


def _distinct(path: Path, examples: Any) -> list[dict[str, Any]]:
    """The examples without exact repetitions, as BIG-bench reads them."""
    if not isinstance(examples, list) or not examples:
        raise DataError(f"{path}: field 'examples' must be a list with at least one example")
    for number, example in enumerate(examples, 1):
        if not isinstance(example, dict) or not isinstance(example.get("input"), str):
            raise DataError(f"{path} example {number}: field 'input' must be a text")
        if "target" not in example and "target_scores" not in example:
            raise DataError(f"{path} example {number}: has neither 'target' nor 'target_scores'")
    return [json.loads(text) for text in dict.fromkeys(json.dumps(example) for example in examples)]


def _prompt(task: dict[str, Any], example: dict[str, Any], output: str) -> str:
    asked = str(task.get("example_input_prefix", "\nQ: ")) + example["input"]
    if isinstance(example.get("target_scores"), dict) and task.get("append_choices_to_input", True):
        prefix = str(task.get("choice_prefix", "\n  choice: "))
        order = np.random.RandomState(_SEED).permutation(sorted(example["target_scores"]))
        asked += prefix + prefix.join(order.tolist())
    return asked + output


def _choices(path: Path, number: int, example: dict[str, Any], prompt: str) -> dict[str, Any]:
    scores = example.get("target_scores")
    place = f"{path} example {number + 1}"
    if not isinstance(scores, dict) or not scores:
        raise DataError(f"{place}: field 'target_scores' must be an object of choices and their scores")
    row: dict[str, Any] = {"question": prompt, "choices": list(scores), "answer": list(scores.values())}
    right = question_of(row, place, solved=True).right
    if row["answer"] == [float(n in right) for n in range(len(scores))] and len(right) == 1:
        row["answer"] = right[0]
    return row


def _targets(path: Path, number: int, example: dict[str, Any], prompt: str) -> dict[str, Any]:
    targets = example.get("target")
    targets = targets if isinstance(targets, list) else [targets]
    if not targets or not all(isinstance(target, str) for target in targets):
        raise DataError(f"{path} example {number + 1}: field 'target' must be a text, or a list of texts")
    return {"question": prompt, "targets": targets}

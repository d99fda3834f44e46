"""Benchmarks as data: a YAML file that says what is asked and how, with its rows in a JSONL file beside it.

A row has choices, which a model scores by likelihood, or a target, which it writes. Files are checked to the field and the
line; the rows a file names never lie outside its folder. It asks no model: that is `few_shot`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from formary.data.source import read
from formary.errors import DataError, nearest
from formary.evaluate import bigbench
from formary.recipe import bundled
from formary.recipe.reading import yaml_in
from formary.tasks.multiple_choice import SEPARATOR, TEMPLATE, Normalise
from formary.tasks.questions import question_of

TextMetric = Literal[
    "exact_match",
    "case_insensitive_match",
    "numeric_match",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "rouge_lsum",
    "bleu",
    "chrf",
]
Metric = Literal["accuracy", TextMetric]
Row = dict[str, Any]

_SEED = 0  # of the choice of examples: the same questions are asked at every reading
_MAX_TOKENS = 64
_PLACE = re.compile(r"\{(\w+)\}")
_CHOICES = "\n".join  # what {choices} in a template stands for


@dataclass(frozen=True)
class Benchmark:
    """What is asked of a model.

    Args:
        rows: {"question", "choices", "answer"} where choices are scored (an answer is an index, or a score for each
            choice); {"question", "targets"} where texts are written. The question is the whole prompt.
        examples: rows of the same form to show before each question; where there are none, some of `rows` are set aside.
        scored: whether rows have choices or targets.
        metrics: what is measured; accuracy for choices.
        prefix: stands once before everything.
        between: stands between a prompt and its answer.
        separator: stands between solved examples.
        stop: what ends a written answer.
        pattern: a regular expression whose first match in what is written is the answer; the whole where None.
        notes: what a user should know of the file.
    """

    name: str
    rows: tuple[Row, ...]
    scored: Literal["choices", "targets"]
    licence: str = ""
    description: str = ""
    examples: tuple[Row, ...] = ()
    metrics: tuple[Metric, ...] = ("accuracy",)
    normalise: Normalise = "bytes"
    shots: int = 0
    prefix: str = ""
    between: str = " "
    separator: str = SEPARATOR
    max_tokens: int = _MAX_TOKENS
    stop: tuple[str, ...] = ("\n",)
    pattern: str | None = None
    notes: tuple[str, ...] = ()

    def with_shots(self, shots: int | None) -> Benchmark:
        """The benchmark with `shots` examples (its own number where None), chosen by a fixed seed and no longer asked.

        Raises:
            DataError: there are not enough rows.
        """
        shots = self.shots if shots is None else shots
        if shots < 0:
            raise DataError(f"--shots {shots}: must be 0 or more")
        apart = self.examples or self.rows
        left = len(apart) - (0 if self.examples else 1)
        if shots > left:
            raise DataError(f"{self.name}: {shots} shots need {shots} examples, and there are {left}")
        chosen = Random(_SEED).sample(range(len(apart)), shots)
        rows = self.rows if self.examples else tuple(r for n, r in enumerate(self.rows) if n not in set(chosen))
        return replace(self, shots=shots, examples=tuple(apart[number] for number in chosen), rows=rows)


class Columns(BaseModel):
    """The names in the rows of what a benchmark reads."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    target: str = "target"


class BenchmarkFile(BaseModel):
    """A benchmark as written in YAML; `docs/guide.md` explains the fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    licence: Annotated[str, Field(min_length=1)]
    source: str = ""
    rows: Annotated[str, Field(min_length=1)]
    examples: str | None = None
    columns: Columns = Columns()
    choices: Annotated[list[str], Field(min_length=2)] | None = None
    template: str = TEMPLATE
    prefix: str = ""
    separator: str = SEPARATOR
    shots: Annotated[int, Field(ge=0)] = 0
    normalise: Normalise = "bytes"
    metric: Metric | list[Metric] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = _MAX_TOKENS
    stop: list[str] = ["\n"]


def is_benchmark(path: str | Path) -> bool:
    """Whether a file is a benchmark: YAML, or a BIG-bench task."""
    path = Path(path)
    return path.suffix in (".yaml", ".yml") or bigbench.is_task(path)


def find(reference: str) -> Path | None:
    """The file of a benchmark: itself, or the ready one of this name; None where there is neither."""
    path = Path(reference)
    if path.exists() or path.suffix:
        return path if is_benchmark(path) else None
    return ready().get(reference)


def ready() -> dict[str, Path]:
    """The benchmarks that come with Formary, by name."""
    found: dict[str, Path] = {}
    for folder in bundled.folders():
        for path in sorted((folder / "benchmarks").glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def load(path: str | Path) -> list[Benchmark]:
    """The benchmark of a YAML file; of a BIG-bench task one for each way it is scored, and for each subtask.

    Raises:
        DataError: a file is missing, a field is unknown or wrong, a row is not as it must be; with file, line and field.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        return [_from_yaml(path)]
    return [Benchmark(**fields) for fields in bigbench.read(path)]


def rows_as_benchmark(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
    *,
    where: str = "row",
) -> Benchmark:
    """Rows of multiple choice, or texts with labels, as a benchmark; the labels of examples and rows are the choices.

    Raises:
        DataError: rows of neither kind, or a label for which no choice stands.
    """
    every = [*rows, *examples]
    if every and all("choices" in row for row in every):
        asked, shown = (
            tuple(_choice_row(dict(row), TEMPLATE, f"{what} {number}") for number, row in enumerate(given, 1))
            for what, given in ((where, rows), ("example", examples))
        )
    elif every and all(isinstance(row.get("label"), str | int | bool) and "text" in row for row in every):
        labels = sorted({str(row["label"]) for row in every})
        if len(labels) < 2:
            raise DataError(f"{name}: every row has the label '{labels[0]}'; there is nothing to choose")
        template = "{text}\nLabel:" if all("text_pair" not in row for row in every) else "{text}\n{text_pair}\nLabel:"
        asked, shown = (
            tuple(
                {
                    "question": filled(template, row, f"{what} {number}"),
                    "choices": labels,
                    "answer": labels.index(str(row["label"])),
                }
                for number, row in enumerate(given, 1)
            )
            for what, given in ((where, rows), ("example", examples))
        )
    else:
        raise DataError(
            f"{name}: shots are for rows with question, choices and answer, or with text and label; these have "
            f"{', '.join(every[0]) if every else 'no rows'}"
        )
    return Benchmark(name, asked, "choices", examples=shown)


def filled(template: str, row: Mapping[str, Any], where: str) -> str:
    """The template with a row's columns in its {places}; nothing else in braces is touched.

    Raises:
        DataError: the row has no such column.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in row:
            raise DataError(f"{where}: the template asks for '{name}', which the row has not; it has {', '.join(row)}")
        given = row[name]
        return _CHOICES(map(str, given)) if isinstance(given, list) else str(given)

    return _PLACE.sub(value, template)


# From here on: one YAML file ------------------------------------------------------------------------------------------


def _from_yaml(path: Path) -> Benchmark:
    file = _checked(path)
    names, choices = file.columns, file.choices
    asked = _rows(path, file, file.rows, "rows")
    shown = _rows(path, file, file.examples, "examples") if file.examples else ()
    given = [row for row in (*asked, *shown)]
    scored: Literal["choices", "targets"] = "choices" if "choices" in given[0] else "targets"
    wrong = next((number for number, row in enumerate(given) if ("choices" in row) != (scored == "choices")), None)
    if wrong is not None:
        raise DataError(
            f"{path}: some rows have '{names.choices}' and some only '{names.target}'; make them two benchmarks"
        )
    metrics = file.metric if isinstance(file.metric, list) else [file.metric] if file.metric else []
    if not metrics:
        metrics = ["accuracy" if scored == "choices" else "exact_match"]
    fitting = [metric for metric in metrics if (metric == "accuracy") == (scored == "choices")]
    if fitting != metrics:
        other = next(metric for metric in metrics if metric not in fitting)
        raise DataError(
            f"{path}{_line(path, ['metric'])}, field 'metric': {other} is not for rows with "
            + (
                "choices; they have accuracy"
                if scored == "choices"
                else "targets; they have exact_match, rouge_l, bleu"
            )
        )
    if choices is not None and scored == "targets":
        raise DataError(
            f"{path}{_line(path, ['choices'])}, field 'choices': rows without '{names.answer}' cannot use it"
        )
    return Benchmark(
        name=file.name,
        description=file.description,
        licence=file.licence,
        rows=asked,
        examples=shown,
        scored=scored,
        metrics=tuple(metrics),
        normalise=file.normalise,
        shots=file.shots,
        prefix=file.prefix,
        separator=file.separator,
        max_tokens=file.max_tokens,
        stop=tuple(file.stop),
    )


def _checked(path: Path) -> BenchmarkFile:
    try:
        values = yaml_in(path.read_text(encoding="utf-8"), name=str(path), refusal=DataError)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such benchmark file") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise DataError(f"{path}: a benchmark is a YAML text file in UTF-8 ({error})") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: a benchmark is a mapping with at least name, licence and rows")
    if "data" in values and "rows" not in values:
        raise DataError(f"{path}: this is a recipe, not a benchmark; `formary evaluate {path}` measures its model")
    try:
        return BenchmarkFile.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise DataError(f"{path}{_line(path, problem['loc'])}, {_sentence(problem)}") from None


def _sentence(problem: Any) -> str:
    # A union's branch is part of pydantic's place and means nothing to a reader.
    place = [str(part) for part in problem["loc"] if not str(part).startswith(("literal[", "list["))]
    name = ".".join(place)
    field = f"field '{name}'"
    if problem["type"] == "extra_forbidden":
        known = list((Columns if place[0] == "columns" and len(place) > 1 else BenchmarkFile).model_fields)
        return f"{field}: unknown; {nearest(place[-1], known) or 'fields here: ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"{field}: is needed"
    return f"{field}: {problem['msg'][0].lower()}{problem['msg'][1:]} (got {problem['input']!r:.60})"


def _line(path: Path, place: Iterable[Any]) -> str:
    """ " line 7" of a field in a YAML file, or of the section that lacks it."""
    node: Any = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line = 1
    for part in place:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, value) for key, value in pairs if key.value == part), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return f" line {line}"


def _rows(path: Path, file: BenchmarkFile, named: str, field: str) -> tuple[Row, ...]:
    """The rows of a file beside the benchmark, each as `Benchmark.rows` are."""
    folder = path.parent.resolve()
    target = (folder / named).resolve()
    where = f"{path}{_line(path, [field])}, field '{field}'"
    if not target.is_relative_to(folder):
        raise DataError(f"{where}: {named} leaves the benchmark's folder; put the file beside it")
    if not target.is_file():
        raise DataError(f"{where}: there is no file {named} in {path.parent}")
    names = file.columns
    found = []
    for row in read([named], required=(names.question,), base=folder):
        values = dict(row.values)
        if names.choices in values or (file.choices is not None and names.answer in values):
            values |= {
                "question": values[names.question],
                "choices": file.choices or values[names.choices],
                "answer": values.get(names.answer),
            }
            found.append(_choice_row(values, file.template, row.origin))
        elif names.target in values:
            targets = values[names.target]
            targets = targets if isinstance(targets, list) else [targets]
            if not targets or not all(isinstance(target, str) for target in targets):
                raise DataError(f"{row.origin}: field '{names.target}' must be a text, or a list of texts")
            question = filled(file.template, values | {"question": values[names.question]}, row.origin)
            found.append({"question": question, "targets": targets})
        else:
            raise DataError(
                f"{row.origin}: has neither '{names.choices}' nor '{names.target}'; map other names with columns"
            )
    if not found:
        raise DataError(f"{where}: {named} holds no rows")
    return tuple(found)


def _choice_row(values: Mapping[str, Any], template: str, where: str) -> Row:
    try:
        question = question_of(values, where, solved=True)
    except DataError as error:
        raise DataError(str(error).replace("data.columns", "columns")) from None
    return {
        "question": filled(template, values, where),
        "choices": list(question.choices),
        "answer": values["answer"],
    }

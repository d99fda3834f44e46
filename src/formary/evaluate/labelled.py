"""Measures a labelled task's answers: which metrics, details and baselines a kind of answer gets, and what leaked.

One table joins kinds of answers to the modules that measure them. Test rows that nearly repeat a training row are
counted, and the first metric is given again without them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from formary.data.duplicates import NearDuplicates
from formary.evaluate import (
    choices,
    detections,
    forecast_baselines,
    forecasts,
    labels,
    pictures,
    ranking,
    retrieval,
    spans,
    table_baselines,
    tags,
    texts,
    vectors,
)
from formary.evaluate.labels import LOWER_IS_BETTER as LABELS_LOWER
from formary.recipe.schema import Evaluate
from formary.tasks.protocol import Answer, LabelledTask, Row

Answers = Sequence[Answer]

LOWER_IS_BETTER = (*LABELS_LOWER, *ranking.LOWER_IS_BETTER, *forecasts.LOWER_IS_BETTER, *pictures.LOWER_IS_BETTER)
"""The metrics of which less is better."""

LEAK_FREE = "without near-duplicates"
"""In the protocol of a metric on the rows that nearly repeat no training row."""


@dataclass(frozen=True)
class Suite:
    """How one kind of answer is measured; `training` rows are only for baselines to learn from."""

    metrics: Callable[[LabelledTask, Sequence[Row], Mapping[str, Answers], Evaluate, str], list[dict[str, Any]]]
    details: Callable[[LabelledTask, Sequence[Row], Answers], dict[str, Any]]
    baselines: Callable[[LabelledTask, Sequence[Row], Sequence[Row]], dict[str, list[Answer]]]


class Measuring(Protocol):
    """A module that measures one kind of answer in rows."""

    def metrics(
        self, rows: Sequence[Row], answers: Mapping[str, Answers], *, settings: Evaluate, where: str
    ) -> list[dict[str, Any]]: ...

    def details(self, rows: Sequence[Row], answers: Answers) -> dict[str, Any]: ...

    def baselines(self, training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[Answer]]: ...


def measured(
    task: LabelledTask,
    rows: Sequence[Row],
    answers: Answers,
    *,
    training: Sequence[Row],
    settings: Evaluate,
    split: str,
) -> dict[str, Any]:
    """Metrics beside baselines on the same rows, details, and the first metric without rows that leaked.

    Returns:
        {"split", "metrics", "details", "leakage", "notes"}, JSON-able; metrics as `language_model.evaluate` gives.
    """
    suite = suite_of(task)
    baselines = suite.baselines(task, training, rows) if settings.baselines and training else {}
    by_model = {"model": answers, **baselines}
    metrics = suite.metrics(task, rows, by_model, settings, f"{split}, {len(rows):,} rows")
    leaked = near_training(task, training, rows, settings.near_duplicates)
    notes = []
    if leaked:
        notes.append(
            f"{len(leaked):,} of {len(rows):,} {split} rows nearly repeat a training row "
            f"(similarity above {settings.near_duplicates:g}); the first metric is given without them too"
        )
        metrics[1:1] = first_without(leaked, task, rows, by_model, settings, split)
    return {
        "split": split,
        "metrics": metrics,
        "details": suite.details(task, rows, answers),
        "leakage": {"rows": len(leaked), "of": len(rows), "examples": [_said(task, rows[n]) for n in leaked[:3]]},
        "notes": notes,
    }


def first_without(
    leaked: Collection[int],
    task: LabelledTask,
    rows: Sequence[Row],
    answers: Mapping[str, Answers],
    settings: Evaluate,
    where: str,
) -> list[dict[str, Any]]:
    """The first metric again without the rows that leaked; [] where none is left."""
    kept = [number for number in range(len(rows)) if number not in leaked]
    if not kept:
        return []
    rest = {name: [given[number] for number in kept] for name, given in answers.items()}
    where = f"{where} {LEAK_FREE} of training rows, {len(kept):,} rows"
    return suite_of(task).metrics(task, [rows[number] for number in kept], rest, settings, where)[:1]


def headline(task: LabelledTask, rows: Sequence[Row], answers: Answers) -> tuple[str, float]:
    """The first metric's name and value, negative where lower is better."""
    quick = Evaluate(baselines=False, bootstrap=100)
    first = suite_of(task).metrics(task, rows, {"model": answers}, quick, "validation")[0]
    value = float(first["model"]["value"])
    return first["metric"], -value if first["metric"] in LOWER_IS_BETTER else value


def near_training(task: LabelledTask, training: Sequence[Row], rows: Sequence[Row], threshold: float) -> list[int]:
    """The numbers of the rows whose text is nearly that of a training row; the same, where `form.alike` is False."""
    if not task.form.alike:
        known = {_key(task, row) for row in training}
        return [number for number, row in enumerate(rows) if _key(task, row) in known]
    index = NearDuplicates(threshold)
    for start in range(0, len(training), 1000):
        index.add([_key(task, row) for row in training[start : start + 1000]])
    found = index.find([_key(task, row) for row in rows])
    return [number for number, neighbour in enumerate(found) if neighbour is not None]


def _said(task: LabelledTask, row: Row) -> str:
    """A row for the eye; one whose text only names something says what."""
    worded = None if task.form.alike else getattr(task, "worded", None)
    return str(worded(row) if worded else _key(task, row))[:200]


def _key(task: LabelledTask, row: Row) -> str:
    text = str(row["text"]) if task.form.text is None else task.form.text(row)
    return task.form.compared(row, text)


# Which module measures which kind of answer -----------------------------------------------------------------------------


def _label_metrics(
    task: Any, rows: Sequence[Row], answers: Mapping[str, Answers], settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    return labels.metrics(rows, answers, settings=settings, where=where, labels=task.labels, kind=task.kind)


def _label_details(task: Any, rows: Sequence[Row], answers: Answers) -> dict[str, Any]:
    aside = {"text", "text_pair", "label", *task.form.files}
    columns = sorted({name for row in rows[:1000] for name in row} - aside)
    found = labels.details(rows, answers, labels=task.labels, kind=task.kind, columns=columns)
    return _with_thumbnails(task, rows, found)


def _with_thumbnails(task: Any, rows: Sequence[Row], found: dict[str, Any]) -> dict[str, Any]:
    """Details whose worst rows show their pictures, where there are any."""
    if hasattr(task, "thumbnail"):
        found["worst"] = [_seen(task, rows[entry["row"] - 1], entry, without="text") for entry in found["worst"]]
    return found


def _seen(task: Any, row: Row, entry: dict[str, Any], *, without: str) -> dict[str, Any]:
    """What is shown of a row, with its picture in place of the text that it does not have."""
    return {"row": entry.pop("row"), "image": task.thumbnail(row)} | {n: v for n, v in entry.items() if n != without}


def _label_baselines(task: Any, training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[Answer]]:
    features = getattr(task, "features", None)
    return labels.baselines(
        training, rows, kind=task.kind, features=features, features_are=getattr(task, "features_are", "features")
    )


def _row_details(task: Any, rows: Sequence[Row], answers: Answers) -> dict[str, Any]:
    worded = [{**row, "text": task.worded(row)} for row in rows]
    columns = [column.name for column in task.table.columns]
    return labels.details(worded, answers, labels=task.labels, kind=task.kind, columns=columns)


def _row_baselines(task: Any, training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[Answer]]:
    return table_baselines.baselines(training, rows, task.table.columns, task.kind)


def _text_metrics(
    task: Any, rows: Sequence[Row], answers: Mapping[str, Answers], settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    pairs, kept = _pairs(task, rows)
    if len(kept) < len(rows):
        where += f" of which {len(rows) - len(kept):,} without an answer are left out"
    by_model = {name: [given[number] for number in kept] for name, given in answers.items()}
    return texts.metrics([pairs[number] for number in kept], by_model, settings=settings, where=where)


def _text_details(task: Any, rows: Sequence[Row], answers: Answers) -> dict[str, Any]:
    pairs, kept = _pairs(task, rows)
    found = texts.details([pairs[number] for number in kept], [answers[number] for number in kept])
    if hasattr(task, "thumbnail"):
        for name in ("copied", "by_source_length"):  # of a picture's text there is none
            found.pop(name)
        for name in ("worst", "best"):
            found[name] = [_seen(task, rows[kept[entry["row"]]], entry, without="source") for entry in found[name]]
    return found


def _text_baselines(task: Any, training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[Answer]]:
    pairs, kept = _pairs(task, training)
    known = [pairs[number] for number in kept]
    if getattr(task, "embedder", "tokens") != "tokens":  # no source text that could be copied or looked up
        return texts.commonest(known, len(rows))
    return texts.baselines(known, _pairs(task, rows)[0])


def _pairs(task: Any, rows: Sequence[Row]) -> tuple[Sequence[Row], list[int]]:
    """Rows as source and target, where a task's are not that already, and which of them have a target."""
    pairs = [task.pair(row) for row in rows] if hasattr(task, "pair") else rows
    return pairs, [number for number, pair in enumerate(pairs) if pair["target"] is not None]


def _choice_metrics(
    task: Any, rows: Sequence[Row], answers: Mapping[str, Answers], settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    return choices.metrics([task.texts(row) for row in rows], answers, settings=settings, where=where)


def _choice_details(task: Any, rows: Sequence[Row], answers: Answers) -> dict[str, Any]:
    return choices.details([task.texts(row) for row in rows], answers)


def _choice_baselines(task: Any, training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[Answer]]:
    return choices.baselines([task.texts(row) for row in rows])


def _question_metrics(
    task: Any, rows: Sequence[Row], answers: Mapping[str, Answers], settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    return choices.question_metrics([task.question(row) for row in rows], answers, settings=settings, where=where)


def _question_details(task: Any, rows: Sequence[Row], answers: Answers) -> dict[str, Any]:
    names = sorted({name for row in rows[:1000] for name in row} - {*task.form.columns, "text"})
    columns = {name: [row.get(name) for row in rows] for name in names}
    return choices.question_details([task.question(row) for row in rows], answers, columns=columns)


def _question_baselines(task: Any, training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[Answer]]:
    return choices.question_baselines([task.question(row) for row in training], [task.question(row) for row in rows])


def _ranking_metrics(
    task: Any, rows: Sequence[Row], answers: Mapping[str, Answers], settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    return ranking.metrics(rows, answers, items=task.choices, settings=settings, where=where)


def _forecast_metrics(
    task: Any, rows: Sequence[Row], answers: Mapping[str, Answers], settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    series = [task.windows.points(row, f"row {number}") for number, row in enumerate(rows, 1)]
    return forecasts.metrics(series, answers, season=task.told.season, settings=settings, where=where)


def _forecast_details(task: Any, rows: Sequence[Row], answers: Answers) -> dict[str, Any]:
    series = [task.windows.points(row, f"row {number}") for number, row in enumerate(rows, 1)]
    return forecasts.details(series, answers, season=task.told.season)


def _forecast_baselines(task: Any, training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[Answer]]:
    known = [task.windows.points(row, f"training row {number}") for number, row in enumerate(training, 1)]
    series = [task.windows.points(row, f"row {number}") for number, row in enumerate(rows, 1)]
    told = task.told
    return forecast_baselines.baselines(
        known,
        series,
        [task.windows.origins(points, every=told.every) for points in series],
        columns=told.columns,
        horizon=task.horizon,
        context=told.context,
        season=told.season,
        levels=task.quantiles,
    )


def _picture_metrics(
    task: Any, rows: Sequence[Row], answers: Mapping[str, Answers], settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    return pictures.metrics(rows, answers, colours=len(task.palette), settings=settings, where=where)


def _picture_details(task: Any, rows: Sequence[Row], answers: Answers) -> dict[str, Any]:
    return _with_thumbnails(task, rows, pictures.details(rows, answers))


def _picture_baselines(task: Any, training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[Answer]]:
    return pictures.baselines(task.codes(training, "training row"), task.codes(rows), len(task.palette))


def _retrieval_metrics(
    task: Any, rows: Sequence[Row], answers: Mapping[str, Answers], settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    return retrieval.metrics(_named(task, rows), answers, settings=settings, where=where)


def _retrieval_details(task: Any, rows: Sequence[Row], answers: Answers) -> dict[str, Any]:
    return retrieval.details(_named(task, rows), answers, thumbnail=lambda number: task.thumbnail(rows[number]))


def _retrieval_baselines(task: Any, training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[Answer]]:
    return retrieval.baselines(training, rows, features=task.features)


def _named(task: Any, rows: Sequence[Row]) -> list[Row]:
    """Rows whose pictures are called by what is in their files, so that the same picture is one."""
    return [{"image": task.form.text(row), "text": row["text"]} for row in rows]


def _suite(module: Measuring) -> Suite:
    """The suite of a module that measures rows as they are."""
    return Suite(
        lambda task, rows, answers, settings, where: module.metrics(rows, answers, settings=settings, where=where),
        lambda task, rows, answers: module.details(rows, answers),
        lambda task, training, rows: module.baselines(training, rows),
    )


SUITES: dict[str, Suite] = {
    "labels": Suite(_label_metrics, _label_details, _label_baselines),
    "row_labels": Suite(_label_metrics, _row_details, _row_baselines),
    "tags": _suite(tags),
    "spans": _suite(spans),
    "choices": Suite(_choice_metrics, _choice_details, _choice_baselines),
    "multiple_choice": Suite(_question_metrics, _question_details, _question_baselines),
    "texts": Suite(_text_metrics, _text_details, _text_baselines),
    "vectors": _suite(vectors),
    "retrieval": Suite(_retrieval_metrics, _retrieval_details, _retrieval_baselines),
    "ranking": Suite(_ranking_metrics, lambda task, rows, answers: ranking.details(rows, answers), ranking.baselines),
    "pictures": Suite(_picture_metrics, _picture_details, _picture_baselines),
    "boxes": _suite(detections),
    "forecasts": Suite(_forecast_metrics, _forecast_details, _forecast_baselines),
}


def suite_of(task: LabelledTask) -> Suite:
    """How the answers of a task are measured."""
    return SUITES[task.answers]

"""The same recipe several times: under several seeds, or with each of K folds of the rows as validation once.

How much of a figure is chance, what the models say together (a bagging ensemble averages the answers of labelled tasks;
Breiman 1996), and, over folds, how good the method is on every row (Stone 1974). Every time is a whole run in a folder of
its own; what is up to date is not done again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from formary import durable
from formary.errors import RecipeError
from formary.pipeline.context import rows_in
from formary.pipeline.run import RunResult, refuse_other, run
from formary.recipe import Recipe, read
from formary.recipe.bundled import find, run_folder

_DATA_STAGES = ("documents", "tokenizer", "tokens")
_VALIDATED = ("validation_loss", "validation_bits_per_byte")  # in metrics.jsonl; the lowest counts


@dataclass(frozen=True)
class Repeated:
    """What several seeds, or folds, gave.

    Args:
        runs: one for each seed or fold.
        metrics: [{"metric", "protocol", "values", "mean", "spread"}]; the spread is the standard deviation over runs.
        ensemble: metrics of the averaged answers, as a run's; empty where answers cannot be averaged, or where no rows
            are unknown to all models.
        validation: the lowest validation losses, as `metrics`; of folds only.
        pooled: metrics over all rows that are not test, each answered by the model that had not learned it, as a run's;
            of folds of labelled tasks only.
        notes: what a reader of these figures should know.
    """

    runs: tuple[RunResult, ...]
    metrics: tuple[dict[str, Any], ...]
    ensemble: tuple[dict[str, Any], ...] = ()
    validation: tuple[dict[str, Any], ...] = ()
    pooled: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


def repeat(
    recipe: str | Path,
    seeds: int,
    *,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    console: Console | None = None,
) -> Repeated:
    """Run a recipe with `seeds` seeds, counting up from its own; summary.json in the folder says what came out.

    Raises:
        RecipeError: fewer than two seeds.
    """
    if seeds < 2:
        raise RecipeError(f"--seeds {seeds}: a spread needs at least 2")
    path = find(str(recipe))
    made = read(path, overrides)
    if folder is None:
        folder = run_folder(made) / "seeds"
        refuse_other(folder / str(made.train.seed), made, path, path.parent)
    console = console or Console()
    runs: list[RunResult] = []
    for seed in range(made.train.seed, made.train.seed + seeds):
        place = folder / str(seed)
        if runs and not place.exists():
            share_data(runs[0].folder, place)
        runs.append(run(path, overrides=[*overrides, f"train.seed={seed}"], folder=place, console=console))
    metrics = tuple(_spread([result.metrics for result in runs]))
    ensemble = tuple(_ensemble(runs)) if not made.pretrains else ()
    durable.write_json(folder / "summary.json", {"metrics": list(metrics), "ensemble": list(ensemble)})
    return Repeated(tuple(runs), metrics, ensemble)


def cross_validate(
    recipe: str | Path,
    folds: int,
    *,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    console: Console | None = None,
) -> Repeated:
    """Run a recipe once for each of `folds` folds of the rows that are not test; summary.json says what came out.

    Fold i is an ordinary run in the folder i, the recipe with data.split.folds and data.split.fold: i.

    Raises:
        RecipeError: fewer than two folds, or rows for validation named by the recipe.
        DataError: fewer rows, or groups, than folds.
    """
    if folds < 2:
        raise RecipeError(f"--folds {folds}: cross-validation needs at least 2")
    path = find(str(recipe))
    made = read(path, overrides)
    if folder is None:
        folder = run_folder(made) / "folds"
        refuse_other(folder / "1", made, path, path.parent)
    console = console or Console()
    runs = []
    for fold in range(1, folds + 1):
        chosen = [f"data.split.folds={folds}", f"data.split.fold={fold}"]
        runs.append(run(path, overrides=[*overrides, *chosen], folder=folder / str(fold), console=console))
    keys = [durable.read_json(result.folder / "stages.json")["evaluate"]["key"] for result in runs]
    known = durable.read_json(folder / "summary.json")
    if known.get("keys") != keys:
        known = {"folds": folds, "keys": keys, **_over_folds(runs, made)}
        durable.write_json(folder / "summary.json", known)
    names = ("metrics", "ensemble", "validation", "pooled", "notes")
    return Repeated(tuple(runs), **{name: tuple(known[name]) for name in names})


def share_data(first: Path, place: Path) -> None:
    """Give a run folder another one's finished data stages, without a second copy where the disk allows."""
    done = durable.read_json(first / "stages.json")
    shutil.copytree(first / "data", place / "data", copy_function=_linked, dirs_exist_ok=True)
    durable.write_json(place / "stages.json", {name: done[name] for name in _DATA_STAGES if name in done})


def _linked(source: str, target: str) -> None:
    """A second name for a file: those of the data stages are replaced as a whole, never changed in place."""
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)


def averaged(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One answer for the answers of several models to the same row; a label that a model does not know has share 0."""
    if "value" in answers[0]:
        return {"value": mean(answer["value"] for answer in answers)}
    names = dict.fromkeys(name for answer in answers for name in answer["probabilities"])
    shares = {name: mean(answer["probabilities"].get(name, 0.0) for answer in answers) for name in names}
    if "labels" in answers[0]:
        return {"labels": [name for name, share in shares.items() if share >= 0.5], "probabilities": shares}
    best = max(shares, key=shares.__getitem__)
    return {"label": best, "probability": shares[best], "probabilities": shares}


# Over runs ---------------------------------------------------------------------------------------------------------------


def _spread(metrics: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of every metric that all runs have."""
    from formary.evaluate.labelled import LEAK_FREE

    by_run = [{(entry["metric"], LEAK_FREE in entry["protocol"]): entry for entry in entries} for entries in metrics]
    found = []
    for key, first in by_run[0].items():
        values = [entries[key]["model"]["value"] for entries in by_run if key in entries]
        if len(values) == len(by_run) and all(isinstance(value, float) for value in values):
            about = {"metric": first["metric"], "protocol": first["protocol"], "values": values}
            found.append({**about, "mean": mean(values), "spread": stdev(values)})
    return found


def _ensemble(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Metrics of averaged probabilities or numbers, beside the first single model."""
    from formary.evaluate.labelled import suite_of

    by_run = [_answers(result.folder / "predictions.json") for result in runs]
    if not by_run[0] or not ({"probabilities", "value"} & by_run[0][0].keys()) or "tags" in by_run[0][0]:
        return []
    split = durable.read_json(runs[0].folder / "evaluation.json")["split"]
    rows, settings = rows_in(runs[0].folder, split), read(runs[0].folder / "recipe.yaml").evaluate
    task = _task(runs[0])
    answers = {"model": [averaged(said) for said in zip(*by_run)], "one model": by_run[0]}
    where = f"{split}, {len(rows):,} rows, mean of {len(runs)} models"
    return suite_of(task).metrics(task, rows, answers, settings, where)


# Over folds --------------------------------------------------------------------------------------------------------------


def _over_folds(runs: Sequence[RunResult], recipe: Recipe) -> dict[str, Any]:
    """All of summary.json that is measured."""
    found: dict[str, Any] = {"metrics": [], "ensemble": [], "validation": _validation(runs), "pooled": [], "notes": []}
    splits = {durable.read_json(result.folder / "evaluation.json")["split"] for result in runs}
    notes = [f"each fold's rows also chose the best of its model's weights (by {recipe.train.best}): a slight flattery"]
    found["metrics"] = _spread([result.metrics for result in runs])
    if not recipe.pretrains:
        found["pooled"], leaked = _pooled(runs, recipe)
        notes += leaked
        found["ensemble"] = _ensemble(runs) if splits == {"test"} else []
    if splits != {"test"}:
        notes.append("there are no test rows: the metrics of the single folds are those of their own rows")
    found["notes"] = notes
    return found


def _validation(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    from formary.train.records import read_records

    records = [read_records(result.folder / "metrics.jsonl") for result in runs]
    found = []
    for name in _VALIDATED:
        values = [
            min((record[name] for record in run_ if record.get(name) is not None), default=None) for run_ in records
        ]
        known = [value for value in values if value is not None]
        if len(known) == len(runs):
            entry = {"metric": name, "protocol": f"lowest of each of {len(runs)} folds", "values": known}
            found.append({**entry, "mean": mean(known), "spread": stdev(known)})
    return found


def _pooled(runs: Sequence[RunResult], recipe: Recipe) -> tuple[list[dict[str, Any]], list[str]]:
    """Every row that is not test measured once, by the model that had not learned it, beside baselines likewise."""
    from formary.evaluate.labelled import first_without, near_training, suite_of

    rows: list[dict[str, Any]] = []
    by_fold: list[dict[str, list[dict[str, Any]]]] = []
    leaked: set[int] = set()
    tasks = []
    for result in runs:
        task, held, training = _task(result), rows_in(result.folder, "validation"), rows_in(result.folder, "train")
        by_model = {"model": _answers(result.folder / "fold_predictions.json")}
        if recipe.evaluate.baselines:
            by_model |= suite_of(task).baselines(task, training, held)
        near = near_training(task, training, held, recipe.evaluate.near_duplicates)
        leaked.update(len(rows) + number for number in near)
        rows += held
        by_fold.append(by_model)
        tasks.append(task)
    names = [name for name in by_fold[0] if all(name in by_model for by_model in by_fold)]
    answers = {name: [answer for by_model in by_fold for answer in by_model[name]] for name in names}
    task = max(tasks, key=lambda task: len(getattr(task, "labels", ())))
    where = f"out of fold, {len(rows):,} rows in {len(runs)} folds"
    metrics = suite_of(task).metrics(task, rows, answers, recipe.evaluate, where)
    if not leaked:
        return metrics, []
    note = (
        f"{len(leaked):,} of {len(rows):,} rows nearly repeat a row of another fold (similarity above "
        f"{recipe.evaluate.near_duplicates:g}); the first pooled metric is given without them too"
    )
    metrics[1:1] = first_without(leaked, task, rows, answers, recipe.evaluate, "out of fold")
    return metrics, [note]


def _task(result: RunResult) -> Any:
    from formary.infer.loaded import load

    return load(result.model).task


def _answers(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found

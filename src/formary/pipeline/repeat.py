"""The same recipe under several seeds: how much of a figure is chance, and what the runs answer together.

Every seed is a whole run in a folder of its own beside the first one's data. A bagging ensemble averages what the models
of labelled tasks say of each row (Breiman 1996).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from formary import durable
from formary.errors import RecipeError
from formary.pipeline.run import RunResult, run
from formary.recipe import read
from formary.recipe.bundled import find

_DATA_STAGES = ("documents", "tokenizer", "tokens")


@dataclass(frozen=True)
class Repeated:
    """What several seeds gave.

    Args:
        runs: one for each seed.
        metrics: [{"metric", "protocol", "values", "mean", "spread"}]; the spread is the standard deviation over seeds.
        ensemble: metrics of the averaged answers, as a run's; empty where answers cannot be averaged.
    """

    runs: tuple[RunResult, ...]
    metrics: tuple[dict[str, Any], ...]
    ensemble: tuple[dict[str, Any], ...]


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
    folder = folder or Path(made.run_folder or Path("runs") / made.name) / "seeds"
    console = console or Console()
    runs: list[RunResult] = []
    for seed in range(made.train.seed, made.train.seed + seeds):
        place = folder / str(seed)
        if runs and not place.exists():
            _share_data(runs[0].folder, place)
        runs.append(run(path, overrides=[*overrides, f"train.seed={seed}"], folder=place, console=console))
    metrics = tuple(_spread([result.metrics for result in runs]))
    ensemble = tuple(_ensemble(runs)) if not made.pretrains else ()
    durable.write_json(folder / "summary.json", {"metrics": list(metrics), "ensemble": list(ensemble)})
    return Repeated(tuple(runs), metrics, ensemble)


def _share_data(first: Path, place: Path) -> None:
    """Give a run folder the first one's finished data stages."""
    done = json.loads((first / "stages.json").read_text(encoding="utf-8"))
    shutil.copytree(first / "data", place / "data")
    durable.write_json(place / "stages.json", {name: done[name] for name in _DATA_STAGES if name in done})


def _spread(metrics: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    found = []
    for entries in zip(*metrics):
        values = [entry["model"]["value"] for entry in entries]
        if all(isinstance(value, float) for value in values):
            about = {"metric": entries[0]["metric"], "protocol": entries[0]["protocol"], "values": values}
            found.append({**about, "mean": mean(values), "spread": stdev(values)})
    return found


def _ensemble(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Metrics of averaged probabilities or numbers, beside the first single model."""
    from formary.data.documents import read_documents
    from formary.evaluate.labelled import suite_of
    from formary.infer.loaded import load

    by_run = [json.loads((result.folder / "predictions.json").read_text(encoding="utf-8")) for result in runs]
    if not by_run[0] or not ({"probabilities", "value"} & by_run[0][0].keys()) or "tags" in by_run[0][0]:
        return []
    split = json.loads((runs[0].folder / "evaluation.json").read_text(encoding="utf-8"))["split"]
    rows = [row.values for row in read_documents(runs[0].folder / "data" / "documents" / f"{split}.jsonl")]
    task, settings = load(runs[0].model).task, read(runs[0].folder / "recipe.yaml").evaluate
    answers = {"model": [averaged(said) for said in zip(*by_run)], "one model": by_run[0]}
    where = f"{split}, {len(rows):,} rows, mean of {len(runs)} models"
    return suite_of(task).metrics(task, rows, answers, settings, where)


def averaged(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One answer for the answers of several models to the same row."""
    if "value" in answers[0]:
        return {"value": mean(answer["value"] for answer in answers)}
    names = answers[0]["probabilities"]
    shares = {name: mean(answer["probabilities"][name] for answer in answers) for name in names}
    if "labels" in answers[0]:
        return {"labels": [name for name, share in shares.items() if share >= 0.5], "probabilities": shares}
    best = max(shares, key=shares.__getitem__)
    return {"label": best, "probability": shares[best], "probabilities": shares}

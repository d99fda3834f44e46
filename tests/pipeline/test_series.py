"""Series and tables from a file to a report, and their models at the command line."""

import json
import random

import numpy as np
import pytest
from rich.console import Console

import formary
from formary.pipeline.run import run

TINY = """
evaluate: {bootstrap: 100}
machine: {threads: 1, device: cpu, precision: float32}
"""
SERIES = """
name: tiny
task: forecast
data: {sources: [points.csv], columns: {time: ds, value: y}, split: {validation: 0.15, test: 0.25}}
model: {preset: series-mini, size: 1x32, switches: {patch_size: 4}}
train: {steps: 12, batch: 8, context: 24, validate_every: 6, best: metric, objective: {horizon: 8, season: 8, quantiles: [0.1, 0.5, 0.9]}}
"""
TABLE = """
name: tiny
task: classify_row
data: {sources: [rows.csv], columns: {label: risk}, split: {validation: 0.1, test: 0.25}}
model: {preset: table-mini, size: 1x32}
train: {steps: 12, batch: 8, validate_every: 6}
"""


def executed(folder, recipe):
    (folder / "recipe.yaml").write_text(recipe + TINY, encoding="utf-8")
    return run(folder / "recipe.yaml", overrides=[], folder=folder / "run", console=Console(quiet=True))


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    rng = np.random.default_rng(0)
    times = np.datetime64("2024-01-01T00", "h") + np.arange(240)
    lines = [f"{t},{10 + 3 * np.sin(n * np.pi / 4) + rng.normal() / 5:.3f}" for n, t in enumerate(times) if n != 100]
    (folder / "points.csv").write_text("\n".join(["ds,y", *lines]) + "\n")
    return folder, executed(folder, SERIES)


def test_a_series_is_measured_beside_baselines_and_drawn(series):
    folder, result = series
    first = result.metrics[0]
    assert first["metric"] == "mase" and "backtest of 7 forecasts of 8 steps" in first["protocol"]
    assert {"naive", "seasonal naive, 8 steps", "seasonal naive, 24 steps", "linear"} <= set(first["baselines"])
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert 'class="interval"' in page and "what came" in page and "Steps ahead" in page
    story = json.loads((folder / "run/data/documents/story.json").read_text())
    assert any("1 of 240 steps (1 hour) have no row" in warning for warning in story["warnings"])


def test_the_file_s_end_is_forecast_under_the_names_the_model_learned(series, command):
    folder, result = series
    said = command("predict", result.model, folder / "points.csv")
    lines = said.stdout.strip().split("\n")
    assert lines[0] == "series\tcolumn\ttime\tforecast\tquantile 0.1\tquantile 0.9" and len(lines) == 9
    assert lines[1].startswith("-\tvalue\t2024-01-11T00:00:00\t")
    whole = json.loads(command("predict", result.model, folder / "points.csv", "--json").stdout)
    assert list(whole["forecasts"][0]["quantiles"]) == ["0.1", "0.5", "0.9"]
    measured = json.loads(command("evaluate", result.model, folder / "points.csv", "--json").stdout)
    assert measured["metrics"][0]["metric"] == "mase"
    (folder / "broken.csv").write_text("ds,y\n2024-01-01,1\n2024-01-02,one\n2024-01-03,3\n")
    refused = command("predict", result.model, folder / "broken.csv")
    assert refused.exit_code == 2 and "broken.csv line 3: column 'value' holds 'one'" in refused.stderr


def test_a_table_is_measured_beside_boosted_trees_and_answered(tmp_path, command):
    rng = random.Random(0)
    rows = [(rng.randint(18, 80), rng.choice(["own", "rent", ""])) for _ in range(200)]
    lines = [f"{'high' if age < 40 else 'low'},{age},{home}" for age, home in rows]
    (tmp_path / "rows.csv").write_text("\n".join(["risk,age,home", *lines]) + "\n")
    result = executed(tmp_path, TABLE)
    assert set(result.metrics[0]["baselines"]) == {"majority class", "logistic regression", "gradient-boosted trees"}
    model = formary.load(result.model)
    (answer,) = model.predict([{"age": 30, "home": "own"}])
    assert answer["label"] in ("high", "low")
    told = command("predict", result.model, tmp_path / "rows.csv").stdout
    assert told.split("\n")[0].split("\t")[2].startswith("age ")

"""Several seeds of one recipe: shared data, a spread, and an ensemble of what the models say."""

import importlib.util
import json
from pathlib import Path
from statistics import mean, stdev

import pytest
from rich.console import Console

from formary.errors import RecipeError
from formary.pipeline.repeat import averaged, repeat

_SPEC = importlib.util.spec_from_file_location("labelled_rows", Path(__file__).with_name("test_labelled.py"))
labelled = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(labelled)


def test_seeds_share_the_data_and_give_a_spread_and_an_ensemble(tmp_path):
    recipe = labelled.write(tmp_path, labelled.rows())
    found = repeat(recipe, 2, folder=tmp_path / "seeds", console=Console(quiet=True))
    first, second = found.runs
    assert first.did[0] == "documents" and second.did == ("train", "evaluate", "report")
    values = [result.metrics[0]["model"]["value"] for result in found.runs]
    accuracy = found.metrics[0]
    assert accuracy["values"] == values
    assert (accuracy["mean"], accuracy["spread"]) == (mean(values), stdev(values))
    assert found.ensemble[0]["metric"] == "accuracy" and "one model" in found.ensemble[0]["baselines"]
    assert "mean of 2 models" in found.ensemble[0]["protocol"]
    assert json.loads((tmp_path / "seeds" / "summary.json").read_text())["metrics"][0]["values"] == values
    again = repeat(recipe, 2, folder=tmp_path / "seeds", console=Console(quiet=True))
    assert all(result.did == () for result in again.runs)


def test_a_spread_needs_two_seeds(tmp_path):
    with pytest.raises(RecipeError, match="at least 2"):
        repeat(labelled.write(tmp_path, labelled.rows()), 1)


def test_an_ensemble_averages_probabilities_and_numbers():
    one = {"label": "a", "probability": 0.6, "probabilities": {"a": 0.6, "b": 0.4}}
    other = {"label": "b", "probability": 0.9, "probabilities": {"a": 0.1, "b": 0.9}}
    assert averaged([one, other])["label"] == "b"
    assert averaged([one, other])["probabilities"] == pytest.approx({"a": 0.35, "b": 0.65})
    assert averaged([{"value": 1.0}, {"value": 4.0}]) == {"value": 2.5}
    several = [
        {"labels": ["a"], "probabilities": {"a": 0.9, "b": 0.4}},
        {"labels": [], "probabilities": {"a": 0.3, "b": 0.4}},
    ]
    assert averaged(several)["labels"] == ["a"]

"""Several seeds, or folds, of one recipe: a spread, an ensemble, and over folds every row measured once."""

import importlib.util
import json
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest
from rich.console import Console

import formary
from formary.errors import DataError, RecipeError
from formary.pipeline.context import SPLITS
from formary.pipeline.repeat import averaged, cross_validate, repeat
from formary.pipeline.run import run

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


def _read(folder, split):
    text = (folder / "data" / "documents" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in text.splitlines()]


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    """Three folds of rows of which some nearly repeat others, and where one label is in a single row."""
    folder = tmp_path_factory.mktemp("folds")
    given = labelled.rows(90)
    for row in given[:12]:
        row["text"] = "a long review about the old house that the film was set in and the book " + row["text"]
        given.append({**row, "text": row["text"] + " indeed"})
    given.append({"text": "neither the one nor the other of them", "label": "perhaps", "shop": "a"})
    recipe = labelled.write(folder, given, train={"steps": 8, "batch": 8, "context": 48, "validate_every": 4})
    return recipe, cross_validate(recipe, 3, folder=folder / "folds", console=Console(quiet=True))


def test_every_row_that_is_not_test_is_validation_once_and_never_both(crossed):
    _, found = crossed
    parts = [{split: set(_read(result.folder, split)) for split in SPLITS} for result in found.runs]
    assert all(part["test"] == parts[0]["test"] for part in parts)
    held = [text for part in parts for text in part["validation"]]
    assert len(held) == len(set(held))
    assert set(held) == parts[0]["train"] | parts[0]["validation"]
    for part in parts:
        assert not part["train"] & (part["validation"] | part["test"]) and not part["validation"] & part["test"]


def test_the_pooled_metric_is_that_of_each_row_answered_by_the_model_without_it(crossed):
    _, found = crossed
    right = []
    for result in found.runs:
        path = result.folder / "data" / "documents" / "validation.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        answers = formary.load(result.model).predict(rows)
        right += [answer["label"] == row["label"] for row, answer in zip(rows, answers, strict=True)]
    pooled = found.pooled[0]
    assert pooled["metric"] == "accuracy" and pooled["model"]["value"] == pytest.approx(mean(right))
    assert f"out of fold, {len(right)} rows in 3 folds" in pooled["protocol"]
    low, high = pooled["model"]["low"], pooled["model"]["high"]
    assert low <= mean(right) <= high and "TF-IDF + logistic regression" in pooled["baselines"]


def test_rows_that_nearly_repeat_one_of_another_fold_are_counted_and_left_out(crossed):
    _, found = crossed
    assert any("nearly repeat a row of another fold" in note for note in found.notes)
    assert "without near-duplicates" in found.pooled[1]["protocol"]


def test_folds_tell_spread_validation_loss_and_what_the_models_say_together(crossed):
    recipe, found = crossed
    accuracy = found.metrics[0]
    assert accuracy["values"] == [result.metrics[0]["model"]["value"] for result in found.runs]
    assert "mean of 3 models" in found.ensemble[0]["protocol"]
    (loss,) = found.validation
    lowest = []
    for result in found.runs:
        records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        lowest.append(min(record["validation_loss"] for record in records if "validation_loss" in record))
    assert loss["values"] == lowest and loss["spread"] == stdev(lowest)
    summary = json.loads((recipe.parent / "folds" / "summary.json").read_text())
    assert summary["folds"] == 3 and summary["pooled"] == list(found.pooled)


def test_only_the_fold_that_is_missing_is_done_again(crossed, tmp_path):
    recipe, _ = crossed
    shutil.copytree(recipe.parent, tmp_path / "copy")
    folder = tmp_path / "copy" / "folds"
    before = json.loads((folder / "summary.json").read_text())
    shutil.rmtree(folder / "2")
    again = cross_validate(recipe, 3, folder=folder, console=Console(quiet=True))
    assert [bool(result.did) for result in again.runs] == [False, True, False]
    assert list(again.pooled) == before["pooled"] and list(again.ensemble) == before["ensemble"]


def test_a_fold_by_hand_is_the_same_run(crossed):
    recipe, found = crossed
    chosen = ["data.split.folds=3", "data.split.fold=2"]
    assert run(recipe, overrides=chosen, folder=found.runs[1].folder, console=Console(quiet=True)).did == ()


def test_pretraining_is_cross_validated_by_its_loss(place):
    found = cross_validate(place.recipe, 2, folder=place.folder / "folds", console=Console(quiet=True))
    assert [entry["metric"] for entry in found.validation] == ["validation_loss", "validation_bits_per_byte"]
    assert len(found.validation[0]["values"]) == 2
    assert found.pooled == found.ensemble == () and found.metrics


def test_folds_that_cannot_be_made_are_refused_with_the_remedy(tmp_path, command):
    recipe = labelled.write(tmp_path, labelled.rows(12))
    with pytest.raises(RecipeError, match="at least 2"):
        cross_validate(recipe, 1)
    quiet = {"folder": tmp_path / "folds", "console": Console(quiet=True)}
    with pytest.raises(DataError, match="20 folds of"):
        cross_validate(recipe, 20, **quiet)
    with pytest.raises(RecipeError, match="put its files under"):
        cross_validate(recipe, 2, overrides=["data.validation=[rows.jsonl]"], **quiet)
    with pytest.raises(RecipeError, match="--folds K"):
        run(recipe, overrides=["data.split.folds=3"], **quiet)
    with pytest.raises(RecipeError, match="3 folds, counted from 1"):
        run(recipe, overrides=["data.split.folds=3", "data.split.fold=4"], **quiet)
    result = command("run", recipe, "--folds", "2", "--seeds", "2")
    assert result.exit_code == 2 and "give one of them" in result.stderr


def test_a_label_that_one_model_does_not_know_has_no_share_of_it():
    one = {"label": "a", "probability": 1.0, "probabilities": {"a": 1.0}}
    other = {"label": "b", "probability": 0.7, "probabilities": {"a": 0.3, "b": 0.7}}
    assert averaged([one, other])["probabilities"] == pytest.approx({"a": 0.65, "b": 0.35})

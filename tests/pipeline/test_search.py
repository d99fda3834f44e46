"""Hyperparameter search: judged by validation, resumed after a kill, the same again under a seed, its errors in advance."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from formary.errors import FormaryError, MissingExtra, RecipeError
from formary.pipeline import search as searching
from formary.pipeline.run import run
from formary.pipeline.search import search
from formary.recipe import read

_SPEC = importlib.util.spec_from_file_location("labelled_rows", Path(__file__).with_name("test_labelled.py"))
labelled = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(labelled)

optuna = pytest.importorskip("optuna")

SPACE = {
    "train.optimiser.lr": {"log": ["1e-4", 1e-2]},
    "train.batch": [4, 8],
    "model.switches.dropout": {"range": [0, 0.3]},
}
TRAIN = {"steps": 6, "batch": 8, "context": 48, "validate_every": 2}
DATA = {"sources": ["rows.jsonl"], "tokenizer": {"kind": "characters"}, "split": {"validation": 0.2, "test": 0.2}}


def write(folder, space=SPACE, *, train=TRAIN, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"space": space, "trials": 3, **settings}
    return labelled.write(folder, labelled.rows(60), data=DATA, train=train, search=asked)


def execute(recipe, **options):
    return search(recipe, folder=recipe.parent / "search", console=Console(quiet=True), **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    recipe = write(tmp_path_factory.mktemp("search"))
    return recipe, execute(recipe)


def settings(found):
    return [trial["settings"] for trial in found.summary["trials"]]


def test_every_trial_is_a_run_up_to_train_and_none_looks_at_the_test_rows(done):
    _, found = done
    assert len(found.summary["trials"]) == 3
    for trial in found.summary["trials"]:
        place = found.folder / "trials" / str(trial["trial"])
        stages = json.loads((place / "stages.json").read_text())
        assert set(stages) == {"documents", "tokenizer", "train"}
        assert not (place / "evaluation.json").exists() and not (place / "predictions.json").exists()
        made = read(place / "recipe.yaml")
        assert made.train.optimiser.lr == trial["settings"]["train.optimiser.lr"]
        assert made.model.switches["dropout"] == trial["settings"]["model.switches.dropout"]
        assert 1e-4 <= made.train.optimiser.lr <= 1e-2 and made.train.batch in (4, 8)
        shared = place / "data" / "documents" / "train.jsonl"
        assert shared.samefile(found.folder / "prepared" / "data" / "documents" / "train.jsonl")


def test_the_best_has_the_lowest_validation_loss_and_alone_keeps_its_weights(done):
    _, found = done
    lowest = {}
    for trial in found.summary["trials"]:
        lines = (found.folder / "trials" / str(trial["trial"]) / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line).get("validation_loss") for line in lines]
        lowest[trial["trial"]] = min(loss for loss in losses if loss is not None)
        assert trial["value"] == pytest.approx(lowest[trial["trial"]])
    assert found.summary["trial"] == min(lowest, key=lowest.get)
    kept = [place.parent.name for place in (found.folder / "trials").glob("*/model")]
    assert kept == [str(found.summary["trial"])]
    assert not list((found.folder / "trials").glob("*/checkpoints"))
    page = (found.folder / "search.html").read_text(encoding="utf-8")
    assert "the best of 3 trials" in page and "model.switches.dropout" in page


def test_the_best_recipe_runs_from_where_it_lies_and_gives_the_same_model(done, tmp_path, monkeypatch):
    _, found = done
    monkeypatch.chdir(tmp_path)
    result = run(found.best, console=Console(quiet=True))
    assert result.did[-1] == "report" and result.metrics
    trial = found.folder / "trials" / str(found.summary["trial"]) / "model" / "model.safetensors"
    assert (result.model / "model.safetensors").read_bytes() == trial.read_bytes()
    assert result.folder == Path("runs/tiny-best")


def test_a_finished_search_has_nothing_to_do_and_more_trials_go_on(done, monkeypatch):
    recipe, found = done
    monkeypatch.setattr(searching._Trying, "one", None)  # no trial is begun
    assert execute(recipe).summary == found.summary


def test_the_best_is_measured_if_asked_without_training_again(done):
    recipe, _ = done
    again = execute(recipe, run_best=True)
    assert again.run.did in (("evaluate", "report"), ())
    assert again.run.metrics[0]["protocol"].startswith("test")


def test_a_killed_search_goes_on_with_the_trial_it_was_at_and_finds_the_same(done, tmp_path, monkeypatch):
    _, found = done
    recipe, loop = write(tmp_path), searching.run

    def killed(made, **options):
        if options["folder"].name == "1":
            raise SystemExit("killed")
        return loop(made, **options)

    monkeypatch.setattr(searching, "run", killed)
    with pytest.raises(SystemExit):
        execute(recipe)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/search/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING"]
    monkeypatch.setattr(searching, "run", loop)
    again = execute(recipe)
    assert settings(again) == settings(found)
    values = [[trial["value"] for trial in search_.summary["trials"]] for search_ in (again, found)]
    assert values[0] == pytest.approx(values[1])
    assert sorted(place.name for place in (tmp_path / "search" / "trials").iterdir()) == ["0", "1", "3"]


def test_the_recipes_own_settings_come_first_where_the_space_has_them(tmp_path):
    space = {"train.optimiser.lr": {"log": [1e-4, 1e-2]}, "train.batch": [4, 8]}
    found = execute(write(tmp_path, space, trials=1))
    assert settings(found) == [{"train.optimiser.lr": 1e-3, "train.batch": 8}]


def test_a_small_space_is_tried_once_through_by_the_metric(tmp_path):
    space = {
        "train.optimiser.betas": [[0.9, 0.95], [0.9, 0.999]],
        "train.objective.class_weights": ["none", "balanced"],
    }
    found = execute(write(tmp_path, space, trials=30, metric="metric", sampler="random"))
    different = {json.dumps(trial["settings"]) for trial in found.summary["trials"]}
    assert len(different) == 4
    assert found.summary["metric"] == "validation accuracy"
    assert found.summary["value"] == max(trial["value"] for trial in found.summary["trials"])
    assert read(found.best).train.best == "metric"


def test_settings_that_cannot_be_trained_fail_alone(tmp_path):
    space = {"train.context": [48, 64], "train.steps": [4], "train.epochs": [None, 1]}
    recipe = write(tmp_path, space, trials=4, sampler="random", train={**TRAIN, "steps": 4})
    found = execute(recipe)
    failed = [trial for trial in found.summary["trials"] if trial["state"] == "failed"]
    assert failed and all("give one of them" in trial["error"] for trial in failed)
    assert all(trial["settings"]["train.epochs"] is None for trial in found.summary["trials"] if trial not in failed)
    with pytest.raises(FormaryError, match="no trial could be trained"):
        execute(write(tmp_path / "all", {"train.steps": [4], "train.epochs": [1]}, train={**TRAIN, "steps": 4}))


def test_a_trial_worse_than_the_median_is_stopped_early(tmp_path):
    space = {"train.optimiser.lr": [1e-3, 2e-3, 3e-3, 4e-3, 1e-9]}
    recipe = write(tmp_path, space, trials=40, sampler="random", train={**TRAIN, "steps": 10})
    found = execute(recipe)
    by_lr = {trial["settings"]["train.optimiser.lr"]: trial["state"] for trial in found.summary["trials"]}
    order = [trial["settings"]["train.optimiser.lr"] for trial in found.summary["trials"]]
    assert order.index(1e-9) >= 4, "the seed must try it when there is a median"
    assert by_lr[1e-9] == "stopped early"


def test_pretraining_is_searched_with_the_default_space(place):
    recipe = yaml.safe_load(place.recipe.read_text())
    place.recipe.write_text(yaml.safe_dump({**recipe, "search": {"trials": 2}}))
    found = search(place.recipe, folder=place.folder / "search", console=Console(quiet=True))
    assert set(found.summary["settings"]) == {"train.optimiser.lr", "train.batch"}
    assert found.summary["metric"] == "validation loss"


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"train.optimiser.lrr": [1]}, "unknown field; did you mean 'lr'"),
        ({"train.optimizer.lr": [1]}, "did you mean 'optimiser'"),
        ({"modle.size": ["1x32"]}, "did you mean 'model'"),
        ({"model.switches.dropuot": [0.1]}, "did you mean 'dropout'"),
        ({"train.batch": [0, 4]}, "train.batch"),
        ({"train.batch": {"logg": [1, 4]}}, "did you mean 'log'"),
        ({"train.batch": {"log": [0, 4]}}, "both above 0"),
        ({"train.batch": {"range": [4, 1]}}, "low below high"),
        ({"train.batch": 16}, "a list of values"),
        ({"data.split.test": [0.1, 0.2]}, "decides which rows"),
        ({"evaluate.bootstrap": [100, 200]}, "makes no better model"),
        ({"train.seed": [1, 2]}, "luckiest"),
        ({"train.objective.class_weights": ["none", "balanced"]}, "search.metric: metric"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_before_any_training(tmp_path, space, message):
    with pytest.raises(RecipeError, match=message):
        execute(write(tmp_path, space))
    assert not (tmp_path / "search").exists()


def test_whole_numbers_stay_whole_and_fractions_do_not(tmp_path):
    space = {"train.batch": {"range": [4, 9]}, "train.optimiser.weight_decay": {"range": [0, 1]}}
    found = execute(write(tmp_path, space, trials=3, sampler="random"))
    assert all(isinstance(chosen["train.batch"], int) for chosen in settings(found))
    assert any(0 < chosen["train.optimiser.weight_decay"] < 1 for chosen in settings(found))


def test_a_search_needs_validation_rows(tmp_path):
    recipe = labelled.write(tmp_path, labelled.rows(40), data={**DATA, "split": {"validation": 0, "test": 0.2}})
    with pytest.raises(RecipeError, match="no validation rows"):
        execute(recipe)


def test_without_optuna_the_message_is_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r'pip install "formary\[search\]"'):
        execute(write(tmp_path))


def test_the_command_tells_the_best_and_where_it_lies(done, command):
    recipe, found = done
    result = command("search", recipe, "--folder", found.folder)
    assert result.exit_code == 0, result.stderr
    assert "best of 3 trials: validation loss" in result.stdout and str(found.best) in result.stdout
    values = json.loads(command("search", recipe, "--folder", found.folder, "--json").stdout)
    assert values["value"] == found.summary["value"] and values["best"] == str(found.best)

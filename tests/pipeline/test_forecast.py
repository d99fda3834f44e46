"""`formary doctor RECIPE`: what it says before a run is what the run then takes, and its data is prepared only once."""

import json

import pytest

from formary.errors import FormaryError
from formary.pipeline import foretold
from formary.pipeline.forecast import foretell
from formary.train.fit import free_memory


def test_what_is_foretold_of_disk_and_memory_is_what_the_run_takes(place):
    found = foretell(str(place.recipe), folder=place.run_folder)
    assert found.fits and found.forecast.steps == 6 and found.forecast.validations == 2
    assert not list(place.run_folder.glob(".writing-*")) and not (place.run_folder / "checkpoints").exists()
    result = place.run()
    assert result.did == ("train", "evaluate", "report")
    (checkpoints,) = (place.run_folder / "checkpoints").iterdir()
    sizes = [sum(file.stat().st_size for file in one.iterdir()) for one in checkpoints.glob("step-*")]
    assert found.forecast.checkpoint_bytes == pytest.approx(max(sizes), rel=0.02)
    assert len(sizes) <= found.forecast.checkpoints
    told, took = (json.loads((place.run_folder / name).read_text()) for name in ("forecast.json", "measured.json"))
    assert told["key"] == took["key"] and told["memory"] == pytest.approx(took["memory"], rel=0.15)
    assert "formary doctor had foretold" in (place.run_folder / "report.html").read_text().replace("Formary", "formary")


def test_a_probe_leaves_no_trace_in_what_is_learned(finished, place):
    foretell(str(place.recipe), folder=place.run_folder)
    place.run(until="train")
    assert place.weights() == finished.weights()


def test_a_run_that_was_stopped_keeps_its_checkpoints(ran):
    before = sorted(path.name for path in ran.run_folder.rglob("step-*"))
    foretell(str(ran.recipe), folder=ran.run_folder, overrides=["train.steps=9"])
    assert sorted(path.name for path in ran.run_folder.rglob("step-*")) == before


def test_the_command_says_time_memory_and_disk(place, command):
    done = command("doctor", place.recipe, "--folder", place.run_folder)
    assert done.exit_code == 0, done.output
    for word in ("time ", "memory ", "disk ", "6 steps of", "2 validations"):
        assert word in done.stdout
    said = json.loads(command("doctor", place.recipe, "--folder", place.run_folder, "--json").stdout)
    assert said["fits"] and said["forecast"]["steps"] == 6


def test_what_does_not_fit_ends_with_1(place, command, monkeypatch):
    monkeypatch.setattr("formary.train.forecast.free_memory", lambda runtime: -free_memory(runtime))
    done = command("doctor", place.recipe, "--folder", place.run_folder)
    assert done.exit_code == 1 and "lower train.micro_batch" in done.stdout


def test_a_model_to_start_from_has_to_be_there(place):
    from shutil import copy

    first = place.folder / "first.yaml"
    copy(place.recipe, first)
    first.write_text(first.read_text().replace("name: tiny", "name: first-of-two"))
    second = place.folder / "second.yaml"
    second.write_text(
        place.recipe.read_text().replace("preset: gpt-mini", "start: recipe:first").replace("  size: 1x32\n", "")
    )
    with pytest.raises(FormaryError, match="is not trained yet"):
        foretell(str(second), folder=place.run_folder)


def test_the_comparison_is_a_sentence():
    said = foretold.said({"seconds": [100.0, 110.0], "memory": [2e9, 1.9e9]})
    assert "1 min 40 s" in said and "(10% more)" in said and "1.9 GB (5% less)" in said

"""formary run and its single steps: what they print, and how quick a run is that has nothing to do."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import formary
from formary.pipeline import paper


@pytest.fixture
def steps(ran, command):
    return lambda step, *options: command(step, ran.recipe, "--folder", ran.run_folder, *options)


def test_a_run_ends_with_the_report_the_model_and_three_commands(place, command):
    result = command("run", place.recipe, "--folder", place.run_folder)
    assert result.exit_code == 0 and result.stderr == ""
    *_, report, model, head, first, second, third = result.stdout.splitlines()
    assert report == f"report: {place.run_folder / 'report.html'}"
    assert model == f"model:  {place.model}" and head == "next, try:"
    assert [shlex.split(line)[1] for line in (first, second, third)] == ["generate", "run", "--logdir"]


def test_the_commands_it_suggests_work_as_printed(ran, command):
    changed = (
        "--set",
        "train.steps=6",
        "--set",
        'generate.prompts=["it\'s a \\"cat\\" $HOME"]',
        "--set",
        "train.context=64",
    )
    result = command("run", ran.recipe, "--folder", ran.run_folder, *changed)
    assert result.exit_code == 0, result.output
    generate, longer, board = (shlex.split(line) for line in result.stdout.splitlines()[-3:])
    assert generate[2:4] == [str(ran.model), 'it\'s a "cat" $HOME']
    assert longer[-2:] == ["--set", "train.steps=12"] and "train.steps=6" not in longer
    for words in (generate, longer, board):
        assert os.access(words[0], os.X_OK) or Path(words[0]).name == words[0]
    written = command(*generate[1:])
    assert written.exit_code == 0 and written.stdout.startswith('it\'s a "cat" $HOME')
    again = command(*longer[1:])
    assert again.exit_code == 0 and "step 12/12" in again.stdout and "documents  read" in again.stdout
    assert "(to do)" not in next(line for line in again.stdout.splitlines() if "tokens  " in line)
    assert Path(board[2]).is_dir()


def test_a_program_is_named_as_this_shell_finds_it(tmp_path, monkeypatch):
    scripts = tmp_path / "env" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "formary").write_text("#!/bin/sh\n")
    (scripts / "formary").chmod(0o755)
    monkeypatch.setattr(paper.sysconfig, "get_path", lambda name: str(scripts))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert paper.program("formary") == "env/bin/formary"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert paper.program("formary") == str(scripts / "formary")
    monkeypatch.setenv("PATH", str(scripts))
    assert paper.program("formary") == "formary"


def test_a_second_run_has_nothing_to_do_and_does_not_import_torch(ran):
    arguments = ["-m", "formary", "run", str(ran.recipe), "--folder", str(ran.run_folder)]
    shown = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("nothing to do: ") and f"report: {ran.run_folder}" in shown.stdout
    imported = {line.rsplit("|")[-1].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert "pydantic" in imported and not imported & {"torch", "transformers", "sklearn", "tensorboard"}


def test_json_is_alone_on_standard_output(steps, ran):
    result = steps("run", "--json", "--set", "evaluate.bootstrap=200")
    made = json.loads(result.stdout)
    assert made["did"] == ["evaluate", "report"] and made["model"] == str(ran.model)
    assert {entry["metric"] for entry in made["metrics"]} == {"bits_per_byte", "loss", "perplexity"}
    assert "bits per byte" in result.stderr


@pytest.mark.parametrize(
    ("step", "last"), [("prepare", "tokens"), ("train", "train"), ("evaluate", "evaluate"), ("report", "report")]
)
def test_a_single_step_does_the_ones_before_it_and_no_more(place, command, step, last):
    result = command(step, place.recipe, "--folder", place.run_folder)
    assert result.exit_code == 0
    assert list(json.loads((place.run_folder / "stages.json").read_text()))[-1] == last


def test_evaluate_shows_the_figures_again(steps, ran):
    found = json.loads((ran.run_folder / "evaluation.json").read_text())["metrics"]
    shown = steps("evaluate").stdout
    assert "nothing to do" in shown and all(entry["says"] in shown for entry in found)


def test_evaluate_measures_any_causal_model_on_any_text(finished, command, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on a mat.")
    result = command("evaluate", finished.model, tmp_path / "a.txt", "--json")
    made = json.loads(result.stdout)
    loss = next(entry for entry in made["metrics"] if entry["metric"] == "loss")["model"]["value"]
    model = formary.load(finished.model)
    (scores,) = model.score(["the cat sat on a mat.<|endoftext|>"])
    assert made["documents"] == 1 and loss == pytest.approx(
        -sum(scores) / len(scores), rel=1e-3
    )  # in the machine's own precision
    assert "measured on: " in command("evaluate", finished.model, tmp_path / "a.txt").stdout


def test_a_ready_recipe_is_run_by_its_name_from_anywhere(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("prepare", "shakespeare", "--set", "data.max_rows=1")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "shakespeare" / "recipe.yaml").exists()

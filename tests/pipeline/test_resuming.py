"""A training that was stopped goes on with what it was begun with, and with other things only if told so."""

import io
import json
import re
import signal
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console

from formary.errors import CheckpointError, RecipeError
from formary.train import loop
from formary.train.loop import Interrupted

# Every generator and reader of pickles is broken before anything of Formary is imported.
NO_PICKLE = """
    import pickle, _pickle, os, signal, sys
    def refused(*arguments, **options):
        raise AssertionError("something unpickles")
    import torch, torch._dynamo, tokenizers, numpy, torch.utils.tensorboard
    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler"):
            setattr(module, name, refused)
    torch.load = torch.serialization.load = refused
"""
RUN = """
    from pathlib import Path
    from rich.console import Console
    from formary.pipeline.run import run
    from formary.train import loop
    recipe, folder, *overrides = sys.argv[1:]
    gradient = loop.gradient
    for name, stop in (("whole", 0), ("cut", 3), ("cut", 2), ("cut", 0)):
        calls = iter(range(1, 1000))
        def stopping(*arguments):
            if next(calls) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return gradient(*arguments)
        loop.gradient = stopping
        try:
            run(recipe, overrides=overrides, folder=Path(folder) / name, until="train", console=Console(width=200))
        except loop.Interrupted as stopped:
            print(stopped)
"""


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("causal_lm", ["train.ema=0.9", "model.switches={dropout: 0.2}", "train.optimiser.name=muon"]),
        ("masked_lm", ["model.switches={dropout: 0.2}", "train.keep_best=2", "machine.deterministic=true"]),
        ("denoise", ["train.optimiser.name=sgd", "data.augment={delete: 0.3, swap: 0.3, copies: 2}"]),
    ],
)
def test_a_stopped_run_ends_with_the_same_bytes_and_unpickles_nothing(tmp_path, place, task, overrides):
    place.write(task)
    program = textwrap.dedent(NO_PICKLE) + textwrap.dedent(RUN)
    words = [sys.executable, "-c", program, str(place.recipe), str(tmp_path), *overrides]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("stopped at step 3", "resuming from step 3", "stopped at step 5", "resuming from step 5"):
        assert said in done.stdout, done.stdout
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")

    def losses(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]

    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.fixture
def stopped(place, monkeypatch):
    """The place of a run that was ended by SIGTERM in its fourth step."""
    calls, gradient = iter(range(1, 1000)), loop.gradient

    def stopping(*arguments):
        if next(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return gradient(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "gradient", stopping)
        with pytest.raises(Interrupted):
            place.run()
    return place


def test_a_changed_recipe_is_refused_with_every_difference(stopped):
    with pytest.raises(RecipeError) as error:
        stopped.run(
            "train.optimiser.lr=0.02", "model.switches={dropout: 0.1}", "train.keep=9", "evaluate.bootstrap=200"
        )
    said = str(error.value)
    assert "stopped at step 4" in said and "--allow-changed" in said
    assert "\n  train.optimiser.lr: 0.001 -> 0.02" in said and "model.switches" in said and "dropout" in said
    assert "keep" not in said and "bootstrap" not in said
    assert stopped.run().did[0] == "train"  # undone, it goes on


def test_changed_data_is_refused_by_the_name_of_the_file(stopped):
    text = stopped.folder / "text.txt"
    before = (stopped.run_folder / "data/documents/train.jsonl").read_bytes()
    text.write_text(text.read_text().replace("cat", "car", 1))
    with pytest.raises(RecipeError, match=r"text\.txt: its content has changed"):
        stopped.run()
    assert (stopped.run_folder / "data/documents/train.jsonl").read_bytes() == before  # refused before any work


def test_what_is_allowed_goes_on_from_the_same_step(stopped):
    out = io.StringIO()
    result = stopped.run("train.optimiser.lr=0.02", console=Console(file=out, width=300), allow_changed=True)
    assert "resuming from step 4" in out.getvalue()
    assert "changed since step 4: train.optimiser.lr: 0.001 -> 0.02" in out.getvalue()
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    rates = {record["step"]: record["lr"] for record in records if "lr" in record}
    assert rates[3] <= 0.001 < rates[5]


def test_what_changes_only_the_last_digits_needs_no_permission(stopped):
    out = io.StringIO()
    stopped.run("train.micro_batch=2", console=Console(file=out, width=300))
    assert "resuming from step 4" in out.getvalue() and "train.micro_batch: null -> 2" in out.getvalue()


def test_another_optimiser_starts_afresh_and_another_model_is_refused(stopped):
    with pytest.raises(CheckpointError, match="another model"):
        stopped.run("model.size=1x48", allow_changed=True)
    out = io.StringIO()
    stopped.run("train.optimiser.name=sgd", console=Console(file=out, width=300), allow_changed=True)
    assert re.search("the optimiser was .* and is sgd: it starts afresh", out.getvalue())


def test_a_finished_training_is_no_obstacle_and_can_be_gone_on_with(ran):
    out = io.StringIO()
    ran.run("train.steps=8", console=Console(file=out, width=300))
    assert "resuming" not in out.getvalue()
    out = io.StringIO()
    ran.run("train.steps=10", console=Console(file=out, width=300), allow_changed=True)
    assert "resuming from step 8" in out.getvalue()


def test_the_command_asks_for_it(stopped, command):
    words = ["train", stopped.recipe, "--folder", stopped.run_folder, "--set", "train.steps=7"]
    refused = command(*words)
    assert refused.exit_code == 2 and "train.steps: 6 -> 7" in refused.stderr
    assert command(*words, "--allow-changed").exit_code == 0


def test_the_best_weights_of_a_broken_checkpoint_are_told_and_replaced(place, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 4.0])  # of steps 2, 4, 6, 8
    monkeypatch.setattr(loop, "validation_loss", lambda *_: next(losses))
    recipe = ["train.steps=8", "train.validate_every=2", "train.keep_best=2"]
    place.run(*recipe, until="train")
    assert json.loads((place.model / "formary.json").read_text())["best_step"] == 4
    before = place.weights()
    (checkpoints,) = (place.run_folder / "checkpoints").iterdir()
    (checkpoints / "step-00000004" / "model.safetensors").write_bytes(b"broken")
    (place.model / "model.safetensors").unlink()
    out = io.StringIO()
    place.run(*recipe, until="train", console=Console(file=out, width=400))
    assert "step-00000004 held the best weights and is broken" in out.getvalue()
    assert "those of step 6 count as the best" in out.getvalue()
    assert json.loads((place.model / "formary.json").read_text())["best_step"] == 6 and place.weights() != before

"""`formary tune`: equal time for all, the better ones longer, resumable, and what it says can be run."""

import importlib.util
import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from formary.errors import FormaryError, RecipeError
from formary.pipeline import tune as tuning
from formary.pipeline.tune import tune
from formary.recipe import read
from formary.train import timed

_SPEC = importlib.util.spec_from_file_location("labelled_rows", Path(__file__).with_name("test_labelled.py"))
labelled = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(labelled)


class Clock:
    """Each look at it is `tick` later, so every step takes that long."""

    def __init__(self, tick=2.0):
        self.tick, self.now = tick, 0.0

    def __call__(self):
        self.now += self.tick
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Steps so long that few are done."""
    made = Clock()
    monkeypatch.setattr(tuning, "CLOCK", made)
    fewer = tuple((sizes, factors, least // 4) for sizes, factors, least in tuning._GRIDS)
    monkeypatch.setattr(tuning, "_GRIDS", fewer)
    return made


@pytest.fixture
def counted(monkeypatch):
    """Every training that was made: its settings and seconds."""
    calls = []

    def train_for(seconds, loss_of, network, batches, settings, *given, **named):
        weights = [float(p.detach().double().sum()) for p in network.parameters()]
        calls.append((seconds, settings, weights))
        return original(seconds, loss_of, network, batches, settings, *given, **named)

    original = timed.train_for
    monkeypatch.setattr(timed, "train_for", train_for)
    return calls


def execute(place, **options):
    return tune(place.recipe, folder=place.run_folder, console=Console(quiet=True), **options)


def test_all_begin_alike_have_equal_time_and_the_best_third_goes_on(place, counted):
    found = execute(place, overrides=["train.optimiser.lr=0.03"])
    trials = found.trials
    budgets = sorted({trial.budget for trial in trials})
    assert [budget / budgets[0] for budget in budgets] == pytest.approx([1, 3, 9])
    assert all(weights == counted[0][2] for _, _, weights in counted[2:])  # the first two time a step
    assert all(abs(trial.steps * 2 - trial.budget) <= 2 for trial in trials)
    rounds = [sorted((t for t in trials if t.budget == budget), key=lambda t: t.loss) for budget in budgets]
    for before, after in pairwise(rounds):
        stayed = {trial.candidate for trial in before[: -(-len(before) // 3)]}
        assert stayed <= {trial.candidate for trial in after}
    assert found.best == rounds[-1][0] and found.own in rounds[-1] and found.own.factor == 1
    assert sum(trial.budget for trial in trials) <= 300
    lines = "\n".join(found.lines())
    assert f"{found.best.loss:.4f}" in lines and "the recipe's own" in lines


def test_a_rate_far_too_small_is_raised_and_the_line_says_how(place):
    found = execute(place, overrides=["train.optimiser.lr=1e-5"])
    sets = dict(one.split("=") for one in found.sets)
    assert float(sets["train.optimiser.lr"]) > 1e-5 and found.best.loss < found.own.loss
    made = read(
        place.recipe, ["train.optimiser.lr=1e-5", *(word for word in shlex.split(found.command) if "=" in word)]
    )
    assert made.train.optimiser.lr == float(sets["train.optimiser.lr"])


@pytest.mark.slow
def test_quick_steps_let_batches_be_tried_too(place, clock):
    clock.tick = 0.38
    found = execute(place, overrides=["train.optimiser={name: muon, lr: 0.01, matrix_lr: 0.03}"])
    first = [trial for trial in found.trials if trial.budget == found.trials[0].budget]
    assert {trial.batch for trial in first} == {2, 4, 8, 16} and len({trial.factor for trial in first}) == 5
    if found.best.factor != 1:
        sets = dict(one.split("=") for one in found.sets)
        assert float(sets["train.optimiser.matrix_lr"]) / 0.03 == pytest.approx(found.best.factor, rel=0.1)


def test_a_stopped_tuning_goes_on_where_it_was(place, counted, monkeypatch):
    whole = execute(place)
    made = len(counted)
    file = place.run_folder / tuning.FILE
    state = json.loads(file.read_text())
    counted.clear()
    assert execute(place).trials == whole.trials and not counted  # nothing to do
    file.write_text(json.dumps({**state, "trials": state["trials"][:2]}))
    again = execute(place)
    assert again.trials == whole.trials and len(counted) == made - 2 - 2  # nor is a step timed again
    counted.clear()
    execute(place, minutes=6)
    assert len(counted) == made


def test_every_candidate_diverging_is_said(place):
    with pytest.raises(FormaryError, match="every learning rate and batch that was tried diverged"):
        execute(place, overrides=["train.optimiser={name: sgd, lr: 1e30}", "train.clip=null"])


def test_too_little_time_is_said_before_anything_is_tried(place, clock, counted):
    clock.tick = 60.0
    with pytest.raises(FormaryError, match=r"a step takes 60 s, so that 5 minutes are too few.*give 1\d\d or more"):
        execute(place)
    assert len(counted) == 2


def test_rows_with_answers_are_tuned_too(tmp_path):
    recipe = labelled.write(
        tmp_path,
        labelled.rows(60),
        data={
            "sources": ["rows.jsonl"],
            "tokenizer": {"kind": "characters"},
            "split": {"validation": 0.2, "test": 0.2},
        },
        train={"epochs": 2, "batch": 8, "context": 48, "optimiser": {"lr": 1e-5}},
    )
    found = tune(recipe, folder=tmp_path / "run", console=Console(quiet=True))
    assert found.best.loss <= found.own.loss
    assert not any(one.startswith("train.steps") for one in found.sets)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("privacy.epsilon=8", "privacy: tuning trains many times"),
        ("data.split.validation=0", "nothing to validate on"),
    ],
)
def test_what_cannot_be_tuned_is_refused(place, override, says):
    with pytest.raises((RecipeError, FormaryError), match=says):
        execute(place, overrides=[override])


def test_the_command_prints_a_table_and_writes_a_recipe_that_runs(place, command, tmp_path):
    made = tmp_path / "elsewhere" / "better.yaml"
    given = ["--folder", place.run_folder, "--set", "train.optimiser.lr=1e-5", "--write", made]
    done = command("tune", place.recipe, *given)
    assert done.exit_code == 0, done.output
    assert "validation loss" in done.stdout and f"formary run {made}" in done.stdout
    recipe = read(made)
    assert recipe.name == "tiny-tuned" and recipe.train.optimiser.lr > 1e-5
    assert (made.parent / yaml.safe_load(made.read_text())["data"]["sources"][0]).resolve() == place.folder / "text.txt"
    said = json.loads(command("tune", place.recipe, *given, "--json").stdout)
    assert said["loss"] <= said["own_loss"] and said["set"] and len(said["trials"]) > 5

"""Recipes: what is accepted, and how errors name the field and the nearest right one."""

import pytest

from formary.errors import RecipeError
from formary.recipe.bundled import find, names
from formary.recipe.presets import TRAINING
from formary.recipe.reading import parse, read, to_yaml
from formary.recipe.schema import Optimiser, Schedule

MINIMAL = "name: r\ndata: {sources: [a.txt]}\n"


def test_a_minimal_recipe_gets_every_default():
    recipe = parse(MINIMAL)
    assert recipe.task == "causal_lm" and recipe.train.batch == 16


def test_a_resolved_recipe_reads_back_the_same():
    recipe = parse(MINIMAL, overrides=["train.steps=7", "model.switches.layers=3"])
    assert parse(to_yaml(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: r\ndata: {sources: [a]}\ntrain: {stpes: 3}\n", "train.stpes: unknown field; did you mean 'steps'?"),
        ("name: r\ndta: {}\n", "did you mean 'data'?"),
        ("name: r\n", "data: this field is needed"),
        ("name: r\ndata: {sources: [a]}\ntrain: {batch: many}\n", "train.batch"),
        ("name: r\ndata: [\n", "line"),
        ("- a\n", "a recipe is a mapping"),
        ("name: ../r\ndata: {sources: [a]}\n", "name"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_field(text, message):
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        parse(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.steps", "key=value"), ("name.x=1", "not a section"), ("train.lr=1", "unknown field")],
)
def test_a_wrong_override_is_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        parse(MINIMAL, overrides=[override])


def test_an_override_may_be_a_number_in_any_spelling():
    assert parse(MINIMAL, overrides=["train.optimiser.lr=2e-4"]).train.optimiser.lr == 2e-4


def test_a_missing_recipe_says_how_to_list_the_ready_ones(tmp_path):
    with pytest.raises(RecipeError, match="formary recipes"):
        read(tmp_path / "none.yaml")


def test_every_ready_recipe_is_valid_and_found_by_name():
    assert names()
    for name, path in names().items():
        assert read(find(name)).name == name == path.stem


def test_a_misspelt_ready_recipe_is_suggested():
    with pytest.raises(RecipeError, match="did you mean 'demo'"):
        find("dmeo")


@pytest.mark.parametrize(("given", "replaced"), [("steps", "epochs"), ("epochs", "steps")])
def test_an_override_of_how_long_to_train_replaces_the_other_way_of_saying_it(given, replaced):
    train = parse(MINIMAL + f"train: {{{replaced}: 9}}\n", overrides=[f"train.{given}=2"]).train
    assert getattr(train, given) == 2 and getattr(train, replaced) is None
    assert getattr(parse(MINIMAL + f"train: {{{replaced}: 9}}\n", overrides=[f"train.{given}="]).train, replaced) == 9


def test_two_lengths_of_training_are_refused_before_any_work():
    for text, overrides in (("train: {steps: 9, epochs: 2}", ()), ("", ("train.steps=9", "train.epochs=2"))):
        with pytest.raises(RecipeError, match=r"train\.steps and train\.epochs .* give one of them"):
            parse(MINIMAL + text, overrides=overrides)


FAST = "{name: x, data: {sources: [x]}, model: {preset: fast}, train: {steps: 5}}"


def test_the_fast_preset_brings_its_optimiser_and_schedule_along():
    train = parse(FAST).train
    assert {"optimiser": train.optimiser.name, "schedule": train.schedule.name} == {
        section: fields["name"] for section, fields in TRAINING["fast"].items()
    }
    assert (
        parse(FAST.replace("fast", "gpt-mini")).train
        == parse("{name: x, data: {sources: [x]}, train: {steps: 5}}").train
    )
    assert train.optimiser.lr == TRAINING["fast"]["optimiser"]["lr"]
    assert train.ramp is not None and (train.ramp.first, train.context) == (64, 256)


def test_the_fast_preset_begins_with_short_sequences_where_the_task_can_and_the_recipe_is_silent():
    assert parse(FAST, overrides=["train.context=96"]).train.ramp.first == 24
    silent = ["train.ramp=null", "train.context=30", "task=classify", "privacy={epsilon: 8, delta: 1.0e-5, clip: 1.0}"]
    for override in silent:
        assert parse(FAST, overrides=[override]).train.ramp is None, override
    assert parse(FAST, overrides=["train.ramp={first: 128}"]).train.ramp.first == 128


def test_what_the_recipe_says_of_training_stands_before_the_preset():
    ours = TRAINING["fast"]["optimiser"]
    changed = parse(FAST, overrides=["train.optimiser.lr=auto", "train.schedule.final=0.2"]).train
    assert (changed.optimiser.lr, changed.optimiser.matrix_lr) == ("auto", ours["matrix_lr"])
    assert changed.schedule.final == 0.2 and changed.schedule.decay == TRAINING["fast"]["schedule"]["decay"]
    other = parse(FAST, overrides=["train.optimiser={name: adamw, lr: 0.002}", "train.schedule.name=cosine"]).train
    assert other.optimiser == Optimiser(name="adamw", lr=0.002) and other.schedule == Schedule(name="cosine")


def test_a_model_that_was_trained_before_takes_no_training_from_a_preset():
    recipe = parse(FAST, overrides=["model.start=somewhere"])
    assert recipe.train.optimiser == Optimiser() and recipe.train.schedule == Schedule()


def test_a_recipe_with_a_preset_written_out_is_read_back_the_same():
    recipe = parse(FAST, overrides=["train.schedule.name=cosine"])
    assert parse(to_yaml(recipe)) == recipe

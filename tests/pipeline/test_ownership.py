"""Recipes of one name do not undo each other's runs; the same recipe may change and go on in its folder."""

import json
import shutil

import pytest
import yaml
from rich.console import Console

from formary.errors import RecipeError
from formary.pipeline.repeat import repeat
from formary.pipeline.run import run
from formary.recipe import read

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with one finished run of a recipe, runs/tiny; only to look at."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "text.txt").write_text("\n\n".join(f"the cat sat on mat {n} and ran" for n in range(60)))
    (folder / "other.txt").write_text("\n\n".join(f"a dog flew over house {n} and back" for n in range(60)))
    recipe = {
        "name": "tiny",
        "task": "causal_lm",
        "data": {
            "sources": ["text.txt"],
            "documents": "paragraph",
            "tokenizer": {"kind": "characters"},
            "split": {"validation": 0.1, "test": 0.2},
        },
        "model": {"preset": "gpt-mini", "size": "1x32"},
        "train": {"steps": 2, "batch": 2, "context": 16},
        "evaluate": {"bootstrap": 100, "ngram_order": 2},
        "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(folder / "recipe.yaml", console=QUIET)
    return folder


@pytest.fixture
def here(project, tmp_path, monkeypatch):
    """A copy of it elsewhere, and the current folder."""
    shutil.copytree(project, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_the_same_recipe_goes_on_where_it_was_also_in_a_copy_of_its_folder(here):
    assert run("recipe.yaml", console=QUIET).did == ()
    assert run("recipe.yaml", overrides=["train.steps=3"], console=QUIET).did == ("train", "evaluate", "report")


def test_more_data_beside_the_old_is_the_same_recipe(here):
    more = run("recipe.yaml", overrides=["data.sources=[text.txt, other.txt]"], console=QUIET, until="documents")
    assert more.did == ("documents",)


@pytest.mark.parametrize("data", ["text.txt", "other.txt"])
def test_another_recipe_file_of_the_same_name_is_refused(here, data):
    text = (here / "recipe.yaml").read_text().replace("text.txt", data)
    (here / "second.yaml").write_text(text)
    model = (here / "runs/tiny/model/model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match=rf"^runs/tiny: holds the run of {here}/recipe\.yaml, .*--folder runs/tiny-2"):
        run("second.yaml", console=QUIET)
    assert (here / "runs/tiny/model/model.safetensors").read_bytes() == model
    assert run("recipe.yaml", console=QUIET).did == ()


def test_what_the_refusal_says_to_do_works(here):
    (here / "second.yaml").write_text((here / "recipe.yaml").read_text())
    assert run("second.yaml", folder=here / "runs/tiny-2", until="documents", console=QUIET).did == ("documents",)
    assert run("second.yaml", overrides=["name=second"], until="documents", console=QUIET).folder.name == "second"
    shutil.rmtree(here / "runs/tiny")
    assert run("second.yaml", until="documents", console=QUIET).folder.name == "tiny"
    with pytest.raises(RecipeError, match=r"second\.yaml"):
        run("recipe.yaml", console=QUIET)


def test_a_recipe_that_was_moved_is_known_by_its_task_and_data(here):
    (here / "recipe.yaml").rename(here / "moved.yaml")
    assert run("moved.yaml", console=QUIET).did == ()
    assert json.loads((here / "runs/tiny/owner.json").read_text()) == {"recipe": "../../moved.yaml"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task=masked_lm", r"a run of task causal_lm \(and this is masked_lm\)"),
        ("data.sources=[other.txt]", "other data"),
    ],
)
def test_another_task_or_all_other_data_is_another_recipe(here, override, says):
    with pytest.raises(RecipeError, match=says):
        run("recipe.yaml", overrides=[override], console=QUIET)


def test_a_recipe_without_a_file_is_known_by_its_task_and_data(here):
    made = read(here / "recipe.yaml")
    assert run(made, base=here, console=QUIET).did == ()
    with pytest.raises(RecipeError, match="other data"):
        run(made.model_copy(update={"data": made.data.model_copy(update={"sources": ["other.txt"]})}), console=QUIET)


def test_a_folder_that_the_user_names_is_given_to_whoever_comes(here):
    changed = ["data.sources=[other.txt]"]
    place = here / "runs/tiny"
    assert "documents" in run("recipe.yaml", overrides=changed, folder=place, until="documents", console=QUIET).did


def test_a_folder_in_which_nothing_was_finished_is_free(here):
    (here / "runs/tiny/stages.json").write_text("{}")
    (here / "second.yaml").write_text((here / "recipe.yaml").read_text())
    assert run("second.yaml", until="documents", console=QUIET).did == ("documents",)


def test_the_folders_of_seeds_are_guarded_too(here):
    seed = str(read(here / "recipe.yaml").train.seed)
    shutil.copytree(here / "runs/tiny", here / "first")
    (here / "runs/tiny/seeds").mkdir()
    shutil.move(here / "first", here / "runs/tiny/seeds" / seed)
    (here / "runs/tiny/seeds" / seed / "owner.json").write_text('{"recipe": "../../../../recipe.yaml"}')
    (here / "second.yaml").write_text((here / "recipe.yaml").read_text())
    with pytest.raises(RecipeError, match=rf"^runs/tiny/seeds/{seed}: holds the run of "):
        repeat("second.yaml", 2, console=QUIET)

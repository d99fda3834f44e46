"""`formary recipes`: the list, the presets, showing and copying."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from formary.cli.main import app
from formary.recipe import bundled, read

LITTLE = """# Data: a poem of mine; CC0.
name: little
description: a small model
data:
  sources: [data/poem.txt]
"""


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """A folder of ready recipes with one in it."""
    home = tmp_path / "ready"
    (home / "data").mkdir(parents=True)
    (home / "little.yaml").write_text(LITTLE)
    (home / "data" / "poem.txt").write_text("a line\n")
    (home / "data" / "other.txt").write_text("not of this recipe\n")
    (home / "data" / "README.md").write_text("where the poem is from\n")
    monkeypatch.setattr(bundled, "folders", lambda: [home])
    return home


def formary(*arguments):
    return CliRunner().invoke(app, ["recipes", *map(str, arguments)])


def test_the_list_has_name_task_description_and_licence(ready):
    shown = formary().output
    for part in ("little", "causal_lm", "a small model", "a poem of mine; CC0."):
        assert part in shown


def test_the_list_as_json_reads_back(ready):
    (entry,) = json.loads(formary("--json").output)
    assert entry["name"] == "little" and entry["licence"] == "a poem of mine; CC0."


def test_a_broken_recipe_is_listed_with_what_is_wrong(ready):
    (ready / "broken.yaml").write_text("name: broken\ndta: {}\n")
    broken = next(entry for entry in json.loads(formary("--json").output) if entry["name"] == "broken")
    assert "did you mean 'data'?" in broken["error"]
    assert "not usable" in formary().output


def test_without_recipes_init_is_suggested(monkeypatch):
    monkeypatch.setattr(bundled, "folders", lambda: [])
    result = formary()
    assert result.exit_code == 0 and "formary init" in result.output


def test_show_prints_the_file_as_it_is(ready):
    assert formary("--show", "little").output == LITTLE


def test_a_misspelt_name_is_suggested(ready):
    result = formary("--show", "litle")
    assert result.exit_code == 2 and "did you mean 'little'?" in result.stderr


def test_a_copy_has_its_data_and_where_they_are_from_and_is_valid(ready, tmp_path):
    result = formary("--copy", "little", tmp_path / "mine")
    assert result.exit_code == 0
    copied = sorted(str(path.relative_to(tmp_path / "mine")) for path in (tmp_path / "mine").rglob("*.*"))
    assert copied == ["data/README.md", "data/poem.txt", "little.yaml"]
    assert read(tmp_path / "mine" / "little.yaml").name == "little"


def test_a_copy_overwrites_nothing_unless_forced(ready, tmp_path):
    mine = tmp_path / "mine"
    (mine / "data").mkdir(parents=True)
    (mine / "data" / "poem.txt").write_text("my own\n")
    result = formary("--copy", "little", mine)
    assert result.exit_code == 2 and "poem.txt is already there" in result.stderr
    assert (mine / "data" / "poem.txt").read_text() == "my own\n" and not (mine / "little.yaml").exists()
    assert formary("--copy", "little", mine, "--force").exit_code == 0
    assert (mine / "data" / "poem.txt").read_text() == "a line\n"


def test_data_outside_the_recipes_folder_are_not_copied(ready, tmp_path):
    (tmp_path / "far.txt").write_text("far\n")
    (ready / "far.yaml").write_text("name: far\ndata: {sources: [../far.txt]}\n")
    result = formary("--copy", "far", tmp_path / "mine")
    assert result.exit_code == 2 and "lies outside" in result.stderr


def test_of_several_places_a_copy_has_those_beside_the_recipe(ready, tmp_path):
    (tmp_path / "far.txt").write_text("far\n")
    np.savez(ready / "data/all.npz", x_train=np.zeros(3), x_test=np.zeros(3))
    sources = f"{tmp_path / 'far.txt'} | data/gone.txt | data/all.npz/train"
    (ready / "both.yaml").write_text(f"name: both\ndata: {{sources: ['{sources}']}}\n")
    assert formary("--copy", "both", tmp_path / "mine").exit_code == 0
    copied = sorted(path.name for path in (tmp_path / "mine").rglob("*.*"))
    assert copied == ["README.md", "all.npz", "both.yaml"]


def test_every_preset_is_listed_with_its_exact_parameters():
    from formary.model.topologies import build, parameter_count
    from formary.recipe.presets import PRESETS, preset

    found = {entry["name"]: entry for entry in json.loads(formary("--presets", "--json").output)}
    assert set(found) == set(PRESETS)
    real = build(preset("bert-mini", vocab_size=8192, context=256))
    assert found["bert-mini"]["parameters"] == parameter_count(real)
    assert "gpt-mini" in formary("--presets").output


def test_every_ready_recipe_is_usable_and_copies_whole(tmp_path):
    for entry in json.loads(formary("--json").output):
        assert "error" not in entry and entry["description"] and entry["licence"], entry["name"]
        result = formary("--copy", entry["name"], tmp_path / entry["name"])
        assert result.exit_code == 0, result.stderr

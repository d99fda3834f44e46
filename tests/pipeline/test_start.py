"""A recipe that starts from the model of another recipe, which is run first."""

import json

import pytest
import yaml
from rich.console import Console

from formary.errors import RecipeError
from formary.pipeline.run import run

QUIET = Console(quiet=True)
MACHINE = {"threads": 1, "device": "cpu", "precision": "float32"}


def write(folder, name, **sections):
    recipe = {"name": name, "machine": MACHINE, "evaluate": {"bootstrap": 100, "ngram_order": 2}} | sections
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["a", "good", "bad", "book", "film", "old", "long", "house"]
    rows = [
        {"text": f"{words[number % 8]} {words[number % 7]} {number}", "label": "ab"[number % 2]} for number in range(90)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"sources": ["rows.jsonl"], "split": {"validation": 0.15, "test": 0.2}}
    train = {"steps": 3, "batch": 4, "context": 32, "validate_every": 3}
    write(
        tmp_path,
        "words",
        task="masked_lm",
        data={**data, "tokenizer": {"kind": "characters"}},
        model={"preset": "bert-mini", "size": "1x32"},
        train=train,
    )
    write(tmp_path, "told", task="classify", data=data, model={"start": "recipe:words"}, train=train)
    return tmp_path


def test_the_recipe_it_starts_from_is_run_first_and_only_once(folder):
    first = run(folder / "told.yaml", console=QUIET)
    assert (folder / "runs/words/report.html").exists() and "train" in first.did
    trained = (folder / "runs/words/model/model.safetensors").stat().st_mtime_ns
    assert run(folder / "told.yaml", console=QUIET).did == ()
    again = run(folder / "told.yaml", overrides=["train.seed=2"], console=QUIET)
    assert "train" in again.did and "documents" not in again.did
    assert (folder / "runs/words/model/model.safetensors").stat().st_mtime_ns == trained


def test_it_starts_from_the_weights_that_recipe_left(folder):
    import torch

    import formary

    run(folder / "told.yaml", overrides=["train.optimiser.lr=1e-12"], console=QUIET)
    before, after = formary.load(folder / "runs/words/model"), formary.load(folder / "runs/told/model")
    ours = dict(after.network.named_parameters())
    shared = [name for name, _ in before.network.named_parameters() if name.startswith("transformer.")]
    assert shared
    for name in shared:
        torch.testing.assert_close(ours[name], dict(before.network.named_parameters())[name], atol=1e-8, rtol=0)


def test_another_result_of_that_recipe_trains_anew(folder):
    run(folder / "told.yaml", console=QUIET)
    text = (folder / "words.yaml").read_text(encoding="utf-8")
    (folder / "words.yaml").write_text(text.replace("steps: 3", "steps: 4"), encoding="utf-8")
    assert "train" in run(folder / "told.yaml", console=QUIET).did


def test_recipes_that_start_from_each_other_are_refused(folder):
    text = (folder / "words.yaml").read_text(encoding="utf-8")
    changed = text.replace("preset: bert-mini", "start: recipe:told").replace("size: 1x32", "")
    (folder / "words.yaml").write_text(changed, encoding="utf-8")
    with pytest.raises(RecipeError, match="comes round"):
        run(folder / "told.yaml", console=QUIET)


def test_a_recipe_that_does_not_exist_is_named(folder):
    with pytest.raises(RecipeError, match="wrods"):
        run(folder / "told.yaml", overrides=["model.start=recipe:wrods"], console=QUIET)

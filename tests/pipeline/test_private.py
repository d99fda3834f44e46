"""Private runs from rows to the model card: what is spent is shown and kept, a stopped one goes on bit for bit."""

import json
import random
from unittest import mock

import pytest
import yaml
from rich.console import Console

from formary.errors import CheckpointError, DataError, RecipeError
from formary.pipeline.run import run

pytest.importorskip("opacus", reason="differentially private training needs Opacus")

from formary.train.loop import Stopped
from formary.train.privacy import PrivateTraining

WORDS = ["the", "film", "book", "was", "long", "and", "very", "much", "about", "old", "house"]


def rows(task, count=220):
    rng = random.Random(0)
    made = []
    for number in range(count):
        words = [*rng.choices(WORDS, k=5), rng.choice(["good", "bad"]), str(number)]
        if task == "tag":
            made.append({"tokens": words, "tags": ["ADJ" if word in ("good", "bad") else "X" for word in words]})
        else:
            made.append({"text": " ".join(words), **({"label": words[5]} if task == "classify" else {})})
    return made


def write(folder, task, **changes):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(task)), encoding="utf-8")
    recipe = {
        "name": "tiny",
        "task": task,
        "data": {
            "sources": ["rows.jsonl"],
            "tokenizer": {"kind": "bytes"},
            "split": {"validation": 0.1, "test": 0.1},
        },
        "model": {"preset": "gpt-mini" if task == "causal_lm" else "bert-mini", "size": "1x32"},
        "train": {"steps": 12, "batch": 16, "context": 48, "validate_every": 4, "save_every": 4},
        "evaluate": {"bootstrap": 100, "baselines": False},
        "privacy": {"epsilon": 8, "delta": 1e-3},
        "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
    }
    recipe.update(changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


def execute(recipe, *overrides, **options):
    options = {"folder": recipe.parent / "run", "console": Console(quiet=True)} | options
    return run(recipe, overrides=overrides, **options)


def records_of(result):
    return [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["classify", "tag", "causal_lm"])
def test_epsilon_is_counted_up_to_what_was_asked_and_told_everywhere(task, tmp_path):
    result = execute(write(tmp_path, task))
    records = records_of(result)
    spent = [record["epsilon"] for record in records if "loss" in record]
    assert len(spent) == 12 and spent == sorted(spent) and spent[0] < spent[-1]
    assert all("epsilon" in record for record in records if "validation_loss" in record)
    facts = json.loads((result.model / "formary.json").read_text())["privacy"]
    assert facts["epsilon"] == spent[-1] and 7.8 < spent[-1] <= 8
    assert facts["steps"] == 12 and facts["rows"] > 150 and not facts["seeded"]
    assert "secret" not in facts
    card, page = (result.model / "README.md").read_text(), result.report.read_text()
    for text in (card, page):
        assert f"epsilon {spent[-1]:.2f} at delta 0.001" in text and "noise multiplier" in text
    assert "differential-privacy" in card
    log = (result.folder / "log.txt").read_text()
    assert "private: each of" in log and f", epsilon {spent[-1]:.2f}" in log


def test_causal_lm_learns_privately_by_low_rank_updates_of_a_loaded_model(tmp_path):
    base = execute(write(tmp_path, "causal_lm", privacy=None), folder=tmp_path / "base")
    (tmp_path / "tuned").mkdir()
    recipe = write(tmp_path / "tuned", "causal_lm", model={"start": str(base.model)})
    result = execute(recipe, "train.tune.method=lora", "train.tune.rank=2", "train.optimiser.lr=0.01")
    assert json.loads((result.model / "formary.json").read_text())["privacy"]["steps"] == 12
    assert (result.folder / "adapter" / "adapter_model.safetensors").exists()
    before, after = ((place / "model" / "model.safetensors").read_bytes() for place in (base.folder, result.folder))
    assert len(before) == len(after) and before != after


class Stop(Exception):
    pass


def test_a_stopped_private_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    recipe = write(tmp_path, "classify")
    real, calls = PrivateTraining.gradient, []

    def gradient(self, *given):
        calls.append(1)
        if len(calls) == 10:  # two steps after the checkpoint of step 8 (counted from 0)
            raise Stop
        return real(self, *given)

    with mock.patch.object(PrivateTraining, "gradient", gradient), pytest.raises(Stop):
        execute(recipe, "privacy.seed=7", until="train")
    resumed = execute(recipe, "privacy.seed=7", until="train")
    whole = execute(recipe, "privacy.seed=7", until="train", folder=tmp_path / "whole")
    assert (resumed.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()
    facts = [json.loads((one.model / "formary.json").read_text())["privacy"] for one in (resumed, whole)]
    assert facts[0] == facts[1] and facts[0]["steps"] == 12 and facts[0]["seeded"]


def test_without_a_seed_no_two_runs_draw_the_same(tmp_path):
    recipe = write(tmp_path, "classify")
    weights = {
        (execute(recipe, until="train", folder=tmp_path / name).model / "model.safetensors").read_bytes()
        for name in ("one", "two")
    }
    assert len(weights) == 2


def test_privacy_cannot_be_had_after_a_training_without(tmp_path):
    recipe = write(tmp_path, "classify", privacy=None)
    with pytest.raises(Stopped):
        execute(recipe, until="train", watch=lambda share, badness: share > 0.5)
    with pytest.raises(CheckpointError, match="without privacy"):
        execute(recipe, "privacy.delta=0.001", until="train", allow_changed=True)


def test_a_regression_is_refused_privately(tmp_path):
    recipe = write(tmp_path, "classify")
    made = [{"text": row["text"], "label": number / 7} for number, row in enumerate(rows("classify"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    with pytest.raises(RecipeError, match="regression"):
        execute(recipe, until="train")


def test_a_text_that_is_one_row_is_too_few(tmp_path):
    recipe = write(tmp_path, "causal_lm")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("causal_lm", 40)))
    with pytest.raises(DataError, match=r"privacy\.delta"):
        execute(recipe, "privacy.delta=0.1", until="train")


def test_a_search_is_refused(tmp_path):
    from formary.pipeline.search import search

    with pytest.raises(RecipeError, match="privacy"):
        search(write(tmp_path, "classify"), console=Console(quiet=True))

"""Every setting of training takes effect for labelled tasks too, and what is left to the machine is settled once."""

import json
import random

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file

from formary.infer.loaded import load
from formary.pipeline import labelled
from formary.pipeline.run import run
from formary.train.fit import Fit, Trial


def written(folder):
    rng = random.Random(0)
    rows = []
    for number in range(60):
        good = rng.random() < 0.7
        text = " ".join(rng.choices(["the", "film", "was", "long", "and", "very", "old"], k=5))
        rows.append({"text": f"{text} {'good' if good else 'bad'} {number}", "label": "yes" if good else "no"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "name": "tiny",
        "task": "classify",
        "data": {
            "sources": ["rows.jsonl"],
            "tokenizer": {"kind": "characters"},
            "split": {"validation": 0.2, "test": 0.1},
        },
        "model": {"preset": "bert-mini", "size": "1x32"},
        "train": {"steps": 4, "batch": 8, "context": 48, "validate_every": 4, "schedule": {"name": "constant"}},
        "evaluate": {"bootstrap": 100},
        "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return written(tmp_path_factory.mktemp("settings"))


def trained(recipe, *overrides, until="train"):
    """The weights after a few steps."""
    folder = recipe.parent / "run"
    run(recipe, overrides=overrides, folder=folder, until=until, console=Console(quiet=True))
    return load_file(folder / "model" / "model.safetensors")


def same(first, second):
    return all(first[name].equal(second[name]) for name in first)


@pytest.fixture(scope="module")
def plain(recipe):
    return trained(recipe)


@pytest.mark.parametrize(
    "setting",
    [
        *(f"train.optimiser.name={name}" for name in ("adam", "sgd", "muon")),
        *(f"train.schedule.name={name}" for name in ("linear", "cosine", "exponential", "wsd")),
        "train.schedule.warmup=2",
        "train.optimiser.weight_decay=0.5",
        "train.optimiser.l1=0.01",
        "model.switches={dropout: 0.1}",
        "train.label_smoothing=0.1",
        "train.objective.class_weights=balanced",
        "train.clip=0.001",
        "train.ema=0.9",
        "train.batch=4",
        "data.augment.delete=0.3",
    ],
)
def test_each_setting_changes_what_is_learned(recipe, plain, setting):
    assert not same(trained(recipe, setting), plain)


def test_a_batch_in_pieces_learns_the_same(recipe, plain):
    pieces = trained(recipe, "train.micro_batch=3")
    assert all(pieces[name].allclose(plain[name], atol=1e-4) for name in plain)


def test_augmentation_adds_training_rows_with_their_labels(recipe):
    trained(recipe, "data.augment.delete=0.3", "data.augment.copies=2")
    read = {
        split: [json.loads(line) for line in (recipe.parent / f"run/data/documents/{split}.jsonl").open()]
        for split in ("train", "validation", "test")
    }
    by_number = {}
    for row in read["train"]:
        by_number.setdefault(row["label"], []).append(row["text"])
    assert len(read["train"]) > 60 > sum(map(len, (read["validation"], read["test"])))
    assert set(by_number) == {"yes", "no"} and all("bad" not in text for text in by_number["yes"])


@pytest.mark.parametrize("ema", ["null", "0.5"])
def test_the_metric_chooses_the_best_weights_and_ends_the_run_when_it_stands_still(recipe, monkeypatch, ema):
    scores = iter([0.5, 0.9, 0.8, 0.7, 0.95])
    seen = []

    def score(task, rows, settled):
        def measure(network):
            seen.append({name: tensor.detach().clone() for name, tensor in network.state_dict().items()})
            return "accuracy", next(scores)

        return measure

    monkeypatch.setattr(labelled, "_score", score)
    overrides = (
        "train.steps=12",
        "train.validate_every=2",
        "train.best=metric",
        "train.patience=2",
        f"train.ema={ema}",
    )
    trained(recipe, *overrides)
    model = recipe.parent / "run" / "model"
    facts = json.loads((model / "formary.json").read_text())
    assert len(seen) == 4 and (facts["step"], facts["best_step"]) == (8, 4)
    best, kept = seen[1], load(model).network.state_dict()
    assert all(kept[name].allclose(tensor, atol=1e-6) for name, tensor in best.items())
    assert not all(seen[2][name].allclose(tensor, atol=1e-6) for name, tensor in best.items())


def test_what_is_left_open_is_settled_told_and_kept(recipe, monkeypatch):
    from formary.train import settled

    def small(*args, **options):
        return Fit(8, 4, "batch 8 in pieces of 4: it fits", 1, (Trial(4, 1, 0.1),))

    monkeypatch.setattr(settled.fit, "find_batch", small)
    overrides = ("train.batch=auto", "train.optimiser.lr=auto")
    first = trained(recipe, *overrides, until="report")
    folder = recipe.parent / "run"
    found = json.loads((folder / "lr_finder.json").read_text())
    log = (folder / "log.txt").read_text()
    page = (folder / "report.html").read_text()
    assert found["why"] in log and found["why"][1:] in page and "learning rate, power of 10" in page
    rates = {record["lr"] for record in map(json.loads, (folder / "metrics.jsonl").open()) if "lr" in record}
    assert max(rates) == pytest.approx(found["lr"])

    def never(*args, **options):
        raise AssertionError("searched again")

    monkeypatch.setattr(settled.fit, "find_batch", never)
    monkeypatch.setattr(settled.range_test, "find_lr", never)
    (folder / "model" / "model.safetensors").unlink()
    assert same(trained(recipe, *overrides), first)

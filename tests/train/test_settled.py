"""What a recipe leaves to the machine becomes numbers once, and stays what it became."""

import json

import pytest
import torch
from rich.console import Console

from formary.recipe.schema import Optimiser, Train
from formary.train import fit, range_test, settled
from formary.train.machine import Runtime
from formary.train.settled import BATCH_FILE, LR_FILE, recorded, settle

CPU = Runtime(device=torch.device("cpu"), precision="float32", threads=1)
AUTO = Train(batch="auto", optimiser=Optimiser(name="muon", lr="auto"), steps=5)


@pytest.fixture
def finders(monkeypatch):
    """Finders that answer at once and count how often they were asked."""
    asked = []

    def batch(*args, sequences, **options):
        asked.append(("batch", sequences))
        return fit.Fit(32, 8, "batch 32 in pieces of 8", 10, (fit.Trial(8, 5, 0.1),))

    def rate(loss_of, network, batches, settings, runtime):
        asked.append(("lr", settings.batch, settings.micro_batch))
        return range_test.Found(0.002, "learning rate 0.002", (1e-3, 1e-2), (2.0, 1.0), (2.0, 1.0))

    monkeypatch.setattr(settled.fit, "find_batch", batch)
    monkeypatch.setattr(settled.range_test, "find_lr", rate)
    return asked


class Batches:
    def __init__(self, settings):
        self.steps_per_epoch = 100 // settings.batch_size


def settle_in(folder, settings=AUTO, key="one", console=None):
    return settle(
        None,
        torch.nn.Linear(1, 1),
        settings=settings,
        batches=Batches,
        runtime=CPU,
        run=folder,
        key=key,
        console=console or Console(quiet=True),
    )


def test_every_auto_becomes_a_number_and_the_rate_is_searched_with_the_batch_found(tmp_path, finders):
    settings = settle_in(tmp_path)
    assert (settings.batch_size, settings.micro_batch) == (32, 8)
    assert (settings.optimiser.peak_lr, settings.optimiser.matrix_lr) == (0.002, pytest.approx(0.04))
    assert finders == [("batch", 100), ("lr", 32, 8)]
    assert settings.model_copy(update={"batch": "auto", "micro_batch": None, "optimiser": AUTO.optimiser}) == AUTO


def test_a_resumed_run_does_not_search_again_and_another_training_does(tmp_path, finders):
    first = settle_in(tmp_path)
    console = Console(record=True, width=200)
    assert settle_in(tmp_path, console=console) == first == recorded(AUTO, tmp_path, "one")
    assert len(finders) == 2 and "batch 32, learning rate 0.002, as found when" in console.export_text()
    assert recorded(AUTO, tmp_path, "two") == AUTO
    settle_in(tmp_path, key="two")
    assert len(finders) == 4


def test_what_was_found_is_in_the_run_folder(tmp_path, finders):
    settle_in(tmp_path)
    curve = json.loads((tmp_path / LR_FILE).read_text())
    assert curve["lr"] == 0.002 and curve["rates"] == [1e-3, 1e-2] and curve["losses"] == [2.0, 1.0]
    assert json.loads((tmp_path / BATCH_FILE).read_text())["trials"][0]["sequences"] == 8


def test_a_broken_record_is_searched_anew(tmp_path, finders):
    (tmp_path / LR_FILE).write_text("{")
    (tmp_path / BATCH_FILE).write_text("[]")
    assert settle_in(tmp_path).batch == 32 and len(finders) == 2


def test_numbers_of_the_recipe_are_left_alone(tmp_path, finders):
    settings = Train(batch=4, optimiser=Optimiser(lr=0.5))
    assert settle_in(tmp_path, settings) == settings
    assert not finders and not list(tmp_path.iterdir())

"""Saving in the background: what is written is what was given, one at a time, and no error is lost."""

import threading

import pytest
import torch

from formary.errors import StorageError
from formary.train import checkpoint
from formary.train.checkpoint import Saved, load, path_of, steps_in
from formary.train.saving import Saver


def saved(step, weight):
    return Saved(step, {"model": {"weight": weight}}, {"step": step})


def test_a_save_holds_the_weights_of_its_moment_though_training_goes_on(tmp_path, monkeypatch):
    go, write = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: (go.wait(), write(*arguments)))
    weight = torch.ones(3)
    with Saver(tmp_path, keep=2) as saver:
        saver.save(saved(1, weight))
        weight += 1  # the step that follows
        go.set()
    assert load(path_of(tmp_path, 1)).tensors["model"]["weight"].tolist() == [1, 1, 1]


def test_at_most_one_save_is_under_way_and_the_last_is_waited_for(tmp_path, monkeypatch):
    at_work, most, write = [], [], checkpoint.save

    def slow(*arguments):
        at_work.append(1)
        most.append(len(at_work))
        write(*arguments)
        at_work.pop()

    monkeypatch.setattr(checkpoint, "save", slow)
    with Saver(tmp_path, keep=3) as saver:
        for step in range(1, 6):
            saver.save(saved(step, torch.ones(3)))
    assert max(most) == 1 and steps_in(tmp_path) == [3, 4, 5]


@pytest.mark.parametrize("way", ["check", "wait", "save", "leaving"])
def test_what_goes_wrong_in_the_background_surfaces(tmp_path, monkeypatch, way):
    def full(*arguments):
        raise StorageError("the disk is full")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(StorageError, match="the disk is full"), Saver(tmp_path, keep=2) as saver:
        saver.save(saved(1, torch.ones(3)))
        if way == "check":
            saver._thread.join()
            saver.check()
        elif way == "wait":
            saver.wait()
        elif way == "save":
            saver.save(saved(2, torch.ones(3)))


def test_the_error_that_ends_a_training_is_told_before_that_of_a_save(tmp_path, monkeypatch):
    def full(*arguments):
        raise StorageError("the disk is full")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(ValueError, match="the first"), Saver(tmp_path, keep=2) as saver:
        saver.save(saved(1, torch.ones(3)))
        raise ValueError("the first")

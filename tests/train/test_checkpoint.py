"""Checkpoints: whole or not at all, broken ones named and passed over, never a pickle."""

import errno
import os

import pytest
import torch

from formary import durable
from formary.errors import StorageError
from formary.train.checkpoint import Saved, load, newest, prune, save


def saved(step):
    tensors = {"model": {"weight": torch.randn(3, 4)}, "optimiser": {"weight/step": torch.tensor(2.0)}}
    return Saved(step, tensors, {"progress": {"step": step}})


def test_what_is_saved_is_what_is_loaded(tmp_path):
    one = saved(7)
    other = load(save(tmp_path, one))
    assert other.step == 7 and other.state == one.state
    assert torch.equal(other.tensors["model"]["weight"], one.tensors["model"]["weight"])


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, damage):
    save(tmp_path, saved(1))
    file = save(tmp_path, saved(2)) / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    found, skipped = newest(tmp_path)
    assert found is not None and found.step == 1
    assert len(skipped) == 1 and "step-00000002" in skipped[0]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    save(tmp_path, saved(1))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        save(tmp_path, saved(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_a_killed_save_left_is_removed(tmp_path):
    (tmp_path / ".writing-123-step-00000009").mkdir()
    assert newest(tmp_path) == (None, [])
    assert list(tmp_path.iterdir()) == []


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        save(tmp_path, saved(step))
    prune(tmp_path, keep=2, also=[3])
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "5", "6"]


def test_a_checkpoint_is_only_safetensors_and_json(tmp_path):
    files = {file.suffix or file.name for file in save(tmp_path, saved(1)).iterdir()}
    assert files == {".safetensors", ".json", "complete"}

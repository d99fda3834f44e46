"""Checkpoints of a run in progress: weights, optimiser, average and loop state, as safetensors and JSON.

A checkpoint appears whole or not at all, and carries checksums; the newest whole one is resumed. The finished model
is another thing: a Hugging Face folder, written by `hub.checkpoint`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from formary import durable
from formary.errors import StorageError

_STATE = "state.json"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: `tensors` by group (model, optimiser, ema, rng), `state` the loop's JSON."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(folder: Path, saved: Saved) -> Path:
    """Write `saved` as folder/step-NNNNNNNN, whole or not at all, and return its path.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    path = folder / f"step-{saved.step:08d}"
    with durable.new_folder(path) as temporary:
        checksums = {}
        for group, tensors in saved.tensors.items():
            file = temporary / f"{group}.safetensors"
            try:
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, str(file))
            except SafetensorError as error:  # its own kind, also for a full disk
                raise StorageError(f"{path}: could not be written ({error}); nothing half-written was left") from error
            checksums[file.name] = _checksum(file)
        record = {"step": saved.step, "checksums": checksums, "state": saved.state}
        (temporary / _STATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return path


def newest(folder: Path) -> tuple[Saved | None, list[str]]:
    """The newest whole checkpoint in `folder`, and a sentence for every broken one that was passed over."""
    durable.remove_leftovers(folder)
    skipped: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return load(path), skipped
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            skipped.append(f"{path} is broken and was skipped ({error})")
    return None, skipped


def load(path: Path) -> Saved:
    """Read one checkpoint and check every file against its checksum.

    Raises:
        ValueError: a file is not the one that was written. OSError, KeyError, SafetensorError: it cannot be read.
    """
    record = json.loads((path / _STATE).read_text(encoding="utf-8"))
    tensors = {}
    for name, checksum in record["checksums"].items():
        file = path / Path(name).name
        if _checksum(file) != checksum:
            raise ValueError(f"{file.name} does not match its checksum")
        tensors[file.stem] = load_file(str(file))
    return Saved(step=int(record["step"]), tensors=tensors, state=record["state"])


def prune(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    paths = sorted(folder.glob("step-*"))
    for path in paths[:-keep]:
        if best_step is None or path.name != f"step-{best_step:08d}":
            shutil.rmtree(path, ignore_errors=True)


def rng_state() -> dict[str, Tensor]:
    """The state of torch's generator, which dropout draws from; batches need none, being functions of the step."""
    return {"torch": torch.get_rng_state()}


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

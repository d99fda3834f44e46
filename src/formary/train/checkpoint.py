"""Checkpoints of a run in progress: weights, optimiser, average and loop state, as safetensors and JSON.

A checkpoint appears whole or not at all: a temporary folder, flushed, renamed, then marked complete. The mark holds the
checksum of state.json, and that those of the tensors; the newest whole checkpoint is resumed. The finished model is
another thing: a Hugging Face folder, written by `hub.checkpoint`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from formary import durable
from formary.errors import StorageError

_STATE = "state.json"
_MARK = "complete"  # the checksum of state.json; written when everything else is on the disk
UNREADABLE = (OSError, ValueError, KeyError, SafetensorError)
"""What `load` raises for a checkpoint that is not as it was written."""


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
    path = path_of(folder, saved.step)
    record = {"step": saved.step, "checksums": dict[str, str](), "state": _plain(saved.state)}
    with durable.new_folder(path) as temporary:
        for group, tensors in saved.tensors.items():
            file = temporary / f"{group}.safetensors"
            try:
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, str(file))
            except SafetensorError as error:  # its own kind, also for a full disk
                raise StorageError(f"{path}: could not be written ({error}); nothing half-written was left") from error
            record["checksums"][file.name] = _checksum(file)
        text = json.dumps(record, indent=1, allow_nan=False)
        (temporary / _STATE).write_text(text, encoding="utf-8")
    durable.write_text(path / _MARK, xxhash.xxh3_128(text.encode()).hexdigest())
    return path


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """The steps that have a complete checkpoint, oldest first; whether it is still as it was written, `load` says."""
    return sorted(
        int(mark.parent.name[5:]) for mark in folder.glob(f"step-*/{_MARK}") if mark.parent.name[5:].isdigit()
    )


def newest(folder: Path) -> tuple[Saved | None, list[str]]:
    """The newest whole checkpoint in `folder`, and a sentence for every broken one that was passed over."""
    durable.remove_leftovers(folder)
    skipped: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return load(path), skipped
        except UNREADABLE as error:
            skipped.append(f"{path} is broken and was skipped ({error})")
    return None, skipped


def load(path: Path) -> Saved:
    """Read one checkpoint and check every file against its checksum.

    Raises:
        ValueError: a file is not the one that was written. OSError, KeyError, SafetensorError: it cannot be read.
    """
    if not (path / _MARK).is_file():
        raise ValueError("it has no completion mark: saving it was cut short")
    text = (path / _STATE).read_bytes()
    if xxhash.xxh3_128(text).hexdigest() != (path / _MARK).read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{_STATE} does not match its checksum")
    record = json.loads(text)
    tensors = {}
    for name, checksum in record["checksums"].items():
        file = path / Path(name).name
        if _checksum(file) != checksum:
            raise ValueError(f"{file.name} does not match its checksum")
        tensors[file.stem] = load_file(str(file))
    return Saved(step=int(record["step"]), tensors=tensors, state=record["state"])


def prune(folder: Path, *, keep: int, also: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and those of the steps in `also`."""
    wanted = {path_of(folder, step).name for step in also}
    for path in sorted(folder.glob("step-*"))[:-keep]:
        if path.name not in wanted:
            delete(path)


def delete(path: Path) -> None:
    """Delete one checkpoint; what a kill leaves of it is not taken for a whole one."""
    (path / _MARK).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _plain(value: Any) -> Any:
    """JSON has no word for what is not finite: it becomes null."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

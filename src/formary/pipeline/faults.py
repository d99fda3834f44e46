"""Faults on purpose: a small training is killed, starved of disk, damaged and robbed of its data, and has to end with the
same bytes as one that was left alone.

Every go is a process of its own, forked from this one so that starting costs little, and works on the disk that is asked
about. Nothing is simulated that the system can do itself: SIGKILL is SIGKILL, and a full disk is a full disk where one may
be mounted.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from formary.errors import FormaryError
from formary.pipeline.run import run

_SENTENCE = "the cat sat on a mat while one dog ran after two birds and they flew away over his old house"
_RECIPE: dict[str, Any] = {
    "name": "selftest",
    "data": {
        "sources": ["text.txt"],
        "documents": "paragraph",
        "tokenizer": {"kind": "characters"},
        "split": {"validation": 0.1, "test": 0.1},
    },
    "model": {"preset": "gpt-mini", "size": "2x32", "switches": {"dropout": 0.1}},
    "train": {
        "steps": 60,
        "batch": 4,
        "context": 32,
        "ema": 0.9,
        "optimiser": {"name": "muon"},
        "validate_every": 10,
        "validation_tokens": 500,
        "save_every": 3,
    },
    "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
}
_WRITES_PER_SAVE = 11  # flushes and renames of one checkpoint
_GOES_PER_TRAINING = 25  # after so many kills a training is let go on to its end
_DISK = 12 * 2**20  # bytes of the disk that is filled up
_PATIENCE = 120.0  # seconds after which a go counts as hanging


@dataclass
class Outcome:
    """One kind of fault: how often it was tried, how often nothing was lost, and what was seen."""

    fault: str
    how: str
    tried: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)  # a sentence for each time

    def count(self, problem: str | None, times: int = 1) -> None:
        """Take in that it was tried `times` times; `problem` says what was lost."""
        self.tried += times
        self.survived += 0 if problem else times
        if problem:
            self.lost.append(problem)


def inject(folder: Path, *, kills: int, console: Console) -> list[Outcome]:
    """Try every fault in `folder`, an empty one on the disk in question; what was lost is left there to look at.

    Raises:
        FormaryError: already the training that is left alone fails.
    """
    lab = _Lab(folder)
    console.print(f"  a training of {_RECIPE['train']['steps']} steps, left alone ...", highlight=False)
    lab.learn_reference()
    console.print(f"  took {lab.seconds:.1f} s; now with faults", highlight=False)
    outcomes = []
    for fault in (_kills, _kills_in_saves, _term, _full_disk, _flipped_bits, _data_error, _vanished):
        outcome = fault(lab, kills)
        outcomes.append(outcome)
        said = "nothing lost" if not outcome.lost else "; ".join(outcome.lost)
        console.print(
            f"  {outcome.fault}: {outcome.survived} of {outcome.tried}, {said}", highlight=False, markup=False
        )
    return outcomes


# The faults -----------------------------------------------------------------------------------------------------------


def _kills(lab: _Lab, kills: int) -> Outcome:
    outcome = Outcome("kill -9", "at random moments, from reading the data to the last step")
    left = kills - kills // 2
    while left > 0:
        place, hits = lab.fresh(), 0
        while left > 0 and hits < _GOES_PER_TRAINING:
            child = lab.start(place)
            if child.wait(lab.random.uniform(0, 0.6 * lab.seconds)) is not None:
                break
            child.signal(signal.SIGKILL)
            if child.end() != -signal.SIGKILL:
                break
            hits, left = hits + 1, left - 1
        outcome.count(lab.finish(place), hits)
    return outcome


def _kills_in_saves(lab: _Lab, kills: int) -> Outcome:
    outcome = Outcome("kill -9 in a save", "between two writes of a checkpoint, each in turn")
    left = kills // 2
    while left > 0:
        place, hits = lab.fresh(), 0
        while left > 0 and hits < _GOES_PER_TRAINING:
            save, write = lab.random.randint(1, 3), left % _WRITES_PER_SAVE + 1
            if lab.start(place, partial(_die_in_save, save, write)).end() != -signal.SIGKILL:
                break
            hits, left = hits + 1, left - 1
        outcome.count(lab.finish(place), hits)
    return outcome


def _term(lab: _Lab, kills: int) -> Outcome:
    outcome = Outcome("SIGTERM", "while steps are computed: saves, ends with 130, goes on")
    for _ in range(3):
        place, step = lab.fresh(), lab.random.randint(2, 50)
        code = lab.start(place, partial(_at_step, step, partial(_signal, signal.SIGTERM))).end()
        problem = None if code == 130 else f"SIGTERM ended with {code} and not 130"
        outcome.count(problem or lab.finish(place, says=f"resuming from step {step + 1}"))
    return outcome


def _full_disk(lab: _Lab, kills: int) -> Outcome:
    with _small_disk(lab.folder / "full-disk") as disk:
        how = (
            "RLIMIT_FSIZE: no file over 4 kB (mounting needs root)" if disk is None else f"a disk of {_DISK >> 20} MiB"
        )
        outcome = Outcome("full disk", f"{how}, full from a checkpoint on; then space is made")
        for save in (1, 4):
            place, ballast = lab.fresh(disk), disk and disk / "ballast"
            starve = partial(_fill, ballast) if ballast else _forbid_long_files
            for _ in range(1 if disk is None else 2):  # also when it is started again on the full disk
                code = lab.start(place, partial(_at_save, save, starve)).end()
                if code != 2:
                    outcome.count(f"a full disk ended with {code} and not 2")
            if ballast:
                ballast.unlink(missing_ok=True)
            outcome.count(lab.finish(place))
            shutil.rmtree(place, ignore_errors=not outcome.lost)
    return outcome


def _flipped_bits(lab: _Lab, kills: int) -> Outcome:
    outcome = Outcome("flipped bit", "in every file of the newest checkpoint, one after another")
    stopped = lab.fresh()
    lab.start(stopped, partial(_at_step, 31, partial(_signal, signal.SIGTERM))).end()
    names = [file.name for file in sorted(_newest_checkpoint(stopped).iterdir())]
    for name in names:
        place = lab.fresh()
        shutil.copytree(stopped, place)
        file = _newest_checkpoint(place) / name
        content = bytearray(file.read_bytes())
        content[lab.random.randrange(len(content))] ^= 1 << lab.random.randrange(8)
        file.write_bytes(content)
        problem = lab.finish(place, says="is broken and was skipped")
        outcome.count(problem and f"{name}: {problem}")
    return outcome


def _data_error(lab: _Lab, kills: int) -> Outcome:
    outcome = Outcome("error while loading data", "a batch raises an exception: saves, goes on from there")

    def fail() -> None:
        raise OSError("the disk with the data was pulled out")

    for step in (1, 29):
        place = lab.fresh()
        code = lab.start(place, partial(_at_step, step, fail)).end()
        problem = f"it ended with {code} and not 1" if code != 1 else None
        outcome.count(problem or lab.finish(place, says=f"resuming from step {step}"))
    return outcome


def _vanished(lab: _Lab, kills: int) -> Outcome:
    outcome = Outcome("vanished data file", "the source (named, put back) or the prepared tokens (made again)")
    hidden = lab.text.with_suffix(".hidden")
    for tokens in (False, True):
        place = lab.fresh()
        lab.start(place, partial(_at_step, 20, partial(_signal, signal.SIGKILL))).end()
        problem = None
        if tokens:
            (place / "data" / "tokens" / "train" / "tokens.bin").unlink()
        else:
            lab.text.rename(hidden)
            try:
                code = lab.start(place).end()
                told = lab.text.name in lab.log(place)
            finally:
                hidden.rename(lab.text)
            problem = None if code == 2 and told else f"a missing source ended with {code}, named: {told}"
        outcome.count(problem or lab.finish(place, says="resuming from step"))
    return outcome


# The laboratory -------------------------------------------------------------------------------------------------------


class _Lab:
    """The recipe, the weights that a training left alone ends with, and goes of other trainings."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.random, self.seconds = folder, random.Random(), 0.0
        self.text, self.recipe = folder / "text.txt", folder / "recipe.yaml"
        self._weights, self._count = b"", 0
        folder.mkdir(parents=True, exist_ok=True)
        words = random.Random(0)
        paragraphs = (" ".join(words.choices(_SENTENCE.split(), k=words.randint(8, 25))) + "." for _ in range(90))
        self.text.write_text("\n\n".join(paragraphs), encoding="utf-8")
        self.recipe.write_text(yaml.safe_dump(_RECIPE, sort_keys=False), encoding="utf-8")
        _import_all()

    def learn_reference(self) -> None:
        place, began = self.fresh(), time.perf_counter()
        code = self.start(place).end()
        self.seconds = time.perf_counter() - began
        if code != 0:
            raise FormaryError(f"the training failed before any fault ({code}): {self.log(place)[-2000:]}")
        self._weights = _weights(place)
        shutil.rmtree(place)

    def fresh(self, disk: Path | None = None) -> Path:
        """A run folder that does not exist yet."""
        self._count += 1
        return (disk or self.folder) / f"run-{self._count}"

    def start(self, place: Path, prepare: Callable[[], None] | None = None) -> _Child:
        """A go of the training in `place`, in a process in which `prepare` was called first."""

        def go() -> None:
            if prepare:
                prepare()
            run(self.recipe, folder=place, until="train", console=Console(file=sys.stdout, width=200))

        return _Child(go, self._log_of(place))

    def finish(self, place: Path, *, says: str = "") -> str | None:
        """Let the training go on undisturbed to its end: what is wrong then, or None; what is right is deleted."""
        self._log_of(place).unlink(missing_ok=True)
        code = self.start(place).end()
        if code != 0:
            return f"{place}: could not go on, exit code {code} (see {self._log_of(place)})"
        if _weights(place) != self._weights:
            return f"{place}: other weights than the undisturbed training"
        if says not in self.log(place):
            return f"{place}: went on without saying {says!r} (see {self._log_of(place)})"
        shutil.rmtree(place)
        self._log_of(place).unlink()
        return None

    def log(self, place: Path) -> str:
        """What the goes in `place` said."""
        return self._log_of(place).read_text(encoding="utf-8", errors="replace")

    def _log_of(self, place: Path) -> Path:
        return self.folder / f"{place.name}.log"


class _Child:
    """A forked process at work, its output in a file; its exit code is negative where a signal ended it."""

    def __init__(self, work: Callable[[], None], log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self._code: int | None = None
        if self.pid == 0:
            _be(work, log)

    def wait(self, seconds: float) -> int | None:
        """The exit code if it ends within so many seconds."""
        deadline = time.monotonic() + seconds
        while self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= deadline:
                return None
            else:
                time.sleep(0.002)
        return self._code

    def signal(self, number: int) -> None:
        """Send it a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> int:
        """Its exit code, once it has ended; what hangs is killed."""
        code = self.wait(_PATIENCE)
        if code is None:
            self.signal(signal.SIGKILL)
            code = self.wait(_PATIENCE)
        return -1 if code is None else code


def _be(work: Callable[[], None], log: Path) -> None:
    """The child's life; it ends here and never returns."""
    code = 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as the process lives
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        try:
            work()
            code = 0
        except FormaryError as error:
            print(error)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _import_all() -> None:
    """Import what a training needs, here and not in every child; nothing of it computes or starts a thread."""
    import torch._dynamo  # noqa: F401 - what torch's optimisers import at their first use

    import formary.data.documents
    import formary.infer.loaded
    import formary.pipeline.pretraining
    import formary.train.loop
    import formary.train.settled  # noqa: F401


def _weights(place: Path) -> bytes:
    return (place / "model" / "model.safetensors").read_bytes()


def _newest_checkpoint(place: Path) -> Path:
    return max(place.glob("checkpoints/*/step-*"))


# What happens inside a child --------------------------------------------------------------------------------------------


def _signal(number: int) -> None:
    os.kill(os.getpid(), number)


def _at_step(step: int, act: Callable[[], None]) -> None:
    """Do something when the batch of a step is wanted."""
    from formary.data.batches import Windows

    batch = Windows.batch

    def acting(self: Windows, number: int) -> Any:
        if number == step:
            act()
        return batch(self, number)

    setattr(Windows, "batch", acting)  # noqa: B010 - mypy knows no such assignment


def _at_save(number: int, act: Callable[[], None]) -> None:
    """Do something when a checkpoint is about to be written, the `number`-th of this process or a later one."""
    from formary.train import checkpoint

    save, seen = checkpoint.save, 0

    def acting(*arguments: Any) -> Path:
        nonlocal seen
        seen += 1
        if seen >= number:
            act()
        return save(*arguments)

    setattr(checkpoint, "save", acting)  # noqa: B010


def _die_in_save(number: int, write: int) -> None:
    """SIGKILL before the `write`-th flush or rename of the `number`-th checkpoint."""

    def arm() -> None:
        left = write

        def counted(call: Callable[..., None]) -> Callable[..., None]:
            def counting(*arguments: Any) -> None:
                nonlocal left
                left -= 1
                if left <= 0:
                    _signal(signal.SIGKILL)
                call(*arguments)

            return counting

        for name in ("fsync", "replace"):
            setattr(os, name, counted(getattr(os, name)))

    _at_save(number, arm)


def _fill(ballast: Path) -> None:
    """Leave no byte on the disk."""
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        for size in (2**16, 2**10, 1):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)


def _forbid_long_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))


@contextmanager
def _small_disk(place: Path) -> Iterator[Path | None]:
    """A small file system of its own, or None where this user may not mount one."""
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={_DISK}", "formary-selftest", str(place)]
    mount = shutil.which("mount")
    mounted = bool(mount) and subprocess.run([str(mount), *options], capture_output=True, check=False).returncode == 0
    try:
        yield place if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], capture_output=True, check=False)

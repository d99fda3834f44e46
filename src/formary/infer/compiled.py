"""Native code for the parts between the products of a stack in 8 bits, made once for a shape of model and kept in the user's cache.

torch's AOTInductor writes C++ from `between`'s modules and the system's compiler makes a library of it; called without
Python's guards, it costs a few microseconds. The code does not hold weights: models of one shape share it. Without a
compiler, or before `build` was asked for, the same modules run as plain torch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formary import durable
from formary.errors import FormaryError
from formary.infer import between

Call = Callable[..., Any]
_KINDS: dict[str, type[between.Part]] = {
    kind.__name__: kind for kind in (between.Enter, between.Attend, between.Project, between.Round, between.Activate)
}
_ROWS, _SEQ, _SLOTS, _KEYS, _CAPACITY = 3, 5, 4, 128, 192  # of the examples; any other numbers will do as well
_NAMES = ("rows", "seq", "slots", "keys", "capacity")
_MANY = 128  # where the loop over positions is spread over threads
_EXTRA = 24
_MOST = 2**20


class NotCompiled(FormaryError):
    """The parts could not be compiled here; they run as plain torch."""


def ready(*parts: between.Part) -> tuple[bool, list[Call]]:
    """Whether compiled code is kept for all parts, and what to call for each: that code, or the parts themselves.

    All or none, so that what a model computes does not depend on what else was compiled.
    """
    files = [_file(part) for part in parts]
    if not all(map(_trusted, files)):
        return False, list(parts)
    try:
        return True, [_loaded(file) for file in files]
    except (RuntimeError, OSError):  # damaged, or of another machine in a shared home
        for file in files:
            file.unlink(missing_ok=True)
        return False, list(parts)


def missing(*parts: between.Part) -> bool:
    """Whether `build` would have something to do."""
    return not all(_trusted(_file(part)) for part in parts)


def build(*parts: between.Part) -> None:
    """Compile the parts that are not in the cache, side by side; about a minute on two cores.

    Raises:
        NotCompiled: there is no C++ compiler, or it failed; says why.
    """
    if not compiler():
        raise NotCompiled("there is no C++ compiler: install g++ (Debian and Ubuntu: apt install g++)")
    wanted = {_file(part): part for part in parts}
    with tempfile.TemporaryDirectory(prefix="formary-compile-") as scratch:
        running = []
        for number, (file, part) in enumerate(wanted.items()):
            if not _trusted(file):
                made = Path(scratch) / f"{number}.pt2"
                running.append((file, made, _started(part, made, Path(scratch) / f"inductor-{number}")))
        try:
            for file, made, process in running:
                _, said = process.communicate()
                if process.returncode or not made.is_file():
                    last = said.strip().splitlines()[-1] if said.strip() else f"exit code {process.returncode}"
                    raise NotCompiled(f"the compiler failed: {last}")
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with durable.new_file(file) as temporary:
                    shutil.copyfile(made, temporary)
        finally:
            for _, _, process in running:
                process.kill()


def compiler() -> str | None:
    """The C++ compiler that would be used."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def cache_folder() -> Path:
    """Where compiled code is kept: $XDG_CACHE_HOME/formary/compiled, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "formary" / "compiled"


def _file(part: between.Part) -> Path:
    """Named for all that the code depends on: the part's sizes and switches, its source, torch, and the processor."""
    known = json.dumps([_description(part), _source(), torch.__version__, torch.backends.cpu.get_cpu_capability()])
    return cache_folder() / f"{type(part).__name__.lower()}-{hashlib.sha256(known.encode()).hexdigest()[:24]}.pt2"


def _trusted(file: Path) -> bool:
    """Whether a library is there and nobody else could have written it: it will be executed."""
    try:
        known = file.stat()
    except OSError:
        return False
    return known.st_uid == os.getuid() and not known.st_mode & 0o022


@cache
def _source() -> str:
    return inspect.getsource(between)


def _description(part: between.Part) -> dict[str, Any]:
    """The sizes and switches that make a part what it is."""
    return {name: value for name, value in vars(part).items() if not name.startswith("_") and name != "training"}


@cache
def _loaded(file: Path) -> Call:
    # Not torch._inductor.aoti_load_package: that imports the whole compiler, and its call takes longer than the code.
    run = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1).run

    def call(*tensors: Tensor) -> Any:
        return run(list(tensors))

    return call


def _started(part: between.Part, made: Path, scratch: Path) -> subprocess.Popen[str]:
    """A process that compiles one part to `made`: this one keeps its memory, its threads and its torch as they are."""
    wanted = json.dumps({"kind": type(part).__name__, "part": _description(part), "made": str(made)})
    return subprocess.Popen(
        [sys.executable, "-m", "formary.infer.compiled", wanted],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Code is written for threads only where there are some; how many is decided when it runs.
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(scratch), "OMP_NUM_THREADS": "2" if part.spread else "1"},
    )


def _compile(kind: str, description: dict[str, Any], made: Path) -> None:
    part = _KINDS[kind].__new__(_KINDS[kind])
    nn.Module.__init__(part)
    part.__dict__.update(description)
    tensors, shapes = _example(part)
    with torch.no_grad():
        exported = torch.export.export(part, tensors, dynamic_shapes=shapes, strict=False)
        torch._inductor.aoti_compile_and_package(
            exported,
            package_path=str(made),
            inductor_configs={"cpp.dynamic_threads": True} if part.spread else {"cpp.threads": 1},
        )


def _example(part: between.Part) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Tensors to trace a part with, and which of their sizes may change."""
    size = _MANY if part.spread else _ROWS
    rows, seq, slots, keys, capacity = (torch.export.Dim(name, min=2, max=_MOST) for name in _NAMES)
    if isinstance(part, between.Enter):
        count = 2 * (part.norm == "layer") or 1
        weights = [torch.ones(part.width) for _ in range(count + part.bias)] + _split(part.split, part.width)
        tensors = [torch.randn(size, part.width), torch.randn(part.added * size, part.width), torch.rand(size, 1)]
        return (*tensors, *weights), (
            {0: rows},
            {0: _times(part.added, rows)},
            {0: rows},
            *_varied(len(weights), split=part.split),
        )
    if isinstance(part, between.Activate):
        inner = part.inner * (2 if part.gated else 1)
        weights = [torch.zeros(inner)] if part.bias else []
        weights += _split(part.split, part.inner)
        sums = torch.randn(part.given * size, inner)
        return (sums, torch.rand(size, 1), *weights), (
            {0: _times(part.given, rows)},
            {0: rows},
            *_varied(len(weights), split=part.split),
        )
    if isinstance(part, between.Project):
        weights = [torch.zeros(part.width)] if part.bias else []
        sums = torch.randn(part.given * size, part.width)
        return (sums, torch.rand(size, 1), *weights), (
            {0: _times(part.given, rows)},
            {0: rows},
            *_varied(len(weights), split=False),
        )
    if isinstance(part, between.Round):
        weights = _split(part.split, part.width)
        return (torch.randn(size, part.width), *weights), ({0: rows}, *_varied(len(weights), split=part.split))
    assert isinstance(part, between.Attend)
    sequences, positions = _ROWS, _MANY if part.spread else _SEQ
    width, kv = part.head_width, part.kv_heads
    out = (part.heads + 2 * kv) * width
    tensors = [
        torch.randn(part.given, sequences, positions, out),
        torch.rand(sequences, positions, 1),
        torch.zeros(_SLOTS, kv, _CAPACITY, width),
        torch.zeros(_SLOTS, kv, _CAPACITY, width),
        torch.arange(sequences * positions * kv).view(sequences, positions, kv),
        part.bias_of(torch.ones(sequences, positions, _KEYS, dtype=torch.bool)),
    ]
    cache = {0: slots, 2: capacity}
    shapes: list[Any] = [{1: rows, 2: seq}, {0: rows, 1: seq}, cache, cache, {0: rows, 1: seq}]
    shapes.append({0: rows, 1: part.group * seq + part.surplus, 2: keys})
    more: list[Tensor] = []
    if part.turns:
        more += [torch.rand(sequences, positions, 1, width // 2) for _ in range(2)]
    turned = len(more)
    more += [torch.zeros(out)] if part.bias else []
    more += [torch.ones(width) for _ in range(2)] if part.eps is not None else []
    more += _split(part.split, part.heads * width)
    shapes += _varied(len(more), {0: rows, 1: seq}, of=turned, split=part.split)
    return (*tensors, *more), tuple(shapes)


def _varied(count: int, first: Any = None, *, of: int = 0, split: bool) -> list[Any]:
    """What may change of `*arguments`, as export wants it: of the first ones `first`, of a split the extra columns."""
    if not count:
        return []
    extra = torch.export.Dim("extra", min=2, max=_MOST)
    plain = count - of - (4 if split else 0)
    return [(*[first] * of, *[{}] * plain, *([{}, *[{0: extra}] * 3] if split else []))]


def _times(count: int, rows: Any) -> Any:
    return rows if count == 1 else count * rows


def _split(wanted: bool, width: int) -> list[Tensor]:
    if not wanted:
        return []
    return [torch.ones(width), torch.arange(_EXTRA), torch.ones(_EXTRA), torch.full((_EXTRA,), 2.0)]


if __name__ == "__main__":
    _wanted = json.loads(sys.argv[1])
    _compile(_wanted["kind"], _wanted["part"], Path(_wanted["made"]))

"""`formary doctor`: what this machine has, how fast it is (measured), what is missing and the command that gets it.

`examine` gathers plain values, `doctor` prints them as tables or JSON; exit code 0 means that training can start.
It installs nothing, changes nothing, and goes online for nothing. With a recipe it says what the run will need, from a
probe of its training (`pipeline.forecast`); the run's data is then prepared already.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from formary.errors import FormaryError

if TYPE_CHECKING:
    import torch

# What the processor can do that Formary's speed depends on: our name -> the flags of /proc/cpuinfo that mean it.
_FEATURES = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "VNNI": {"avx512_vnni", "avx_vnni", "asimddp"},
    "AMX": {"amx_tile"},
}
_EXTRAS = {
    "zh": "Chinese words (jieba)",
    "gguf": "read GGUF checkpoints",
    "datasets": "Hugging Face datasets folders",
    "languages": "keep only some languages (data.clean.languages)",
    "translate": "BLEU and chrF of written texts (sacrebleu)",
    "vision": "pictures (Pillow)",
    "search": "hyperparameter search (Optuna)",
    "series": "forecasts beside exponential smoothing (statsmodels)",
    "privacy": "differentially private training (Opacus)",
    "mlflow": "follow runs in MLflow",
    "wandb": "follow runs in Weights & Biases",
    "lm-eval": "the benchmarks of lm-evaluation-harness",
    "serve": "the server, and answers by a schema",
    "dev": "work on Formary itself",
}
_LEAST_DISK = 10**9  # bytes
_LEAST_MEMORY = 5 * 10**8  # bytes: torch alone takes half of it
_MEASURE_SECONDS = 0.5


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="Predict what this recipe's run will need: memory, disk and time.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a field of the recipe.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what this machine can do, and what is missing with the command that gets it.

    Takes about three seconds, one of them measuring. Exit code 0: training can start. With a recipe its data is prepared
    (the run will not do that again) and 20 steps or more of its training are tried; exit code 1: it does not fit here.
    """
    if recipe is not None:
        _foretell(recipe, set_, folder, as_json)
        return
    if set_ or folder:
        raise FormaryError("--set and --folder belong to a recipe: formary doctor RECIPE --set ...")
    found = examine()
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)
    if found["problems"]:
        raise typer.Exit(1)


def _foretell(recipe: str, overrides: list[str] | None, folder: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from formary.pipeline.forecast import foretell
    from formary.train.records import duration

    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    found = foretell(recipe, overrides=overrides or (), folder=folder, console=console)
    if as_json:
        print(json.dumps({**asdict(found), "folder": str(found.folder), "fits": found.fits}, indent=2))
    else:
        parts = found.forecast
        console.print()
        console.print(
            f"time    {duration(found.seconds)} of training: {parts.steps:,} steps of {parts.step_seconds:.3g} s, "
            f"{parts.validations:,} validations of {parts.validation_seconds:.2g} s"
        )
        console.print(
            f"memory  {_size(found.memory)} at most, of {_size(found.memory_free)} that it can have"
            + ("" if found.memory <= found.memory_free else ": lower train.micro_batch or train.batch")
        )
        console.print(
            f"disk    {_size(found.disk)} at most for {parts.checkpoints} checkpoints of {_size(parts.checkpoint_bytes)} "
            f"and the model, of {_size(found.disk_free)} free"
            + ("" if found.disk <= found.disk_free else ": lower train.keep, or name another disk with --folder")
        )
        console.print("The run's report will say how right this was.")
    if not found.fits:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything `doctor` knows, as JSON-able values; `problems` is empty when training can start."""
    problems, notes = [], []
    required, extras = _requirements()
    missing = [name for name in required if not _installed(name)]
    if missing:
        problems.append(f"not installed: {', '.join(missing)}; get them with {_install_command('formary')}")

    machine = _machine()
    if machine["disk_free_bytes"] < _LEAST_DISK:
        problems.append(
            f"the disk of {Path.cwd()} has {_size(machine['disk_free_bytes'])} free; a run needs 1 GB or more"
        )
    if machine["memory_available_bytes"] is not None and machine["memory_available_bytes"] < _LEAST_MEMORY:
        problems.append(f"only {_size(machine['memory_available_bytes'])} of memory are available; close something")
    if not os.access(Path.cwd(), os.W_OK):
        problems.append(f"{Path.cwd()} is not writable: run from a folder of your own")

    torch_build: dict[str, Any] | None = None
    speed: dict[str, float] | None = None
    if _installed("torch"):
        try:
            torch_build, speed = _torch_build(), measure()
        except (ImportError, OSError) as error:  # a broken library, or a build for another processor
            problems.append(f"torch is installed but does not start ({error}); get it with {_install_command('torch')}")
    compiler = _compiler()
    if compiler["path"] is None:
        notes.append(
            "no C++ compiler: machine.compile needs one, and int8 models write faster with one (Debian, Ubuntu: "
            "apt install g++); all else works"
        )
    elif not compiler["python_headers"]:
        notes.append("no Python.h: machine.compile needs it (Debian, Ubuntu: apt install python3-dev); all else works")
    return {
        "machine": machine,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "torch": torch_build,
        "measured": speed,
        "compiler": compiler,
        "extras": {name: _extra(name, libraries) for name, libraries in extras.items()},
        "hub": _hub(),
        "terminal": {
            "tty": sys.stdout.isatty(),
            "columns": shutil.get_terminal_size().columns,
            "encoding": sys.stdout.encoding,
        },
        "notes": notes,
        "problems": problems,
    }


# The parts of the examination -----------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "features": {},
        "cores": None,
        "logical_cores": os.cpu_count(),
        "core_limit": _core_limit(),
        "memory_bytes": None,
        "memory_available_bytes": None,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
    }
    if _installed("torch") and _installed("psutil"):
        import psutil

        from formary.infer.precision import cpu_flags
        from formary.train import machine

        flags = cpu_flags()
        memory, limit = psutil.virtual_memory(), _memory_limit()
        facts |= {
            "cpu": machine.cpu_name(),
            "features": {name: bool(flags & meaning) for name, meaning in _FEATURES.items()} if flags else {},
            "cores": machine.physical_cores(),
            "memory_bytes": min(memory.total, limit or memory.total),
            "memory_available_bytes": min(memory.available, limit or memory.available),
        }
    return facts


def _core_limit() -> float | None:
    """Cores a container may use (cgroup v2 cpu.max), None when unlimited."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _memory_limit() -> int | None:
    """Bytes a container may use (cgroup v2 memory.max), None when unlimited."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no cgroup v2, or the word "max"
        return None


def _torch_build() -> dict[str, Any]:
    import torch

    from formary.recipe.schema import Machine
    from formary.train.machine import runtime

    settled = runtime(Machine())
    return {
        "version": torch.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "mkldnn": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
        "blas": "MKL" if torch.backends.mkl.is_available() else "other",  # type: ignore[no-untyped-call]
        "threads": settled.threads,
        "device": settled.device.type,
        "precision": settled.precision,
    }


def measure(seconds: float = _MEASURE_SECONDS, *, size: int = 512, read_bytes: int = 2**28) -> dict[str, float]:
    """What the processor does, with the threads a run would use: each figure is the best of several rounds.

    Args:
        seconds: spent on each kind of product; half as long on reading memory.
        size: rows and columns of the matrices.
        read_bytes: what is read per round; far more than the processor's caches hold.

    Returns:
        `fp32_gflops`, `bf16_gflops` and, where it can be had, `int8_gflops` of a square matrix product;
        `memory_gb_per_s` of adding up an array.
    """
    import torch

    from formary.infer import kernels

    a, b = torch.randn(size, size), torch.randn(size, size)
    operations = 2 * size**3
    found = {"fp32_gflops": operations / _best_time(lambda: a @ b, seconds) / 1e9}
    a16, b16 = a.bfloat16(), b.bfloat16()
    found["bf16_gflops"] = operations / _best_time(lambda: a16 @ b16, seconds) / 1e9
    if "int8" in kernels.available():
        packed = kernels.pack(b)
        found["int8_gflops"] = operations / _best_time(lambda: kernels.product(a, packed), seconds) / 1e9
    array = torch.ones(read_bytes // 4)
    found["memory_gb_per_s"] = read_bytes / _best_time(array.sum, seconds / 2) / 1e9
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def _best_time(work: Callable[[], torch.Tensor], seconds: float) -> float:
    work()  # the first call sets up threads and buffers
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        begin = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - begin)
        if now >= end:
            return best


def _compiler() -> dict[str, Any]:
    """The C++ compiler that torch.compile would find, and whether Python's headers are there for it."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return {"path": found, "python_headers": headers.is_file()}


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """The libraries Formary always needs, and those of each extra, as its package metadata lists them."""
    required: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("formary") or []:
        match = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        if match is None:
            continue
        if extra:
            extras.setdefault(extra[1], []).append(match[0])
        else:
            required.append(match[0])
    return required, extras


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _extra(name: str, libraries: list[str]) -> dict[str, Any]:
    missing = [library for library in libraries if not _installed(library)]
    command = _install_command(f"formary[{name}]") if missing else None
    return {"for": _EXTRAS.get(name, ""), "installed": not missing, "missing": missing, "command": command}


def _install_command(what: str) -> str:
    quoted = f'"{what}"' if "[" in what else what
    if importlib.util.find_spec("pip") is None:  # as in environments that uv makes
        return f"uv pip install --python {sys.executable} {quoted}"
    return f"{sys.executable} -m pip install {quoted}"


def _hub() -> dict[str, Any]:
    if not _installed("huggingface_hub"):
        return {"offline": None, "cache": None, "endpoint": None}
    from huggingface_hub import constants

    return {
        "offline": bool(constants.HF_HUB_OFFLINE),
        "cache": constants.HF_HUB_CACHE,
        "endpoint": constants.ENDPOINT,
    }


# Printing -------------------------------------------------------------------------------------------------------------


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)

    def section(title: str, rows: list[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True, min_width=14)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row("  " + name, escape(value))
        console.print(f"[bold]{title}[/bold]")
        console.print(table)
        console.print()

    section("Machine", _machine_rows(found))
    section("Software", _software_rows(found))
    extras = found["extras"]
    section("Extras", [(name, f"{_yes(extra['installed']):<5}{extra['for']}") for name, extra in extras.items()])
    for extra in extras.values():
        if extra["command"]:  # outside the table, so that a narrow terminal does not cut what is to be copied
            console.print(f"  {escape(extra['command'])}")
    if any(extra["command"] for extra in extras.values()):
        console.print()
    for note in found["notes"]:
        console.print(f"note: {escape(note)}")
    for problem in found["problems"]:
        console.print(f"[red]missing:[/red] {escape(problem)}")
    if not found["problems"]:
        console.print("[green]Training can start:[/green] formary run demo, or formary init YOUR_DATA")


def _machine_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    machine, speed = found["machine"], found["measured"]
    cores = f"{machine['cores'] or machine['logical_cores']} ({machine['logical_cores']} logical)"
    if machine["core_limit"]:
        cores += f", this container may use {machine['core_limit']:g}"
    rows = [("system", machine["system"]), ("processor", machine["cpu"]), ("cores", cores)]
    if machine["features"]:
        rows.append(("features", "  ".join(f"{name} {_yes(has)}" for name, has in machine["features"].items())))
    if machine["memory_bytes"]:
        rows.append(
            ("memory", f"{_size(machine['memory_bytes'])}, {_size(machine['memory_available_bytes'])} available")
        )
    rows.append(("disk", f"{_size(machine['disk_free_bytes'])} free in {Path.cwd()}"))
    if speed:
        kinds = {"fp32_gflops": "float32", "bf16_gflops": "bfloat16", "int8_gflops": "int8"}
        products = ", ".join(f"{speed[key]:,.0f} {kind}" for key, kind in kinds.items() if key in speed)
        rows.append(("measured", f"GFLOP/s {products}"))
        rows.append(("", f"{speed['memory_gb_per_s']:,.1f} GB/s read from memory"))
    return rows


def _software_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    python, build, compiler, hub = found["python"], found["torch"], found["compiler"], found["hub"]
    rows = [("python", f"{python['version']}  {python['executable']}")]
    if build is None:
        rows.append(("torch", "not usable, see below"))
    else:
        rows.append(("torch", f"{build['version']}, BLAS: {build['blas']}, oneDNN: {_yes(build['mkldnn'])}"))
        rows.append(("a run uses", f"{build['threads']} threads, {build['precision']} on {build['cuda'] or 'the CPU'}"))
    rows.append(("C++ compiler", compiler["path"] or "none (for machine.compile and faster int8)"))
    if hub["offline"] is not None:
        state = "offline (HF_HUB_OFFLINE is set)" if hub["offline"] else f"online allowed, {hub['endpoint']}"
        rows.append(("model hub", f"{state}; files kept in {hub['cache']}"))
    terminal = found["terminal"]
    kind = "yes" if terminal["tty"] else "no (progress is printed as plain lines)"
    rows.append(("terminal", f"{kind}, {terminal['columns']} columns, {terminal['encoding']}"))
    return rows


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.3g} MB"

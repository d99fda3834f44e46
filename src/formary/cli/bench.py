"""`formary bench`: how fast a model runs on this machine, in a table that says how much its figures vary.

What is measured, and how, is `infer.bench`'s; here are the options and the words.
"""

from __future__ import annotations

import json as json_format
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from formary.cli.compiling import compile_steps
from formary.errors import FormaryError

if TYPE_CHECKING:
    from rich.table import Table

    from formary.infer.bench import Figure, Workload
    from formary.infer.loaded import Model

_NOISY = 0.1  # a spread beyond this is worth a word
_BUSY = 0.3  # others' load, in processors, beyond which figures are too low


def bench(
    model: Annotated[str, typer.Argument(help="A model folder, a GGUF file, or a hub id.")],
    threads: Annotated[int | None, typer.Option(min=1, help="The processor's cores when left out.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompts that are written on from.")] = 32,
    new: Annotated[int, typer.Option(min=1, help="Tokens written for each.")] = 96,
    batch: Annotated[str, typer.Option(metavar="N,N", help="How many are written at once.")] = "1,8",
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt whose reading is timed.")] = 512,
    texts: Annotated[int, typer.Option(min=1, help="Texts of mixed length that an encoder answers.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="How often all of it is measured; kernels take turns.")] = 3,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Native code for int8 models: made once, then kept.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure writing, reading and memory of a model here: tokens per second, or texts per second of an encoder."""
    batches = _numbers(batch)
    load_before = _load_average()
    import torch
    from rich.console import Console

    from formary.infer.bench import Workload, networks_of, read_bandwidth
    from formary.infer.bench import measure as measured
    from formary.infer.loaded import load
    from formary.train.machine import physical_cores

    torch.set_num_threads(threads or physical_cores())
    loaded = load(model)
    asked = Workload(prompt=prompt, new=new, batches=batches, prefill=prefill, texts=texts, rounds=rounds)
    workload = asked.fitting(loaded)
    console = Console(stderr=json, highlight=False, soft_wrap=True)
    bandwidth = read_bandwidth()
    networks = networks_of(loaded)
    if compile and "int8" in networks:
        compile_steps(networks["int8"], console.print)
    with console.status("") as status:
        figures = measured(
            loaded, networks, workload, bandwidth=bandwidth, told=lambda what: status.update(f"{what} ...")
        )
    facts = _facts(loaded, model, networks, bandwidth)
    notes = _notes(figures, asked, workload, load_before)
    if json:
        values = [
            {
                name: getattr(figure, name)
                for name in ("kernel", "measure", "unit", "median", "values", "bandwidth_share")
            }
            for figure in figures
        ]
        print(json_format.dumps({**facts, "figures": values, "notes": notes}, ensure_ascii=False))
        return
    _print(console, figures, facts, workload, notes)


def _print(console: Any, figures: list[Figure], facts: dict[str, Any], workload: Workload, notes: list[str]) -> None:
    console.print(
        f"{facts['model']}: {facts['parameters']:,} weights\n"
        f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, formary {facts['formary']}",
        markup=False,
    )
    console.print(_table(figures, facts))
    console.print(
        f"Medians of {workload.rounds} rounds, in brackets the least and the most. Memory gives "
        f"{facts['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s: writing one text at 100 % of it would read the weights "
        f"at that speed.\nThis process took {facts['peak_memory_bytes'] / 1e6:,.0f} MB at most.",
        markup=False,
    )
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False)


def _table(figures: list[Figure], facts: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for kernel in facts["kernels"]:
        table.add_column(kernel)
    found = {(figure.measure, figure.kernel): figure for figure in figures}
    for measure in dict.fromkeys(figure.measure for figure in figures):
        of_kernels = [found[measure, kernel] for kernel in facts["kernels"]]
        table.add_row(f"{measure}, {of_kernels[0].unit}", *map(_cell, of_kernels))
        if of_kernels[0].bandwidth_share is not None:
            shares = [f"{figure.bandwidth_share:.0%}" for figure in of_kernels]
            table.add_row("  of what memory gives", *shares)
    table.add_row(
        "weights read for a token, MB", *[f"{one['bytes_per_token'] / 1e6:,.0f}" for one in facts["kernels"].values()]
    )
    return table


def _cell(figure: Figure) -> str:
    return f"{_number(figure.median)} ({_number(min(figure.values))} to {_number(max(figure.values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _facts(model: Model, name: str, networks: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    from formary.infer.kernels import weight_bytes
    from formary.model.topologies import parameter_count
    from formary.train.machine import cpu_name

    return {
        "model": name,
        "parameters": parameter_count(model.network),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "formary": version("formary"),
        "bandwidth_bytes_per_s": bandwidth,
        "peak_memory_bytes": _peak_memory(),
        "kernels": {kernel: {"bytes_per_token": weight_bytes(network)} for kernel, network in networks.items()},
    }


def _notes(figures: list[Figure], asked: Workload, done: Workload, load_before: float) -> list[str]:
    """What a reader must know to trust the figures, or not."""
    notes = []
    writes = any(figure.measure.startswith("writing") for figure in figures)
    for name, what in (("prompt", "prompts"), ("new", "answers"), ("prefill", "the prompt that is read")):
        if writes and getattr(done, name) < getattr(asked, name):
            notes.append(
                f"{what} shortened from {getattr(asked, name)} to {getattr(done, name)} tokens to fit the context"
            )
    if load_before > _BUSY:
        notes.append(f"the machine was busy with other work (load {load_before:.1f}): expect more when it is quiet")
    worst = max(figures, key=lambda figure: figure.spread)
    if worst.spread > _NOISY:
        notes.append(
            f"noisy: '{worst.measure}' ({worst.kernel}) varied by {worst.spread:.0%} between rounds; "
            "differences smaller than that mean nothing. More --rounds help, a quiet machine more"
        )
    if done.rounds == 1:
        notes.append("a single round says nothing about noise; --rounds 3 does")
    return notes


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise FormaryError(f"--batch {text}: expected whole numbers of at least 1 with commas, e.g. --batch 1,8")
    return tuple(dict.fromkeys(numbers))


def _load_average() -> float:
    """Processors at work in the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _peak_memory() -> int:
    """The most bytes this process has held; what it holds now where the system does not say."""
    try:
        import resource
    except ImportError:
        import psutil

        return int(psutil.Process().memory_info().rss)
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

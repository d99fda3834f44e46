"""`formary selftest --faults`: whether trainings on this disk survive what disks, kernels and people do to them.

It prints what was tried and what survived; exit code 1 if anything was lost. The faults are `pipeline.faults`.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from formary.errors import FormaryError


def selftest(
    faults: Annotated[bool, typer.Option("--faults", help="Kill, starve and damage small trainings.")] = False,
    folder: Annotated[
        Path, typer.Option(help="Where to work: a folder on the disk in question; what is made there is deleted.")
    ] = Path("."),
    kills: Annotated[int, typer.Option(min=2, help="How many kill -9 to try, half of them inside a save.")] = 20,
) -> None:
    """Try on your own disk whether a training can be lost; takes about a second for every kill.

    A small training is killed, ended, starved of disk, its checkpoints are damaged and its data taken away. Each time it goes
    on, and its final weights are compared, byte for byte, with those of a training that was left alone.
    """
    if not faults:
        raise FormaryError("name what to test: formary selftest --faults")
    from rich.console import Console
    from rich.table import Table

    from formary.pipeline.faults import inject

    if not folder.is_dir():
        raise FormaryError(f"{folder}: is no folder; name one on the disk in question with --folder")
    console = Console(soft_wrap=True, highlight=False)
    try:
        place = Path(tempfile.mkdtemp(prefix="formary-selftest-", dir=folder))
    except OSError as error:
        raise FormaryError(f"{folder}: cannot be written ({error.strerror}); name another with --folder") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was mounted and written goes, too
    began = time.perf_counter()
    console.print(f"faults on the disk of {folder.resolve()}, {kills} kills:", markup=False)
    try:
        outcomes = inject(place, kills=kills, console=console)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    lost = any(outcome.lost for outcome in outcomes)
    if not lost:
        shutil.rmtree(place, ignore_errors=True)
    table = Table("fault", "how", "tried", "survived", "", box=None, pad_edge=False)
    for outcome in outcomes:
        verdict = "[red]LOST[/red]" if outcome.lost else "nothing lost"
        table.add_row(outcome.fault, outcome.how, str(outcome.tried), str(outcome.survived), verdict)
    console.print()
    console.print(table)
    tried, survived = sum(o.tried for o in outcomes), sum(o.survived for o in outcomes)
    console.print(f"{survived} of {tried} ended with the weights of the undisturbed training, to the last byte", end="")
    console.print(f" ({time.perf_counter() - began:.0f} s)")
    if lost:
        console.print(f"what was lost lies in {place}", markup=False)
        raise typer.Exit(1)

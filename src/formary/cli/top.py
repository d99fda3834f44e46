"""The command top: a live view of one run, or of all in a folder, drawn with braille dots.

It only reads what runs write anyway, so it can be started and left at any time, on the machine or over ssh.
"""

from __future__ import annotations

import json as json_format
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from formary.errors import FormaryError

if TYPE_CHECKING:
    from formary.pipeline.watching import Status

Point = tuple[float, float]

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille cell: four rows, two columns
_BLOCKS = "▁▂▃▄▅▆▇█"
_RUNS = 20  # in the table
_SAMPLE = 600  # characters


def top(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of runs.")] = Path("runs"),
    once: Annotated[
        bool, typer.Option("--once", help="Show it once and end, as when the output is not a terminal.")
    ] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.2, help="How often to look.")] = 1.0,
    json: Annotated[bool, typer.Option("--json", help="Print what is known as JSON and end.")] = False,
) -> None:
    """Watch runs live: loss curves, rate, time left, memory, the last validation and sample. Ctrl-C ends the watching only."""
    from formary.pipeline.watching import Watcher, runs_in

    watchers: dict[Path, Watcher] = {}

    def look() -> list[Status]:
        paths = runs_in(run)
        for path in paths:
            watchers.setdefault(path, Watcher(path))
        return [watchers[path].look() for path in paths[:_RUNS]]

    found = look()
    if not found:
        what = "there is no such folder" if not run.exists() else "this is no run folder and holds none"
        raise FormaryError(f"{run}: {what}; `formary run RECIPE` makes one in runs/")
    console = Console()
    if json:
        print(json_format.dumps([summary(status) for status in found], ensure_ascii=False))
        return
    if once or not console.is_terminal:
        console.print(view(found, console.width, 40))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(view(found, console.width, console.height), refresh=True)
                time.sleep(every)
                found = look() or found
    except KeyboardInterrupt:
        console.print(view(found, console.width, 40))


def summary(status: Status) -> dict[str, Any]:
    """What is known of a run, JSON-able."""
    best = status.best
    return {
        "folder": str(status.folder),
        "name": status.name,
        "task": status.task,
        "state": status.state,
        "step": status.step,
        "total_steps": status.total,
        "loss": status.last("loss"),
        "validation_loss": status.last("validation_loss"),
        "best_validation_loss": best["validation_loss"] if best else None,
        "best_step": best["step"] if best else None,
        "tokens_per_second": status.last("tokens_per_second"),
        "unit": status.unit,
        "seconds_left": status.seconds_left,
        "memory": status.memory,
        "epsilon": status.last("epsilon"),
        "skipped_steps": status.skipped,
        "sample": status.sample,
    }


def view(found: Sequence[Status], width: int, height: int) -> RenderableType:
    """One run in full, several as a table."""
    return _one(found[0], width, height) if len(found) == 1 else _several(found, width)


def _several(found: Sequence[Status], width: int) -> RenderableType:
    table, wide = Table(box=None, pad_edge=False), width >= 110
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for heading in ("step", "loss", "validation", *(("speed", "left", "memory") if wide else ("left",))):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("loss so far", no_wrap=True)
    for status in found:
        rate, left = status.last("tokens_per_second"), _time(status.seconds_left)
        speed = (f"{rate:,.0f} {status.unit}/s" if rate is not None else "", left, _bytes(status.memory))
        table.add_row(
            Text(status.name, style="bold"),
            Text(status.state, style=_colour(status.state)),
            _steps(status) if wide else _steps(status).replace(" of ", "/"),
            _number(status.last("loss")),
            _number(status.last("validation_loss")),
            *(speed if wide else (left,)),
            Text(sparkline([y for _, y in status.curve("loss")], 16 if wide else 10), style="cyan"),
        )
    return table


def _one(status: Status, width: int, height: int) -> RenderableType:
    from formary.pipeline.progress import share_bar

    width = max(40, min(width, 120))
    head = Text.assemble((status.name, "bold"), f"  {status.task}  ", (status.state, _colour(status.state)))
    parts: list[RenderableType] = [head, Text(str(status.folder), style="dim")]
    rate, epsilon = status.last("tokens_per_second"), status.last("epsilon")
    facts = [f"step {_steps(status)}"]
    facts += [f"{rate:,.0f} {status.unit}/s"] if rate is not None else []
    facts += [f"{_time(status.seconds_left)} left"] if status.seconds_left is not None else []
    facts += [f"{_bytes(status.memory)} of memory"] if status.memory is not None else []
    facts += [f"epsilon {epsilon:.2f} spent"] if epsilon is not None else []
    facts += [f"{status.skipped} steps skipped"] if status.skipped else []
    if status.total:
        parts.append(Text(share_bar(status.step / status.total, min(width, 60)), style="cyan"))
    parts.append(Text("   ".join(facts)))
    training, validation = status.curve("loss"), status.curve("validation_loss")
    if training or validation:
        rows = max(6, min(14, height - 14))
        parts += ["", plot([("training", training, "cyan"), ("validation", validation, "yellow")], width, rows)]
    per_second = f"{status.unit}/s"
    for name, title in (("tokens_per_second", per_second), ("grad_norm", "gradient norm"), ("lr", "learning rate")):
        values = [y for _, y in status.curve(name)]
        if len(values) > 1:
            line = sparkline(values, max(10, width - 34))
            parts.append(Text.assemble(f"{title:<14}", (line, "cyan"), f"  {_number(values[-1])}"))
    if status.validation:
        parts += ["", Text(f"last validation: {_measured(status.validation[-1])}")]
        best = status.best
        if best and best["step"] != status.validation[-1]["step"]:
            parts.append(Text(f"best:            {_measured(best)}"))
    if status.sample:
        parts += ["", Text("it writes:", style="dim"), Text(status.sample[:_SAMPLE])]
    return Group(*parts)


def plot(curves: Sequence[tuple[str, Sequence[Point], str]], width: int, rows: int) -> Text:
    """Curves over the step in braille dots, with the range of both axes; a later curve is drawn over an earlier one."""
    curves = [(name, [p for p in points if math.isfinite(p[1])], colour) for name, points, colour in curves]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return Text("")
    xs = [x for _, points, _ in curves for x, _ in points]
    ys = [y for _, points, _ in curves for _, y in points]
    low, high = min(ys), max(ys)
    left = max(len(_number(low)), len(_number(high))) + 1
    columns = max(10, width - left - 2)
    cells = [[0] * columns for _ in range(rows)]
    colours = [[""] * columns for _ in range(rows)]
    across, down = 2 * columns - 1, 4 * rows - 1
    x_low, x_span = min(xs), (max(xs) - min(xs)) or 1.0

    def mark(x: int, y: int, colour: str) -> None:
        cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
        colours[y // 4][x // 2] = colour

    for _, points, colour in curves:
        places = [
            (round((x - x_low) / x_span * across), round((high - y) / ((high - low) or 1.0) * down)) for x, y in points
        ]
        mark(*places[0], colour)
        for (x0, y0), (x1, y1) in pairwise(places):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            for part in range(1, steps + 1):
                mark(round(x0 + (x1 - x0) * part / steps), round(y0 + (y1 - y0) * part / steps), colour)
    drawn = Text()
    for name, _, colour in curves:
        drawn.append(f"{'':{left}}" if not drawn else "   ").append(f"⣀ {name} loss", style=colour)
    for number, (row, row_colours) in enumerate(zip(cells, colours)):
        label = _number(high) if number == 0 else _number(low) if number == rows - 1 else ""
        drawn.append(f"\n{label:>{left - 1}} ", style="dim")
        for cell, colour in zip(row, row_colours):
            drawn.append(chr(0x2800 + cell), style=colour or None)
    ends = f"{x_low:,.0f}", f"{max(xs):,.0f}"
    drawn.append(f"\n{'':{left}}{ends[0]}{ends[1]:>{columns - len(ends[0])}}", style="dim")
    return drawn


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as a line of blocks of rising height, at most `width` of them; neighbours are averaged where there are more."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    chunks = [finite[i * len(finite) // count : (i + 1) * len(finite) // count] for i in range(count)]
    means = [sum(chunk) / len(chunk) for chunk in chunks]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BLOCKS[min(7, int((mean - low) / span * 8))] for mean in means)


def _measured(record: Any) -> str:
    said = [f"step {record['step']:,}", f"loss {_number(record['validation_loss'])}"]
    for name, value in record.items():
        if name.startswith("validation_") and name not in ("validation_loss", "validation_seconds"):
            said.append(f"{name.removeprefix('validation_').replace('_', ' ')} {_number(value)}")
    return ", ".join(said)


def _steps(status: Status) -> str:
    if status.total is None:
        return f"{status.step:,}"
    return f"{status.step:,} of {status.total:,}"


def _number(value: Any) -> str:
    return "" if not isinstance(value, (int, float)) else f"{value:.4g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _colour(state: str) -> str:
    return {"finished": "green", "stopped": "red", "not begun": "dim"}.get(state, "yellow")

"""How right a forecast of a run was, told after it: forecast.json beside measured.json, which the train stage leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formary import durable
from formary.pipeline.context import Context

FORECAST, MEASURED = "forecast.json", "measured.json"


def measured_training(context: Context, seconds: float) -> None:
    """Leave what the training that has just ended took: seconds of all its goes, and memory at its highest."""
    from formary.train.forecast import peak_memory
    from formary.train.machine import runtime

    checkpoints = sum(file.stat().st_size for file in (context.folder / "checkpoints").rglob("*") if file.is_file())
    found = {"seconds": seconds, "memory": peak_memory(runtime(context.recipe.machine)), "checkpoints": checkpoints}
    durable.write_json(context.folder / MEASURED, {"key": context.keys["train"], **found})


def compared(folder: Path, key: str) -> dict[str, Any]:
    """What was foretold of the training of this key and what it took: {} where either is not known."""
    foretold, measured = durable.read_json(folder / FORECAST), durable.read_json(folder / MEASURED)
    if foretold.get("key") != key or measured.get("key") != key:
        return {}
    return {
        "seconds": [foretold["seconds"], measured["seconds"]],
        "memory": [foretold["memory"], measured["memory"]],
    }


def said(found: Mapping[str, Any]) -> str:
    """The comparison as a sentence."""
    from formary.train.records import duration

    def off(pair: Sequence[float]) -> str:
        share = pair[1] / pair[0] - 1
        return f"{abs(share):.0%} {'more' if share > 0 else 'less'}"

    (seconds, took), (memory, held) = found["seconds"], found["memory"]
    return (
        f"formary doctor had foretold {duration(seconds)} of training and {memory / 1e9:.2g} GB of memory; it took "
        f"{duration(took)} ({off((seconds, took))}) and {held / 1e9:.2g} GB ({off((memory, held))})."
    )

"""Rows and answers of labelled tasks as lines for the eye: in a report, and at the command line.

What a row asks is told by the task's own columns; what an answer says, by what is in it. Nothing here is read back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from formary.evaluate.detections import SURE
from formary.tasks.protocol import LabelledTask

Row = Mapping[str, Any]

_SAID = (
    "label",
    "labels",
    "value",
    "answer",
    "choice",
    "text",
    "tags",
    "items",
)  # what an answer may hold, the first counts
_LONGEST = 500  # characters of a row or an answer


def asked(task: LabelledTask, row: Row, *, longest: int = _LONGEST) -> str:
    """What a row asks, in one line: its text, its words, the last turn of its conversation."""
    if hasattr(task, "worded"):  # a row that is no text
        return shortened(task.worded(row), longest)
    if hasattr(task, "pair"):  # a conversation
        return shortened(str(task.pair(row)["source"]), longest)
    parts: list[str] = []
    for name in task.asks:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, str) or not isinstance(value, Sequence):
            told = str(value)
        else:
            told = (" " if name == "tokens" else " / ").join(map(str, value))
        parts.append(told if not parts or name == "context" else f"{name}: {told}")
    share = max(40, longest // max(1, len(parts)))
    return " · ".join(shortened(part, share if len(parts) > 1 else longest) for part in parts)


def told(row: Row, answer: Mapping[str, Any]) -> str:
    """What an answer says: labels, a number, an answer, a text, words as word/TAG; "" where it is none of these."""
    name = next((name for name in _SAID if name in answer), None)
    if "boxes" in answer:
        return ", ".join(_box(box) for box in answer["boxes"] if box["score"] >= SURE) or "nothing"
    if name is None:
        if "forecasts" in answer:
            return "; ".join(map(_forecast, answer["forecasts"]))
        if "preferred" in answer:
            return f"{answer['preferred']} (by {abs(answer['margin']):.3f})"
        if "image" in answer:
            return "a picture"
        if "similarity" in answer:
            return f"similarity {answer['similarity']:.3f} to: {row['text']}"
        vector = next((given for name, given in answer.items() if name.endswith("vector")), None)
        return "" if vector is None else f"a vector of {len(vector):,} numbers"
    said = answer[name]
    if name == "items":
        return ", ".join(str(entry["item"]) for entry in said)
    if name == "tags":
        words = answer.get("tokens", row.get("tokens"))
        return " ".join(f"{word}/{tag}" for word, tag in zip(words, said)) if words else ", ".join(said)
    if isinstance(said, list):
        return ", ".join(map(str, said))
    return f"{said:.4g}" if isinstance(said, float) else str(said)


def forecast_lines(answer: Mapping[str, Any]) -> list[str]:
    """An answer of forecasts as a table: a step a line, with the widest interval that the model gives."""
    lines: list[str] = []
    for forecast in answer["forecasts"]:
        levels = list(forecast.get("quantiles") or {})
        edges = [levels[0], levels[-1]] if len(levels) > 1 else []
        if not lines:
            lines.append("\t".join(["series", "column", "time", "forecast", *(f"quantile {level}" for level in edges)]))
        for n, (time, point) in enumerate(zip(forecast["time"], forecast["point"])):
            numbers = [point, *(forecast["quantiles"][level][n] for level in edges)]
            lines.append("\t".join([answer["series"] or "-", forecast["column"], time, *(f"{x:.6g}" for x in numbers)]))
    return lines


def _box(box: Mapping[str, Any]) -> str:
    x, y, width, height = (round(number) for number in box["box"])
    return f"{box['label']} {box['score']:.2f} at ({x}, {y}), {width} x {height}"


def _forecast(forecast: Mapping[str, Any]) -> str:
    point = forecast["point"]
    first, last = f"{point[0]:.4g} at {forecast['time'][0]}", f"{point[-1]:.4g} at {forecast['time'][-1]}"
    return f"{forecast['column']} {first}" + (f" to {last}" if len(point) > 1 else "")


def sample(task: LabelledTask, row: Row, answer: Mapping[str, Any]) -> dict[str, Any]:
    """A row and its answer as a sample of the report."""
    said = shortened(told(row, answer)) or "(nothing)"
    sure = f" ({answer['probability']:.0%})" if isinstance(answer.get("probability"), float) else ""
    pictures = {"image": task.thumbnail(row)} if hasattr(task, "thumbnail") and row.get("image") else {}
    pictures |= {"made": answer["image"]} if "image" in answer else {}
    return {"prompt": asked(task, row), "text": f" → {said}{sure}", "settings": {}} | pictures


def shortened(text: str, longest: int = _LONGEST) -> str:
    """On one line, and no longer than that many characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"

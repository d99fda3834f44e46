"""From a table of numbers and names to a commented recipe: a series to forecast, or rows to tell a label from.

Tables with a column of text are not looked at here; `guess_rows` is for those. A guess is a start, to be edited.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Any

from formary.recipe.commented import Choice, Lines, percent, rounded
from formary.recipe.guess import Guess
from formary.recipe.sample import Sample, describe, files_of, names_of, text_length
from formary.recipe.sizes import REACHED

Rows = Sequence[Mapping[str, Any]]

_TIME_NAMES = (
    "time",
    "timestamp",
    "datetime",
    "date",
    "ds",
    "day",
    "week",
    "month",
    "quarter",
    "year",
    "日期",
    "时间",
    "月份",
    "年份",
)
_TIME = re.compile(r"[12]\d{3}(?:[-/.]\d{1,2}(?:[-/.]\d{1,2}(?:[T ]\d{1,2}:\d{2}.*)?)?|[ -]?[Qq][1-4])?")
_VALUE_NAMES = ("value", "y", "target", "close", "price", "demand", "sales", "load", "数值", "销量", "价格")
_SERIES_NAMES = (
    "series",
    "series_id",
    "unique_id",
    "id",
    "store",
    "item",
    "symbol",
    "ticker",
    "station",
    "city",
    "name",
    "region",
)
_LABEL_NAMES = (
    "label", "class", "category", "target", "y", "status", "outcome", "default", "income", "churn", "survived", "species",
    "diagnosis", "result", "approved", "fraud", "risk", "标签", "类别", "结果", "状态",
)  # fmt: skip
_TEXT_NAMES = ("text", "content", "body", "review", "message", "comment", "question", "文本", "内容", "评论")
_EVENTS = ({"user", "item"}, {"user_id", "item_id"}, {"user_id", "movie_id"})  # columns of rows that are no series
_EMPTY = ("", "na", "n/a", "nan", "null", "none", "?", "-")
_MOST_LABELS = 20
_FEWEST_ROWS = 30
_STEPS = (  # up to so many days: season in steps, its name, horizon, patch
    (2 / 24, 24, "a day", 24, 24),
    (1.5, 7, "a week", 14, 7),
    (8, 52, "a year", 13, 4),
    (32, 12, "a year", 12, 6),
    (95, 4, "a year", 4, 4),
    (1e9, 1, "", 5, 4),
)


def guess_table(sample: Sample, *, name: str, task: str | None, gflops: float) -> Guess | None:
    """Guess a recipe for a table without texts; None where it seems to be something else."""
    rows = sample.rows
    columns = names_of(rows[:100])
    plain = all(isinstance(value, str | int | float | None) for row in rows[:200] for value in row.values())
    worded = any(text_length(rows[:500], column) or column.lower() in _TEXT_NAMES for column in columns)
    if len(rows) < _FEWEST_ROWS or not plain or worded or any(e <= {c.lower() for c in columns} for e in _EVENTS):
        return None
    if task in (None, "forecast") and (time := _time_of(rows, columns)):
        found = _series(sample, columns, time, name, gflops)
        if found or task == "forecast":
            return found
    if task in (None, "classify_row") and (label := _label_of(rows, columns)):
        return _rows(sample, columns, label, name, gflops)
    return None


# A series --------------------------------------------------------------------------------------------------------------


def _series(sample: Sample, columns: list[str], time: Choice, name: str, gflops: float) -> Guess | None:
    rows = sample.rows
    read = re.findall(r"\{(\w+)\}", time.value) or [time.value]
    numbers = [column for column in columns if column not in read and _are_numbers(rows, column)]
    words = [column for column in columns if column not in read and column not in numbers]
    moments = [_moment(_filled(time.value, row)) for row in rows]
    series = None
    if len(set(moments)) < len(moments):
        ids = [c for wanted in _SERIES_NAMES for c in [*words, *numbers] if c.lower() == wanted] or words
        series = next(
            (c for c in ids if len({(m, str(r.get(c))) for m, r in zip(moments, rows)}) == len(moments)), None
        )
        if series is None:
            return None
    values = [column for column in numbers if column != series]
    usual = [column for wanted in _VALUE_NAMES for column in values if column.lower() == wanted]
    if not values:
        return None
    ordered = sorted(set(moments))
    gap = median(later - earlier for earlier, later in pairwise(ordered))
    if not 0.2 <= (ordered[-1] - ordered[0]) / (gap or 1) / (len(ordered) - 1) <= 5:
        return None
    season, spoken, horizon, patch = next(found[1:] for found in _STEPS if gap <= found[0])
    season = max(1, round(1 / gap)) if gap < 1 / 24 - 1e-9 else season
    count = round(len(ordered) / sample.share)
    horizon = season if gap < 1 / 24 - 1e-9 else horizon
    room = max(2 * patch, int(0.7 * count) // 3 // patch * patch)
    context = min(room, max(7 * season if season > 1 else 32, 4 * patch))
    epochs = max(3, min(60, round(60_000 / max(1, count * (1 if usual else len(values))))))
    wanted = usual[:1] or (values if len(values) == 1 else [])
    mapped = {"time": time.value} | ({"series": series} if series else {}) | ({"value": wanted[0]} if wanted else {})
    lines = _begun(sample, name, "forecast", "rows have a time and numbers, in regular steps")
    if changed := {ours: theirs for ours, theirs in mapped.items() if ours != theirs}:
        lines.add(1, "columns", changed, "our names: yours; " + time.why)
    lines.section("split", 1)
    lines.add(2, "validation", 0.15, "share of the time, after training")
    lines.add(2, "test", 0.2, "the last share of the time")
    lines.section("model")
    lines.add(1, "preset", "series-mini", "reads stretches of a series, one column at a time")
    lines.add(1, "size", "2x64", "layers x width; small, as series are")
    lines.add(1, "switches", {"patch_size": patch, "dropout": 0.2}, "steps in a stretch; some forgetting")
    lines.section("train")
    lines.add(1, "epochs", epochs, "passes over the windows of the training part")
    lines.add(1, "batch", 64, "windows per step")
    lines.add(1, "context", context, "steps of history that it sees" + (f", whole times {spoken}" if spoken else ""))
    lines.add(1, "validate_every", 50, "steps; the best weights are kept")
    lines.section("objective", 1)
    lines.add(2, "horizon", horizon, "steps that are forecast at once")
    lines.add(2, "season", season, "steps after which it repeats itself" + (f": {spoken}" if spoken else ""))
    if season > 1:
        lines.add(2, "anchor", "season", "what is learned is the difference from the season before")
    if not wanted:
        lines.add(2, "values", values, "the columns to forecast; move what is known of the future to `known`")
    _optimiser(lines)
    why = f"{time.value} holds times, about {rounded(count)} steps" + (f" for each {series}" if series else "")
    parameters = 2 * 12 * 64**2 + 64 * 13 * (context + horizon)
    tokens = (context + horizon) / patch * count * 0.65 * epochs
    seconds = 6 * parameters * tokens / (gflops * 1e9 * REACHED) + 10
    saw = (f"{files_of(sample)}", why, "numbers: " + ", ".join(values), "task forecast: a time and numbers, no text")
    return Guess(lines.text(), "forecast", saw, parameters, seconds)


def _time_of(rows: Rows, columns: list[str]) -> Choice | None:
    """The column of times, or a template of two."""
    lower = {column.lower(): column for column in columns}
    if "year" in lower and "quarter" in lower:
        return Choice(f"{{{lower['year']}}}Q{{{lower['quarter']}}}", "times from two columns")
    if "year" in lower and "month" in lower and _are_numbers(rows, lower["month"]):
        return Choice(f"{{{lower['year']}}}-{{{lower['month']}}}", "times from two columns")
    named = [lower[name] for name in _TIME_NAMES if name in lower]
    others = [column for column in columns if column not in named and not _are_numbers(rows, column)]
    for column in [*named, *others]:
        values = [str(row.get(column)).strip() for row in rows[:500]]
        if sum(bool(_TIME.fullmatch(value)) for value in values) > 0.95 * len(values) and len(set(values)) > 2:
            return Choice(column, "times")
    return None


def _filled(template: str, row: Mapping[str, Any]) -> str:
    if "{" not in template:
        return str(row.get(template))
    return re.sub(r"\{(\w+)\}", lambda part: str(row.get(part[1])).removesuffix(".0"), template)


def _moment(text: str) -> float:
    """Days since a beginning, roughly; what is not read counts as 0."""
    parts = [int(part) for part in re.findall(r"\d+", text)[:6]]
    if re.search(r"[Qq]", text) and len(parts) > 1:
        parts = [parts[0], 3 * parts[1] - 2]
    try:
        whole = datetime(*[*parts, *[1, 1][max(0, len(parts) - 1) :]][:6]) if parts else datetime(1970, 1, 1)  # type: ignore[arg-type]
    except ValueError:
        return 0.0
    return (whole - datetime(1970, 1, 1)).total_seconds() / 86_400


# Rows with a label -----------------------------------------------------------------------------------------------------


def _rows(sample: Sample, columns: list[str], label: str, name: str, gflops: float) -> Guess:
    rows = sample.rows
    count = round(len(rows) / sample.share)
    epochs = max(3, min(30, round(100_000 / max(1, count))))
    batch = 64 if count < 50_000 else 256
    lines = _begun(sample, name, "classify_row", f"{label} is what to tell from the other columns")
    if label != "label":
        lines.add(1, "columns", {"label": label}, "our name: yours")
    lines.section("split", 1)
    for part, share in (("validation", 0.1), ("test", 0.2)):
        lines.add(
            2, part, 0.0 if getattr(sample, part) else share, "share of the rows; a row stays where it is as data grows"
        )
    lines.section("model")
    lines.add(1, "preset", "table-mini", "each cell is a token, numbers and names alike")
    lines.add(1, "size", "2x64", "layers x width")
    lines.add(1, "switches", {"dropout": 0.2}, "rows are few, so some forgetting helps")
    lines.section("train")
    lines.add(1, "epochs", epochs, "passes over the rows")
    lines.add(1, "batch", batch, "rows per step")
    lines.add(
        1, "validate_every", max(10, round(0.7 * count / batch)), "steps, about a pass; the best weights are kept"
    )
    lines.add(1, "patience", 6, "stop after so many validations without a better one")
    _optimiser(lines)
    parameters = 2 * 12 * 64**2 + 64 * 3 * len(columns)
    seconds = 6 * parameters * len(columns) * count * 0.7 * epochs / (gflops * 1e9 * REACHED) + 10
    told = ", ".join(describe(rows, column) for column in columns)
    lines_of = [f"{files_of(sample)}, about {rounded(count)} rows", "columns: " + told]
    saw = (
        *lines_of,
        f"task classify_row: {describe(rows, label)} is what to tell from numbers and names; no column is text",
    )
    return Guess(lines.text(), "classify_row", saw, parameters, seconds)


def _label_of(rows: Rows, columns: list[str]) -> str | None:
    """The column that is clearly the label: by its name, with few different values."""
    lower = {column.lower(): column for column in columns}
    for name in _LABEL_NAMES:
        if name in lower and len(columns) > 1:
            values = [str(row.get(lower[name])).strip() for row in rows]
            if 2 <= len({value for value in values if value.lower() not in _EMPTY}) <= _MOST_LABELS:
                return lower[name]
    return None


# What both share -------------------------------------------------------------------------------------------------------


def _begun(sample: Sample, name: str, task: str, why: str) -> Lines:
    lines = Lines()
    lines.comment(f"{name}: written by `formary init` after a look at {percent(sample.share)} of the data.")
    lines.comment("Every value is a guess with its reason beside it. `formary run` executes it as it stands.")
    lines.add(0, "name", name, "names the run folder, runs/" + name)
    lines.add(0, "task", task, why)
    lines.section("data")
    lines.add(1, "sources", list(sample.sources), files_of(sample))
    for part in ("validation", "test"):
        if task != "forecast" and getattr(sample, part):
            lines.add(1, part, list(getattr(sample, part)), "lies beside it under a name that says so")
    if sample.encoding != "utf-8":
        lines.add(1, "encoding", sample.encoding, "the file is not UTF-8")
    return lines


def _optimiser(lines: Lines) -> None:
    lines.section("optimiser", 1)
    lines.add(2, "lr", 0.001, "peak rate, for a model from scratch")
    lines.section("schedule", 1)
    lines.add(2, "warmup", 0.1, "share of the run")
    lines.add(2, "final", 0.0, "to nothing")


def _are_numbers(rows: Rows, column: str) -> bool:
    given = [row.get(column) for row in rows]
    values = [str(value) for value in given if value is not None and str(value).strip().lower() not in _EMPTY]
    return bool(values) and all(_is_number(value) for value in values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

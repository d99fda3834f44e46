"""From events (who took what, when) to a commented recipe that recommends the next item.

Columns are known by their usual names and by their values: users and items come again, times do not stand still. Where one
of the three is missing, or a text is the point of the rows, it passes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from formary.recipe.commented import Lines, duration, percent, rounded
from formary.recipe.guess import Guess
from formary.recipe.sample import Sample, describe, files_of, names_of
from formary.recipe.sizes import REACHED

USERS = (
    "user", "user_id", "userid", "uid", "customer", "customer_id", "customerid", "client_id", "visitor_id", "visitorid",
    "member_id", "session", "session_id", "learner", "learner_id", "student", "student_id", "reviewerid", "用户", "用户id",
)  # fmt: skip
ITEMS = (
    "item", "item_id", "itemid", "product", "product_id", "productid", "sku", "asin", "isbn", "book_id", "movie_id", "movieid",
    "track_id", "song_id", "artist_id", "video_id", "article_id", "news_id", "course_id", "question_id", "answer", "page",
    "商品", "商品id", "物品",
)  # fmt: skip
TIMES = (
    "time", "timestamp", "date", "datetime", "event_time", "created_at", "unixreviewtime", "ts", "when", "minute", "时间", "日期",
)  # fmt: skip
_LONGEST, _SHORTEST = 200, 20  # items that are read of a history
_WIDTHS = ((200_000, 64), (5_000_000, 128), (None, 256))  # events up to which a model of this width pays
_EPOCHS = ((20_000, 150), (200_000, 100), (5_000_000, 20), (None, 5))


def guess_events(sample: Sample, *, name: str, gflops: float) -> Guess | None:
    """A recipe for task next_item; None where the rows seem to be no events."""
    columns = _columns(sample.rows)
    if columns is None:
        return None
    events = max(1, round(len(sample.rows) / sample.share))
    users, items = (Counter(str(row.get(columns[ours])) for row in sample.rows) for ours in ("user", "item"))
    lengths = sorted(users.values())
    usual = lengths[int(0.9 * (len(lengths) - 1))] / (sample.share if len(sample.rows) > 3 * len(users) else 1.0)
    context = int(min(_LONGEST, max(_SHORTEST, -(-usual // 10) * 10)))
    width = next(width for limit, width in _WIDTHS if limit is None or events < limit)
    epochs = next(epochs for limit, epochs in _EPOCHS if limit is None or events < limit)
    parameters = width * (len(items) + context) + 2 * 6 * width**2
    seconds = 6 * parameters * events * epochs / (gflops * 1e9 * REACHED)
    why = f"each row is one event: {columns['user']}, {columns['item']} and {columns['time']}"
    lines = Lines()
    lines.comment(f"{name}: written by `formary init` after a look at {percent(sample.share)} of the data.")
    lines.comment("Every value is a guess with its reason beside it. `formary run` executes it as it stands.")
    lines.add(0, "name", name, "names the run folder, runs/" + name)
    lines.add(0, "task", "next_item", why)
    lines.section("data")
    lines.add(1, "sources", list(sample.sources), f"{files_of(sample)}, about {rounded(events)} events")
    mapped = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    if mapped:
        lines.add(1, "columns", mapped, "our names: yours")
    if sample.encoding != "utf-8":
        lines.add(1, "encoding", sample.encoding, "the file is not UTF-8")
    lines.comment(
        "Each user's last item is test, the one before it validation. Texts of items, with which new ones can be", 1
    )
    lines.comment(
        "recommended: items: {sources: [...], columns: {item: ..., text: ...}, vectors: a model of task embed}", 1
    )
    lines.section("model")
    lines.add(1, "preset", "sasrec-mini", "reads histories from left to right; bert4rec-mini reads them both ways")
    lines.add(1, "size", f"2x{width}", f"layers x width, for about {rounded(events)} events")
    lines.add(1, "switches", {"dropout": 0.3}, "users are few, so some forgetting helps")
    lines.section("train")
    lines.add(1, "epochs", epochs, f"passes over the events; roughly {duration(seconds)} here")
    lines.add(1, "batch", 64, "users per step, with histories of like length")
    lines.add(
        1,
        "context",
        context,
        "items of a history that are read, the newest; enough for 9 of 10 users"
        if context >= usual
        else "items of a history that are read, the newest",
    )
    repeats = len(sample.rows) - len(
        {(str(row.get(columns["user"])), str(row.get(columns["item"]))) for row in sample.rows}
    )
    if repeats > 0.05 * len(sample.rows):
        lines.add(
            1,
            "objective",
            {"exclude_seen": False},
            f"{percent(repeats / len(sample.rows))} of the events are of an item the user had before",
        )
    lines.section("optimiser", 1)
    lines.add(2, "lr", 0.001, "peak rate")
    lines.section("schedule", 1)
    lines.add(2, "warmup", 0.05, "share of the run")
    lines.add(2, "final", 0.0, "to nothing")
    steps = max(1, round(len(users) / sample.share * epochs / 64))
    lines.add(1, "validate_every", max(10, steps // 20), "steps; the best weights are kept")
    lines.add(1, "best", "metric", "by NDCG@10 on the validation items")
    saw = [f"{files_of(sample)}, about {rounded(events)} rows"]
    saw.append("columns: " + ", ".join(describe(sample.rows, column) for column in names_of(sample.rows[:100])))
    saw.append(f"task next_item: {why}; {len(users):,} users and {len(items):,} items in what was looked at")
    return Guess(lines.text(), "next_item", tuple(saw), parameters, seconds)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """Ours: theirs, where there are users, items and times, and users come again."""
    by_lower = {name.lower().replace(" ", "_"): name for name in names_of(rows[:20])}
    found = {
        ours: next((by_lower[name] for name in names if name in by_lower), None)
        for ours, names in (("user", USERS), ("item", ITEMS), ("time", TIMES))
    }
    columns = {ours: theirs for ours, theirs in found.items() if theirs is not None}
    if len(columns) < 3 or len({str(row.get(columns["user"])) for row in rows}) > 0.8 * len(rows):
        return None
    return columns

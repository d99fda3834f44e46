"""Where a row belongs: train, validation or test.

By hash, a row's place depends only on itself (or its group), so adding rows moves none; by order, on its place in the file.
Rows alike up to case and white space hash alike, so copies stay together. Folds are dealt out when all rows are known, so
that labels are spread evenly; which rows are test, they leave as it is. This file decides; `documents` writes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import xxhash

from formary.data.duplicates import exact_key
from formary.data.records import Part, Row
from formary.errors import DataError
from formary.recipe import schema

PARTS: tuple[Part, ...] = ("train", "validation", "test")


def assign(row: Row, split: schema.Split) -> Part:
    """The part of one row under a hash split.

    The hash of the salt and the row's folded text (or its group) is a number u in [0, 1): test below split.test,
    validation below split.test + split.validation, train above. A row whose group is null stands alone.

    Raises:
        DataError: the group column is missing.
    """
    share = unit_of(row, split) / 2**64
    if share < split.test:
        return "test"
    if share < split.test + split.validation:
        return "validation"
    return "train"


def by_order(
    rows: Iterable[Row], total: int, split: schema.Split, *, unit: Literal["rows", "chars"]
) -> Iterator[tuple[Part, Row]]:
    """Divide rows in their own order: train first, then validation, then test; with folds, validation is one of K pieces.

    Args:
        rows: all rows, in order.
        total: how many rows, or characters of text, there are.
        split: the shares.
        unit: "rows" keeps rows whole; "chars" cuts the text itself, as nanoGPT cuts one long text 90/10.
    """
    pieces = _pieces(total, split)
    at = 0
    for row in rows:
        if unit == "rows":
            yield next(part for part, _, end in pieces if at < end), row
            at += 1
            continue
        text = row.values["text"]
        for part, *edges in pieces:
            start, end = (min(max(edge - at, 0), len(text)) for edge in edges)
            if start < end:
                whole = start == 0 and end == len(text)
                piece = row if whole else Row({**row.values, "text": text[start:end]}, row.origin)
                yield part, piece
        at += len(text)


def cuts(total: int, split: schema.Split) -> tuple[int, int]:
    """Where train ends and where validation ends, of `total` rows or characters."""
    return int(total * (1 - split.validation - split.test)), int(total * (1 - split.test))


def _pieces(total: int, split: schema.Split) -> list[tuple[Part, int, int]]:
    """Consecutive pieces of `total` rows or characters: part, start, end."""
    first, second = cuts(total, split)
    if split.folds is None or split.fold is None:
        return [("train", 0, first), ("validation", first, second), ("test", second, total)]
    start, end = second * (split.fold - 1) // split.folds, second * split.fold // split.folds
    return [("train", 0, start), ("validation", start, end), ("train", end, second), ("test", second, total)]


def dealt(rows: Iterable[tuple[int, Sequence[str]]], folds: int) -> list[int]:
    """The fold of each row, from 1; a unit stays whole, and each label is spread over the folds as evenly as that allows.

    Units are dealt out one by one, large ones first and equal ones by their hash, each to the fold that has the least of
    its labels so far, and of several such to the smallest.

    Args:
        rows: the unit of each (see `unit_of`) and its labels, if it has any.

    Raises:
        DataError: there are fewer units than folds.
    """
    order: list[int] = []
    labels: defaultdict[int, Counter[str]] = defaultdict(Counter)
    sizes: Counter[int] = Counter()
    totals: Counter[str] = Counter()
    for unit, names in rows:
        order.append(unit)
        sizes[unit] += 1
        totals.update(names)
        if names:
            labels[unit].update(names)
    if len(sizes) < folds:
        raise DataError(
            f"data.split.folds: {folds} folds of {len(sizes):,} rows (or groups) that are not test; at most as many "
            "folds as rows are possible"
        )
    held: list[Counter[str]] = [Counter() for _ in range(folds)]
    filled = [0] * folds
    fold_of: dict[int, int] = {}
    for unit in sorted(sizes, key=lambda unit: (-sizes[unit], unit)):
        counts = labels.get(unit, Counter())
        crowding = [
            (sum(count * held[fold][name] / totals[name] for name, count in counts.items()), filled[fold], fold)
            for fold in range(folds)
        ]
        fold_of[unit] = chosen = min(crowding)[2]
        held[chosen].update(counts)
        filled[chosen] += sizes[unit]
    return [fold_of[unit] + 1 for unit in order]


def unit_of(row: Row, split: schema.Split) -> int:
    """The hash of what a row stays together with: its group, or the copies of its text."""
    salt = split.salt.encode()
    if split.group is not None:
        if split.group not in row.values:
            raise DataError(
                f"{row.origin}: column '{split.group}', which data.split.group names, is missing; this row has columns "
                f"{', '.join(map(str, row.values))}. Map another name with data.columns.{split.group}"
            )
        group = row.values[split.group]
        if group is not None:
            return xxhash.xxh3_64_intdigest(salt + b"\0group\0" + str(group).encode("utf-8", "surrogatepass"))
    if row.key is None:
        row.key = exact_key(row.text)
    return xxhash.xxh3_64_intdigest(salt + b"\0row\0" + row.key.to_bytes(8, "big"))

"""Where a row belongs: train, validation or test.

By hash, a row's place depends only on itself (or its group), so adding rows moves none; by order, on its place in the file.
Rows alike up to case and white space hash alike, so copies stay together. This file decides; `documents` writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import xxhash

from formary.data.duplicates import exact_key
from formary.data.records import Row
from formary.errors import DataError
from formary.recipe import schema

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


def assign(row: Row, split: schema.Split) -> Part:
    """The part of one row under a hash split.

    The hash of the salt and the row's folded text (or its group) is a number u in [0, 1): test below split.test,
    validation below split.test + split.validation, train above. A row whose group is null stands alone.

    Raises:
        DataError: the group column is missing.
    """
    share = _hash(row, split) / 2**64
    if share < split.test:
        return "test"
    if share < split.test + split.validation:
        return "validation"
    return "train"


def by_order(
    rows: Iterable[Row], total: int, split: schema.Split, *, unit: Literal["rows", "chars"]
) -> Iterator[tuple[Part, Row]]:
    """Divide rows in their own order: train first, then validation, then test.

    Args:
        rows: all rows, in order.
        total: how many rows, or characters of text, there are.
        split: the shares.
        unit: "rows" keeps rows whole; "chars" cuts the text itself, as nanoGPT cuts one long text 90/10.
    """
    ends = cuts(total, split)
    at = 0
    for row in rows:
        if unit == "rows":
            yield _part_at(at, ends), row
            at += 1
            continue
        text = row.values["text"]
        edges = [0, *(min(max(end - at, 0), len(text)) for end in ends), len(text)]
        for part, start, end in zip(PARTS, edges, edges[1:]):
            if start < end:
                whole = start == 0 and end == len(text)
                piece = row if whole else Row({**row.values, "text": text[start:end]}, row.origin)
                yield part, piece
        at += len(text)


def cuts(total: int, split: schema.Split) -> tuple[int, int]:
    """Where train ends and where validation ends, of `total` rows or characters."""
    return int(total * (1 - split.validation - split.test)), int(total * (1 - split.test))


def _part_at(position: int, ends: tuple[int, int]) -> Part:
    if position < ends[0]:
        return "train"
    return "validation" if position < ends[1] else "test"


def _hash(row: Row, split: schema.Split) -> int:
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

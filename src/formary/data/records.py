"""What the rows of a task hold: the columns it needs, and the text that stands for a row.

Cleaning, duplicates and the split look at one text per row. For most tasks that is the column `text`; rows of other
shapes (tokens and tags, questions with contexts, conversations) say how theirs is composed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RowForm:
    """The form of a task's rows.

    Args:
        columns: which every row must have.
        text: composes a row's text where it is not the column `text`. It is written into that column, for duplicates,
            leakage and the eye; all other columns stay as they are.
    """

    columns: tuple[str, ...] = ("text",)
    text: Callable[[Mapping[str, Any]], str] | None = None

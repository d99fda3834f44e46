"""What a row is, and what the rows of a task hold: the columns they need and the text that stands for one.

Cleaning, duplicates and the split look at one text per row. For most tasks that is the column `text`; for rows of other
shapes (tokens and tags, questions with contexts, conversations) it is composed of their columns and never written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from formary.recipe.schema import Split

Part = Literal["train", "validation", "test"]


@dataclass(slots=True)
class Row:
    """One row: its values by column name and where it came from ("data/a.jsonl line 17").

    Args:
        values: as read from the file.
        origin: the file and the place in it.
        key: the hash of its folded text, once asked for.
        composed: the text that stands for it where that is not its column `text`.
    """

    values: dict[str, Any]
    origin: str
    key: int | None = None
    composed: str | None = None

    @property
    def text(self) -> str:
        """The text by which the row is counted, judged and compared."""
        text: str = self.values["text"] if self.composed is None else self.composed
        return text


Gathering = Generator[tuple[Part, Row], None, Sequence[str] | None]


@dataclass(frozen=True)
class RowForm:
    """The form of a task's rows.

    Args:
        columns: which every row must have, what is learned last.
        text: composes a row's text where it is not the column `text`. Rows are dropped or kept by it and compared by it;
            it changes nothing in them.
        beside: columns that belong to the text where a row has them, such as the second text of a pair: rows of the same
            text are no duplicates when these differ.
        files: columns that hold files, such as pictures: in rows a path counts from the file that names it, and becomes
            absolute; others may not send paths.
        unreadable: why a row cannot be read at all, given its values, or None: it is then left out, named and counted.
        telling: columns without which a row is another task's: it is left out and counted, not refused.
        alike: whether rows of nearly the same text are nearly the same rows; not where the text only names a picture or such.
        gather: makes the task's rows of many that were read (the events of a user, the points of a series) and says to which
            part each belongs: from rows and the split of the recipe, or None where all are of one part, whose name then
            does not matter. `columns` are those of the rows read. What it returns in the end are sentences for the story.
        check: refuses (DataError) a row whose answer cannot be learned, given its values and its place in the file.
    """

    columns: tuple[str, ...] = ("text",)
    text: Callable[[Mapping[str, Any]], str] | None = None
    beside: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    unreadable: Callable[[Mapping[str, Any]], str | None] | None = None
    telling: tuple[str, ...] = ()
    alike: bool = True
    gather: Callable[[Iterator[Row], Split | None], Gathering] | None = None
    check: Callable[[Mapping[str, Any], str], object] | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """The columns without which a row is refused."""
        return tuple(name for name in self.columns if name not in self.telling)

    def compared(self, values: Mapping[str, Any], text: str) -> str:
        """What two rows are duplicates by: the text, and what stands beside it."""
        others = [str(values[name]) for name in self.beside if values.get(name) is not None]
        return "\n".join([text, *others])

    @property
    def one_text(self) -> bool:
        """Whether a row is a text and nothing else."""
        return self.text is None and self.columns == ("text",)

    @property
    def answers(self) -> tuple[str, ...]:
        """The columns in which two rows of the same text may differ."""
        aside = self.files if self.text is not None else ("text",)
        return tuple(name for name in self.columns if name not in aside)

    def with_text(self, row: Row) -> Row:
        """The row, given its composed text; one from which none can be composed stands for itself, its task refuses it."""
        if self.text is not None:
            try:
                row.composed = self.text(row.values)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                row.composed = json.dumps(row.values, ensure_ascii=False, default=str)
        return row

    def checked(self, row: Row) -> Row:
        """The row, if its task can learn from it.

        Raises:
            DataError: it cannot; the message names the place in the file.
        """
        if self.check is not None and all(name in row.values for name in self.telling):
            self.check(row.values, row.origin)
        return row


def label_names(value: Any) -> list[str]:
    """A label, or labels, as names: numbers without a needless .0, truth values as true and false."""
    if isinstance(value, list | tuple | set):
        return [name for part in value for name in label_names(part)]
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, float) and value.is_integer():
        return [str(int(value))]
    return [str(value)]

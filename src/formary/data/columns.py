"""How the columns of a file become ours: one by its name, or several written into one text by a template.

A template is what people write anyway, "Age {Age}, income {Income}": each name in braces is replaced by the row's value.
"{Comedy?} {Drama?}" is for columns of yes and no: a name with a question mark is written itself where the value is yes, unless
a column is called so, mark and all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from formary.errors import DataError, RecipeError, nearest

UNKNOWN = "unknown"
"""What a template writes for a missing value."""

_NO = ("", "0", "0.0", "false", "no", "n", "f", "none", "na", "n/a", "nan", "null")
_MISSING = ("", "na", "n/a", "nan", "null")
_PART = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|([{}])")


def is_template(theirs: str) -> bool:
    """Whether an entry of data.columns is a text with columns in it, not the name of one."""
    return "{" in theirs


def columns_in(template: str, ours: str) -> list[str]:
    """The names in a template's braces, in order, those with a question mark as they stand.

    Raises:
        RecipeError: a brace stands alone, or no column is named.
    """
    parts = list(_PART.finditer(template))
    if lonely := next((part for part in parts if part[2]), None):
        raise RecipeError(
            f"data.columns.{ours}: the {lonely[2]} at character {lonely.start() + 1} has no partner; a column is written "
            "{its name}, a brace itself {{ or }}"
        )
    found = list(dict.fromkeys(part[1] for part in parts if part[1]))
    if not found:
        raise RecipeError(f"data.columns.{ours}: {template!r:.60} names no column; write one as {{its name}}")
    return found


def column_of(name: str, values: Mapping[str, Any]) -> str:
    """The column that a name in braces stands for: that of the name, else the one that it asks a yes or no of."""
    return name if name in values else name.removesuffix("?")


def filled(template: str, values: Mapping[str, Any], *, ours: str, origin: str) -> str:
    """The text that a template makes of a row; missing values (empty, NA, NaN, null) are said to be unknown.

    Raises:
        DataError: the row has no such column; the row is called `origin`.
    """
    named = columns_in(template, ours)
    flags = {name: column for name in named if (column := column_of(name, values)) != name}
    for name in (flags.get(name, name) for name in named):
        if name not in values:
            hint = nearest(name, values)
            raise DataError(
                f"{origin}: column '{name}' is missing (data.columns.{ours} names it){'; ' + hint if hint else ''}; this "
                f"row has {', '.join(map(str, values)) or 'no columns'}"
            )

    def written(part: re.Match[str]) -> str:
        if not part[1]:
            return part[0][0]
        if part[1] in flags:
            name = flags[part[1]]
            return name if str(values[name]).strip().lower() not in _NO else ""
        return _said(values[part[1]])

    text = _PART.sub(written, template)
    return " ".join(text.split()) if flags else text  # where the answer is no, a gap is left


def _said(value: Any) -> str:
    if isinstance(value, float):
        if math.isnan(value):
            return UNKNOWN
        return str(int(value)) if value.is_integer() else f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value)) or UNKNOWN
    said = " ".join(str(value).split()) if value is not None else ""
    return UNKNOWN if said.lower() in _MISSING else said

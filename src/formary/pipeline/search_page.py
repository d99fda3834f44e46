"""search.html: the trials of a hyperparameter search as one page in the report's style, the best first."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from formary.pipeline.page import framed
from formary.recipe.space import plain


def page_of(name: str, summary: Mapping[str, Any], *, lower_is_better: bool) -> str:
    """The page of a search's summary, as `pipeline.search` makes it."""
    fields = list(summary["settings"])
    sign = 1 if lower_is_better else -1

    def place(trial: Mapping[str, Any]) -> tuple[bool, float, int]:
        value = trial["value"]
        return value is None, 0.0 if value is None else sign * value, trial["trial"]

    rows = []
    for trial in sorted(summary["trials"], key=place):
        cells = [
            str(trial["trial"]),
            "" if trial["value"] is None else f"{trial['value']:.4f}",
            *(plain(trial["settings"].get(field, "")) for field in fields),
            f"{trial['seconds']:.0f} s" if "seconds" in trial else "",
            trial.get("error", trial["state"]),
        ]
        rows.append((cells, trial["trial"] == summary["trial"]))
    title = f"{summary['metric']} {summary['value']:.4f}, the best of {len(rows)} trials"
    parts = [f"<h2>The trials, the best first</h2>{_table(['trial', summary['metric'], *fields, 'time', ''], rows)}"]
    if summary["importance"]:
        shares = [([field, f"{share:.0%}"], False) for field, share in summary["importance"].items()]
        parts.append(f"<h2>Share of the variance among these trials</h2>{_table(['field', 'share'], shares)}")
    parts.append("".join(f'<p class="small">{escape(note)}</p>' for note in summary["notes"]))
    sections = "".join(f"<section>{part}</section>" for part in parts)
    eyebrow = f'<p class="eyebrow">{escape(name)} · search</p>'
    header = f"<header>{eyebrow}<h1>{escape(title[0].upper() + title[1:])}</h1></header>"
    return framed(f"{escape(name)}: {escape(title)}", f"{header}\n<main>{sections}</main>")


def _table(head: list[str], rows: list[tuple[list[str], bool]]) -> str:
    """A table; rows marked true are in the model's colour."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        ('<tr class="ours">' if marked else "<tr>") + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells, marked in rows
    )
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'

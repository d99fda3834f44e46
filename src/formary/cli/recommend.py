"""The command that recommends: from a history of items to those a user may take next, the likeliest first."""

from __future__ import annotations

import json as json_format
import sys
from typing import Annotated, Any

import typer

from formary.errors import FormaryError


def recommend(
    model: Annotated[str, typer.Argument(help="A model folder of task next_item.")],
    history: Annotated[
        str,
        typer.Option(help="What the user took before, the last one newest: a,b,c, a JSON list, or nothing."),
    ] = "",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many items.")] = 10,
    with_seen: Annotated[bool, typer.Option("--with-seen", help="Recommend items of the history too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")] = False,
) -> None:
    """Recommend items to a user with this history; an empty one is somebody new."""
    from formary.infer.loaded import load

    loaded = load(model)
    if loaded.task.answers != "ranking":
        raise FormaryError(f"{model}: is for task {loaded.task.name}, which recommends nothing; use formary predict")
    options: dict[str, Any] = {"k": k} | ({"exclude_seen": False} if with_seen else {})
    (answer,) = loaded.predict([{"history": history}], **options)
    if json:
        print(json_format.dumps(answer, ensure_ascii=False))
        return
    if unknown := answer.get("unknown"):
        print(f"note: unknown to the model, and not read: {', '.join(unknown)}", file=sys.stderr)
    for place, entry in enumerate(answer["items"], 1):
        print(f"{place}\t{entry['item']}\t{entry['score']:.4f}")

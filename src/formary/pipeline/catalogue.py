"""What is known of the items that rows name: their texts read once, turned into vectors by a model, kept in the run folder.

A task with items of its own (`vocabulary`, `describe`) takes them in; what vectors are good for is the task's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from formary import durable
from formary.pipeline.context import Context

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ITEMS = "items.jsonl"
"""A row for each item with its text, also in the folder of a model that recommends."""

_VECTORS = "vectors.safetensors"


def write_catalogue(context: Context) -> None:
    """Read `data.items`, and let its model turn every text into a vector.

    Raises:
        DataError: a row has no item or no text. RecipeError: the model is not there, or gives no vectors.
    """
    import numpy as np
    from safetensors.numpy import save_file

    from formary.data.events import name_of
    from formary.data.source import read
    from formary.errors import RecipeError
    from formary.infer.loaded import load
    from formary.pipeline.answering import answered
    from formary.tasks.reading import text_of
    from formary.train.machine import runtime

    asked = context.recipe.data.items
    assert asked is not None
    texts: dict[str, str] = {}
    other: list[str] = []
    for row in read(asked.sources, columns=asked.columns, required=("item", "text"), base=context.base):
        item = name_of(row.values["item"], "item", row.origin)
        text = text_of(row.values, "text", row.origin)
        if texts.setdefault(item, text) != text:
            other.append(f"{item} at {row.origin}")
    if other:
        context.console.print(
            f"  note: {len(other):,} rows give an item another text than an earlier row did, which stays: "
            + ", ".join(other[:3])
        )
    place = context.located(asked.vectors)
    if place is None and asked.vectors.startswith("recipe:"):
        name = asked.vectors.removeprefix("recipe:")
        raise RecipeError(f"data.items.vectors: the model of recipe {name} is not there yet: formary run {name}")
    model = load(place or asked.vectors)
    if model.task.answers != "vectors":
        raise RecipeError(f"data.items.vectors: {asked.vectors} is for task {model.task.name} and gives no vectors")
    settled = runtime(context.recipe.machine)
    model.network.to(settled.device)
    rows = [{"text": text} for text in texts.values()]
    answers, notes = answered(model, rows, precision=settled.autocast, console=context.console, targets=False)
    for note in notes:
        context.console.print(f"  note: {note}")
    vectors = np.array([answer["vector"] for answer in answers], dtype=np.float32)
    lines = (json.dumps({"item": item, "text": text}, ensure_ascii=False) for item, text in texts.items())
    with durable.new_folder(context.catalogue) as folder:
        durable.write_text(folder / ITEMS, "".join(line + "\n" for line in lines))
        save_file({"vectors": vectors}, folder / _VECTORS, metadata={"model": asked.vectors})
    context.console.print(f"  {len(texts):,} items, each a vector of {vectors.shape[1]} numbers by {asked.vectors}")


def catalogue_rows(context: Context) -> list[dict[str, Any]]:
    """{"item", "text"} of every item that is described; [] where the recipe describes none."""
    if context.recipe.data.items is None:
        return []
    return [json.loads(line) for line in (context.catalogue / ITEMS).read_text(encoding="utf-8").splitlines()]


def catalogue_vectors(context: Context) -> NDArray[np.float32]:
    """(items, width) of the rows, in their order."""
    from safetensors.numpy import load_file

    return load_file(context.catalogue / _VECTORS)["vectors"]

"""The items that a model can be asked about: their names, and their texts where its folder has them, to be found by a word.

Read once for each model; only the page asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

from formary.infer.loaded import Model
from formary.pipeline.catalogue import ITEMS
from formary.tasks.next_item import SPECIAL

_SHOWN = 20


class Catalogue:
    """The items of a model of task next_item, those that were taken most first."""

    def __init__(self, model: Model) -> None:
        ordered = sorted(model.tokenizer.vocab.items(), key=lambda pair: pair[1])
        names = [name for name, _ in ordered if name not in SPECIAL.values()]
        self.texts = _texts(model)
        self.names = dict.fromkeys(names)
        self._folded = [(name, f"{name}\n{self.texts.get(name, '')}".casefold()) for name in names]

    def find(self, words: str) -> list[dict[str, Any]]:
        """Items whose name or text holds all the words; one of exactly that name comes first."""
        wanted = words.casefold().split()
        fitting = (name for name, folded in self._folded if all(word in folded for word in wanted))
        exact = [words.strip()] if words.strip() in self.names else []
        return self.told([*dict.fromkeys([*exact, *islice(fitting, _SHOWN)])][:_SHOWN])

    def told(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Items by name, with their texts."""
        return [{"item": name, "text": self.texts.get(name, "")} for name in names if name in self.names]


def _texts(model: Model) -> dict[str, str]:
    path = model.folder / ITEMS if model.folder is not None else None
    if path is None or not path.is_file():
        return {}
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {row["item"]: row["text"] for row in rows}

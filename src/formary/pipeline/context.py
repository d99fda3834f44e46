"""What every stage of a run is given: the recipe, the run folder and where its things lie in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from formary.recipe.bundled import located
from formary.recipe.schema import Recipe
from formary.train.processes import ALONE, Processes

if TYPE_CHECKING:
    from formary.data.shards import TokenShards
    from formary.train.loop import Watch
    from formary.train.state import Progress

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Context:
    """What a stage is given: the recipe, where its paths count from, the run folder, and where to speak."""

    recipe: Recipe
    called: tuple[str, ...]  # the recipe and options as the user gave them, for the commands we suggest
    base: Path
    folder: Path
    console: Console
    keys: dict[str, str]  # stage -> hash of everything its result depends on
    times: dict[str, float]  # stage -> seconds it took
    watch: Watch | None = None  # is told of every validation, and may stop the training
    processes: Processes = ALONE  # this one among those of the run
    data: Mapping[str, str] = field(default_factory=dict)  # hashes of the data files by path
    allow_changed: bool = False  # go on with what a training on other data or of another recipe has learned
    trainer: Callable[..., Progress] | None = None  # in place of `train.loop.train`, with its arguments and `remade`

    @property
    def documents(self) -> Path:
        return self.folder / "data" / "documents"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "data" / "tokenizer"

    @property
    def catalogue(self) -> Path:
        return self.folder / "data" / "items"

    def tokens(self, split: str) -> Path:
        return self.folder / "data" / "tokens" / split

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def located(self, reference: str) -> Path | None:
        """A path the recipe names; None where there is none (a hub id)."""
        return existing(reference, self.base)

    def rows_of(self, split: str) -> list[dict[str, Any]]:
        """The rows of a split."""
        return rows_in(self.folder, split)

    def rows(self, split: str) -> int:
        """Documents in a split, as the data story counted them."""
        story = json.loads((self.documents / "story.json").read_text(encoding="utf-8"))
        return int(story["splits"][split]["rows"])


def rows_in(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a split of the run in `folder`."""
    from formary.data.documents import read_documents

    return [row.values for row in read_documents(folder / "data" / "documents" / f"{split}.jsonl")]


def existing(reference: str, base: Path) -> Path | None:
    """A path that a recipe in `base` names, from there or from the current folder; None where neither has it."""
    return next((path for path in (located(reference, base), Path(reference)) if path.exists()), None)


def open_tokens(context: Context, split: str) -> TokenShards:
    """The token shards of a split."""
    from formary.data.shards import TokenShards

    return TokenShards.open(context.tokens(split))

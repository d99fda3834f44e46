"""Pictures written pixel by pixel, each in one of a few colours: image GPT (Chen et al. 2020), told a label where there is one.

Colours and labels are tokens of a vocabulary of their own, so the model is the decoder that writes texts, and half a picture
is a prompt like any other. How likely a model finds real pictures is what it is measured by.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from formary.data.images import data_uri
from formary.data.palette import Palette
from formary.data.records import RowForm, label_names
from formary.data.tokenizer import Tokenizer, names_as_tokens
from formary.errors import DataError, RecipeError, nearest
from formary.model.config import ModelConfig, Topology
from formary.model.heads import LanguageHead
from formary.model.topologies import Decoder, Network
from formary.recipe.schema import Recipe
from formary.tasks.cross_entropy import cross_entropy, token_losses
from formary.tasks.models import scratch_config
from formary.tasks.pictures import PictureReader, named, thumbnail, unreadable
from formary.tasks.protocol import Answer, Answers, Batch, Example, Precision, Progress, Row
from formary.tasks.reading import outputs

SPECIAL = {"unk": "[UNK]", "bos": "[START]"}
"""A picture begins with its label, or with [START] where nothing is told of it."""

_UNTOLD = 0.1  # share of training pictures whose label is kept back, so that a model also knows pictures of any kind
_NEVER = -100.0  # added to the logits of what is no colour
_LARGEST = 64  # side in pixels: a picture of 4,096 tokens
_LOOKED_AT = 2000  # training pictures that the colours are chosen from
_KEPT = 0.5  # share of a picture that is gone on from where nobody says how much


class GenerateImage:
    """Pictures for labels, and the rest of pictures."""

    name = "generate_image"
    topologies: ClassVar[tuple[Topology, ...]] = ("decoder",)
    form: ClassVar[RowForm] = RowForm(
        columns=("image",), text=named, files=("image",), unreadable=unreadable, alike=False
    )
    asks: ClassVar[tuple[str, ...]] = ("label",)
    answers: ClassVar[Answers] = "pictures"
    ends: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer, *, side: int, recipe: Recipe | None = None) -> None:
        self.tokenizer, self.side, self.recipe = tokenizer, side, recipe
        colours = sorted((number, name) for name, number in tokenizer.vocab.items() if name.startswith("#"))
        self.palette = Palette.of_names([name for _, name in colours])
        self.first = colours[0][0]  # colours follow one another from here on
        self.labels = sorted(set(tokenizer.vocab) - set(self.palette.names) - set(SPECIAL.values()))
        self.pictures = PictureReader(side)
        self.untold: Counter[str] = Counter()

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return "causal_lm"  # is not asked: the vocabulary is made of colours

    @classmethod
    def vocabulary(cls, recipe: Recipe, rows: Sequence[Row]) -> Tokenizer:
        """A token for each colour, dark before light, then one for each label.

        Raises:
            DataError: a label looks like a colour, or is called like a special token.
        """
        labels = sorted({name for row in rows for name in _label(row)})
        if clash := next((name for name in labels if name.startswith("#") or name in SPECIAL.values()), None):
            raise DataError(
                f"label '{clash}' is called as the model calls a colour; give it a name without # and brackets"
            )
        chosen = (
            [rows[place * len(rows) // _LOOKED_AT] for place in range(_LOOKED_AT)] if len(rows) > _LOOKED_AT else rows
        )
        pictures = PictureReader(_side_of(recipe)).read(chosen, "training row")
        palette = Palette.learned(pictures, recipe.train.objective.colours, seed=recipe.train.seed)
        return names_as_tokens([*palette.names, *labels], SPECIAL)

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        if any(name not in tokenizer.vocab for name in SPECIAL.values()):
            raise RecipeError(
                "data.tokenizer: task generate_image needs a vocabulary of colours, and a model of texts has none; leave "
                "out model.start and data.tokenizer.path"
            )
        return cls(tokenizer, side=_side_of(recipe), recipe=recipe)

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        return cls(tokenizer, side=int(settings.get("side", math.isqrt(config.context))))

    def settings(self) -> dict[str, Any]:
        return {"side": self.side}

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        config = scratch_config(self.recipe, self.tokenizer, "decoder")
        stack = dataclasses.replace(config.transformer, context=self.pixels)
        return self.head(dataclasses.replace(config, transformer=stack))

    def head(self, config: ModelConfig) -> ModelConfig:
        if config.head != "linear" or config.vocab_size != self.tokenizer.vocab_size or config.context < self.pixels:
            raise RecipeError(
                f"model.start: not a model of pictures in these colours, {self.side} x {self.side} pixels; leave it out, or "
                "take train.objective.side and data.tokenizer.path from the run that trained it"
            )
        return config

    @property
    def pixels(self) -> int:
        """Of a picture: that many tokens are written."""
        return self.side * self.side

    def codes(self, rows: Sequence[Row], where: str = "row") -> NDArray[np.uint16]:
        """The pictures of rows in the palette's numbers: (rows, side, side).

        Raises:
            DataError: a row has no picture, or one that cannot be read.
        """
        found = [self.palette.nearest(picture) for picture in self.pictures.read(rows, where)]
        return np.stack(found) if found else np.zeros((0, self.side, self.side), dtype=np.uint16)

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        """Pictures as (pixels,) numbers of colours; the token that each begins with is remembered."""
        begins = [self._begin(row, None) for row in rows]
        return [
            Example(codes.reshape(-1), row=number, memory=begin)
            for number, (codes, begin) in enumerate(zip(self.codes(rows, where), begins))
        ]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Tokens (batch, pixels) from the label to the last pixel but one, and as targets the pixels."""
        return self._batch(examples, [example.memory for example in examples])

    def training_batch(self, examples: Sequence[Example], step: int) -> Batch:
        """What a training step learns from: of a tenth of the pictures the label is not told."""
        assert self.recipe is not None
        untold = np.random.default_rng([self.recipe.train.seed, step, 13]).random(len(examples)) < _UNTOLD
        start = self.tokenizer.bos_id
        return self._batch(examples, [start if u else e.memory for e, u in zip(examples, untold)])

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats over all pixels."""
        assert isinstance(network, Decoder) and isinstance(network.head, LanguageHead)
        return cross_entropy(network.head, network(batch["tokens"]), batch["targets"])

    def likelihood(
        self,
        network: Network,
        rows: Sequence[Row],
        *,
        precision: Precision = nullcontext,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """{"bits", "pixels"} for each row's picture: minus the logarithm (base 2) of its probability, given its label."""

        def answer(network: Network, batch: Batch) -> list[Answer]:
            assert isinstance(network, Decoder) and isinstance(network.head, LanguageHead)
            nats = token_losses(network.head, network(batch["tokens"]), batch["targets"]).double().sum(dim=1)
            return [{"bits": total / math.log(2), "pixels": self.pixels} for total in nats.tolist()]

        return outputs(self, network, self.examples(rows, targets=True), answer, precision=precision, progress=progress)

    def prompt(self, row: Row, where: str) -> tuple[int, ...]:
        """The label, and of a picture to go on from the upper part: `keep` of it (half, if a row does not say)."""
        begin = self._begin(row, where)
        kept = self._kept(row, where)
        _seed(row, where)
        if not kept:
            return (begin,)
        codes = self.palette.nearest(self.pictures.one(row, where))
        return (begin, *(self.first + int(code) for code in codes.reshape(-1)[:kept]))

    def writing(self, row: Row) -> dict[str, Any]:
        others = [number for number in range(self.tokenizer.vocab_size) if not self._is_colour(number)]
        return {
            "max_tokens": self.pixels - self._kept(row, "row"),
            "temperature": 1.0,
            "seed": _seed(row, "row"),
            "logit_bias": dict.fromkeys(others, _NEVER),
        }

    def generation(self, defaults: dict[str, Any]) -> dict[str, Any]:
        return {"do_sample": True, "temperature": 1.0, "max_new_tokens": self.pixels}

    def written(self, row: Row, tokens: Sequence[int]) -> Answer:
        """{"image": the picture as a data URI}, its first pixels those that were kept."""
        kept = self.prompt(row, "row")[1:]
        codes = np.array([*kept, *tokens][: self.pixels], dtype=np.int64) - self.first
        whole = np.zeros(self.pixels, dtype=np.int64)
        whole[: len(codes)] = codes.clip(0, len(self.palette) - 1)
        return {"image": data_uri(self.palette.colours[whole].reshape(self.side, self.side, 3))}

    def showing(self, rows: Sequence[Row]) -> list[Row]:
        """What a report shows: the rest of some pictures, then new ones of each label."""
        labels: Sequence[str | None] = self.labels or [None]
        return [*rows, *({"label": label, "seed": 1 + n} for n in range(2) for label in labels)]

    def worded(self, row: Row) -> str:
        """What a row asks for, in words."""
        label = next(iter(_label(row)), "any picture")
        return f"{label}, the rest of a picture" if row.get("image") else label

    def thumbnail(self, row: Row) -> str:
        """The picture of a row, small, as a data URI."""
        return thumbnail(row)

    def notes(self) -> list[str]:
        if not self.untold:
            return []
        listed = ", ".join(f"'{name}' ({count:,})" for name, count in self.untold.most_common(5))
        return [f"labels that no training row has tell the model nothing: {listed}"]

    # Parts --------------------------------------------------------------------------------------------------------------

    def _batch(self, examples: Sequence[Example], begins: Sequence[Any]) -> Batch:
        pixels = torch.from_numpy(np.stack([example.inputs for example in examples]).astype(np.int64)) + self.first
        begin = torch.tensor(begins, dtype=torch.long)[:, None]
        return {"tokens": torch.cat([begin, pixels[:, :-1]], dim=1), "targets": pixels}

    def _begin(self, row: Row, where: str | None) -> int:
        """The token that a picture begins with; an unknown label is refused if `where` says in which row it is."""
        name = next(iter(_label(row)), None)
        number = None if name is None else self.tokenizer.vocab.get(name)
        if number is not None and name in self.labels:
            return number
        if name is not None:
            if where is not None:
                hint = nearest(name, self.labels) or f"there are {', '.join(self.labels) or 'none'}"
                raise DataError(f"{where}: field 'label' holds '{name}', which the model does not know; {hint}")
            self.untold[name] += 1
        assert self.tokenizer.bos_id is not None
        return self.tokenizer.bos_id

    def _kept(self, row: Row, where: str) -> int:
        """How many pixels of a row's picture are gone on from."""
        if row.get("image") is None:
            return 0
        keep = row.get("keep", _KEPT)
        if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 <= keep < 1:
            raise DataError(
                f"{where}: field 'keep' holds {keep!r:.40}; give the share of the picture, from 0 to below 1"
            )
        return int(keep * self.pixels)

    def _is_colour(self, number: int) -> bool:
        return self.first <= number < self.first + len(self.palette)


def _side_of(recipe: Recipe) -> int:
    side = recipe.train.objective.side
    if side > _LARGEST:
        raise RecipeError(
            f"train.objective.side: {side} x {side} pixels are {side * side:,} tokens a picture; at most {_LARGEST} x "
            f"{_LARGEST} are written"
        )
    return side


def _seed(row: Row, where: str) -> int:
    """Which of the pictures that it could paint a row asks for."""
    seed = row.get("seed")
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool)):
        return seed or 0
    raise DataError(f"{where}: field 'seed' holds {seed!r:.40}; give a whole number")


def _label(row: Row) -> list[str]:
    """The name of a row's label, if it has one."""
    value = row.get("label")
    return [] if value is None or value == "" else label_names(value)[:1]

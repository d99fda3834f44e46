"""What a user takes next, from what the user took before: SASRec reads causally, BERT4Rec fills in a masked end.

Items are the tokens of a vocabulary of their own, so the model is the decoder or encoder that reads texts (Kang and McAuley
2018; Sun et al. 2019). An answer ranks all items. Items that have only a text are known by its vector (cold start).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from formary.data import events
from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer, names_as_tokens
from formary.errors import DataError, RecipeError, RequestError
from formary.model.config import ModelConfig, Topology
from formary.model.heads import LanguageHead, pooled
from formary.model.topologies import Decoder, Encoder, Network
from formary.recipe.schema import Objective, Recipe
from formary.tasks.cross_entropy import IGNORED, cross_entropy
from formary.tasks.models import context_of, reading_topology, scratch_config
from formary.tasks.protocol import Answer, Answers, Batch, Example, Precision, Progress, Row
from formary.tasks.ranking import ranked
from formary.tasks.reading import collated, first_seen, hidden_states, outputs, padded, windows
from formary.tasks.sampled import sampled_loss

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]", "bos": "[START]"}
LISTED = 10
"""Recommendations in an answer where nobody says how many."""

_LAST_ONLY = 0.1  # share of training sequences whose end alone is masked, as in every question (Sun et al. 2019, 3.6)
_SCORES = 1 << 24  # scores of items held in memory at a time
_SHARED = 2  # neighbouring windows of a long history have 1 / this of a window in common


class NextItem:
    """All items in the order in which a user may take them next."""

    name = "next_item"
    topologies: ClassVar[tuple[Topology, ...]] = ("decoder", "encoder")
    form: ClassVar[RowForm] = RowForm(
        columns=events.COLUMNS, text=events.told, alike=False, gather=events.gathered, check=events.check
    )
    asks: ClassVar[tuple[str, ...]] = ("history",)
    answers: ClassVar[Answers] = "ranking"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: int,
        topology: Topology,
        seen: int,
        described: bool = False,
        objective: Objective | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.tokenizer, self.context, self.recipe = tokenizer, context, recipe
        self.causal = topology == "decoder"
        self.objective = objective or Objective()
        self.seen = seen  # tokens of the vocabulary that occurred in training, special ones included; they come first
        self.features: NDArray[np.float32] | None = None
        self.open = tokenizer.vocab_size if described else seen  # and those that can be recommended
        self.names = {number: name for name, number in tokenizer.vocab.items()}
        self.unknown: Counter[str] = Counter()
        self.unlearned, self.repeated = 0, 0

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return "masked_lm"  # is not asked: the vocabulary is made of items

    @classmethod
    def vocabulary(cls, recipe: Recipe, rows: Sequence[Row]) -> Tokenizer:
        """A token for each item, those of histories first, frequent ones before rare ones, then those only described.

        Raises:
            DataError: an item has the name of a special token.
        """
        counts = Counter(item for row in rows for item in row.get("history", ()))
        taken = sorted(counts, key=lambda item: (-counts[item], item))
        described = dict.fromkeys(str(row["item"]) for row in rows if "history" not in row)
        items = [*taken, *(item for item in described if item not in counts)]
        if clash := next((name for name in SPECIAL.values() if name in counts or name in described), None):
            raise DataError(f"an item is called {clash}, as a token of the model's own; give it another name")
        return names_as_tokens(items, SPECIAL)

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        vocab = tokenizer.vocab
        known = {vocab[item] for row in rows for item in row["history"] if item in vocab}
        if len(known) < 2 or any(name not in vocab for name in SPECIAL.values()):
            raise DataError(
                f"data.sources: the training rows hold {len(known)} items that the model knows; it takes at least two, and "
                "a model of texts knows none (leave out model.start and data.tokenizer.path)"
            )
        return cls(
            tokenizer,
            context=recipe.train.context,
            topology=reading_topology(recipe) if start is None else start.topology,
            seen=max(known) + 1,
            objective=recipe.train.objective,
            recipe=recipe,
        )

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        return cls(
            tokenizer,
            context=context_of(config, settings),
            topology=config.topology,
            seen=int(settings.get("seen", config.vocab_size)),
            described=config.features > 0,
            objective=Objective(exclude_seen=bool(settings.get("exclude_seen", True))),
        )

    def settings(self) -> dict[str, Any]:
        return {"context": self.context, "seen": self.seen, "exclude_seen": self.objective.exclude_seen}

    def describe(self, items: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Take in what is known of items, (items, features); before `model_config`; vectors get length 1."""
        size = self.tokenizer.vocab_size
        self.features = np.zeros((size, vectors.shape[1]), dtype=np.float32)
        places = [self.tokenizer.vocab.get(item, 0) for item in items]
        self.features[places] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        self.features[: len(SPECIAL)] = 0.0
        self.open = size

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(scratch_config(self.recipe, self.tokenizer, reading_topology(self.recipe)))

    def head(self, config: ModelConfig) -> ModelConfig:
        if config.head not in ("linear", "masked") or config.vocab_size != self.tokenizer.vocab_size:
            raise RecipeError(
                "model.start: the model does not score the tokens of its tokenizer, so they cannot be items"
            )
        config = dataclasses.replace(config, pooler=False, next_sentence=False, tied_embeddings=True)
        if self.features is not None:
            alone = self.objective.described_alone
            config = dataclasses.replace(config, features=self.features.shape[1], features_alone=alone)
        return config

    def prepare(self, network: Network) -> None:
        """Put in what is known of items; those that nothing is learned of have nothing else."""
        known = getattr(network.embedder, "known", None)
        if known is not None:
            with torch.no_grad():
                if self.features is not None:
                    known.table.copy_(torch.from_numpy(self.features))
                network.embedder.tokens.weight[self.seen :] = 0.0  # type: ignore[union-attr, operator]
            known.table.requires_grad_(False)

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        """A row with an `item` teaches and is scored by it alone; one without teaches all of its history, in windows."""
        found: list[Example] = []
        for number, row in enumerate(rows):
            ids, unknown = self._history(row, f"{where} {number + 1}")
            self.unknown.update(unknown.get("unknown", ()))
            if targets and row.get("item") is None:
                found += self._windows(ids, number)
                continue
            target = None if row.get("item") is None else self._target(row, ids)
            found.append(self._question(ids, target if targets else None, number, (ids, unknown, target)))
        return found

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = collated(examples, self.tokenizer.pad_id)
        batch["row"] = torch.tensor([example.row for example in examples])
        if all(example.target is not None for example in examples):
            batch["targets"] = padded([example.target for example in examples], IGNORED)
        return batch

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats over the items to predict, as `train.objective.item_loss` says.

        In training only items of training compete: others would be learned never to come. An encoder's training sequences
        are masked here, anew in every step.
        """
        assert isinstance(network, Encoder | Decoder) and isinstance(network.head, LanguageHead)
        if isinstance(network, Encoder):
            batch = self._masked(batch)
        hidden, targets = hidden_states(network, batch), batch["targets"]
        size = self.seen if network.training else self.open
        weight = self._table(network)[:size]
        if self.objective.item_loss == "softmax":
            smoothing = self.recipe.train.label_smoothing if self.recipe and network.training else 0.0
            return cross_entropy(network.head, hidden, targets, smoothing=smoothing, weight=weight)
        scored = targets != IGNORED
        bias = None if network.head.bias is None else network.head.bias[:size]
        return sampled_loss(
            network.head.prepare(hidden[scored]), targets[scored], weight, bias,
            kind=self.objective.item_loss, draws=self.objective.negatives, first=len(SPECIAL), fixed=not network.training,
        )  # fmt: skip

    def predict(
        self,
        network: Network,
        rows: Sequence[Row],
        *,
        precision: Precision = nullcontext,
        targets: bool = False,
        progress: Progress | None = None,
        k: int = LISTED,
        exclude_seen: bool | None = None,
        **options: Any,
    ) -> list[Answer]:
        """{"items": [{"item", "score"}, ...]} for each row's `history`, the likeliest first.

        A score is the item's probability among those that could be recommended (of a model trained with softmax). What of
        a history the model does not know is listed under "unknown". A row with an `item` also gets "rank", from 1, how many
        items are "tied" with it, itself included, and the number of "candidates"; rank None: it could not be recommended.

        Args:
            k: how many items are listed.
            exclude_seen: leave out the items of the history; as the model was trained when None.
        """
        if options:
            raise RequestError(f"{next(iter(options))}: is no option of task {self.name}; there are k and exclude_seen")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise RequestError(f"k: {k!r} is no number of items; give 1 or more")
        asked = [{"history": row.get("history"), "item": row.get("item")} for row in rows]
        examples = self.examples(asked, targets=False)

        def answer(network: Network, batch: Batch) -> list[Answer]:
            assert isinstance(network, Encoder | Decoder) and isinstance(network.head, LanguageHead)
            last = network.head.prepare(pooled(hidden_states(network, batch), batch["mask"], "last"))
            weight, bias = self._table(network)[: self.open], network.head.bias
            found: list[Answer] = []
            at_once = max(1, _SCORES // len(weight))
            for start in range(0, len(last), at_once):
                scores = F.linear(last[start : start + at_once], weight, None if bias is None else bias[: self.open])
                for row, one in zip(
                    batch["row"][start : start + at_once].tolist(), network.head.capped(scores.float()).cpu().numpy()
                ):
                    ids, unknown, target = examples[row].memory
                    found.append(self.ranked(one, ids, target, k=k, exclude=exclude_seen) | unknown)
            return found

        return outputs(self, network, examples, answer, precision=precision, progress=progress)

    def ranked(
        self,
        scores: NDArray[Any],
        history: Sequence[int],
        target: int | None,
        *,
        k: int = LISTED,
        exclude: bool | None = None,
    ) -> Answer:
        """The answer that scores (open,) of all tokens make, as `predict` gives it; also for baselines."""
        exclude = self.objective.exclude_seen if exclude is None else exclude
        barred = [*range(len(SPECIAL)), *(history if exclude else ())]
        return ranked(scores, self.names, k=k, barred=barred, target=target, new=self.seen)

    @property
    def choices(self) -> int:
        """How many items can be recommended at all."""
        return self.open - len(SPECIAL)

    def known_items(self, names: Sequence[str]) -> list[int]:
        """The tokens of the items that the model knows."""
        return [number for name in names if (number := self.tokenizer.vocab.get(name, -1)) >= len(SPECIAL)]

    def item_of(self, row: Row) -> int | None:
        """The token of a row's item: -1 where the model does not know it, None where the row has none."""
        return None if row.get("item") is None else next(iter(self.known_items([str(row["item"])])), -1)

    def notes(self) -> list[str]:
        said = []
        if self.unknown:
            listed = ", ".join(f"'{name}' ({count:,})" for name, count in self.unknown.most_common(5))
            said.append(f"{len(self.unknown):,} items of histories are unknown to the model and are not read: {listed}")
        if self.unlearned:
            how = "it is known by its text alone" if self.open > self.seen else "the model learned nothing of it"
            said.append(f"{self.unlearned:,} rows have an item that no training row has; {how}")
        if self.repeated:
            said.append(
                f"{self.repeated:,} rows have an item that the user had before; it is not recommended again, so they count as "
                "misses (train.objective.exclude_seen: false recommends such items too)"
            )
        return said

    # From rows to sequences ---------------------------------------------------------------------------------------------

    def _history(self, row: Row, where: str) -> tuple[list[int], Answer]:
        """The tokens of a row's history, and what an answer says of the items in it that are unknown."""
        names = events.history(row, where)
        unknown = [name for name in names if not self.known_items([name])]
        return self.known_items(names), {"unknown": unknown} if unknown else {}

    def _target(self, row: Row, ids: Sequence[int]) -> int:
        number = self.item_of({"item": events.name_of(row["item"], "item", "row")})
        assert number is not None
        self.unlearned += not 0 <= number < self.seen
        self.repeated += self.objective.exclude_seen and number in ids
        return number

    def _windows(self, ids: list[int], number: int) -> list[Example]:
        """All of a history to be learned; a long one in windows that share half, where each item is learned once."""
        assert self.tokenizer.bos_id is not None
        sequence = np.array([self.tokenizer.bos_id, *ids] if self.causal else ids, dtype=np.int64)
        steps = len(sequence) - 1 if self.causal else len(sequence)
        if steps < 1:
            return []
        stretches = windows([1] * steps, room=self.context, shared=self.context // _SHARED)
        own = first_seen(stretches) if self.causal else stretches
        found = []
        for (start, stop), (first, last) in zip(stretches, own):
            targets = np.full(stop - start, IGNORED, dtype=np.int64)
            targets[first - start : last - start] = sequence[first + self.causal : last + self.causal]
            found.append(Example(sequence[start:stop], target=targets, row=number))
        return found

    def _question(self, ids: list[int], target: int | None, number: int, memory: Any) -> Example:
        """The newest part of a history, of which the item after it is asked."""
        bos, mask = self.tokenizer.bos_id, self.tokenizer.mask_id
        sequence = [bos, *ids][-self.context :] if self.causal else [*ids[max(0, len(ids) - self.context + 1) :], mask]
        targets = None
        if target is not None:
            targets = np.full(len(sequence), IGNORED, dtype=np.int64)
            targets[-1] = target if 0 <= target < self.open else IGNORED
        return Example(np.array(sequence, dtype=np.int64), target=targets, row=number, memory=memory)

    # What the network says ----------------------------------------------------------------------------------------------

    def _masked(self, batch: Batch) -> Batch:
        """Training sequences with some items masked, each anew at every step; questions are masked already."""
        tokens, real = batch["tokens"], batch["mask"]
        assert self.tokenizer.mask_id is not None
        asked = (tokens == self.tokenizer.mask_id).any(dim=1, keepdim=True)
        last = real & (real.flip(1).cumsum(1).flip(1) == 1)
        chosen = real & (torch.rand(tokens.shape, device=tokens.device) < self.objective.mask_rate)
        end_only = torch.rand(len(tokens), 1, device=tokens.device) < _LAST_ONLY
        chosen = torch.where(end_only | ~chosen.any(dim=1, keepdim=True), last, chosen) & ~asked
        targets = batch["targets"].masked_fill(~chosen & ~asked, IGNORED)
        return batch | {"tokens": tokens.masked_fill(chosen, self.tokenizer.mask_id), "targets": targets}

    def _table(self, network: Encoder | Decoder) -> Tensor:
        """(vocab_size, width), what a hidden state is multiplied with to score items."""
        return cast(Tensor, network.embedder.vectors())  # type: ignore[operator]

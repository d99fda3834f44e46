"""Text to text: translation, summaries, rewriting, answers without a source (Sutskever et al. 2014; Raffel et al. 2020).

An encoder-decoder reads the source and writes the target; a decoder goes on after source and end token (Radford et al.
2018). The loss is on the target and its end alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError, RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.heads import LanguageHead
from formary.model.topologies import Decoder, EncoderDecoder, Network
from formary.recipe.schema import Recipe
from formary.tasks.cross_entropy import IGNORED, cross_entropy
from formary.tasks.models import asks_for_decoder, context_of, scratch_config, with_language_head
from formary.tasks.protocol import Answers, Batch, Example, Prompt, Row
from formary.tasks.reading import Reader, collated, padded, place_of, text_of

_UNSAMPLED = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def _composed(row: Row) -> str:
    return f"{row.get('source')}\n{row.get('target')}"


class Translate:
    """One text for another.

    Args:
        longest_target: tokens a target may have, its end included.
        start_id: what an encoder-decoder's target begins with; None for a decoder.
        smoothing: share of a target's probability that is spread over the vocabulary while training.
    """

    name = "translate"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder_decoder", "decoder")
    form: ClassVar[RowForm] = RowForm(columns=("source", "target"), text=_composed)
    asks: ClassVar[tuple[str, ...]] = ("source",)
    answers: ClassVar[Answers] = "texts"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        topology: Literal["decoder", "encoder_decoder"],
        context: int,
        longest_target: int,
        start_id: int | None = None,
        smoothing: float = 0.0,
        recipe: Recipe | None = None,
    ) -> None:
        self.tokenizer, self.topology, self.context, self.recipe = tokenizer, topology, context, recipe
        self.longest_target, self.start_id, self.smoothing = longest_target, start_id, smoothing
        self.end = _end_of(tokenizer)
        self.ends = (self.end,)
        room = context if topology == "encoder_decoder" else context - longest_target - 1
        if room < 1:
            raise RecipeError(f"train.context: {context} tokens leave no room for a source beside the target")
        self.reader = Reader(tokenizer, room)
        self.targets_cut = 0
        self.respelled = 0  # targets that the tokenizer writes otherwise
        self.respelling = ("", "")  # the first of them, and how it is written

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return "causal_lm" if _topology(recipe) == "decoder" else "denoise"

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        if not rows:
            raise DataError("data.sources: there are no training rows")
        context = recipe.train.context
        topology = _topology(recipe)
        if start is not None:
            topology = _writer(start)
        first = tokenizer.pad_id if start is None or start.decoder_start_id is None else start.decoder_start_id
        if topology == "encoder_decoder" and first is None:
            raise RecipeError(
                "data.tokenizer: task translate needs a pad token, with which an encoder-decoder's targets begin"
            )
        half = context if topology == "encoder_decoder" else context // 2  # a decoder's source has the other half
        return cls(
            tokenizer,
            topology=topology,
            context=context,
            longest_target=min(recipe.train.objective.longest_target, half),
            start_id=first if topology == "encoder_decoder" else None,
            smoothing=recipe.train.label_smoothing,
            recipe=recipe,
        )

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        topology = _writer(config)
        longest = config.context if topology == "encoder_decoder" else config.context // 2
        return cls(
            tokenizer,
            topology=topology,
            context=context_of(config, settings),
            longest_target=min(int(settings.get("longest_target", longest)), longest),
            start_id=tokenizer.pad_id if config.decoder_start_id is None else config.decoder_start_id,
        )

    def settings(self) -> dict[str, Any]:
        return {"context": self.context, "longest_target": self.longest_target}

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(scratch_config(self.recipe, self.tokenizer, self.topology))

    def head(self, config: ModelConfig) -> ModelConfig:
        _writer(config)
        config = with_language_head(config, self.tokenizer, end=self.end)
        start = self.start_id if config.decoder_start_id is None else config.decoder_start_id
        return dataclasses.replace(config, decoder_start_id=start)

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        places = [place_of(row, f"{where} {number}") for number, row in enumerate(rows, 1)]
        sources = self.reader.read([text_of(row, "source", place) for row, place in zip(rows, places)])
        after = [] if self.topology == "encoder_decoder" else [self.end]
        read = [np.append(source.tokens, np.array(after, dtype=np.int64)) for source in sources]
        if not targets:
            return [Example(tokens, row=number) for number, tokens in enumerate(read)]
        written = self._targets([text_of(row, "target", place) for row, place in zip(rows, places)])
        return [
            Example(tokens, target=target, row=number) for number, (tokens, target) in enumerate(zip(read, written))
        ]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """An encoder-decoder's sources and shifted targets, or a decoder's sources and targets in one line."""
        targets: list[NDArray[np.int64]] = [example.target for example in examples if example.target is not None]
        pad = self.tokenizer.pad_id or 0
        if len(targets) < len(examples):
            return collated(examples, pad)
        if self.topology == "encoder_decoder":
            assert self.start_id is not None
            begun = [np.insert(target[:-1], 0, self.start_id) for target in targets]
            return {
                **collated(examples, pad),
                "decoder_tokens": padded(begun, pad),
                "targets": padded(targets, IGNORED),
            }
        lines = [np.append(example.inputs, target) for example, target in zip(examples, targets)]
        silent = [np.full(len(example.inputs) - 1, IGNORED) for example in examples]
        return {
            "tokens": padded([line[:-1] for line in lines], pad),
            "targets": padded([np.append(none, target) for none, target in zip(silent, targets)], IGNORED),
        }

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        smoothing = self.smoothing if network.training else 0.0
        if isinstance(network, EncoderDecoder):
            mask = None if bool(batch["mask"].all()) else batch["mask"]
            hidden = network(batch["tokens"], batch["decoder_tokens"], source_mask=mask)
        else:
            assert isinstance(network, Decoder)
            hidden = network(batch["tokens"])
        assert isinstance(network.head, LanguageHead)
        return cross_entropy(network.head, hidden, batch["targets"], smoothing=smoothing)

    def prompt(self, row: Row, where: str) -> Prompt:
        (source,) = self.reader.read([text_of(row, "source", place_of(row, where))])
        tokens = tuple(source.tokens.tolist())
        return tokens if self.topology == "encoder_decoder" else (*tokens, self.end)

    def writing(self, row: Row) -> dict[str, Any]:
        return {"max_tokens": self.longest_target}

    def generation(self, defaults: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in defaults.items() if name not in _UNSAMPLED}
        return {**kept, "do_sample": False, "max_new_tokens": self.longest_target}

    def notes(self) -> list[str]:
        said = []
        if self.reader.cut:
            said.append(
                f"{_many(self.reader.cut, 'source')} longer than {self.reader.context} tokens and cut to them; raise "
                "train.context to keep more"
            )
        if self.targets_cut:
            said.append(
                f"{_many(self.targets_cut, 'target')} longer than {self.longest_target} tokens and cut to them; raise "
                "train.objective.longest_target (and if need be train.context) to keep more"
            )
        if self.respelled:
            text, written = self.respelling
            said.append(
                f"{_many(self.respelled, 'target')} not written by this tokenizer as they stand: '{text:.80}' comes out as "
                f"'{written:.80}'; data.tokenizer: {{kind: bpe}} writes every text"
            )
        return said

    def _targets(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Targets with their end; one that is cut has none, so that the model does not learn to end there."""
        backend = self.tokenizer.backend
        wrapped = self.topology == "encoder_decoder"  # with what its family puts around a text
        found = []
        for encoding in backend.encode_batch(list(texts), add_special_tokens=wrapped):
            tokens = np.array(encoding.ids, dtype=np.int64)
            if not len(tokens) or tokens[-1] != self.end:
                tokens = np.append(tokens, self.end)
            self.targets_cut += len(tokens) > self.longest_target
            found.append(tokens[: self.longest_target])
        written = backend.decode_batch([tokens.tolist() for tokens in found], skip_special_tokens=True)
        for text, again, tokens in zip(texts, written, found):
            if tokens[-1] == self.end and again.split() != text.split():
                if not self.respelled:
                    self.respelling = (text, again)
                self.respelled += 1
        return found


def _topology(recipe: Recipe) -> Literal["decoder", "encoder_decoder"]:
    """What is trained from scratch: a decoder where the preset is one, else an encoder-decoder."""
    return "decoder" if asks_for_decoder(recipe) else "encoder_decoder"


def _writer(config: ModelConfig) -> Literal["decoder", "encoder_decoder"]:
    if config.topology in ("encoder", "two_towers"):
        raise RecipeError(
            "model: task translate needs an encoder-decoder or a decoder, and this model writes no text; "
            "take one such as a T5, or leave out model.start"
        )
    return "decoder" if config.topology == "decoder" else "encoder_decoder"


def _end_of(tokenizer: Tokenizer) -> int:
    end = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.sep_id
    if end is None:
        raise RecipeError("data.tokenizer: a task that writes needs an end token (eos), and this tokenizer has none")
    return end


def _many(count: int, what: str) -> str:
    return f"1 {what} was" if count == 1 else f"{count:,} {what}s were"

"""Tagging: one tag for each word of a sentence, such as names in BIO or parts of speech (Devlin et al. 2019, section 5.3).

Words are cut to tokens one by one, and a word's tag is read from its first token (its last in a decoder, which has then
seen the word). Sentences longer than the context are read in overlapping windows. Tags of names are kept well-formed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer, is_cjk
from formary.errors import DataError, RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.heads import LabelHead
from formary.model.topologies import Decoder, Encoder, Network
from formary.recipe.schema import Recipe
from formary.tasks import crf
from formary.tasks.models import context_of, reading_tokens, reading_topology, scratch_config, with_label_head
from formary.tasks.protocol import Answer, Answers, Batch, Example, Precision, Progress, Row
from formary.tasks.reading import collated, hidden_states, outputs, owned, padded, place_of, windows

Kind = Literal["repair", "crf", "none"]
_CRF_PACE = 100.0  # the rates that suit a Transformer's weights are too slow for scores of transitions


@dataclass(frozen=True)
class Pieces:
    """A sentence as tokens, word by word.

    Args:
        words: the ids of each word, at least one.
        reading: which of them its tag is read from, for each word.
        before: the special tokens before the words; `after`: those after.
    """

    words: tuple[NDArray[np.int64], ...]
    reading: tuple[int, ...]
    before: NDArray[np.int64]
    after: NDArray[np.int64]

    def window(self, stretch: tuple[int, int], own: tuple[int, int], room: int) -> tuple[NDArray[np.int64], ...]:
        """The tokens of a stretch of words, of which `own` are tagged, and the positions to read these from."""
        parts, readings, at = [self.before], [], len(self.before)
        for number in range(*stretch):
            if own[0] <= number < own[1]:
                readings.append(at + min(self.reading[number], room - 1))
            parts.append(self.words[number][:room])
            at += len(parts[-1])
        return np.concatenate([*parts, self.after]), np.array(readings, dtype=np.int64)


class Tag:
    """A tag for each word."""

    name = "tag"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder", "decoder")
    form: ClassVar[RowForm] = RowForm(
        columns=("tokens", "tags"),
        text=lambda row: _sentence(row["tokens"]),
        check=lambda row, where: _tags(row, where),
    )
    asks: ClassVar[tuple[str, ...]] = ("tokens",)
    answers: ClassVar[Answers] = "tags"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: int,
        labels: Sequence[str],
        causal: bool = False,
        transitions: Kind = "none",
        learned: crf.Transitions | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.tokenizer, self.context, self.recipe = tokenizer, context, recipe
        self.labels, self.causal, self.transitions = tuple(labels), causal, transitions
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        scheme = transitions != "none" and crf.is_scheme(self.labels)
        self.rules = crf.legal(self.labels) if scheme else crf.Transitions.free(len(self.labels))
        self.learned = learned
        self.spaced = _needs_spaces(tokenizer)
        self.unseen: Counter[str] = Counter()
        self.illegal = self.long = 0  # training sentences against the scheme of their tags; sentences in windows

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return reading_tokens(recipe)

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        if not rows:
            raise DataError("data.sources: there are no training rows")
        tags = [_tags(row, f"training row {number}") for number, row in enumerate(rows, 1)]
        labels = sorted({tag for row in tags for tag in row}, key=lambda tag: (tag != "O", tag))
        if len(labels) < 2:
            raise DataError(f"data.sources: every word has the tag '{labels[0]}'; a tagger needs at least two tags")
        transitions = recipe.train.objective.transitions
        scheme = transitions != "none" and crf.is_scheme(labels)
        illegal = sum(not crf.is_legal(row, labels) for row in tags) if scheme else 0
        task = cls(
            tokenizer,
            context=recipe.train.context,
            labels=labels,
            causal=(start.topology if start else reading_topology(recipe)) == "decoder",
            transitions="none" if illegal and transitions == "repair" else transitions,
            recipe=recipe,
        )
        task.illegal = illegal
        if illegal:  # the data follows another scheme, such as IOB1
            task.rules = crf.Transitions.free(len(labels))
        return task

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        labels, scores = config.labels, settings.get("transition_scores")
        learned = crf.Transitions.of_flat(np.array(scores, dtype=np.float64), len(labels)) if scores else None
        task = cls(
            tokenizer,
            context=context_of(config, settings),
            labels=labels,
            causal=config.topology == "decoder",
            transitions=settings.get("transitions", "none"),
            learned=learned,
        )
        if not settings.get("scheme", True):
            task.rules = crf.Transitions.free(len(labels))
        return task

    def settings(self) -> dict[str, Any]:
        said: dict[str, Any] = {"context": self.context, "transitions": self.transitions}
        said["scheme"] = bool(self.rules.step.any())
        if self.learned is not None:
            said["transition_scores"] = [round(number, 6) for number in self.learned.flat().tolist()]
        return said

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(scratch_config(self.recipe, self.tokenizer, reading_topology(self.recipe)))

    def head(self, config: ModelConfig) -> ModelConfig:
        return with_label_head(config, self.tokenizer, self.name, head="tag", labels=self.labels)

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        """One example for each window of each row; a row without words has none."""
        places = [place_of(row, f"{where} {number}") for number, row in enumerate(rows, 1)]
        sentences = [_words(row, place, split=not targets) for row, place in zip(rows, places)]
        labels = [
            np.array([self._number(tag) for tag in _tags(row, place)], dtype=np.int64) if targets else None
            for row, place in zip(rows, places)
        ]
        examples = []
        for row, (pieces, known) in enumerate(zip(self._pieces(sentences), labels)):
            if not pieces.words:
                continue
            room = max(1, self.context - len(pieces.before) - len(pieces.after))
            stretches = windows([len(word) for word in pieces.words], room=room, shared=room // 2)
            self.long += len(stretches) > 1
            for stretch, own in zip(stretches, owned(stretches)):
                tokens, readings = pieces.window(stretch, own, room)
                target = None if known is None else known[slice(*own)]
                examples.append(Example(tokens, None, target, row=row, memory=readings))
        return examples

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = collated(examples, self.tokenizer.pad_id)
        batch["places"] = padded([example.memory for example in examples], -1)
        if all(example.target is not None for example in examples):
            batch["targets"] = padded([example.target for example in examples], -100)
        return batch

    def prepare(self, network: Network) -> None:
        """Give the network a CRF's transitions to learn beside its weights; `finish` takes them into the settings."""
        if self.transitions == "crf":
            numbers = torch.zeros(len(self.labels) * (len(self.labels) + 2))
            network.register_parameter("transitions", nn.Parameter(numbers.to(next(network.parameters()).device)))

    def finish(self, network: Network) -> None:
        """Take the learned transitions out of the network, whose layout on disk has no place for them."""
        if self.transitions == "crf":
            self.learned = self._transitions(network)
            del network.transitions

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each word's tag, or of whole sequences under a CRF; tags unseen in training teach nothing."""
        logits, targets = self._logits(network, batch), batch["targets"]
        count = (targets != -100).sum()
        if self.transitions == "crf":
            flat = _parameter(network)
            if flat is None:
                raise RecipeError("train.objective.transitions: crf needs Tag.prepare(network) before training")
            rules = torch.from_numpy(self.rules.flat()).to(logits)
            return crf.crf_loss(logits, targets, batch["places"] >= 0, flat * _CRF_PACE + rules), count
        smoothing = self.recipe.train.label_smoothing if self.recipe and network.training else 0.0
        total = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing, ignore_index=-100, reduction="sum"
        )
        return total, count

    def predict(
        self,
        network: Network,
        rows: Sequence[Row],
        *,
        precision: Precision = nullcontext,
        targets: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Answer]:
        """{"tags", "probabilities"} for each row, the probability of each tag by itself; "tokens" where a text was given."""
        examples = self.examples(rows, targets=targets)

        def answer(network: Network, batch: Batch) -> list[NDArray[np.float64]]:
            scores = self._logits(network, batch).log_softmax(dim=-1).cpu().double().numpy()
            counts = (batch["places"] >= 0).sum(dim=1).tolist()
            return [row[:count] for row, count in zip(scores, counts)]

        by_row: list[list[NDArray[np.float64]]] = [[] for _ in rows]
        for example, scores in zip(
            examples, outputs(self, network, examples, answer, precision=precision, progress=progress)
        ):
            by_row[example.row].append(scores)
        transitions = self.rules + self._transitions(network)
        return [self._answer(row, parts, transitions) for row, parts in zip(rows, by_row)]

    def notes(self) -> list[str]:
        said = []
        if self.long:
            many = "1 sentence was" if self.long == 1 else f"{self.long:,} sentences were"
            said.append(f"{many} longer than the context of {self.context} tokens and read in overlapping windows")
        if self.unseen:
            listed = ", ".join(f"'{name}' ({count:,})" for name, count in self.unseen.most_common(5))
            said.append(f"tags that no training row has count as errors: {listed}")
        if self.illegal:
            many = "1 training row breaks" if self.illegal == 1 else f"{self.illegal:,} training rows break"
            said.append(f"{many} the scheme of its tags (an I- without its B-), so illegal sequences are not repaired")
        return said

    def _logits(self, network: Network, batch: Batch) -> Tensor:
        """(batch, words, labels) in float32."""
        assert isinstance(network, Encoder | Decoder) and isinstance(network.head, LabelHead)
        hidden = hidden_states(network, batch)
        places = batch["places"].clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
        logits: Tensor = network.head(hidden.gather(1, places))
        return logits.float()

    def _answer(self, row: Row, parts: list[NDArray[np.float64]], transitions: crf.Transitions) -> Answer:
        scores = np.concatenate(parts) if parts else np.zeros((0, len(self.labels)))
        path = crf.best_path(scores, transitions)
        shares = np.exp(scores[np.arange(len(path)), path]).tolist()
        answer: Answer = {"tags": [self.labels[number] for number in path], "probabilities": shares}
        return answer | ({"tokens": _split(row["tokens"])} if isinstance(row["tokens"], str) else {})

    def _transitions(self, network: Network) -> crf.Transitions:
        """Those that the network is learning, else those that were learned."""
        flat = _parameter(network)
        if flat is not None:
            numbers = flat.detach().cpu().double().numpy() * _CRF_PACE
            return crf.Transitions.of_flat(numbers, len(self.labels))
        return self.learned or crf.Transitions.free(len(self.labels))

    def _number(self, tag: str) -> int:
        if tag not in self.numbers:
            self.unseen[tag] += 1
        return self.numbers.get(tag, -100)

    def _pieces(self, sentences: Sequence[list[str]]) -> list[Pieces]:
        backend = self.tokenizer.backend
        given = [_with_spaces(words) if self.spaced else words for words in sentences]
        found = []
        for words, encoding in zip(given, backend.encode_batch(given, is_pretokenized=True, add_special_tokens=False)):
            ids: list[list[int]] = [[] for _ in words]
            visible: list[list[int]] = [[] for _ in words]  # the tokens of each word that are more than a space
            for token, number, (begin, end) in zip(encoding.ids, encoding.word_ids, encoding.offsets):
                assert number is not None
                if words[number][begin:end].strip():
                    visible[number].append(len(ids[number]))
                ids[number].append(token)
            full = backend.post_process(encoding, None, True)
            own = [place for place, number in enumerate(full.sequence_ids) if number is not None]
            begin, end = (own[0], own[-1] + 1) if own else (min(1, len(full.ids)),) * 2
            found.append(
                Pieces(
                    tuple(np.array(word or [self._stand_in], dtype=np.int64) for word in ids),
                    tuple((seen or [0])[-1 if self.causal else 0] for seen in visible),
                    np.array(full.ids[:begin], dtype=np.int64),
                    np.array(full.ids[end:], dtype=np.int64),
                )
            )
        return found

    @property
    def _stand_in(self) -> int:
        """The token of a word that the tokenizer makes nothing of, such as a lone control character."""
        ids = (self.tokenizer.unk_id, self.tokenizer.mask_id, self.tokenizer.pad_id, self.tokenizer.eos_id)
        return next((token for token in ids if token is not None), 0)


def _parameter(network: Network) -> Tensor | None:
    found = getattr(network, "transitions", None)
    return found if isinstance(found, Tensor) else None


def _words(row: Row, where: str, *, split: bool) -> list[str]:
    """A row's words; a plain text is split where that is asked for."""
    words = row.get("tokens")
    if isinstance(words, str) and split:
        return _split(words)
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        said = "is missing" if "tokens" not in row else f"holds {type(words).__name__} {words!r:.60}"
        raise DataError(
            f"{where}: field 'tokens' {said}, and a tagger needs a list of words; map another column with "
            "data.columns.tokens"
        )
    if not words and not split:
        raise DataError(f"{where}: field 'tokens' is empty; take the row out")
    return list(words)


def _tags(row: Row, where: str) -> list[str]:
    """A row's tags as names, one for each of its words."""
    words, tags = _words(row, where, split=False), row.get("tags")
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str | int) and tag != "" for tag in tags):
        said = "is missing" if "tags" not in row else f"holds {type(tags).__name__} {tags!r:.60}"
        raise DataError(
            f"{where}: field 'tags' {said}, and a tagger needs a list of tags; map another column with data.columns.tags"
        )
    if len(tags) != len(words):
        raise DataError(
            f"{where}: {len(words)} tokens and {len(tags)} tags, and each token needs one: {_sentence(words)[:60]!r}"
        )
    return [str(tag) for tag in tags]


def _split(text: str) -> list[str]:
    """A text's words: what stands between spaces, and each Chinese character by itself."""
    return "".join(f" {letter} " if is_cjk(ord(letter)) else letter for letter in text).split()


def _sentence(words: Any) -> str:
    """Words as a text: no space between two Chinese characters."""
    return "".join(_with_spaces([str(word) for word in words])) if isinstance(words, list | tuple) else str(words)


def _with_spaces(words: Sequence[str]) -> list[str]:
    """Words with the space before them that running text has, for tokenizers in which spaces are part of tokens."""
    spaced = list(words[:1])
    for before, word in pairwise(words):
        joined = before and word and is_cjk(ord(before[-1])) and is_cjk(ord(word[0]))
        spaced.append(word if joined else f" {word}")
    return spaced


def _needs_spaces(tokenizer: Tokenizer) -> bool:
    """Whether words must come with their spaces to give the tokens of running text: byte-level BPE, characters."""
    apart = tokenizer.backend.encode(["a", "b"], is_pretokenized=True, add_special_tokens=False).ids
    return bool(tokenizer.backend.encode("a b", add_special_tokens=False).ids != apart)

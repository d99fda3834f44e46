"""Preference: prefer chosen answers to rejected ones by direct preference optimisation (Rafailov et al. 2023, eq. 7).

loss = -log sigmoid(beta ((log p(chosen) - log p0(chosen)) - (log p(rejected) - log p0(rejected)))), where p0 is the model
that training starts from. What p0 says is computed once, before; it is not kept in memory. Answers are rendered as chat's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from formary.data.conversations import Conversation, messages_of
from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError, FormaryError, RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.topologies import Network
from formary.recipe.schema import Recipe
from formary.tasks.chat import Chat
from formary.tasks.cross_entropy import IGNORED
from formary.tasks.likelihood import log_likelihoods
from formary.tasks.protocol import Answer, Answers, Batch, Example, Precision, Progress, Row
from formary.tasks.reading import outputs, padded, place_of

_BETA = 0.1


@dataclass(frozen=True)
class _Side:
    """One answer after its prompt: (seq,) tokens, and True at those of the answer."""

    tokens: NDArray[np.int64]
    learned: NDArray[np.bool_]

    @property
    def targets(self) -> NDArray[np.int64]:
        return np.where(self.learned, self.tokens, IGNORED)[1:]


@dataclass(frozen=True)
class _Pair:
    chosen: _Side
    rejected: _Side

    @property
    def key(self) -> bytes:
        return self.chosen.tokens.tobytes() + b"|" + self.rejected.tokens.tobytes()


def _composed(row: Row) -> str:
    return "\n".join(str(row.get(column)) for column in ("prompt", "chosen", "rejected"))


class Preference:
    """Which of two answers is better.

    Args:
        chat: reads prompts and answers as conversations.
        beta: how strongly the model is held to the one it starts from.
    """

    name = "preference"
    topologies: ClassVar[tuple[Topology, ...]] = ("decoder",)
    needs_start: ClassVar[bool] = True  # it changes a model that writes already
    form: ClassVar[RowForm] = RowForm(columns=("prompt", "chosen", "rejected"), text=_composed)
    asks: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected")
    answers: ClassVar[Answers] = "choices"

    def __init__(self, chat: Chat, *, beta: float = _BETA) -> None:
        self.chat, self.beta = chat, beta
        self.tokenizer: Tokenizer = chat.tokenizer
        self._cut: set[bytes] = set()  # rows, by what is left of them
        self._reference: dict[bytes, tuple[float, float]] = {}  # log-likelihoods by the model that training starts from

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return Chat.special_tokens(recipe)

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        if start is None:
            raise RecipeError(
                "model.start: task preference changes a model that writes already, best one that task chat trained; "
                "name its folder"
            )
        return cls(Chat.learn(recipe, tokenizer, rows, start=start), beta=recipe.train.objective.beta)

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        return cls(Chat.of_model(config, tokenizer, settings), beta=float(settings.get("beta", _BETA)))

    def settings(self) -> dict[str, Any]:
        return {**self.chat.settings(), "beta": self.beta}

    def model_config(self) -> ModelConfig:
        return self.chat.model_config()

    def head(self, config: ModelConfig) -> ModelConfig:
        return self.chat.head(config)

    def generation(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """generation_config.json of the model, which still chats."""
        return self.chat.generation(defaults)

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        """Both answers of each row after one prompt; of what is longer than the context the prompt's beginning is cut."""
        places = [place_of(row, f"{where} {number}") for number, row in enumerate(rows, 1)]
        pairs = [self._pair(row, place) for row, place in zip(rows, places)]
        return [Example(pair.chosen.tokens, target=pair, row=number) for number, pair in enumerate(pairs)]

    def collate(self, examples: Sequence[Example]) -> Batch:
        pairs: list[_Pair] = [example.target for example in examples]
        pad = self.tokenizer.pad_id or 0
        batch = {
            "tokens": padded([pair.chosen.tokens[:-1] for pair in pairs], pad),
            "targets": padded([pair.chosen.targets for pair in pairs], IGNORED),
            "rejected_tokens": padded([pair.rejected.tokens[:-1] for pair in pairs], pad),
            "rejected_targets": padded([pair.rejected.targets for pair in pairs], IGNORED),
        }
        if all(pair.key in self._reference for pair in pairs):
            batch["reference"] = torch.tensor([self._reference[pair.key] for pair in pairs])
        return batch

    def remember(self, network: Network, examples: Sequence[Example], *, precision: Precision = nullcontext) -> None:
        """Remember what the network, before it is trained, thinks of both answers."""
        said = outputs(self, network, examples, lambda n, b: _both(n, b).tolist(), precision=precision)
        self._reference |= {example.target.key: (first, second) for example, (first, second) in zip(examples, said)}

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed over pairs; at the start it is log 2 each.

        While training, label smoothing is the chance that a pair is the wrong way round (Mitchell 2023, conservative DPO).
        """
        if "reference" not in batch:
            raise FormaryError("preference: remember must see the starting network and every example before the loss")
        margins = self._margins(_both(network, batch), batch)
        wrong = self.chat.smoothing if network.training else 0.0
        each = (1 - wrong) * F.logsigmoid(margins) + wrong * F.logsigmoid(-margins)
        return -each.sum(), torch.tensor(len(batch["tokens"]))

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
        """Which answer is preferred: by beta times how much more likely than at the start the model finds it.

        Where `remember` has not seen the starting network, by the mean log-likelihood of an answer's tokens.
        """
        examples = self.examples(rows, targets=targets)

        def answer(network: Network, batch: Batch) -> list[Answer]:
            likely = _both(network, batch)
            if "reference" in batch:
                margins = self._margins(likely, batch)
            else:
                sizes = [(batch[name] != IGNORED).sum(dim=1).clamp(min=1) for name in ("targets", "rejected_targets")]
                margins = likely[:, 0] / sizes[0] - likely[:, 1] / sizes[1]
            return [
                {"preferred": "chosen" if margin > 0 else "rejected", "margin": margin} for margin in margins.tolist()
            ]

        return outputs(self, network, examples, answer, precision=precision, progress=progress)

    def texts(self, row: Row) -> dict[str, str]:
        """The two answers as texts."""
        place = place_of(row, "row")
        return {side: _answer(row, side, place)["content"] for side in ("chosen", "rejected")}

    def notes(self) -> list[str]:
        said = self.chat.notes()
        if self._cut:
            rows = "1 row was" if len(self._cut) == 1 else f"{len(self._cut):,} rows were"
            said.append(
                f"{rows} longer than the context of {self.chat.context} tokens and cut to it, where prompts begin; raise "
                "train.context to keep more"
            )
        return said

    def _margins(self, likely: Tensor, batch: Batch) -> Tensor:
        """(batch,) implicit rewards of the chosen answers less those of the rejected."""
        gained = likely - batch["reference"].to(likely.device)
        return self.beta * (gained[:, 0] - gained[:, 1])

    def _pair(self, row: Row, place: str) -> _Pair:
        prompt = row.get("prompt")
        if not isinstance(prompt, str | list) or not prompt:
            raise DataError(f"{place}: field 'prompt' holds {prompt!r:.40}, neither a text nor messages")
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = messages_of({"messages": asked}, place)
        sides = [self._parts(messages, _answer(row, side, place), place) for side in ("chosen", "rejected")]
        context, longest = self.chat.context, max(len(answer) for _, answer in sides)
        prompt_tokens = sides[0][0]
        keep = min(len(prompt_tokens), max(context - longest, context // 2))
        pair = _Pair(*(_side(prompt_tokens[len(prompt_tokens) - keep :], answer, context) for _, answer in sides))
        if keep < len(prompt_tokens) or keep + longest > context:
            self._cut.add(pair.key)
        return pair

    def _parts(
        self, prompt: Conversation, answer: dict[str, str], place: str
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens before the last answer of a conversation, and those of the answer."""
        rendered = self.chat.rendered([*prompt, answer], place)
        if not rendered:
            raise DataError(f"{place}: field 'prompt' has no message by the user")
        tokens, learned = self.chat.read(rendered[-1])
        start = int(np.flatnonzero(learned[1:] & ~learned[:-1])[-1]) + 1
        return tokens[:start], tokens[start:][learned[start:]]


def _side(prompt: NDArray[np.int64], answer: NDArray[np.int64], context: int) -> _Side:
    learned = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return _Side(np.concatenate([prompt, answer])[:context], learned[:context])


def _answer(row: Row, side: str, place: str) -> dict[str, str]:
    """An answer, given as a text or as messages of which it is the last."""
    value = row.get(side)
    if isinstance(value, list) and value:
        last = messages_of({"messages": value}, f"{place}, field '{side}'")[-1]
        if last["role"] == "assistant":
            return last
    if not isinstance(value, str):
        raise DataError(
            f"{place}: field '{side}' holds {value!r:.40}, neither a text nor messages that end with an answer"
        )
    return {"role": "assistant", "content": value}


def _both(network: Network, batch: Batch) -> Tensor:
    """The log-likelihoods in nats of chosen and rejected answers, (batch, 2)."""
    sides = [(batch["tokens"], batch["targets"]), (batch["rejected_tokens"], batch["rejected_targets"])]
    return torch.stack([log_likelihoods(network, tokens, targets) for tokens, targets in sides], dim=1)

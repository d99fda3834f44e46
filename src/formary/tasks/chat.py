"""Chat: the assistant's next message, learned from conversations with the loss on the assistant's words alone.

Conversations become text by the model's own chat template (ChatML where it has none), and a template that was given is
saved with the model. What is learned is what has to be written after the prompts that the model will be given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from formary.data.chat import CHATML, CHATML_WITH_EOS, Rendered, render, rendered_answers, template_in
from formary.data.conversations import Conversation, composed, form_of, messages_of
from formary.data.records import RowForm
from formary.data.tokenizer import Tokenizer
from formary.errors import DataError, RecipeError, RequestError
from formary.model.config import ModelConfig, Topology
from formary.model.heads import LanguageHead
from formary.model.topologies import Decoder, Network
from formary.recipe.schema import Recipe
from formary.tasks.cross_entropy import IGNORED, cross_entropy
from formary.tasks.models import context_of, scratch_config, with_language_head
from formary.tasks.protocol import Answers, Batch, Example, Row
from formary.tasks.reading import padded, place_of

_SHOWN = 1500  # characters of the example shown before training
_LONGEST_ANSWER = 256  # tokens, for a model that does not say


class Chat:
    """The task of assistants.

    Args:
        longest_answer: tokens that an answer may have where nothing is said; learning finds the longest one.
    """

    name = "chat"
    topologies: ClassVar[tuple[Topology, ...]] = ("decoder",)
    # Several forms of rows are read as messages, so no column is a must.
    form: ClassVar[RowForm] = RowForm(columns=(), text=composed, check=messages_of)
    asks: ClassVar[tuple[str, ...]] = ("messages",)
    answers: ClassVar[Answers] = "texts"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: int,
        longest_answer: int = _LONGEST_ANSWER,
        recipe: Recipe | None = None,
    ) -> None:
        self.tokenizer, self.context, self.recipe = tokenizer, context, recipe
        self.longest_answer = max(1, min(longest_answer, context // 2))  # the prompt has the other half at least
        self.smoothing = recipe.train.label_smoothing if recipe else 0.0
        self.template = template_in(tokenizer.config) or _default_template(tokenizer)
        ids = (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
        self.variables: dict[str, Any] = {f"{role}_token": _name_of(tokenizer, token) for role, token in ids}
        self.ends = self._ends()
        self.seen: Counter[str] = Counter()  # what happened to conversations
        self.forms: Counter[str] = Counter()  # what rows were read from, other than messages

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return cls.name

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        if not rows:
            raise DataError("data.sources: there are no training rows")
        if start is not None:
            _check_decoder(start)
        task = cls(tokenizer, context=recipe.train.context, longest_answer=1, recipe=recipe)
        tokenizer.config["chat_template"] = task.template  # saved with the tokenizer, and so with the model
        return task

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        context = context_of(config, settings)
        return cls(tokenizer, context=context, longest_answer=int(settings.get("longest_answer", _LONGEST_ANSWER)))

    def settings(self) -> dict[str, Any]:
        return {"context": self.context, "longest_answer": self.longest_answer}

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(scratch_config(self.recipe, self.tokenizer, "decoder"))

    def head(self, config: ModelConfig) -> ModelConfig:
        _check_decoder(config)
        return with_language_head(config, self.tokenizer, end=self.ends[0])

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        """Conversations with `target` True at tokens that the assistant writes: (seq,) bool.

        A conversation of which nothing is learned within the context gives no example.
        """
        if not targets:
            prompts = [self.prompt(row, f"{where} {number}") for number, row in enumerate(rows, 1)]
            return [Example(np.array(prompt), row=number) for number, prompt in enumerate(prompts)]
        found = []
        for number, row in enumerate(rows):
            place = place_of(row, f"{where} {number + 1}")
            messages = self._messages(row, place)
            if all(message["role"] != "assistant" for message in messages):
                raise DataError(
                    f"{place}: the assistant says nothing, so there is nothing to learn; add a message with the role "
                    "assistant, or take the row out"
                )
            self.seen["unanswered"] += messages[-1]["role"] != "assistant"
            self.seen["opened"] += next(m["role"] for m in messages if m["role"] != "system") == "assistant"
            taught = False
            for rendered in self.rendered(messages, place):
                tokens, learned = self.read(rendered)
                self.seen["cut"] += len(tokens) > self.context
                tokens, learned = tokens[: self.context], learned[: self.context]
                if learned.any():
                    found.append(Example(tokens, target=learned, row=number))
                    taught = True
            self.seen["left out"] += not taught
        if rows and not found:
            raise DataError(
                f"data.sources: no conversation has an answer to a user within {self.context} tokens; raise train.context"
            )
        if self.recipe is not None:  # while learning
            longest = max((_longest_run(example.target) for example in found), default=1)
            self.longest_answer = max(self.longest_answer, min(longest, self.context // 2))
        return found

    def collate(self, examples: Sequence[Example]) -> Batch:
        pad = self.tokenizer.pad_id or 0
        if any(example.target is None for example in examples):
            return {"tokens": padded([example.inputs for example in examples], pad)}
        targets = [np.where(example.target, example.inputs, IGNORED)[1:] for example in examples]
        return {
            "tokens": padded([example.inputs[:-1] for example in examples], pad),
            "targets": padded(targets, IGNORED),
        }

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(network, Decoder) and isinstance(network.head, LanguageHead)
        smoothing = self.smoothing if network.training else 0.0
        return cross_entropy(network.head, network(batch["tokens"]), batch["targets"], smoothing=smoothing)

    def prompt(self, row: Row, where: str) -> tuple[int, ...]:
        """The conversation up to the user's last turn, opened for the answer; of a long one the oldest turns are left out."""
        place = place_of(row, where)
        messages = self._messages(row, place)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if all(message["role"] != "user" for message in messages):
            raise DataError(f"{place}: the user says nothing to answer; add a message with the role user")
        room, shortened = self.context - self.longest_answer, False
        while len(tokens := self._opened(messages, place)) > room:
            shortened = True
            system = messages[:1] if messages[0]["role"] == "system" else []
            rest = messages[len(system) :]
            later = next((n for n, m in enumerate(rest) if n and m["role"] == "user"), None)
            if later is None:
                tokens = tokens[-room:]
                break
            messages = system + rest[later:]
        self.seen["shortened"] += shortened
        return tuple(tokens)

    def writing(self, row: Row) -> dict[str, Any]:
        return {"max_tokens": self.longest_answer}

    def generation(self, defaults: dict[str, Any]) -> dict[str, Any]:
        ends: int | list[int] = self.ends[0] if len(self.ends) == 1 else list(self.ends)
        return {**defaults, "eos_token_id": ends}

    def pair(self, row: Row) -> dict[str, str | None]:
        """The user's last turn as `source` and the answer to it as `target`, None where the row has none."""
        messages = messages_of(row, place_of(row, "row"))
        answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        asked = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
        return {"source": asked, "target": answer}

    def show(self, example: Example) -> list[str]:
        """An example as it is learned, what the assistant writes between 【 and 】."""
        edges = np.flatnonzero(np.diff(example.target.astype(np.int8))) + 1
        said = ""
        for stretch, learned in zip(np.split(example.inputs, edges), np.split(example.target, edges)):
            text = self.tokenizer.decode(stretch)
            said += f"【{text}】" if learned[0] else text
        if len(said) > _SHOWN:
            said = f"{said[: _SHOWN // 2]} [...] {said[-_SHOWN // 2 :]}"
        return ["the first conversation; what is learned stands between 【 and 】:", *said.splitlines()]

    def notes(self) -> list[str]:
        said = []
        for form, count in self.forms.items():
            rows = "1 row has" if count == 1 else f"{count:,} rows have"
            said.append(f"{rows} the form {form}, read as messages")
        for name, text in (
            (
                "cut",
                f"longer than the context of {self.context} tokens and cut to it; raise train.context to keep more",
            ),
            ("left out", "left out: no answer to a user lies within the context"),
            ("unanswered", "closed by the user's turn; that turn teaches nothing"),
            ("opened", "opened by the assistant; words before any user's are not learned as answers"),
            ("shortened", "too long to answer whole; the oldest part was left out"),
        ):
            if count := self.seen[name]:
                said.append(f"1 conversation was {text}" if count == 1 else f"{count:,} conversations were {text}")
        if not set(self.ends) & self.tokenizer.special_ids:
            said.append("the tokenizer marks no end of a turn as special; answers may run on to max_tokens")
        return said

    def rendered(self, messages: Conversation, place: str) -> list[Rendered]:
        """The conversation by the template, with what the assistant writes; see `rendered_answers`."""
        try:
            return rendered_answers(self.template, messages, **self.variables)
        except RequestError as error:
            raise DataError(f"{place}: {error}") from error

    def read(self, rendered: Rendered) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The tokens of a rendered conversation, and True at those that the assistant writes.

        Each stretch is read by itself, as the prompt is when the model is asked: no token lies across an edge.
        """
        text, edges = rendered.text, [0]
        for start, stop in rendered.answers:
            edges += [start, self._close(text, start, stop)]
        stretches = [text[start:stop] for start, stop in zip(edges, [*edges[1:], len(text)])]
        if self._adds_space:  # to every text it reads, so stretches must not be read apart
            (ids, offsets), *_ = self.tokenizer.encode_with_offsets([text])
            stretch = np.searchsorted(np.array(edges), offsets[:, 0], side="right") - 1
            return ids.astype(np.int64), stretch % 2 == 1
        read = [np.asarray(ids, dtype=np.int64) for ids in self.tokenizer.encode_batch(stretches)]
        learned = [np.full(len(ids), number % 2 == 1) for number, ids in enumerate(read)]
        return np.concatenate(read), np.concatenate(learned)

    def _close(self, text: str, start: int, stop: int) -> int:
        """Where writing ends: at an end token, not at the space that a template puts after it."""
        stripped = text[start:stop].rstrip()
        return start + len(stripped) if stripped.endswith(self._specials) else stop

    @property
    def _specials(self) -> tuple[str, ...]:
        return tuple(_name_of(self.tokenizer, token) for token in self.tokenizer.special_ids)

    @property
    def _adds_space(self) -> bool:
        ids = self.tokenizer.encode("a")
        return bool(ids) and _name_of(self.tokenizer, ids[0]).startswith(("▁", "Ġ"))

    def _ends(self) -> tuple[int, ...]:
        """The token with which the template ends an answer, and the tokenizer's own end."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        closing = []
        for rendered in self.rendered(messages, "data.tokenizer"):
            tokens, learned = self.read(rendered)
            closing = [token for token in tokens[learned].tolist() if token in self.tokenizer.special_ids][-1:]
        ends = tuple(dict.fromkeys([*closing, *([] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id])]))
        if not ends:
            raise RecipeError("data.tokenizer: task chat needs an end token (eos), and this tokenizer has none")
        return ends

    def _messages(self, row: Row, place: str) -> Conversation:
        messages = messages_of(row, place)
        if form := form_of(row):
            self.forms[form] += 1
        return messages

    def _opened(self, messages: Conversation, place: str) -> list[int]:
        try:
            return self.tokenizer.encode(render(self.template, messages, **self.variables))
        except RequestError as error:
            raise DataError(f"{place}: {error}") from error


def _default_template(tokenizer: Tokenizer) -> str:
    return CHATML if {"<|im_start|>", "<|im_end|>"} <= tokenizer.vocab.keys() else CHATML_WITH_EOS


def _name_of(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else str(tokenizer.backend.id_to_token(token) or "")


def _check_decoder(config: ModelConfig) -> None:
    if config.topology != "decoder":
        raise RecipeError(
            f"model: task chat needs a decoder, and this is an {config.topology}; take one such as SmolLM2, or one that "
            "causal_lm trained"
        )


def _longest_run(learned: NDArray[np.bool_]) -> int:
    """The longest stretch of True: of several answers, the longest."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[0::2]).max(initial=0))

"""A loaded model: text in, text out. `formary.load(path)` gives a `Model`; `generate` is what most people call.

It joins a network, its tokenizer, its generation defaults, its chat template and its task. Writing is `generation`'s,
answering rows `answers`'; reading files is `hub`'s.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch

from formary.data.chat import Message, render, template_in
from formary.data.tokenizer import Tokenizer
from formary.errors import RequestError
from formary.infer.answers import answers, rows_of
from formary.infer.engine import Request
from formary.infer.generation import Generation, Options, Writer, settings_from
from formary.infer.precision import autocast
from formary.infer.probe import Choice, prepared
from formary.infer.stepper import Stepper, evaluating
from formary.model.config import ModelConfig
from formary.model.heads import LanguageHead
from formary.model.topologies import Encoder, EncoderDecoder, Network

if TYPE_CHECKING:
    from formary.tasks.protocol import LabelledTask

__all__ = ["Candidate", "Generation", "Model", "Options", "load", "settings_from"]

_MASK = "[MASK]"
_TASKS = {  # of a model that does not say its own: by what it reads and by its head
    ("tokens", "classify"): "classify",
    ("tokens", "tag"): "tag",
    ("tokens", "span"): "answer_span",
    ("tokens", "choice"): "multiple_choice",
    ("tokens", "none"): "embed",  # a backbone alone, as sentence-transformers keeps it
    ("patches", "none"): "match_image_text",  # of two towers
    ("patches", "classify"): "classify_image",
    ("patches", "detect"): "detect",
    ("columns", "classify"): "classify_row",
    ("series", "forecast"): "forecast",
}


@dataclass(frozen=True)
class Candidate:
    """One way to fill a masked place: the token, its text, and its probability."""

    token: int
    text: str
    probability: float


class Model:
    """A network with its tokenizer.

    Args:
        defaults: generation_config.json's content: do_sample, temperature, top_k, top_p, ..., max_new_tokens.
            What is passed to a call wins over it.
        chat_template: Jinja; the tokenizer's own when left out.
    """

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        *,
        defaults: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        folder: Path | None = None,
        family: str = "formary",
        formary: Mapping[str, Any] | None = None,
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.generation_config = dict(defaults or {})
        self.defaults = settings_from(self.generation_config)
        self.chat_template = chat_template or template_in(tokenizer.config)
        self.folder = folder
        self.family = family
        self.formary = dict(formary or {})
        self.parameters = sum(parameter.numel() for parameter in network.parameters())  # before any is rounded

    @property
    def config(self) -> ModelConfig:
        """The network's config."""
        return self.network.config

    @property
    def reads_text(self) -> bool:
        """Whether what it reads is text, and not pictures, series or cells."""
        return self.config.embedder == "tokens"

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str, *, n: Literal[1] = 1, echo: bool = False, **options: Unpack[Options]
    ) -> Generation: ...
    @overload
    def generate(self, prompt: str, *, n: int, echo: bool = False, **options: Unpack[Options]) -> list[Generation]: ...
    @overload
    def generate(
        self, prompt: list[str] | tuple[str, ...], *, n: int = 1, echo: bool = False, **options: Unpack[Options]
    ) -> list[Generation]: ...
    def generate(
        self, prompt: str | list[str] | tuple[str, ...], *, n: int = 1, echo: bool = False, **options: Unpack[Options]
    ) -> Generation | list[Generation]:
        """Write on from a prompt (a decoder) or answer a source text (an encoder-decoder).

        Args:
            prompt: one text, or a list of texts, which are written together.
            n: answers to each prompt.
            echo: begin `text` with the prompt, and score the prompt's tokens too when `logprobs` is given.
            options: `max_tokens`; `stop` (a string or several); `logprobs` (0: of the chosen tokens, k: and of the
                k likeliest); `sliding` (go on beyond the context with its last half);
                `beams` with `length_penalty` and `early_stopping` (beam search instead of sampling);
                `json_schema`, `regex` or `choice` (a list of texts), which the answer then follows;
                and the fields of `SamplingSettings`: temperature, top_k, top_p, min_p, typical_p, logit_bias,
                repetition_penalty, frequency_penalty, presence_penalty, seed. Where nothing is said the model's
                defaults hold, else greedy; a filter without a temperature samples at temperature 1.

        Returns:
            one `Generation` for one text and n = 1; otherwise a flat list, the answers to each prompt together.

        Raises:
            RequestError: an unknown option, or a value that cannot be followed; the message names it.
        """
        single = isinstance(prompt, str)
        if not isinstance(prompt, str | list | tuple):
            raise RequestError(f"prompt: must be a text or a list of texts, not {type(prompt).__name__}")
        texts: list[str] = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [self.prompt_tokens(text) for text in texts]
        if echo and isinstance(self.network, EncoderDecoder):
            raise RequestError("echo: an encoder-decoder does not write on from its source text")
        written = self.writer.write(prompts, options, n=n, scored=echo)
        if echo:
            written = [replace(found, text=texts[place // n] + found.text) for place, found in enumerate(written)]
        return written[0] if single and n == 1 else written

    def stream(self, prompt: str, **options: Unpack[Options]) -> Iterator[str]:
        """`generate` for one answer, piece by piece as it is written; the pieces joined are the whole text.

        Characters are never broken, and text that may become a stop string is held back until it cannot.
        """
        return self.writer.pieces(self.prompt_tokens(prompt), options)

    def chat(
        self, messages: Sequence[Message], *, n: int = 1, **options: Unpack[Options]
    ) -> Generation | list[Generation]:
        """The assistant's next message; options as for `generate`.

        Args:
            messages: [{"role": "user", "content": "..."}, ...]; roles as the model's template knows them.
        """
        written = self.write([self.chat_tokens(messages)], options, n=n)
        return written[0] if n == 1 else written

    def stream_chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Iterator[str]:
        """`chat`, piece by piece."""
        return self.writer.pieces(self.chat_tokens(messages), options)

    def chat_tokens(self, messages: Sequence[Message], **variables: Any) -> tuple[int, ...]:
        """The conversation as the model reads it; the template writes special tokens itself, none is added."""
        return tuple(self.tokenizer.encode(self.render_chat(messages, **variables)))

    def render_chat(self, messages: Sequence[Message], **variables: Any) -> str:
        """The conversation as text, by the model's chat template.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise RequestError(
                "chat: this model has no chat template, so it was not trained to chat; use generate, "
                "or train it with task chat"
            )
        tokens = {f"{role}_token": self._name_of(getattr(self.tokenizer, f"{role}_id")) for role in ("bos", "eos")}
        return render(self.chat_template, messages, **{**tokens, **variables})

    def score(self, texts: Sequence[str], targets: Sequence[str] | None = None) -> list[list[float]]:
        """The log-probability (natural) of every token of each text.

        A decoder's first token is judged after its start token (bos, else eos); for a model with neither it is nan.

        Args:
            targets: an encoder-decoder's target texts; `texts` are its sources, and the targets are scored.

        Raises:
            RequestError: a text longer than the context, or a model of another kind.
        """
        if isinstance(texts, str):
            raise RequestError("texts: pass a list of texts, such as [text]")
        if (targets is not None) != isinstance(self.network, EncoderDecoder):
            raise RequestError("targets: an encoder-decoder needs them, and no other model takes them")
        if targets is None:
            return [self._score_tokens(self.tokenizer.encode(text)) for text in texts]
        if len(targets) != len(texts):
            raise RequestError(f"targets: {len(targets)} for {len(texts)} texts")
        return [self._score_target(source, target) for source, target in zip(texts, targets)]

    def fill(self, text: str, *, top: int = 5) -> list[list[Candidate]]:
        """For each mask in the text the likeliest tokens there, best first.

        Args:
            text: with [MASK], or the model's own mask token, at the places to fill.

        Raises:
            RequestError: no mask in the text, too long a text, or a model without a masked head.
        """
        network, mask_id = self.network, self.tokenizer.mask_id
        if not isinstance(network, Encoder) or not isinstance(network.head, LanguageHead) or mask_id is None:
            raise RequestError("fill: needs an encoder trained with masks, such as BERT; use generate for this model")
        name = self._name_of(mask_id)
        tokens = list(self.tokenizer.backend.encode(text.replace(_MASK, name)).ids)
        places = [place for place, token in enumerate(tokens) if token == mask_id]
        if not places:
            raise RequestError(f"text: holds no {_MASK} to fill: {text[:80]!r}")
        self._check_length(tokens)
        with torch.inference_mode(), evaluating(network):
            hidden = network(torch.tensor([tokens], device=network.head.weight.device))
            probabilities = network.head(hidden[0, places]).float().softmax(dim=-1)
        values, ids = probabilities.topk(min(top, probabilities.shape[-1]), dim=-1)
        return [
            [Candidate(token, self._text_of(token), value) for token, value in zip(row_ids, row_values)]
            for row_ids, row_values in zip(ids.tolist(), values.tolist())
        ]

    def predict(
        self, inputs: Sequence[str | Mapping[str, Any]], *, precision: str = "auto", **options: Any
    ) -> list[dict[str, Any]]:
        """The answers of a model with a task's head: labels, tags, spans, translations, vectors.

        Args:
            inputs: texts, or rows with the task's columns (`text`, `tokens`, `question` and `context`, `source`, ...).
            precision: "float32", "bfloat16", or "auto": bfloat16 where the processor is faster at it, but float32 for
                vectors. Texts are written in the precision of the weights.
            options: of the task; for tasks that write those of `generate`, such as `beams`.

        Returns:
            one dict for each input, such as {"label": "spam", "probability": 0.98, "probabilities": {...}}.

        Raises:
            RequestError: the model has no task that predicts. DataError: an input is not as the task needs it.
        """
        task = self.task
        if isinstance(inputs, str | Mapping):
            raise RequestError("inputs: pass a list of texts or rows, such as [text]")
        rows = rows_of(task, inputs)
        if precision == "auto" and task.answers in ("vectors", "retrieval"):
            precision = "float32"
        device = next(self.network.parameters()).device
        return answers(task, self.network, rows, precision=partial(autocast, precision, device), **options)

    @cached_property
    def task(self) -> LabelledTask:
        """What the model was trained to answer: as its folder says, else as its head says.

        Raises:
            RequestError: it has neither, so it only writes or fills in.
        """
        kind = self._task_kind
        if kind is None:
            what = "fills in masks" if isinstance(self.network, Encoder) else "writes text"
            raise RequestError(
                f"predict: this model {what} and has no head for a task; use generate, or train it with task classify "
                "or the like"
            )
        return kind.of_model(self.config, self.tokenizer, self.formary.get("settings", {}))

    @property
    def has_task(self) -> bool:
        """Whether it was trained to answer, and does not only write or fill in."""
        return self._task_kind is not None

    def with_task_of(self, other: Model) -> Model:
        """This model for the task of another, such as an untouched one beside one that was fine-tuned from it."""
        changed = copy.copy(self)
        changed.formary = {name: other.formary[name] for name in ("task", "settings") if name in other.formary}
        changed.__dict__.pop("task", None)  # what was cached is of before
        return changed

    @property
    def _task_kind(self) -> type[LabelledTask] | None:
        from formary.tasks.registry import labelled_task

        name = self.formary.get("task") or _TASKS.get((self.config.embedder, self.config.head))
        kind = labelled_task(name) if name else None
        fitting = getattr(kind, "topologies", ())
        return None if fitting and self.config.topology not in fitting else kind

    def in_precision(self, precision: str) -> tuple[Model, Choice]:
        """This model in "float32", "int8", or ("auto") what measures best here, and why; see `probe.prepared`."""
        network, choice = prepared(self.network, self.tokenizer, precision)
        changed = copy.copy(self)
        changed.network = network
        changed.__dict__.pop("task", None)
        return changed, choice

    @property
    def writer(self) -> Writer:
        """What writes with this network: tokens in, generations out."""
        return Writer(self.network, self.tokenizer, self.generation_config)

    def write(self, prompts: Sequence[tuple[int, ...]], options: Mapping[str, Any], *, n: int = 1) -> list[Generation]:
        """`generate` for prompts that are tokens already, exactly as the network reads them."""
        return self.writer.write(prompts, options, n=n)

    def request(
        self, prompt: tuple[int, ...], n: int, options: Mapping[str, Any]
    ) -> tuple[Request, dict[str, Any] | None]:
        """The engine's request for the options of `generate`, and those of beam search; see `Writer.request`."""
        return self.writer.request(prompt, n, options)

    @property
    def text_decoder(self) -> Any:
        """Makes a fresh `TextDecoder` for an answer, as the engine takes it."""
        return self.writer.text_decoder

    def stop_tokens(self) -> frozenset[int]:
        """The ids that end an answer."""
        return self.writer.stop_tokens()

    def prompt_tokens(self, text: str) -> tuple[int, ...]:
        """The prompt as the family reads it: with the tokens its tokenizer puts around a text, at least one."""
        if not isinstance(text, str):
            raise RequestError(f"prompt: must be a text or a list of texts, not {type(text).__name__}")
        tokens = tuple(self.tokenizer.backend.encode(text).ids)
        start = self._start_token()
        return tokens if tokens or start is None else (start,)

    def _start_token(self) -> int | None:
        ids = (self.config.bos_id, self.tokenizer.bos_id, self.config.eos_id, self.tokenizer.eos_id)
        return next((token for token in ids if token is not None), None)

    def _score_tokens(self, tokens: list[int]) -> list[float]:
        start = self._start_token()
        self._check_length(tokens)
        stepper = Stepper(self.network, slots=1, context=1)
        if start is not None and len(tokens) <= self.config.context:
            return stepper.token_logprobs([start, *tokens])
        return [float("nan"), *stepper.token_logprobs(tokens)] if tokens else []

    def _score_target(self, source: str, target: str) -> list[float]:
        source_tokens = self.prompt_tokens(source)
        tokens = [*self.writer.prefix()[:1], *self.prompt_tokens(target)]
        self._check_length(tokens[1:])
        return Stepper(self.network, slots=1, context=1).token_logprobs(tokens, source_tokens)

    def _check_length(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self.config.context:
            raise RequestError(f"text: {len(tokens)} tokens are more than the model's context of {self.config.context}")

    def _name_of(self, token: int | None) -> str:
        return "" if token is None else str(self.tokenizer.backend.id_to_token(token) or "")

    def _text_of(self, token: int) -> str:
        return self.tokenizer.token_bytes[token].decode(errors="replace").strip() or self._name_of(token)


def load(path: str | Path, *, precision: str = "float32") -> Model:
    """Open a trained model: a folder in Hugging Face layout, a .gguf file, or a hub id.

    Args:
        precision: "float32" keeps its weights; "int8" rounds its matrices to eight bits (see `infer.kernels`);
            "auto" measures both here, and takes int8 where that is faster and as good.

    Raises:
        CheckpointError: it is not there, or cannot be opened safely; the message says what to do.
    """
    from formary.data import tokenizer
    from formary.hub import checkpoint

    loaded = checkpoint.load(path)
    if not loaded.config.vocab_size:
        words = tokenizer.wordless()
    elif loaded.tokenizer is None:
        words = tokenizer.load(loaded.folder)
    else:  # a GGUF file has its tokenizer inside
        template = loaded.chat_template
        ids = {"bos": loaded.config.bos_id, "eos": loaded.config.eos_id, "pad": loaded.config.pad_id}
        names = {f"{role}_token": loaded.tokenizer.id_to_token(i) for role, i in ids.items() if i is not None}
        words = Tokenizer(loaded.tokenizer, names | ({"chat_template": template} if template else {}))
    model = Model(
        loaded.network,
        words,
        defaults=loaded.generation,
        chat_template=loaded.chat_template,
        folder=loaded.folder,
        family=loaded.family,
        formary=loaded.formary,
    )
    return model.in_precision(precision)[0]

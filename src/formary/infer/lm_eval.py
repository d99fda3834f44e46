"""Lets EleutherAI's lm-evaluation-harness (the extra `lm-eval`) drive a Formary model, in process.

`lm_eval.simple_evaluate(model=FormaryLM("runs/novel/model"), tasks=[...])`; the harness brings tasks and metrics, the
likelihoods are `tasks.likelihood`'s and the texts the engine's. Importing this module imports the harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from formary.errors import MissingExtra, RequestError
from formary.infer.loaded import Model, load
from formary.tasks.likelihood import likelihoods, writes

try:
    _harness: Any = import_module("lm_eval.api.model")
    _windows: Any = import_module("lm_eval.utils")
except ImportError as error:
    raise MissingExtra("lm-eval", "lm-evaluation-harness: lm_eval") from error

_MAX_TOKENS = 256  # written where a task does not say; the harness's own default
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class FormaryLM(_harness.TemplateLM):  # type: ignore[misc]
    """A Formary model as the harness sees one.

    Args:
        model: a loaded model, or what `formary.load` takes.

    Raises:
        RequestError: not a causal model that writes.
    """

    backend = "causal"

    def __init__(self, model: Model | str | Path, **options: Any) -> None:
        super().__init__()
        self.model = model if isinstance(model, Model) else load(model)
        if not writes(self.model.network):
            raise RequestError(f"{model}: the harness needs a causal model that writes text, such as a GPT")
        ignored = sorted(set(options) - {"batch_size", "max_batch_size", "device"})  # the harness passes these three
        if ignored:
            raise RequestError(f"FormaryLM: there is no option '{ignored[0]}'; it has model")

    @property
    def max_length(self) -> int:
        """The context in tokens."""
        return self.model.config.context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; the start token where there is none, else the first of all."""
        ids = (self.model.tokenizer.eos_id, self.model.config.eos_id, self.model.tokenizer.bos_id)
        return next((token for token in ids if token is not None), 0)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the start token, else the token that ends texts."""
        token = self.model.tokenizer.bos_id
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        """By which the harness keeps its cache of requests."""
        return str(self.model.folder or self.model.family).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own template; the harness's named ones are not known here."""
        return self.model.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the model's chat template."""
        return self.model.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """A text as tokens; with the special tokens of the model's tokenizer unless told otherwise."""
        return list(self.model.tokenizer.backend.encode(string, add_special_tokens=add_special_tokens is not False).ids)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in the harness's windows: each token is judged once."""
        pairs, sizes = [], []
        for (text,) in (request.args for request in requests):
            windows = _windows.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            made = [_windows.make_disjoint_window(window) for window in windows]
            pairs += made
            sizes.append(len(made))
        scores = iter(likelihoods(self.model.network, pairs))
        totals = [sum(next(scores).logprob for _ in range(size)) for size in sizes]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context until a stop string; greedy unless a task samples."""
        found: list[str] = [""] * len(requests)
        together: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            together.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in together.values():
            options = self._options(requests[numbers[0]].args[1])
            room = self.max_length - options["max_tokens"]
            if room < 1:
                raise RequestError(
                    f"generate_until: {options['max_tokens']} tokens to write leave no room for a prompt in the context "
                    f"of {self.max_length}; set max_gen_toks in the task's generation_kwargs"
                )
            prompts = [tuple(self.tok_encode(requests[n].args[0])[-room:]) or (self.prefix_token_id,) for n in numbers]
            for number, written in zip(numbers, self.model.write(prompts, options), strict=True):
                found[number] = written.text
                self.cache_hook.add_partial("generate_until", requests[number].args, written.text)
        return found

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The harness's generation_kwargs as options of `Model.write`."""
        until = given.get("until") or []
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        most = given.get("max_gen_toks", given.get("max_new_tokens", _MAX_TOKENS))
        options: dict[str, Any] = {"max_tokens": int(most), "stop": stop, "temperature": 0.0}
        if given.get("do_sample"):
            options |= {"temperature": 1.0} | {name: given[name] for name in _SAMPLING if given.get(name)}
        return options

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        found = [
            tuple(one) for one in likelihoods(self.model.network, [(before, after) for _, before, after in requests])
        ]
        for (key, _, _), one in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", key, one)
        return found  # type: ignore[return-value]

"""In which precision a model had better run here: measured on the model itself, in some seconds, when it is opened.

Eight bits are taken where they are faster and raise the perplexity of a real text by at most one per cent; otherwise
the model stays as it is. More of the text is read until it is clear on which side of that the rise lies, or it ends. `kernels` does the rounding; this decides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from formary.data.tokenizer import Tokenizer
from formary.errors import RequestError
from formary.infer.fused_encoder import FusedEncoder, fits
from formary.infer.kernels import available, quantised
from formary.infer.stepper import Stepper, writes
from formary.model.topologies import EncoderDecoder, Network

PRECISIONS = ("auto", "float32", "int8")
MOST_RISE = 0.01
"""The rise of perplexity, as a share, up to which eight bits are taken without being asked for."""
LEAST_SPEEDUP = 1.1

_CALIBRATION = 384  # tokens that choose how a layer is rounded
_JUDGING = 512  # tokens whose perplexity is compared at a time
_FEWEST = 64  # that are worth comparing
_MOST_PARTS = 5
_TEXTS = ("sample.txt", "sample.zh.txt")  # English and Chinese
_CLEAR = 3.0  # standard errors between the rise and what is allowed, from which on no more is read
_STEPS = 12
_LARGEST = 700.0  # whose exponential is a number


@dataclass(frozen=True)
class Choice:
    """What was decided, and why.

    Args:
        precision: "float32" or "int8".
        reason: one sentence.
        speedup: seconds of a token in float32 over those in int8, when measured.
        rise: perplexity in int8 over that in float32, less 1, when measured.
    """

    precision: str
    reason: str
    speedup: float | None = None
    rise: float | None = None


def prepared(network: Network, tokenizer: Tokenizer, precision: str = "auto") -> tuple[Network, Choice]:
    """A network in the precision asked for, or for "auto" in the one that measures best here.

    The weights of the network that was given are not changed; embeddings and norms are shared.

    Raises:
        RequestError: another precision, or "int8" where it cannot be had.
    """
    if precision not in PRECISIONS:
        raise RequestError(f"precision: {precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
    if precision == "float32":
        return network, Choice("float32", "asked for")
    if not network.config.reads_text:
        if precision == "int8":
            raise RequestError(
                f"precision: int8 is for models that read tokens; this one reads {network.config.embedder}"
            )
        return network, Choice("float32", f"it reads {network.config.embedder}")
    if precision == "auto":
        parameter = next(network.parameters())
        if not writes(network):
            return network, Choice("float32", "it reads and does not write")
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu" or "int8" not in available():
            return network, Choice("float32", "there is no eight-bit product for it here")
    first, parts = _sample(network, tokenizer)
    source = first[:, : network.config.encoder.context] if network.config.encoder is not None else None
    rounded = quantised(network, first, source=source)
    if fits(rounded):
        rounded = FusedEncoder(rounded)
    if not writes(network):
        return rounded, Choice("int8", "asked for")
    if precision == "int8":  # nothing hangs on how clear the rise is
        return rounded, Choice("int8", "asked for", rise=_rise(network, rounded, parts[:1], source))
    rise = _rise(network, rounded, parts, source)
    if not rise <= MOST_RISE:  # also when it is not a number
        return network, Choice("float32", f"in int8 the perplexity of a text rises by {rise:.1%}", rise=rise)
    speedup = _speedup(network, rounded)
    if speedup < LEAST_SPEEDUP:
        return network, Choice(
            "float32", f"it is so small that int8 is only {speedup:.1f} times as fast", speedup, rise
        )
    return rounded, Choice("int8", f"{speedup:.1f} times as fast, perplexity {rise:+.1%}", speedup, rise)


def _rise(network: Network, rounded: Network, parts: Sequence[Tensor], source: Tensor | None) -> float:
    """The perplexity of `rounded` over that of `network`, less 1, on as many parts of the text as make it clear."""
    differences = np.zeros(0)
    for part in parts:
        with np.errstate(invalid="ignore"):
            found = _logprobs(network, part, source) - _logprobs(rounded, part, source)
        differences = np.append(differences, found)
        if not np.isfinite(differences).all():
            return math.nan
        error = differences.std() / len(differences) ** 0.5
        if abs(differences.mean() - math.log1p(MOST_RISE)) > _CLEAR * error:
            break
    return math.expm1(min(float(differences.mean()), _LARGEST))


def _logprobs(network: Network, tokens: Tensor, source: Tensor | None) -> NDArray[np.float64]:
    """The log-probability of each token (1, seq) but the first, given those before it: (seq - 1,)."""
    read = None if source is None else source[0].tolist()
    return np.array(Stepper(network, slots=1, context=1).token_logprobs(tokens[0].tolist(), read), dtype=np.float64)


def _sample(network: Network, tokenizer: Tokenizer) -> tuple[Tensor, list[Tensor]]:
    """Tokens of a real text that calibrate, (1, seq), and parts of it that judge, each (1, seq).

    The text is English or Chinese, whichever the network finds likelier; of what it cannot read its rounding says little. A
    vocabulary that can spell neither gives its own tokens in a scattered order.
    """
    config, unknown = network.config, tokenizer.unk_id
    package = resources.files("formary.infer")
    readable = []
    for name in _TEXTS:
        text = package.joinpath(name).read_text(encoding="utf-8")
        tokens = tokenizer.encode(text)
        if len(tokens) >= _FEWEST and (unknown is None or tokens.count(unknown) <= len(tokens) // 2):
            readable.append((len(text.encode()) / len(tokens), tokens))
    if not readable:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (_CALIBRATION + _JUDGING,), generator=generator).tolist()
    elif len(readable) == 1 or not writes(network):
        tokens = readable[0][1]
    else:
        _, tokens = max(readable, key=lambda one: _likely(network, one[1]) / one[0])
    half = min(_CALIBRATION, len(tokens) // 2)
    size = min(_JUDGING, config.context)
    parts = [tokens[start : start + size] for start in range(half, len(tokens), size)][:_MOST_PARTS]
    worth = [part for part in parts if len(part) >= min(_FEWEST, size)] or parts[:1]
    return torch.tensor([tokens[: min(half, config.context)]]), [torch.tensor([part]) for part in worth]


def _likely(network: Network, tokens: Sequence[int]) -> float:
    """The mean log-probability of a text's first tokens."""
    first = torch.tensor([tokens[: min(_FEWEST, network.config.context)]])
    return float(_logprobs(network, first, first if network.config.encoder is not None else None).mean())


def _speedup(network: Network, rounded: Network) -> float:
    """Seconds of one token in float32 over those in int8, at best, in turn."""
    steppers = [Stepper(each, slots=1, context=_STEPS + 3) for each in (network, rounded)]
    times: list[list[float]] = [[], []]
    for stepper in steppers:
        source = [[0]] if isinstance(stepper.network, EncoderDecoder) else []
        stepper.prefill(0, [[0]], source)
    for _ in range(_STEPS):
        for stepper, taken in zip(steppers, times):
            begin = time.perf_counter()
            stepper.decode([0])
            taken.append(time.perf_counter() - begin)
    before, after = (min(taken) for taken in times)  # other work on the machine only ever adds
    return before / after

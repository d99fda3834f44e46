"""In which precision a model had better run here: measured on the model itself, in a second or two, when it is opened.

Eight bits are taken where they are faster and raise the perplexity of a real text by at most one per cent; otherwise
the model stays as it is. `kernels` does the rounding; this decides.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from formary.data.tokenizer import Tokenizer
from formary.errors import RequestError
from formary.infer.fused_encoder import FusedEncoder, fits
from formary.infer.kernels import available, quantised
from formary.infer.stepper import Stepper, writes
from formary.model.config import ModelConfig
from formary.model.topologies import EncoderDecoder, Network

PRECISIONS = ("auto", "float32", "int8")
MOST_RISE = 0.01
"""The rise of perplexity, as a share, up to which eight bits are taken without being asked for."""
LEAST_SPEEDUP = 1.1

_CALIBRATION = 384  # tokens that choose how a layer is rounded
_JUDGING = 512  # tokens whose perplexity is compared
_STEPS = 12


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
    if precision == "auto":
        parameter = next(network.parameters())
        if not writes(network):
            return network, Choice("float32", "it reads and does not write")
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu" or "int8" not in available():
            return network, Choice("float32", "there is no eight-bit product for it here")
    first, second = _sample(tokenizer, network.config)
    source = first[:, : network.config.encoder.context] if network.config.encoder is not None else None
    rounded = quantised(network, first, source=source)
    if fits(rounded):
        rounded = FusedEncoder(rounded)
    if not writes(network):
        return rounded, Choice("int8", "asked for")
    rise = perplexity(rounded, second, source) / perplexity(network, second, source) - 1
    if precision == "int8":
        return rounded, Choice("int8", "asked for", rise=rise)
    if not rise <= MOST_RISE:  # also when it is not a number
        return network, Choice("float32", f"in int8 the perplexity of a text rises by {rise:.1%}", rise=rise)
    speedup = _speedup(network, rounded)
    if speedup < LEAST_SPEEDUP:
        return network, Choice(
            "float32", f"it is so small that int8 is only {speedup:.1f} times as fast", speedup, rise
        )
    return rounded, Choice("int8", f"{speedup:.1f} times as fast, perplexity {rise:+.1%}", speedup, rise)


def perplexity(network: Network, tokens: Tensor, source: Tensor | None = None) -> float:
    """exp of the mean loss of each token (1, seq) but the first, given those before it."""
    read = None if source is None else source[0].tolist()
    logprobs = Stepper(network, slots=1, context=1).token_logprobs(tokens[0].tolist(), read)
    return math.exp(min(-sum(logprobs) / len(logprobs), 700.0))


def _sample(tokenizer: Tokenizer, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Tokens of a real text that calibrate and tokens that judge, each (1, seq).

    A vocabulary that cannot spell the text gives its own tokens in a scattered order.
    """
    text = resources.files("formary.infer").joinpath("sample.txt").read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)
    unknown = tokenizer.unk_id
    if len(tokens) < 64 or (unknown is not None and tokens.count(unknown) > len(tokens) // 2):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (_CALIBRATION + _JUDGING,), generator=generator).tolist()
    context = config.context
    half = min(_CALIBRATION, len(tokens) // 2)
    calibrating, judging = tokens[: min(half, context)], tokens[half : half + min(_JUDGING, context)]
    return torch.tensor([calibrating]), torch.tensor([judging])


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

"""How likely a causal model finds texts after other texts: what choices and language-model harnesses are scored by.

Continuations of like length are read together, and logits are made at their tokens alone. Which text is asked and what
follows from its likelihood, others decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from formary.data.buckets import by_length
from formary.data.tokenizer import Tokenizer
from formary.errors import RequestError
from formary.model.heads import LanguageHead
from formary.model.topologies import Decoder, Network
from formary.tasks.cross_entropy import IGNORED
from formary.tasks.protocol import Precision
from formary.tasks.reading import padded

_TOKENS = 4096  # padded tokens in a batch


class Likelihood(NamedTuple):
    """Of one continuation: its summed log-probability in nats, and whether greedy decoding would have written it."""

    logprob: float
    greedy: bool


def writes(network: Network) -> bool:
    """Whether a network is a causal model that writes text: only such a one has likelihoods."""
    return isinstance(network, Decoder) and isinstance(network.head, LanguageHead)


def log_likelihoods(network: Network, tokens: Tensor, targets: Tensor) -> Tensor:
    """The summed log-probability of each sequence's targets, (batch,); `IGNORED` ones do not count.

    The logits of one sequence at a time are held, and made again for the gradient.
    """
    assert isinstance(network, Decoder) and isinstance(network.head, LanguageHead)
    head = network.head

    def one(hidden: Tensor, wanted: Tensor) -> Tensor:
        return -F.cross_entropy(head(hidden).float(), wanted, reduction="sum")

    found = []
    for hidden, wanted in zip(network(tokens), targets):
        scored = wanted != IGNORED
        rows = hidden[scored], wanted[scored]
        found.append(checkpoint(one, *rows, use_reentrant=False) if torch.is_grad_enabled() else one(*rows))
    return torch.stack(found)


@torch.inference_mode()
def likelihoods(
    network: Network, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, precision: Precision = nullcontext
) -> list[Likelihood]:
    """The likelihood of each continuation after its context, both as tokens, in order.

    Of what is longer than the context of the network the beginning is left out. An empty continuation is certain.

    Raises:
        RequestError: not a causal model that writes, or nothing stands before a continuation.
    """
    if not isinstance(network, Decoder) or not isinstance(network.head, LanguageHead):
        raise RequestError(
            "likelihood: needs a causal model that writes text, such as a GPT; this one is "
            + ("a classifier" if isinstance(network, Decoder) else f"an {network.config.topology}")
        )
    head, context = network.head, network.config.context
    if not all(before for before, _ in pairs):
        raise RequestError("likelihood: at least one token must stand before a continuation, such as the start token")
    whole = [np.array([*before, *after][-(context + 1) :], dtype=np.int64) for before, after in pairs]
    sizes = [min(len(after), len(tokens) - 1) for (_, after), tokens in zip(pairs, whole)]
    found = [Likelihood(0.0, True)] * len(pairs)
    training = network.training
    network.eval()
    try:
        for numbers in by_length([len(tokens) - 1 for tokens in whole], tokens=_TOKENS):
            tokens = padded([whole[n][: max(len(whole[n]) - 1, 1)] for n in numbers], 0).to(head.weight.device)
            with precision():
                hidden = network(tokens)
            for states, number in zip(hidden, numbers):
                size, length = sizes[number], len(whole[number])
                if not size:
                    continue
                wanted = torch.from_numpy(whole[number][length - size :]).to(states.device)
                with precision():
                    logits = head(states[length - 1 - size : length - 1])
                table = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
                chosen = table.gather(1, wanted[:, None])[:, 0]
                found[number] = Likelihood(float(chosen.sum()), bool((table.argmax(dim=-1) == wanted).all()))
    finally:
        network.train(training)
    return found


def split_tokens(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """A context and its continuation as tokens, read as one text: white space at the end belongs to what follows.

    Special tokens stand where the model's tokenizer puts them; a context without tokens is the start token.
    """
    space = context[len(context.rstrip()) :]
    before = tokenizer.backend.encode(context.removesuffix(space) if space else context).ids
    whole = tokenizer.backend.encode(context + continuation).ids
    if before:
        return list(before), list(whole[len(before) :])
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return ([start] if start is not None else []), list(whole)

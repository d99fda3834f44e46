"""Beam search against trying every sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from formary.errors import RequestError
from formary.infer.beam import beam_search
from formary.infer.engine import Engine, Request
from formary.model.topologies import EncoderDecoder, Network

Make = Callable[..., Network]
EOS = 3


@torch.no_grad()
def every_sequence(network: Network, prompt: tuple[int, ...], longest: int) -> dict[tuple[int, ...], float]:
    """The log-probability of all sequences that end with EOS or have the full length."""
    found = {}
    for length in range(1, longest + 1):
        for tokens in itertools.product(range(network.config.vocab_size), repeat=length):
            ended = tokens[-1] == EOS
            if EOS in tokens[:-1] or (length < longest and not ended):
                continue
            if isinstance(network, EncoderDecoder):
                start = network.config.decoder_start_id
                hidden = network(torch.tensor([prompt]), torch.tensor([[start, *tokens[:-1]]]))
            else:
                hidden = network(torch.tensor([[*prompt, *tokens[:-1]]]))
            table = network.head(hidden[0, -length:]).log_softmax(-1)
            found[tokens] = float(table[range(length), list(tokens)].sum())
    return found


@pytest.mark.parametrize("name", ["gpt-mini", "seq2seq-mini", "bart-base"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_with_enough_beams_it_finds_the_best_of_all_sequences(name: str, penalty: float, make_network: Make) -> None:
    network = make_network(name, vocab_size=4, context=16)
    prompt, longest = (1, 2), 4
    scores = {
        tokens: total / len(tokens) ** penalty for tokens, total in every_sequence(network, prompt, longest).items()
    }
    best = sorted(scores, key=lambda tokens: -scores[tokens])[:5]
    seq2seq = isinstance(network, EncoderDecoder)
    found = beam_search(
        network,
        (network.config.decoder_start_id,) if seq2seq else prompt,
        source=prompt if seq2seq else None,
        beams=4**longest,
        n=5,
        max_tokens=longest,
        length_penalty=penalty,
        early_stopping="never",
        stop_tokens=frozenset([EOS]),
    )
    assert [hypothesis.tokens for hypothesis in found] == best
    assert [hypothesis.score for hypothesis in found] == pytest.approx([scores[tokens] for tokens in best])
    assert [hypothesis.finish for hypothesis in found] == ["stop" if t[-1] == EOS else "length" for t in best]


def test_one_beam_is_greedy(make_network: Make) -> None:
    network = make_network("gpt2-mini")
    greedy = [event.token for event in Engine(network).generate([Request((1, 2), max_tokens=10)])]
    assert beam_search(network, (1, 2), beams=1, max_tokens=10)[0].tokens == tuple(greedy)


def test_it_ends_at_the_context(make_network: Make) -> None:
    network = make_network("gpt2-mini", context=8)
    assert len(beam_search(network, (1, 2), beams=3, max_tokens=99)[0].tokens) == 7


def test_numbers_that_do_not_fit_are_named(make_network: Make) -> None:
    network = make_network("gpt2-mini", context=8)
    for options, named in [
        ({"n": 5}, "n = 5"),
        ({"beams": 0}, "beams"),
        ({"early_stopping": "maybe"}, "early_stopping"),
    ]:
        with pytest.raises(RequestError, match=named):
            beam_search(network, (1, 2), **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="context"):
        beam_search(network, tuple(range(9)))

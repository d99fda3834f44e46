"""Decoding with value embeddings and capped logits: cache, guesses and eight bits give what a full forward pass gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from formary.infer.engine import Engine, Request
from formary.infer.fused import fits
from formary.infer.kernels import available, quantised
from formary.infer.stepper import Stepper
from formary.model.topologies import Network, build
from formary.recipe.presets import preset

Make = Callable[..., Network]
SWITCHES: list[dict[str, Any]] = [
    {"value_embeddings": 1},
    {"logit_cap": 2.0},
    {"value_embeddings": 1, "logit_cap": 2.0, "activation": "relu2", "gated": False},
]
PROMPTS = [(3, 1, 4, 1, 5, 9), (2,), (6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3)]


def recomputed(network: Network, prompt: tuple[int, ...], count: int) -> list[int]:
    answer: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            answer.append(int(network.head(network(torch.tensor([[*prompt, *answer]]))[0, -1]).argmax()))
    return answer


def written(engine: Engine, speculate: bool) -> list[list[int]]:
    requests = [Request(prompt, max_tokens=14, stop_tokens=frozenset(), speculate=speculate) for prompt in PROMPTS]
    found: dict[Any, list[int]] = {}
    for event in engine.generate(requests):
        found.setdefault(event.request, []).append(event.token)
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("speculate", [False, True])
def test_greedy_with_the_cache_and_with_guesses_equals_recomputing_everything(
    switches: dict[str, Any], speculate: bool, make_network: Make
) -> None:
    network = make_network("gpt-mini", **switches)
    expected = [recomputed(network, prompt, 14) for prompt in PROMPTS]
    assert written(Engine(network), speculate) == expected
    assert written(Engine(network, draft=make_network("gpt-mini", seed=5, **switches)), speculate) == expected


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_logits_are_the_same_however_the_tokens_are_read(switches: dict[str, Any], make_network: Make) -> None:
    network = make_network("gpt-mini", **switches)
    text = list(PROMPTS[2])
    with torch.no_grad():
        expected = network.head(network(torch.tensor([text])))[0]
    stepper = Stepper(network, slots=2)
    torch.testing.assert_close(stepper.prefill(0, [text, [1, 2]])[0], expected[-1])
    stepper.prefill(0, [text[:4]])
    torch.testing.assert_close(stepper.verify([text[4:8]])[0], expected[4:8])
    torch.testing.assert_close(stepper.decode([text[8]])[0], expected[8])


@pytest.mark.skipif("int8" not in available(), reason="this machine has no eight-bit product")
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_in_eight_bits_the_answers_are_near_and_the_cache_changes_nothing(switches: dict[str, Any]) -> None:
    network = build(preset("gpt-mini", vocab_size=60, context=200, size="2x64", switches=switches), seed=0).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    read = torch.randint(60, (1, 96), generator=torch.Generator().manual_seed(0))
    rounded = quantised(network, read)
    assert fits(rounded) != ("value_embeddings" in switches)  # those take the modules, one by one
    with torch.no_grad():
        exact, modules = (each.head(each(read))[0, -1] for each in (network, rounded))
    assert (modules - exact).norm() < 0.1 * exact.norm()
    cap = switches.get("logit_cap")
    assert cap is None or modules.abs().max() <= cap
    stepper = Stepper(rounded, slots=1)
    stepper.prefill(0, [read[0, :-1].tolist()])
    decoded = stepper.decode([int(read[0, -1])])[0]
    assert (decoded - modules).norm() <= 0.5 * (modules - exact).norm() + 1e-5 * exact.norm()

"""Numbers that are not finite end the answer that they belong to, and change no other: not now, and not later."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from formary.infer import kernels
from formary.infer.engine import NO_TOKEN, Engine, Event, NotFinite, Request
from formary.infer.sampling import SamplingSettings
from formary.model.topologies import Network

from .conftest import make

BROKEN = 7  # the token whose vector is not a number
CONTEXT = 160
HEALTHY = [(1, 2, 3, 4), tuple(range(8, 30)) * 4, (5, 6, 5, 6, 5, 6, 5, 6, 5)]
ENDLESS: frozenset[int] = frozenset()


def damaged(name: str, precision: str) -> Network:
    network = make(name, context=CONTEXT)
    if precision != "float64":
        network = network.float()
    if precision == "int8":
        if "int8" not in kernels.available():
            pytest.skip("this processor has no int8 kernel")
        network = kernels.quantised(network, torch.arange(8, 40)[None])
    with torch.no_grad():
        network.embedder.tokens.weight[BROKEN] = math.nan
    return network


def drained(engine: Engine) -> dict[Any, list[Event]]:
    found: dict[Any, list[Event]] = {}
    while engine.busy:
        for event in engine.step():
            found.setdefault(event.request, []).append(event)
    assert engine.free == engine.slots
    return found


def written(events: list[Event]) -> list[int]:
    assert events[-1].finish == "length"
    return [event.token for event in events]


def healthy(**options: Any) -> Iterator[Request]:
    for number, prompt in enumerate(HEALTHY):
        bias = {BROKEN: -1e6}  # which they do not write themselves
        settings = SamplingSettings(temperature=0.0 if number % 2 else 1.0, top_p=0.9, seed=number, logit_bias=bias)
        yield Request(prompt, settings, max_tokens=20, stop_tokens=ENDLESS, logprobs=0, id=number, **options)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("gpt-mini", "float64"),
        ("gpt-mini", "float32"),
        ("gpt-mini", "int8"),
        ("gpt2-mini", "float64"),
        ("seq2seq-mini", "float64"),
        ("bart-base", "float64"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [{"slots": 8}, {"slots": 5, "chunk": 16}, {"slots": 4, "prefix_cache_tokens": 512}],
    ids=["together", "in pieces", "with a prefix cache"],
)
@pytest.mark.parametrize("speculate", [False, True])
def test_one_prompt_that_breaks_the_network_ends_alone(
    name: str, precision: str, options: dict[str, Any], speculate: bool
) -> None:
    network = damaged(name, precision)
    alone = {}
    for request in healthy():
        engine = Engine(network, slots=1)
        engine.submit(request)
        alone |= {number: written(events) for number, events in drained(engine).items()}
    engine = Engine(network, **options)
    ill = [(BROKEN,), (*range(8, 30), BROKEN, 1), (*HEALTHY[1][:70], BROKEN), (*HEALTHY[0], BROKEN)]
    for _ in range(2):  # the second time in rows that held what was not finite
        for number, request in enumerate(healthy(speculate=speculate)):
            engine.submit(Request(ill[number], max_tokens=9, n=1 + number % 2, id=f"ill {number}"))
            engine.submit(request)
        engine.submit(Request(ill[3], max_tokens=9, n=2, id="ill 3"))
        found = drained(engine)
        assert {number: written(found[number]) for number in alone} == alone
        for number in range(4):
            events = found[f"ill {number}"]
            assert [(event.token, event.finish) for event in events] == [(NO_TOKEN, "error")] * (1 + number % 2)


@pytest.mark.parametrize("precision", ["float64", "int8"])
@pytest.mark.parametrize("speculate", [False, True])
def test_an_answer_that_breaks_while_it_is_written_ends_there(precision: str, speculate: bool) -> None:
    network = damaged("gpt-mini", precision)
    requests = list(healthy(speculate=speculate))
    engine = Engine(network, slots=8)
    for request in requests:
        engine.submit(request)
    alone = {number: written(events) for number, events in drained(engine).items()}
    biased = SamplingSettings(logit_bias={BROKEN: 1e6})
    engine = Engine(network, slots=4)
    engine.submit(Request((1, 2, 3), biased, max_tokens=9, stop_tokens=ENDLESS, speculate=speculate, id="ill"))
    for request in requests:
        engine.submit(request)
    found = drained(engine)
    assert [(event.token, event.finish) for event in found.pop("ill")] == [(BROKEN, None), (NO_TOKEN, "error")]
    assert {number: written(events) for number, events in found.items()} == alone
    for request in requests:
        engine.submit(request)
    assert {number: written(events) for number, events in drained(engine).items()} == alone


def test_a_guess_that_breaks_the_network_is_a_wrong_guess() -> None:
    network = damaged("gpt-mini", "float64")
    settings = SamplingSettings(logit_bias={BROKEN: -1e6})
    prompt = (1, 2, 3, 1, 2)
    found = []
    for speculate in (False, True):
        engine = Engine(network, slots=2)
        if speculate:
            engine._speculator.guess = lambda guessers, rows, rooms: [  # type: ignore[method-assign]
                [BROKEN, 3] if room > 1 else [] for room in rooms
            ]
        engine.submit(Request(prompt, settings, max_tokens=12, stop_tokens=ENDLESS, speculate=speculate))
        found.append(written(drained(engine)[0]))
        assert engine.statistics.accepted == 0
    assert found[0] == found[1]


def test_scores_of_a_prompt_that_breaks_the_network_are_no_scores() -> None:
    engine = Engine(damaged("gpt-mini", "float64"), slots=2)
    engine.submit(Request((1, BROKEN, 2), max_tokens=0, prompt_logprobs=1))
    (event,) = drained(engine)[0]
    assert event.finish == "error" and event.prompt is None


def test_who_asks_for_one_answer_is_told() -> None:
    engine = Engine(damaged("gpt-mini", "float64"), slots=2)
    with pytest.raises(NotFinite, match=r"not finite.*damaged"):
        list(engine.generate([Request((1, 2)), Request((BROKEN,))]))
    assert not engine.busy and engine.free == 2

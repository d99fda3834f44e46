"""Continuous batching: whoever joins, leaves, shares a prefix or guesses ahead, every answer is that of its request alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from formary.infer.engine import NO_TOKEN, Engine, Event, Request
from formary.infer.prefix import BLOCK
from formary.infer.sampling import SamplingSettings
from formary.model.topologies import Network

from .conftest import make

Make = Callable[..., Network]
WRITERS = ["gpt2-mini", "gpt-mini", "seq2seq-mini"]
CONTEXT = 96
SETTINGS = [
    SamplingSettings(),
    SamplingSettings(repetition_penalty=1.3),
    SamplingSettings(temperature=0.5, seed=1),
    SamplingSettings(temperature=0.9, top_k=8, frequency_penalty=0.4, seed=2),
    SamplingSettings(
        temperature=1.0, logit_bias={3: 60.0, 4: 59.0}, seed=3
    ),  # repeats itself, so that guesses are right
]
SHARED = tuple(place * 7 % 40 for place in range(2 * BLOCK))


def requests_of(count: int, seed: int) -> list[Request]:
    """Prompts that begin alike and repeat themselves, with every kind of settings."""
    rng = random.Random(seed)
    found = []
    for place in range(count):
        beginning = SHARED[: rng.choice([0, BLOCK, 2 * BLOCK])]
        phrase = [rng.randrange(40) for _ in range(rng.randint(1, 6))]
        found.append(
            Request(
                (*beginning, *(phrase * 2)),
                SETTINGS[place % len(SETTINGS)],
                max_tokens=rng.randint(1, 14),
                n=rng.choice([1, 1, 2]),
                stop_tokens=frozenset([rng.randrange(40)]),
                speculate=rng.choice([True, False, None]),
                id=place,
            )
        )
    return found


Tokens = dict[tuple[Any, int], list[int]]


def collected(events: Iterable[Event]) -> Tokens:
    found: Tokens = {}
    for event in events:
        found.setdefault((event.request, event.sample), []).append(event.token)
    return found


def drained(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    assert engine.free == engine.slots
    return events


def alone(network: Network, requests: Iterable[Request]) -> Tokens:
    found: Tokens = {}
    for request in requests:
        engine = Engine(network, slots=2)
        engine.submit(dataclasses.replace(request, speculate=False))
        found |= collected(drained(engine))
    return found


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"slots": 8},
        {"slots": 3, "chunk": 5},
        {"slots": 8, "prefix_cache_tokens": 20 * BLOCK},
        {"slots": 4, "chunk": 40, "prefix_cache_tokens": 3 * BLOCK, "draft": True},
    ],
)
def test_answers_are_those_of_the_requests_alone(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    network = make(name, context=CONTEXT).to(dtype)
    if options.get("draft"):
        options = options | {"draft": None if name == "seq2seq-mini" else network}
    requests = requests_of(12, seed=5)
    engine = Engine(network, **options)
    events: list[Event] = []
    for place, request in enumerate(requests):  # some join late
        engine.submit(request)
        for _ in range(place % 3):
            events += engine.step()
    events += drained(engine)
    assert collected(events) == alone(network, requests)
    statistics = engine.statistics
    assert statistics.generated_tokens == len(events)
    assert 0 < statistics.accepted <= statistics.proposed
    if "prefix_cache_tokens" in options and name != "seq2seq-mini":
        assert statistics.cached_tokens >= BLOCK
        assert sum(event.cached > 0 for event in events) > 0


@pytest.mark.parametrize("settings_", SETTINGS)
def test_a_draft_that_is_the_network_itself_is_right_wherever_the_answer_is_greedy(settings_: SamplingSettings) -> None:
    network = make("gpt-mini", context=CONTEXT)
    request = Request((1, 2, 3), settings_, max_tokens=30, stop_tokens=frozenset(), speculate=True)
    engine = Engine(network, draft=network)
    found = collected(engine.generate([request]))
    assert list(found.values()) == list(alone(network, [request]).values())
    statistics = engine.statistics
    if settings_ == SamplingSettings():
        assert statistics.accepted == statistics.proposed > 20
        assert statistics.steps < 8
    else:
        assert statistics.accepted < statistics.proposed


def test_a_long_prompt_does_not_hold_up_those_who_write(make_network: Make) -> None:
    network = make_network("gpt-mini", context=CONTEXT)
    engine = Engine(network, slots=2, chunk=8)
    engine.submit(Request((1, 2), max_tokens=40, stop_tokens=frozenset(), speculate=False, id="writer"))
    engine.step()
    engine.submit(Request(tuple(range(40)), max_tokens=2, stop_tokens=frozenset(), id="long"))
    for step in range(1, 6):
        events = engine.step()
        assert [event.request for event in events] == ["writer"] + ["long"] * (step == 5)


def test_several_prompts_share_a_chunk(make_network: Make) -> None:
    engine = Engine(make_network("gpt2-mini"), slots=8, chunk=5)
    for place in range(4):
        engine.submit(Request((place, 1, 2), id=place))
    assert sorted(event.request for event in engine.step()) == [0, 1, 2]  # nobody writes: 10 tokens are read
    assert (engine.active, engine.reading) == (3, 1)
    for place in range(4, 7):
        engine.submit(Request((place, 1, 2), id=place))
    assert sorted({event.request for event in engine.step()} - {0, 1, 2}) == [3, 4]
    assert (engine.active, engine.reading) == (5, 2)  # beside those who write 5: the rest of one prompt, and the next


@pytest.mark.parametrize("when", [0, 1, 2, 4])
def test_a_cancelled_request_frees_its_slots_and_disturbs_nobody(when: int, make_network: Make) -> None:
    network = make_network("gpt-mini", context=CONTEXT)
    requests = [
        Request((5, 6), max_tokens=12, stop_tokens=frozenset(), id="before"),
        Request(tuple(range(30)), max_tokens=9, n=2, stop_tokens=frozenset(), id="cancelled"),
        Request((*range(7, 27), 3), max_tokens=9, stop_tokens=frozenset(), id="after"),
    ]
    engine = Engine(network, slots=4, chunk=12, prefix_cache_tokens=256)
    for request in requests:
        engine.submit(request)
    events = [event for _ in range(when) for event in engine.step()]
    used = engine.waiting + engine.reading + engine.active
    engine.cancel("cancelled")
    assert engine.waiting + engine.reading + engine.active == used - 2
    rest = drained(engine)
    assert all(event.request != "cancelled" for event in rest)
    expected = alone(network, requests)
    found = collected(events + rest)
    assert {key: found[key] for key in expected if key[0] != "cancelled"} == {
        key: tokens for key, tokens in expected.items() if key[0] != "cancelled"
    }


def test_a_conversation_goes_on_from_what_is_kept(make_network: Make) -> None:
    network = make_network("gpt2-mini", context=CONTEXT)
    engine = Engine(network, slots=1, prefix_cache_tokens=256)
    request = Request(tuple(range(30)), max_tokens=20, stop_tokens=frozenset())
    first = [event.token for event in engine.generate([request])]
    second = dataclasses.replace(request, prompt=(*request.prompt, *first, 1, 2, 3))
    events = list(engine.generate([second]))
    assert [event.cached for event in events] == [BLOCK] + [0] * 19  # 49 tokens were in the row: one whole block
    assert collected(events) == alone(network, [dataclasses.replace(second, id=0)])
    assert engine.statistics.cached_tokens == BLOCK
    assert engine.statistics.prompt_tokens == len(request.prompt) + len(second.prompt)


def test_prompts_that_begin_alike_and_come_together_read_their_beginning_once(make_network: Make) -> None:
    engine = Engine(make_network("gpt2-mini", context=CONTEXT), slots=4, prefix_cache_tokens=256)
    for place in range(4):
        engine.submit(Request((*SHARED, place), max_tokens=1, id=place))
    events = drained(engine)
    assert sorted(event.cached for event in events) == [0] + [len(SHARED)] * 3


@pytest.mark.parametrize("chunk", [3, 256])
def test_prompt_logprobs_are_those_of_recomputing(chunk: int, make_network: Make) -> None:
    network = make_network("gpt-mini")
    prompt = tuple(place * 5 % 40 for place in range(20))
    with torch.no_grad():
        table = network.head(network(torch.tensor([prompt]))[0]).log_softmax(-1)
    expected = [float(table[place, token]) for place, token in enumerate(prompt[1:])]
    engine = Engine(network, chunk=chunk, prefix_cache_tokens=256)
    for max_tokens, n in [(0, 1), (0, 2), (2, 1), (3, 2)]:
        request = Request(prompt, max_tokens=max_tokens, n=n, prompt_logprobs=3, stop_tokens=frozenset())
        events = [*engine.generate([request])]
        scores = [event.prompt for event in events if event.prompt is not None]
        assert len(scores) == 1 and events[0].prompt is scores[0] and events[0].cached == 0
        assert scores[0].logprobs[0] is None and scores[0].top[0] == ()
        assert scores[0].logprobs[1:] == pytest.approx(expected)
        for place, top in enumerate(scores[0].top[1:]):
            assert [token for token, _ in top] == table[place].topk(3).indices.tolist()
        if max_tokens == 0:
            assert [(event.token, event.finish) for event in events] == [(NO_TOKEN, "length")] * n
        assert len(events) == n * max(max_tokens, 1)


NETWORK = make("gpt-mini", context=CONTEXT)
POOL = requests_of(10, seed=8)
EXPECTED = alone(NETWORK, POOL)


class Scheduling(RuleBasedStateMachine):
    """Requests come, are cancelled and written in any order; every answer is, or begins like, that of its request alone."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(NETWORK, slots=3, chunk=20, prefix_cache_tokens=4 * BLOCK)
        self.open: dict[str, int] = {}  # the request in the pool behind each id
        self.events: dict[str, list[Event]] = {}

    @rule(place=st.integers(0, len(POOL) - 1))
    def submit(self, place: int) -> None:
        name = f"{len(self.events)}"
        self.engine.submit(dataclasses.replace(POOL[place], id=name))
        self.open[name], self.events[name] = place, []

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            for event in self.engine.step():
                self.events[str(event.request)].append(event)
        self._close()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.open:
            name = data.draw(st.sampled_from(sorted(self.open)))
            self.engine.cancel(name)
            self._check(name, self.open.pop(name), whole=False)

    @invariant()
    def slots_add_up(self) -> None:
        engine = self.engine
        assert engine.free >= 0
        wanted = sum(POOL[place].n for place in self.open.values())
        ended = sum(event.finish is not None for name in self.open for event in self.events[name])
        assert engine.waiting + engine.reading + engine.active == wanted - ended

    def teardown(self) -> None:
        while self.engine.busy:
            self.step(1)
        assert not self.open

    def _close(self) -> None:
        for name, place in list(self.open.items()):
            if sum(event.finish is not None for event in self.events[name]) == POOL[place].n:
                self._check(name, self.open.pop(name), whole=True)

    def _check(self, name: str, place: int, *, whole: bool) -> None:
        found = collected(self.events[name])
        for sample in range(POOL[place].n):
            tokens, expected = found.get((name, sample), []), EXPECTED[place, sample]
            assert tokens == (expected if whole else expected[: len(tokens)])


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)

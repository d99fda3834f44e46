"""The engine against recomputing everything at every token, and against itself in other company."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from formary.errors import RequestError
from formary.infer.engine import Engine, Event, Request
from formary.infer.sampling import SamplingSettings
from formary.model.topologies import EncoderDecoder, Network

WRITERS = ["gpt2-mini", "gpt-mini", "seq2seq-mini", "bart-base"]
Make = Callable[..., Network]


def random_prompts(count: int, *, longest: int, vocab_size: int = 40, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))) for _ in range(count)]


@torch.no_grad()
def recomputed_logits(network: Network, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Logits after all tokens, by a forward pass over all of them without a cache."""
    if isinstance(network, EncoderDecoder):
        start = network.config.decoder_start_id
        hidden = network(torch.tensor([prompt]), torch.tensor([[start, *answer]]))
    else:
        hidden = network(torch.tensor([[*prompt, *answer]]))
    return network.head(hidden[0, -1])


def recomputed(network: Network, prompt: Sequence[int], count: int) -> list[int]:
    answer: list[int] = []
    for _ in range(count):
        answer.append(int(recomputed_logits(network, prompt, answer).argmax()))
    return answer


def answers(engine: Engine, requests: Sequence[Request]) -> dict[tuple[Any, int], list[Event]]:
    found: dict[tuple[Any, int], list[Event]] = {}
    for event in engine.generate(requests):
        found.setdefault((event.request, event.sample), []).append(event)
    return found


def tokens(engine: Engine, *requests: Request) -> list[list[int]]:
    return [[event.token for event in events] for _, events in sorted(answers(engine, requests).items())]


@pytest.mark.parametrize("name", WRITERS)
def test_greedy_with_the_cache_equals_recomputing_everything(name: str, make_network: Make) -> None:
    network = make_network(name)
    prompts = random_prompts(6, longest=18)
    requests = [Request(prompt, max_tokens=12, stop_tokens=frozenset()) for prompt in prompts]
    found = tokens(Engine(network, slots=6), *requests)
    assert found == [recomputed(network, prompt, 12) for prompt in prompts]
    assert len({token for answer in found for token in answer}) > 3  # the test would see a difference


@pytest.mark.parametrize("name", WRITERS)
def test_in_float32_the_logprobs_are_those_of_recomputing_within_rounding(name: str, make_network: Make) -> None:
    network = make_network(name).float()
    prompts = random_prompts(5, longest=18, seed=1)
    requests = [Request(prompt, max_tokens=8, logprobs=3, stop_tokens=frozenset()) for prompt in prompts]
    for (place, _), events in answers(Engine(network, slots=3), requests).items():
        for step, event in enumerate(events):
            logits = recomputed_logits(network, prompts[place], [earlier.token for earlier in events[:step]])
            expected = logits.log_softmax(-1)
            assert event.logprob == pytest.approx(float(expected[event.token]), abs=1e-4)
            assert [value for _, value in event.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
            assert float(expected.max()) - float(expected[event.token]) < 1e-4  # the likeliest, ties within rounding


MIXED = [
    SamplingSettings(),
    SamplingSettings(temperature=0.9, seed=1),
    SamplingSettings(temperature=1.3, top_k=5, seed=1),
    SamplingSettings(temperature=1.0, top_p=0.8, min_p=0.02, seed=3, repetition_penalty=1.4),
    SamplingSettings(frequency_penalty=0.8, presence_penalty=0.3),
    SamplingSettings(temperature=0.7, typical_p=0.9, logit_bias={4: 2.0, 5: -9.0}, seed=2),
]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("slots", [1, 4, 16])
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(name: str, slots: int, make_network: Make) -> None:
    network = make_network(name)
    prompts = random_prompts(len(MIXED), longest=15, seed=2)
    requests = [
        Request(prompt, settings, max_tokens=4 + place, n=1 + place % 2)
        for place, (prompt, settings) in enumerate(zip(prompts, MIXED))
    ]
    together = answers(Engine(network, slots=slots), requests)
    for place, request in enumerate(requests):
        alone = answers(Engine(network, slots=1), [request])
        for index in range(request.n):
            texts = [[event.token for event in run] for run in (together[place, index], alone[0, index])]
            assert texts[0] == texts[1]


def test_requests_may_join_and_leave_between_steps(make_network: Make) -> None:
    network = make_network("gpt-mini")
    prompts = random_prompts(3, longest=9, seed=3)
    requests = [
        Request(prompt, SamplingSettings(temperature=1.0, seed=place), max_tokens=9, id=f"r{place}")
        for place, prompt in enumerate(prompts)
    ]
    alone = {request.id: tokens(Engine(network), request)[0] for request in requests}
    engine = Engine(network, slots=3)
    engine.submit(requests[0])
    engine.submit(requests[1])
    events = engine.step() + engine.step() + engine.step()
    engine.cancel("r0")
    engine.submit(requests[2])
    events += engine.step()
    assert engine.active == 2 and engine.free == 1
    while engine.busy:
        events += engine.step()
    found = {name: [event.token for event in events if event.request == name] for name in alone}
    assert found == {**alone, "r0": alone["r0"][:3]}


def test_n_answers_differ_and_each_repeats_with_its_seed(make_network: Make) -> None:
    request = Request((1, 2, 3), SamplingSettings(temperature=1.0, seed=5), max_tokens=10, n=4)
    engine = Engine(make_network("gpt2-mini"), slots=4)
    found = tokens(engine, request)
    assert len({tuple(answer) for answer in found}) == 4
    assert found == tokens(engine, request)
    other = dataclasses.replace(request, settings=SamplingSettings(temperature=1.0, seed=6))
    assert found != tokens(engine, other)


def test_the_end_token_ends_with_reason_stop_and_max_tokens_with_length(make_network: Make) -> None:
    network = make_network("gpt2-mini")
    expected = recomputed(network, (1, 2), 8)
    place = next(place for place in range(2, 8) if expected[place] not in expected[:place])
    request = Request((1, 2), max_tokens=8, stop_tokens=frozenset([expected[place]]))
    events = answers(Engine(network), [request])[0, 0]
    assert [event.token for event in events] == expected[: place + 1]
    assert [event.finish for event in events] == [None] * place + ["stop"]
    events = answers(Engine(network), [dataclasses.replace(request, max_tokens=place)])[0, 0]
    assert [event.finish for event in events] == [None] * (place - 1) + ["length"]


def test_the_models_own_eos_ends_an_answer_when_nothing_is_said(make_network: Make) -> None:
    plain = recomputed(make_network("gpt2-mini"), (1, 2), 3)
    network = make_network("gpt2-mini", eos_id=plain[0])
    assert [event.finish for event in answers(Engine(network), [Request((1, 2))])[0, 0]] == ["stop"]


def test_at_the_end_of_the_context_an_answer_stops_with_reason_length(make_network: Make) -> None:
    network = make_network("gpt-mini", context=16)
    for length in (1, 10, 16):
        prompt = tuple(range(length))
        events = answers(Engine(network), [Request(prompt, max_tokens=99, stop_tokens=frozenset())])[0, 0]
        assert [event.token for event in events] == recomputed(network, prompt, 17 - length)
        assert events[-1].finish == "length"


@pytest.mark.parametrize("name", ["gpt-mini", "gpt2-mini"])
@pytest.mark.parametrize("context", [2, 3, 16])
def test_sliding_goes_on_with_the_last_half_of_the_context(name: str, context: int, make_network: Make) -> None:
    network = make_network(name, context=context)
    prompt = (5, 6)
    window, expected = list(prompt), []
    for _ in range(30):
        if len(window) > context:
            window = window[-max(context // 2, 1) :]
        expected.append(int(recomputed_logits(network, window, ()).argmax()))
        window.append(expected[-1])
    request = Request(prompt, max_tokens=30, sliding=True, stop_tokens=frozenset())
    other = Request((1,), max_tokens=11, sliding=True, stop_tokens=frozenset())
    assert tokens(Engine(network, slots=2), request, other)[0] == expected


class Letters:
    """Token i is the letter i; token 39 is an incomplete character until the next token."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, id: int, /) -> str:
        if id == 39:
            self.held += "?"
            return ""
        text, self.held = self.held + chr(ord("A") + id), ""
        return text

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


def spelled(ids: Sequence[int]) -> str:
    decoder = Letters()
    return "".join(map(decoder.push, ids)) + decoder.flush()


def test_a_stop_string_that_spans_tokens_ends_the_answer_and_is_not_shown(make_network: Make) -> None:
    network = make_network("gpt2-mini")
    settings = SamplingSettings(temperature=1.0)
    free = Request((1, 2), settings, max_tokens=20, stop_tokens=frozenset())
    ids = tokens(Engine(network), free)[0]
    text = spelled(ids)
    stop = text[6:9]
    at = text.index(stop)
    events = answers(Engine(network, text_decoder=Letters), [dataclasses.replace(free, stop=(stop, "never"))])[0, 0]
    assert "".join(event.text for event in events) == text[:at]
    assert events[-1].finish == "stop"
    assert [event.token for event in events] == ids[: len(events)]


def test_text_that_was_withheld_appears_at_the_end(make_network: Make) -> None:
    network = make_network("gpt2-mini")
    free = Request((1, 2), SamplingSettings(temperature=1.0), max_tokens=20, stop_tokens=frozenset())
    text = spelled(tokens(Engine(network), free)[0])
    stop = text[-2:] + "~"
    events = answers(Engine(network, text_decoder=Letters), [dataclasses.replace(free, stop=(stop,))])[0, 0]
    assert "".join(event.text for event in events) == text
    assert events[-1].finish == "length"
    assert events[-1].text.endswith(text[-2:])


def test_equal_prompts_are_read_once(make_network: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(make_network("gpt2-mini"), slots=8)
    read: list[int] = []
    stepper_read = engine._stepper.read

    def counted(start: int, prompts: Any, sources: Any = ()) -> Any:
        read.extend(map(len, prompts))
        return stepper_read(start, prompts, sources)

    monkeypatch.setattr(engine._stepper, "read", counted)
    for request in (Request((1, 2, 3), n=3), Request((1, 2, 3)), Request((4,))):
        engine.submit(request)
    engine.step()
    assert sorted(read) == [1, 3]


def test_a_network_in_training_writes_without_dropout_and_stays_in_training(make_network: Make) -> None:
    network = make_network("gpt2-mini", dropout=0.5).train()
    found = tokens(Engine(network), Request((1, 2), max_tokens=6))[0]
    assert network.training and all(module.training for module in network.modules())
    assert found == recomputed(network.eval(), (1, 2), 6)


def test_closing_the_iterator_frees_the_slots(make_network: Make) -> None:
    engine = Engine(make_network("gpt2-mini"), slots=1)
    events = engine.generate([Request((1,), max_tokens=9)])
    next(iter(events))
    with pytest.raises(RuntimeError, match="busy"):
        next(iter(engine.generate([Request((2,))])))
    events.close()  # type: ignore[attr-defined]
    assert engine.free == 1


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request(tuple([1] * 33)), "33 tokens are more than the context of 32"),
        (Request(()), "prompt"),
        (Request((40,)), "token 40 is outside the vocabulary of 40"),
        (Request((1,), SamplingSettings(logit_bias={99: 1.0})), "logit_bias"),
        (Request((1,), stop=("x",)), "tokenizer"),
    ],
)
def test_a_request_that_cannot_be_followed_says_why(request_: Request, named: str, make_network: Make) -> None:
    with pytest.raises(RequestError, match=named):
        Engine(make_network("gpt2-mini")).submit(request_)


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"n": 0}, {"logprobs": -1}, {"stop": ("",)}])
def test_a_request_out_of_range_names_the_argument(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        Request((1,), **options)


def test_encoder_decoders_name_what_does_not_fit(make_network: Make) -> None:
    network = make_network("seq2seq-mini")
    for request, named in [
        (Request(tuple([1] * 33)), "encoder's context of 32"),
        (Request(()), "source"),
        (Request((1,), prefix=()), "prefix"),
        (Request((1,), sliding=True), "sliding"),
    ]:
        with pytest.raises(RequestError, match=named):
            Engine(network).submit(request)


def test_an_encoder_is_refused(make_network: Make) -> None:
    with pytest.raises(RequestError, match="does not write"):
        Engine(make_network("bert-mini"))

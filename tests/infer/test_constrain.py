"""Constrained answers against their oracles: re.fullmatch, and trying out every token."""

from __future__ import annotations

import gc
import math
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.tokenizer import Tokenizer
from formary.errors import MissingExtra, RequestError
from formary.infer import constrain
from formary.infer.engine import Engine, Request
from formary.infer.loaded import Model
from formary.infer.sampling import SamplingSettings, Table, sample
from formary.infer.stepper import Stepper
from formary.model.topologies import Network

from .conftest import make
from .constrained import KINDS, followed_or_refused, spelled, tokenizer_of, writer, written

Make = Callable[..., Network]
Make = Callable[..., Network]

# --- regular expressions --------------------------------------------------------------------------------------

ATOMS = st.sampled_from(["a", "bc", "[a-d]", "[^a-z]", "\\d", ".", "猫", "[猫坐在]", "\\.", "/", '"', " ", "\\\\"])


def longer(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["?", "{2}", "{0,2}", "{1,3}"])).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


@settings(max_examples=25, deadline=None)
@given(st.recursive(ATOMS, longer, max_leaves=5), st.integers(0, 1000))
def test_what_is_written_matches_its_regular_expression(pattern: str, seed: int) -> None:
    for made in written("bpe", seed, regex=f"x{pattern}"):
        assert made.finish_reason == "stop"
        assert re.fullmatch(f"x{pattern}", made.text)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_follows_a_regular_expression(kind: str) -> None:
    for made in written(kind, 2, n=4, regex="[0-9]{2,4}|cat( dog)?|猫"):
        assert made.finish_reason == "stop" and re.fullmatch("[0-9]{2,4}|cat( dog)?|猫", made.text)


def test_anchors_may_stand_at_the_ends() -> None:
    maker = constrain.regex("^ab?$", tokenizer_of("bytes"))
    assert [spelled(maker, text) for text in ("a", "ab", "b", "abb")] == [True, True, False, False]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("a(?=b)", "look-ahead"),
        (r"(a)\1", "backreference"),
        (r"\bword", r"\b"),
        ("a^b", "^"),
        ("[a", "unclosed"),
        ("a\\", "backslash"),
        ("", "not empty"),
        ("a" * 5_000, "4096"),
        ("(" * 1_000 + ")" * 1_000, "nested"),
        (r"[^\s\S]", "nothing"),
        ("\ud800", "surrogate"),
        (3, "regular expression"),
    ],
)
def test_a_regular_expression_that_cannot_be_followed_is_refused(pattern: Any, said: str) -> None:
    with pytest.raises(RequestError, match=r"^regex") as caught:
        constrain.regex(pattern, tokenizer_of("bytes"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*c", "((a{1000}){1000}){1000}", "(.{1,1000}){1,1000}", "(a|b)*a(a|b){200}", r"(?i)(\w|\s){500}"],
)
def test_a_hostile_regular_expression_is_refused_or_followed(pattern: str) -> None:
    followed_or_refused(lambda: constrain.regex(pattern, tokenizer_of("bpe")))


@pytest.mark.parametrize("pattern", ["/a", "a/\nstart: /b/", r'a\/"', "%json", "<eos>", "(?x) a # b"])
def test_a_pattern_cannot_leave_its_place_in_the_grammar(pattern: str) -> None:
    example = {r'a\/"': 'a/"', "(?x) a # b": "a"}.get(pattern, pattern)
    assert re.fullmatch(pattern, example)
    maker = constrain.regex(pattern, tokenizer_of("bytes"))
    assert spelled(maker, example) and not spelled(maker, "b")


# --- choices --------------------------------------------------------------------------------------------------

CHOICES = ["cat", "cat on the log", "dog", "猫坐在垫子上"]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram", "characters", "sentencepiece"])
def test_a_choice_is_one_of_the_texts(kind: str) -> None:
    made = written(kind, 1, n=8, temperature=5.0, choice=CHOICES)
    assert {generation.text for generation in made} <= set(CHOICES)
    assert len({generation.text for generation in made}) > 1
    assert {generation.finish_reason for generation in made} == {"stop"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_allowed_tokens_are_those_that_lead_to_a_choice(kind: str) -> None:
    """The oracle decodes every continuation by every token."""
    tokenizer = tokenizer_of(kind)
    texts = ["cat", "cat on", "dog"]
    tokens: list[int] = []
    constraint = constrain.choice(texts, tokenizer)()
    while not constraint.finished:
        allowed = constraint.allowed()
        leading = {
            token
            for token in range(tokenizer.vocab_size)
            if token not in tokenizer.special_ids
            and (text := tokenizer.decode([*tokens, token])) != tokenizer.decode(tokens)
            and any(choice.startswith(text) for choice in texts)
        }
        ends = {tokenizer.eos_id} if tokenizer.decode(tokens) in texts else set()
        assert set(allowed.nonzero()[:, 0].tolist()) == leading | ends
        tokens.append(min(leading or ends))
        constraint.accept(tokens[-1])
    assert tokenizer.decode(tokens[:-1]) in texts and tokens[-1] == tokenizer.eos_id


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_greedy_choice_is_the_likeliest_path_through_the_texts(kind: str) -> None:
    model = writer(kind)
    tokenizer = model.tokenizer
    prompt = list(model.tokenizer.encode("the"))
    found = model.generate("the", temperature=0, choice=CHOICES)
    goals = [text.encode() for text in CHOICES]
    answer: list[int] = []
    with torch.no_grad():
        while not answer or answer[-1] != tokenizer.eos_id:
            begun = b"".join(tokenizer.token_bytes[token] for token in answer)
            logits = model.network.head(model.network(torch.tensor([[*prompt, *answer]]))[0, -1]).tolist()
            candidates = [tokenizer.eos_id] if begun in goals else []
            for token, spelling in enumerate(tokenizer.token_bytes):
                if token not in tokenizer.special_ids and any(goal.startswith(begun + spelling) for goal in goals):
                    candidates.append(token)
            answer.append(max(candidates, key=lambda token: logits[token]))
    assert list(found.tokens) == answer


@pytest.mark.parametrize(
    "text", ['a"b\\', "two\nlines", "猫\u2028", "/a/i", "<[1]>", "\x00", "\x7f", "😀", '" | "', "\\u0041"]
)
def test_a_choice_is_written_letter_by_letter(text: str) -> None:
    maker = constrain.choice([text, "other"], tokenizer_of("bytes"))
    assert spelled(maker, text) and spelled(maker, "other") and not spelled(maker, "A")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "at least one"),
        ([""], "empty"),
        ("cat", "list"),
        ([3], "list"),
        (["a"] * 1_001, "1001"),
        (["a" * 70_000], "bytes"),
        (["a\ud800"], "surrogate"),
    ],
)
def test_choices_are_checked(texts: Any, said: str) -> None:
    with pytest.raises(RequestError, match=r"^choice") as caught:
        constrain.choice(texts, tokenizer_of("bytes"))
    assert said in str(caught.value)


def test_a_choice_that_the_tokenizer_cannot_write_is_named() -> None:
    with pytest.raises(RequestError, match="cannot write 'Ω'"):
        constrain.choice(["cat", "Ω"], tokenizer_of("characters"))
    with pytest.raises(RequestError, match="cannot write 'cat\\(dog'"):
        constrain.choice(["cat(dog"], tokenizer_of("wordpiece"))


# --- in the engine --------------------------------------------------------------------------------------------


def test_end_tokens_are_allowed_when_an_answer_may_end_and_alone_when_it_must() -> None:
    tokenizer = tokenizer_of("bytes")
    a, b = tokenizer.encode("ab")
    constraint = constrain.regex("ab?", tokenizer, ends=[0, 301])()
    steps = []
    for token in (a, b, 301):
        steps.append(constraint.allowed().nonzero()[:, 0].tolist())
        constraint.accept(token)
    assert steps == [[a], [0, b, 301], [0, 301]]
    assert constraint.finished and constraint.complete


def test_without_an_end_token_an_answer_stops_where_nothing_may_follow() -> None:
    tokenizer = Tokenizer(tokenizer_of("bytes").backend, {"eos_token": None})
    model = Model(make("gpt-mini", vocab_size=tokenizer.vocab_size), tokenizer)
    assert model.stop_tokens() == frozenset()
    made = model.generate("the", regex="[0-9]{3}", temperature=1.0)
    assert re.fullmatch("[0-9]{3}", made.text) and made.finish_reason == "stop" and len(made.tokens) == 3
    open_ended = model.generate("the", regex="[0-9]+", temperature=1.0, max_tokens=5)
    assert open_ended.finish_reason == "length" and len(open_ended.tokens) == 5


def test_answers_beside_a_constrained_one_stay_as_they_are(make_network: Make) -> None:
    tokenizer = tokenizer_of("bytes")
    network = make_network("gpt-mini", vocab_size=tokenizer.vocab_size, context=64)
    free = [
        Request((70 + seed, 3), SamplingSettings(temperature=1.0, seed=seed), max_tokens=12, logprobs=2)
        for seed in range(3)
    ]
    bound = Request((5, 6), max_tokens=12, constraint=constrain.choice(CHOICES, tokenizer))
    alone = [(event.request, event) for event in Engine(network).generate(free)]
    beside = [(event.request, event) for event in Engine(network).generate([*free, bound]) if event.request != 3]
    key = lambda pair: pair[0]  # noqa: E731
    assert [event.token for _, event in sorted(beside, key=key)] == [event.token for _, event in sorted(alone, key=key)]
    for (_, found), (_, expected) in zip(sorted(beside, key=key), sorted(alone, key=key)):
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-9)


def test_only_the_bound_row_of_a_batch_is_masked() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    given_logits = logits.clone()
    constraint = constrain.choice(["cat"], tokenizer_of("bytes"))()
    table = Table([SamplingSettings(temperature=1.0, top_p=0.9, seed=row) for row in range(3)])
    free = sample(logits, table, [0.3, 0.5, 0.7])
    tokens = sample(logits, table, [0.3, 0.5, 0.7], (), [None, constraint, None])
    assert tokens == [free[0], tokenizer_of("bytes").encode("c")[0], free[2]]
    assert torch.equal(logits, given_logits)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.01},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "typical_p": 0.01},
        {"repetition_penalty": 5.0, "presence_penalty": 2.0},
        {"logit_bias": {token: -math.inf for token in range(200)}},
        {"logit_bias": {0: 100.0}},
    ],
    ids=str,
)
def test_no_setting_leads_out_of_a_constraint(options: dict[str, Any]) -> None:
    found = writer("bytes").generate("the", choice=["ccc", "ddd"], **options)
    assert found.text in ("ccc", "ddd") and found.finish_reason == "stop"


def test_log_probabilities_are_the_models_own() -> None:
    model = writer("bytes")
    found = model.generate("the", choice=CHOICES, logprobs=2)
    tokens = [*model.tokenizer.encode("the"), *found.tokens]
    expected = Stepper(model.network, slots=1).token_logprobs(tokens)[-len(found.tokens) :]
    assert found.logprobs == pytest.approx(expected)


def test_speculation_changes_nothing(make_network: Make) -> None:
    tokenizer = tokenizer_of("bytes")
    network = make_network("gpt-mini", vocab_size=tokenizer.vocab_size, context=64)
    maker = constrain.regex("(cat |dog ){6}", tokenizer)
    prompt = tuple(tokenizer.encode("cat dog cat dog "))
    runs = [
        [event.token for event in Engine(network).generate([Request(prompt, constraint=maker, speculate=speculate)])]
        for speculate in (True, False)
    ]
    assert runs[0] == runs[1]


def test_each_answer_has_a_constraint_of_its_own() -> None:
    maker = constrain.choice(["cat", "dog"], tokenizer_of("bytes"))
    c, a, d = tokenizer_of("bytes").encode("cad")
    first, second = maker(), maker()
    first.accept(c)
    assert first.allowed().nonzero()[:, 0].tolist() == [a]
    assert second.allowed().nonzero()[:, 0].tolist() == [c, d]


def test_a_token_that_is_not_allowed_is_a_defect() -> None:
    constraint = constrain.choice(["cat"], tokenizer_of("bytes"))()
    with pytest.raises(RuntimeError, match="not allowed"):
        constraint.accept(tokenizer_of("bytes").encode("x")[0])


def test_an_encoder_decoder_follows_a_constraint(make_network: Make) -> None:
    tokenizer = tokenizer_of("characters")
    network = make_network("seq2seq-mini", vocab_size=tokenizer.vocab_size, context=64)
    found = Model(network, tokenizer).generate("the cat", choice=CHOICES, temperature=1.0, n=3)
    assert {generation.text for generation in found} <= set(CHOICES)


def test_two_constraints_or_beams_are_refused() -> None:
    with pytest.raises(RequestError, match=r"choice.*regex"):
        writer("bytes").generate("the", regex="a", choice=["a"])
    with pytest.raises(RequestError, match=r"json_schema.*beam"):
        writer("bytes").generate("the", json_schema={}, beams=2)


def test_a_tokenizer_is_not_kept_alive() -> None:
    tokenizer = Tokenizer(tokenizer_of("bytes").backend)
    maker = constrain.choice(["cat"], tokenizer)
    left = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert left() is None and not maker().finished


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r'pip install "formary\[serve\]"'):
        constrain.choice(["cat"], Tokenizer(tokenizer_of("bytes").backend))


def spellings(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    firsts, laters = constrain._spellings(tokenizer)
    return b"".join([firsts[tokens[0]], *(laters[token] for token in tokens[1:])]).decode(errors="replace")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_tokens_are_said_to_write_is_what_they_decode_to(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    broken = {number for name, number in tokenizer.vocab.items() if re.match("<0x[89A-F]", name)}  # no character alone
    ordinary = [token for token in range(tokenizer.vocab_size) if token not in tokenizer.special_ids | broken]
    tokens = data.draw(st.lists(st.sampled_from(ordinary), min_size=1, max_size=8))
    assert spellings(tokenizer, tokens) == tokenizer.decode(tokens)

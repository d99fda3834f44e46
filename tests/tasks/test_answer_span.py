"""Answers in a context: offsets round trip, windows cover everything, scores are compared over all of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.tokenizer import train as train_tokenizer
from formary.errors import DataError
from formary.model.topologies import build
from formary.recipe.reading import parse
from formary.recipe.schema import Tokenizer as TokenizerSettings
from formary.tasks.answer_span import AnswerSpan, Window, span_scores

CONTEXT = "Ann went to Rome in May. Bob stayed in Oslo."


def row(question, answer, context=CONTEXT):
    found = {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    return {"question": question, "context": context, "answers": found}


ROWS = [row("who left?", "Ann"), row("where to?", "Rome"), row("when?", "May"), row("who stayed?", "Bob")]
OPEN = [*ROWS[:3], row("why?", None)]
KINDS = {"characters": 8, "bytes": 8, "bpe": 270, "wordpiece": 60, "unigram": 36}


def made(rows, *, preset="bert-mini", context=96, kind="characters", **objective):
    recipe = parse(
        f"""
        name: t
        task: answer_span
        data: {{sources: [x]}}
        model: {{preset: {preset}, size: 1x32}}
        train: {{batch: 4, context: {context}, objective: {objective or "{}"}}}
        """
    )
    texts = [str(one.get(name, "")) for one in rows for name in ("question", "context")] * 9
    setting = TokenizerSettings(kind=kind, vocab_size=KINDS[kind])
    tokenizer = train_tokenizer([*texts, CONTEXT], setting, task=AnswerSpan.special_tokens(recipe))
    return AnswerSpan.learn(recipe, tokenizer, rows, start=None)


def pointed(task, examples, network=None):
    """The answers of a model that is certain of the examples' targets."""
    found = []
    for example in examples:
        scores = np.zeros((len(example.inputs), 2))
        scores[example.target[0], 0] = scores[example.target[1], 1] = 20.0
        found.append((example.memory, scores))
    return found


@pytest.mark.parametrize("preset", ["bert-mini", "gpt-mini"])
def test_encoders_and_decoders_learn_answers(learned, preset):
    task = made(ROWS, preset=preset)
    answers = task.predict(learned(task, ROWS, steps=200, clip=1.0), ROWS)
    assert [answer["answer"] for answer in answers] == [one["answers"]["text"][0] for one in ROWS]
    for answer in answers:
        assert CONTEXT[answer["start"] : answer["end"]] == answer["answer"]
        assert 0.5 < answer["probability"] <= 1 and answer["no_answer_probability"] == 0


def test_unanswerable_questions_are_learned_where_there_are_some(learned):
    task = made(OPEN)
    assert task.unanswerable and not made(ROWS).unanswerable
    answers = task.predict(learned(task, OPEN, steps=200, clip=1.0), OPEN)
    assert [answer["answer"] for answer in answers] == ["Ann", "Rome", "May", ""]
    assert answers[3]["no_answer_probability"] == answers[3]["probability"] > 0.5
    assert (answers[3]["start"], answers[3]["end"]) == (0, 0)


def test_contexts_longer_than_the_model_are_read_in_windows(learned):
    task = made(OPEN, context=40, stride=10)
    assert len(task.examples(OPEN, targets=True)) >= 8
    assert "4 contexts were too long for 40 tokens and read in windows that share 10 tokens" in task.notes()
    answers = task.predict(learned(task, OPEN, steps=200, clip=1.0), OPEN)
    assert [answer["answer"] for answer in answers] == ["Ann", "Rome", "May", ""]


@pytest.mark.parametrize("preset", ["bert-mini", "gpt-mini"])
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(preset):
    rows = [*OPEN, row("and?", "x", context="x"), row("where to?", "Rome", context=CONTEXT * 4)]
    task = made(rows, preset=preset)
    network = build(task.model_config(), seed=1).eval()
    for one, answer in zip(rows, task.predict(network, rows)):
        (alone,) = task.predict(network, [one])
        assert alone["answer"] == answer["answer"] and alone["start"] == answer["start"]
        assert alone["probability"] == pytest.approx(answer["probability"], abs=1e-5)
        assert alone["no_answer_probability"] == pytest.approx(answer["no_answer_probability"], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_found_again_in_every_tokenizer(kind):
    chinese = row("谁去了？", "安娜", context="昨天 安娜去了罗马。")
    rows = [*ROWS, chinese] if kind in ("characters", "bytes", "bpe") else ROWS
    rows = rows if kind != "bpe" else ROWS
    task = made(rows, kind=kind)
    for number, one in enumerate(rows):
        examples = [example for example in task.examples(rows, targets=True) if example.row == number]
        answer = task._answer(one["context"], pointed(task, examples))
        held, wanted = answer["answer"], one["answers"]["text"][0]
        assert held == wanted if kind != "unigram" else wanted in held
        assert one["context"][answer["start"] : answer["end"]] == held


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_and_offsets_round_trip(data):
    words = data.draw(st.lists(st.text("abc我京", min_size=1, max_size=5), min_size=1, max_size=30))
    context = " ".join(words)
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 1, len(words) - 1)))
    begin = len(" ".join([*words[:first], ""]))
    answer = " ".join(words[first : last + 1])
    one = {"question": "ab", "context": context, "answers": [{"text": answer, "answer_start": begin}]}
    task = data.draw(st.sampled_from(WINDOWED))
    examples = task.examples([one], targets=True)
    assert max(len(example.inputs) for example in examples) <= task.context
    assert sum(example.target != (0, 0) for example in examples) >= 1
    found = task._answer(context, pointed(task, [example for example in examples if example.target != (0, 0)]))
    assert (found["answer"], found["start"], found["end"]) == (answer, begin, begin + len(answer))


# 32 tokens hold 27 of a context, neighbours share 12: an answer of up to 11 characters is whole in one of them.
WINDOWED = [made([row("abc", "a", context="abc 我 京")], context=32, stride=12, kind="characters")]


def test_scores_equal_brute_force_over_windows():
    rng = np.random.default_rng(0)
    context, longest = "ab cd efg", 4
    offsets = np.array([[place, place + 1] for place in range(len(context))])
    windows = [
        (Window(start, 2, offsets[start:stop]), rng.normal(size=(stop - start + 3, 2)))
        for start, stop in ((0, 6), (4, 9))
    ]
    table, found = span_scores(windows, context, longest)
    assert np.array_equal(found, offsets)
    for start in range(9):
        for more in range(longest):
            values = [
                scores[2 + start - window.start, 0] + scores[2 + start + more - window.start, 1]
                for window, scores in windows
                if window.start <= start
                and start + more < window.start + len(window.offsets)
                and " " not in (context[start], context[start + more])
            ]
            assert table[start, more] == pytest.approx(max(values, default=-np.inf))


def test_an_answer_is_never_longer_than_asked():
    task = made(ROWS, longest_answer=3)
    for seed in range(5):
        for answer in task.predict(build(task.model_config(), seed=seed), ROWS):
            assert 1 <= len(answer["answer"]) <= 3


def test_a_long_question_is_cut_and_an_empty_context_has_no_answer():
    task = made(ROWS, context=40)
    rows = [row("who " * 30, "Ann"), {"question": "who?", "context": ""}, {"question": "", "context": "Ann"}]
    answers = task.predict(build(task.model_config(), seed=0), rows)
    assert "1 question was longer than half of 40 tokens and cut" in task.notes()[-1]
    assert answers[1]["answer"] == "" and answers[1]["probability"] == 1
    assert answers[2]["answer"]


def test_a_finished_model_answers_as_before():
    task = made(OPEN, context=40, stride=10, longest_answer=7)
    network = build(task.model_config(), seed=0)
    fresh = AnswerSpan.of_model(network.config, task.tokenizer, task.settings())
    assert fresh.predict(network, OPEN) == task.predict(network, OPEN)


def test_label_smoothing_looks_at_real_positions_only():
    task = made(ROWS)
    network = build(task.model_config(), seed=0)
    network.train()
    batch = task.collate(task.examples([row("a" * 40, "Ann"), ROWS[0]], targets=True))
    plain, _ = task.loss(network, batch)
    task.recipe = task.recipe.model_copy(
        update={"train": task.recipe.train.model_copy(update={"label_smoothing": 1e-6})}
    )
    smooth, _ = task.loss(network, batch)
    assert smooth.item() == pytest.approx(plain.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answers": {"text": ["Paris"], "answer_start": [3]}},
            "'Paris' is not in its context at character 3; it does not",
        ),
        (
            {"answers": {"text": ["Rome"], "answer_start": [3]}},
            "'Rome' is not in its context at character 3; it stands at 12",
        ),
        ({"answers": {"text": ["Rome"], "answer_start": [-4]}}, "at character -4"),
        ({"answers": {"text": ["Rome"], "answer_start": []}}, "field 'answers' has 1 texts and 0 starts"),
        ({"answers": {"text": [" "], "answer_start": [3]}}, "holds the answer ' '"),
        ({"answers": "Rome"}, "field 'answers' holds str"),
        ({"context": None}, "field 'context' holds NoneType"),
        ({"question": 3}, "field 'question' holds int"),
    ],
)
def test_a_row_that_is_not_as_it_must_be_is_named(change, message):
    bad = {**ROWS[0], "id": "56be4", **change}
    with pytest.raises(DataError, match=rf"row 2 \(id 56be4\): .*({message})"):
        task = made(ROWS)
        task.examples([ROWS[0], bad], targets=True)


def test_a_missing_start_is_looked_up_and_lists_of_answers_are_taken():
    for given_answers in ({"text": ["Rome"]}, [{"text": "Rome"}], {"text": "Rome", "answer_start": 12}):
        task = made([{**ROWS[0], "answers": given_answers}])
        (example,) = task.examples([{**ROWS[0], "answers": given_answers}], targets=True)
        assert task._answer(CONTEXT, pointed(task, [example]))["answer"] == "Rome"


def test_rows_without_any_answer_are_refused():
    with pytest.raises(DataError, match="no training row has an answer"):
        made([row("why?", None)])

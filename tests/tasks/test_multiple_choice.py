"""Multiple choice: transformers' models as oracle, likelihoods by hand, any number of choices, prompts that must fit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.data.tokenizer import train as train_tokenizer
from formary.errors import DataError, RecipeError
from formary.hub.checkpoint import load, save
from formary.model.topologies import build, with_head
from formary.recipe.presets import preset
from formary.recipe.reading import parse
from formary.tasks.multiple_choice import MultipleChoice
from formary.tasks.questions import question_of

ROWS = [
    {"question": "what do cows drink", "choices": ["water", "sand", "stones"], "answer": 0},
    {"question": "what do birds do", "choices": ["swim", "fly"], "answer": "fly"},
    {"question": "what is cold", "choices": ["fire", "the sun", "tea", "ice"], "answer": [0, 0, 0, 1]},
    {"question": "which are even", "choices": ["one", "two", "four"], "answer": [0, 1, 1]},
]


def made(*, kind="bert-mini", context=48, rows=ROWS, normalise="none", smoothing=0.0):
    recipe = parse(
        f"""
        name: t
        task: multiple_choice
        data: {{sources: [x], tokenizer: {{kind: characters}}}}
        model: {{preset: {kind}, size: 1x32}}
        train: {{batch: 4, context: {context}, label_smoothing: {smoothing}, objective: {{normalise: {normalise}}}}}
        """
    )
    texts = [
        question_of(row, "row").text + " ".join(question_of(row, "row").choices) + "QuestionAnswer: " for row in ROWS
    ]
    tokenizer = train_tokenizer(texts, recipe.data.tokenizer, task=MultipleChoice.special_tokens(recipe))
    return MultipleChoice.learn(recipe, tokenizer, rows, start=None)


def causal(tokens=512):
    recipe = parse("{name: t, task: causal_lm, data: {sources: [x], tokenizer: {kind: bytes}}}")
    tokenizer = train_tokenizer([""], recipe.data.tokenizer, task="causal_lm")
    config = preset("gpt-mini", vocab_size=tokenizer.vocab_size, context=tokens, size="2x64")
    return build(config, seed=0).eval(), tokenizer


def by_hand(network, prompt, choice):
    """The log-likelihood in nats of bytes after bytes, one token at a time."""
    tokenizer = causal()[1]
    before, after = tokenizer.encode(prompt), tokenizer.encode(" " + choice)
    total, read = 0.0, list(before)
    for token in after:
        with torch.no_grad():
            total += float(network.head(network(torch.tensor([read])))[0, -1].log_softmax(-1)[token])
        read.append(token)
    return total, len(after)


@pytest.mark.parametrize("kind", ["bert-mini", "gpt-mini"])
def test_encoders_and_causal_models_learn_to_choose(learned, kind):
    task = made(kind=kind, context=64)
    answers = task.predict(learned(task, ROWS, steps=40, lr=5e-3), ROWS)
    for row, answer in zip(ROWS, answers):
        one = question_of(row, "row")
        assert answer["index"] in one.right and answer["choice"] == one.choices[answer["index"]]
        assert len(answer["probabilities"]) == len(one.choices) and sum(answer["probabilities"]) == pytest.approx(1)
        assert answer["probability"] == max(answer["probabilities"])


@pytest.mark.parametrize("kind", ["bert-mini", "gpt-mini"])
def test_an_answer_does_not_depend_on_the_other_rows(kind):
    task = made(kind=kind, context=64)
    network = build(task.model_config(), seed=1).eval()
    for row, answer in zip(ROWS, task.predict(network, ROWS)):
        assert task.predict(network, [row])[0]["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)


@pytest.mark.parametrize("kind", ["bert-mini", "gpt-mini"])
def test_the_loss_is_that_of_the_answers_probabilities(kind):
    """Also where rows have different numbers of choices and several right ones: half the weight goes to each of two."""
    task = made(kind=kind, context=64)
    network = build(task.model_config(), seed=2).eval()
    loss, count = task.loss(network, task.collate(task.examples(ROWS, targets=True)))
    answers = task.predict(network, ROWS)
    right = [question_of(row, "row").right for row in ROWS]
    wanted = -sum(math.log(a["probabilities"][n]) / len(ns) for a, ns in zip(answers, right) for n in ns)
    assert loss.item() == pytest.approx(wanted, rel=1e-4) and int(count) == len(ROWS)


@pytest.mark.parametrize("kind", ["bert-mini", "gpt-mini"])
def test_no_gradient_is_lost_to_choices_that_a_row_does_not_have(kind):
    task = made(kind=kind, context=64, smoothing=0.1)
    network = build(task.model_config(), seed=2).train()
    whole = task.collate(task.examples(ROWS, targets=True))
    loss, _ = task.loss(network, whole)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    network.zero_grad()
    for row in ROWS:
        alone, _ = task.loss(network, task.collate(task.examples([row], targets=True)))
        alone.backward()
    apart = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    torch.testing.assert_close(gradient, apart, atol=1e-4, rtol=1e-3)


def test_transformers_opens_the_trained_encoder_and_gives_the_same_probabilities(learned, tmp_path):
    transformers = pytest.importorskip("transformers")
    task = made()
    network = learned(task, ROWS, steps=5)
    save(tmp_path, network)
    theirs = transformers.AutoModelForMultipleChoice.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "BertForMultipleChoice"
    again = MultipleChoice.of_model(load(tmp_path).config, task.tokenizer, task.settings())
    for example, answer in zip(task.examples(ROWS, targets=False), again.predict(network, ROWS)):
        batch = task.collate([example])
        with torch.no_grad():
            logits = theirs(
                input_ids=batch["tokens"], attention_mask=batch["mask"].long(), token_type_ids=batch["types"]
            ).logits[0]
        assert answer["probabilities"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-4)


@pytest.mark.parametrize("normalise", ["none", "length", "bytes"])
def test_a_prompted_choice_is_scored_by_the_likelihood_of_its_tokens(normalise):
    network, tokenizer = causal()
    task = MultipleChoice.prompted(network.config, tokenizer, normalise=normalise)
    row = {"question": "what is cold", "choices": ["fire", "the old moon", "é"]}
    (answer,) = task.predict(network, [row])
    scores = []
    for choice in row["choices"]:
        total, tokens = by_hand(network, "Question: what is cold\nAnswer:", choice)
        scores.append(total / {"none": 1, "length": tokens, "bytes": len(choice.encode())}[normalise])
    assert answer["probabilities"] == pytest.approx(torch.tensor(scores).softmax(-1).tolist(), rel=1e-3)


def test_examples_stand_solved_before_the_question():
    network, tokenizer = causal()
    task = MultipleChoice.prompted(network.config, tokenizer, examples=ROWS[:2], normalise="none")
    prompt = (
        "Question: what do cows drink\nAnswer: water\n\nQuestion: what do birds do\nAnswer: fly\n\n"
        "Question: what is cold\nAnswer:"
    )
    (answer,) = task.predict(network, [ROWS[2]])
    scores = [by_hand(network, prompt, choice)[0] for choice in ROWS[2]["choices"]]
    assert answer["probabilities"] == pytest.approx(torch.tensor(scores).softmax(-1).tolist(), rel=1e-3)
    assert task.notes() == []


def test_a_template_may_list_the_choices_and_braces_in_rows_are_left_alone():
    network, tokenizer = causal()
    task = MultipleChoice.prompted(network.config, tokenizer, template="{question}\n{choices}\nAnswer:")
    row = {"question": "a {choices} b", "choices": ["x{question}", "y"]}
    (example,) = task.examples([row], targets=False)
    said = tokenizer.decode(example.memory[0].tokens)
    assert said.endswith("a {choices} b\nA. x{question}\nB. y\nAnswer: x{question}")


def test_an_answer_in_chinese_follows_its_colon_at_once():
    network, tokenizer = causal()
    task = MultipleChoice.prompted(network.config, tokenizer, template="问：{question}\n答：")
    (example,) = task.examples([{"question": "冷的是什么", "choices": ["冰", "火"]}], targets=False)
    assert tokenizer.decode(example.memory[0].tokens).endswith("答：冰")


@given(context=st.integers(48, 260), count=st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_a_prompt_keeps_as_many_of_the_last_examples_as_fit(context, count):
    _, tokenizer = causal()
    config = causal(context)[0].config
    shown = [{"question": f"number {n}", "choices": ["a", "b"], "answer": 1} for n in range(count)]
    task = MultipleChoice.prompted(config, tokenizer, examples=shown)
    (example,) = task.examples([{"question": "q", "choices": ["yes", "no way"]}], targets=False)
    lengths = [len(one.tokens) for one in example.memory]
    assert max(lengths) <= context
    said = tokenizer.decode(example.memory[1].tokens)
    kept = said.count("Answer: b")
    assert [f"number {n}" in said for n in range(count)] == [n >= count - kept for n in range(count)]
    if kept < count:
        one_more = len("Question: number 0\nAnswer: b\n\n")
        assert max(lengths) + one_more > context
        assert f"{count - kept:,} of the earliest examples" in task.notes()[0]
    else:
        assert task.notes() == []


def test_a_question_that_does_not_fit_by_itself_is_cut_where_it_begins_and_counted():
    network, tokenizer = causal(32)
    task = MultipleChoice.prompted(network.config, tokenizer, examples=ROWS[:1])
    row = {"question": "long " * 30, "choices": ["yes", "no"]}
    (example,) = task.examples([row], targets=False)
    assert all(len(one.tokens) <= 32 for one in example.memory)
    assert tokenizer.decode(example.memory[0].tokens).endswith("Answer: yes")
    assert any("cut where they begin" in note for note in task.notes())
    assert math.isfinite(task.predict(network, [row])[0]["probability"])


@given(st.lists(st.text("abc xyz", min_size=1, max_size=8), min_size=2, max_size=6, unique=True), st.data())
@settings(deadline=None)
def test_the_forms_of_an_answer_mean_the_same(choices, data):
    choices = [f"{number} {choice}" for number, choice in enumerate(choices)]
    place = data.draw(st.integers(0, len(choices) - 1))
    scores = [float(number == place) for number in range(len(choices))]
    by_text = dict(zip(choices, scores))
    for answer in (place, float(place), choices[place], "ABCDEF"[place], f"({'abcdef'[place]})", scores, by_text):
        assert question_of({"question": "q", "choices": choices, "answer": answer}, "row").right == (place,)


def test_a_choices_own_text_comes_before_letters_and_numbers():
    assert question_of({"question": "q", "choices": ["B", "A"], "answer": "A"}, "row").right == (1,)
    assert question_of({"question": "q", "choices": ["2", "0"], "answer": "0"}, "row").right == (1,)
    assert question_of({"question": "q", "choices": ["Yes", "No"], "answer": " no"}, "row").right == (1,)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "'question' is missing"),
        ({"question": "q", "answer": 0}, "'choices' is missing"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least 2"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, "empty"),
        ({"question": "q", "choices": ["a", "b"]}, "'answer' is missing"),
        ({"question": "q", "choices": ["a", "b"], "answer": float("nan")}, "'answer' holds float nan"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "numbered 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": -1}, "numbered 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "none of the choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": [0, 0]}, "above 0"),
        ({"question": "q", "choices": ["a", "b"], "answer": [1]}, "1 entries"),
        ({"question": "q", "choices": ["a", "b"], "answer": [1, float("nan")]}, "finite"),
    ],
)
def test_a_row_that_is_no_question_is_named(row, said):
    with pytest.raises(DataError) as error:
        made().examples([ROWS[0], row], targets=True, where="training row")
    assert "training row 2" in str(error.value) and said in str(error.value)


def test_only_causal_models_that_write_are_prompted_and_a_template_needs_its_question():
    network, tokenizer = causal()
    encoder = made().model_config()
    with pytest.raises(RecipeError, match="causal model"):
        MultipleChoice.prompted(encoder, tokenizer)
    with pytest.raises(RecipeError, match="must hold"):
        MultipleChoice.prompted(network.config, tokenizer, template="Answer:")
    with pytest.raises(DataError, match="example 1: field 'answer'"):
        MultipleChoice.prompted(network.config, tokenizer, examples=[{"question": "q", "choices": ["a", "b"]}])


def test_a_loaded_masked_model_gets_a_head_with_one_output():
    task = made()
    start = build(preset("bert-mini", vocab_size=task.tokenizer.vocab_size, context=48, size="1x32"), seed=0)
    network = with_head(start, task.head(start.config), seed=0)
    assert network.head.output.weight.shape == (1, 32) and network.config.pooler
    assert torch.equal(network.embedder.tokens.weight, start.embedder.tokens.weight)

"""Classification: labels as names, several labels, numbers; pairs, cut texts, and rows that are not as they must be."""

import numpy as np
import pytest
import torch

from formary.data.tokenizer import train as train_tokenizer
from formary.errors import DataError
from formary.model.topologies import build, with_head
from formary.recipe.reading import parse
from formary.tasks.classify import Classify
from formary.tasks.reading import shares

WORDS = ["good film", "bad film", "a good and kind book", "a bad and long book that does not end", "good", "bad"]


def made(rows, *, preset="bert-mini", context=32, start=None, **objective):
    recipe = parse(
        f"""
        name: t
        task: classify
        data: {{sources: [x]}}
        model: {{preset: {preset}, size: 1x32}}
        train: {{batch: 4, context: {context}, objective: {objective or "{}"}}}
        """
    )
    special = Classify.special_tokens(recipe)
    tokenizer = train_tokenizer(
        [" ".join(WORDS)], recipe.data.tokenizer.model_copy(update={"kind": "characters"}), task=special
    )
    return Classify.learn(recipe, tokenizer, rows, start=start)


SENTIMENT = [{"text": text, "label": "yes" if "good" in text else "no"} for text in WORDS]


@pytest.mark.parametrize("preset", ["bert-mini", "gpt-mini"])
def test_encoders_and_decoders_learn_labels(learned, preset):
    task = made(SENTIMENT, preset=preset)
    answers = task.predict(learned(task, SENTIMENT), SENTIMENT)
    assert [answer["label"] for answer in answers] == [row["label"] for row in SENTIMENT]
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["probability"] == max(answer["probabilities"].values())


@pytest.mark.parametrize("preset", ["bert-mini", "gpt-mini"])
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(preset):
    task = made(SENTIMENT, preset=preset)
    network = build(task.model_config(), seed=1).eval()
    together = task.predict(network, SENTIMENT)
    for row, answer in zip(SENTIMENT, together):
        (alone,) = task.predict(network, [row])
        assert alone["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)


def test_several_labels_are_learned_each_by_itself(learned):
    rows = [
        {"text": row["text"], "label": [name for name in ("good", "book") if name in row["text"]]} for row in SENTIMENT
    ]
    task = made(rows)
    assert task.kind == "multi" and task.labels == ("book", "good")
    answers = task.predict(learned(task, rows, steps=150), rows)
    assert [set(answer["labels"]) for answer in answers] == [set(row["label"]) for row in rows]


def test_numbers_with_fractions_are_a_regression_and_the_finished_head_says_them_itself(learned):
    rows = [{"text": text, "label": 100 + 7.5 * len(text)} for text in WORDS]
    task = made(rows)
    assert task.kind == "regression"
    network = learned(task, rows, steps=200)
    before = [answer["value"] for answer in task.predict(network, rows)]
    assert np.abs(np.array(before) - [row["label"] for row in rows]).mean() < 15
    task.finish(network)
    fresh = Classify.of_model(network.config, task.tokenizer, task.settings())
    assert [answer["value"] for answer in fresh.predict(network, rows)] == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 0] * 3, ("0", "1")),
        ([True, False] * 3, ("false", "true")),
        ([2.0, 10.0] * 3, ("2", "10")),
        (["b", "a"] * 3, ("a", "b")),
    ],
)
def test_labels_of_every_type_become_names(labels, names):
    assert made([{"text": text, "label": label} for text, label in zip(WORDS, labels)]).labels == names


def test_balanced_weights_let_each_class_weigh_alike_and_a_row_one_on_average():
    rows = [{"text": "x", "label": "rare"}] + [{"text": "y", "label": "common"}] * 9
    task = made(rows, class_weights="balanced")
    weights = dict(zip(task.labels, task.weights.tolist()))
    assert weights["rare"] == pytest.approx(9 * weights["common"])
    assert sum(weights[row["label"]] for row in rows) / len(rows) == pytest.approx(1)


def test_a_pair_is_read_with_types_and_the_longer_text_is_cut_first():
    rows = [{"text": "good", "text_pair": "bad " * 20, "label": n % 2} for n in range(4)]
    task = made(rows, context=16)
    (example, *_) = task.examples(rows, targets=True)
    assert len(example.inputs) == 16
    assert example.types.tolist() == [0] * 6 + [1] * 10
    assert task.notes() == [
        "4 texts were longer than the context of 16 tokens and cut to it; raise train.context to keep more"
    ]


@pytest.mark.parametrize(
    ("first", "second", "room", "kept"),
    [(3, 4, 10, (3, 4)), (20, 3, 10, (7, 3)), (3, 20, 10, (3, 7)), (20, 20, 9, (5, 4)), (5, 0, 3, (3, 0))],
)
def test_shares_of_a_pair(first, second, room, kept):
    assert shares(first, second, room) == kept


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "field 'label' is missing"),
        ({"text": "x", "label": None}, "field 'label' is empty"),
        ({"text": "x", "label": float("nan")}, r"not a number \(NaN\)"),
        ({"text": "x", "label": ""}, "field 'label' is empty"),
        ({"label": "yes"}, "field 'text' is missing"),
        ({"text": 7, "label": "yes"}, "holds int 7, not a text"),
    ],
)
def test_a_row_that_is_not_as_it_must_be_is_named(row, message):
    with pytest.raises(DataError, match="row 2: .*" + message):
        task = made(SENTIMENT)
        task.examples([SENTIMENT[0], row], targets=True)


def test_one_class_only_is_refused():
    with pytest.raises(DataError, match="every training row has the label 'spam'"):
        made([{"text": text, "label": "spam"} for text in WORDS])


def test_labels_unseen_in_training_are_counted_and_teach_nothing():
    task = made(SENTIMENT)
    rows = [SENTIMENT[0], {"text": "bad", "label": "perhaps"}]
    network = build(task.model_config(), seed=0)
    _, count = task.loss(network, task.collate(task.examples(rows, targets=True)))
    assert int(count) == 1
    assert "labels that no training row has count as errors: 'perhaps' (1)" in task.notes()


def test_a_head_goes_onto_a_pretrained_body_and_leaves_it_as_it_was():
    task = made(SENTIMENT)
    body = build(task.model_config(), seed=5)
    other = with_head(body, task.head(body.config), seed=9)
    assert torch.equal(other.transformer.blocks[0].ffn.input.weight, body.transformer.blocks[0].ffn.input.weight)
    assert torch.equal(other.embedder.tokens.weight, body.embedder.tokens.weight)


def test_an_empty_text_is_answered():
    task = made(SENTIMENT, preset="gpt-mini")
    assert task.predict(build(task.model_config(), seed=0), [{"text": ""}])[0]["label"] in task.labels

"""Sentence vectors: pairs come together, padding and company in the batch change nothing, repeats are no contrast."""

import math

import pytest
import torch

from formary.data.tokenizer import train as train_tokenizer
from formary.errors import DataError, RecipeError
from formary.model.topologies import build
from formary.recipe.reading import parse
from formary.tasks.embed import Embed

ROWS = [
    {"text": "a cat", "positive": "some kitten"},
    {"text": "the sea", "positive": "an ocean of water"},
    {"text": "red", "positive": "a colour"},
    {"text": "he runs fast", "positive": "quick"},
]
HARD = [{**ROWS[0], "negative": "a cap"}, {**ROWS[1], "negative": None}, ROWS[2], {**ROWS[3], "negative": "he runs"}]


def made(rows=ROWS, *, context=32, batch=4, switches="{}", preset="bert-mini", **objective):
    recipe = parse(
        f"""
        name: t
        task: embed
        data: {{sources: [x]}}
        model: {{preset: {preset}, size: 1x32, switches: {switches}}}
        train: {{batch: {batch}, context: {context}, objective: {objective or "{}"}}}
        """
    )
    texts = [value for row in HARD for value in row.values() if value]
    setting = recipe.data.tokenizer.model_copy(update={"kind": "characters"})
    return Embed.learn(recipe, train_tokenizer(texts, setting, task="masked_lm"), rows, start=None)


def vectors(answers, name="vector"):
    return torch.tensor([answer[name] for answer in answers])


@pytest.mark.parametrize("rows", [ROWS, HARD], ids=["pairs", "hard negatives"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_texts_find_their_positives(learned, pooling, rows):
    task = made(rows, switches=f"{{pooling: {pooling}}}")
    assert task.pooling == pooling
    answers = task.predict(learned(task, rows), rows)
    texts, positives = vectors(answers), vectors(answers, "positive")
    assert torch.allclose(texts.norm(dim=1), torch.ones(4), atol=1e-5)
    similar = texts @ positives.T
    assert similar.argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert (similar.diagonal() - similar.clone().fill_diagonal_(-1).max(dim=1).values).min() > 0.2


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_vector_does_not_depend_on_what_else_is_in_the_batch(pooling):
    task = made(switches=f"{{pooling: {pooling}}}")
    network = build(task.model_config(), seed=1).eval()
    for row, answer in zip(ROWS, task.predict(network, ROWS)):
        (alone,) = task.predict(network, [{"text": row["text"]}])
        assert set(alone) == {"vector"}
        assert alone["vector"] == pytest.approx(answer["vector"], abs=1e-5)


def test_loss_is_the_mean_of_both_directions():
    task = made(HARD, temperature=0.5)
    network = build(task.model_config(), seed=2).eval()
    answers = task.predict(network, HARD)
    texts, positives = vectors(answers), vectors(answers, "positive")
    negatives = vectors(task.predict(network, [{"text": HARD[0]["negative"]}, {"text": HARD[3]["negative"]}]))
    expected = 0.0
    for number in range(4):
        ahead = torch.cat([positives, negatives]) @ texts[number] / 0.5
        back = texts @ positives[number] / 0.5
        own = texts[number] @ positives[number] / 0.5
        expected += float((ahead.logsumexp(0) - own + back.logsumexp(0) - own) / 2)
    loss, count = task.loss(network, task.collate(task.examples(HARD, targets=True)))
    assert int(count) == 4 and float(loss) == pytest.approx(expected, rel=1e-4)


def test_what_occurs_twice_is_no_contrast_to_itself():
    rows = [ROWS[0], ROWS[0]]
    task = made(rows)
    network = build(task.model_config(), seed=2).eval()
    loss, _ = task.loss(network, task.collate(task.examples(rows, targets=True)))
    assert float(loss) == pytest.approx(0, abs=1e-5)
    rows = [ROWS[0], {**ROWS[1], "positive": ROWS[0]["positive"]}, ROWS[2]]
    loss, _ = task.loss(network, task.collate(task.examples(rows, targets=True)))
    assert math.isfinite(float(loss))


def test_a_finished_model_and_a_foreign_one_embed_alike():
    task = made(switches="{pooling: first}")
    network = build(task.model_config(), seed=0).eval()
    fresh = Embed.of_model(network.config, task.tokenizer, task.settings())
    assert fresh.predict(network, ROWS) == task.predict(network, ROWS)
    assert Embed.of_model(network.config, task.tokenizer, {}).pooling == "mean"


def test_a_long_text_is_cut_and_counted_and_an_empty_one_is_embedded():
    task = made(context=8)
    answers = task.predict(build(task.model_config(), seed=0), [{"text": "a cat " * 9}, {"text": ""}])
    assert len(answers) == 2 and "1 text was longer than the context of 8 tokens" in task.notes()[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "field 'positive' is missing"),
        ({"text": "x", "positive": 3}, "field 'positive' holds int 3"),
        ({"positive": "x"}, "field 'text' is missing"),
        ({"text": "x", "positive": "y", "negative": 1}, "field 'negative' holds int"),
    ],
)
def test_a_row_that_is_not_as_it_must_be_is_named(row, message):
    with pytest.raises(DataError, match="row 2: " + message):
        made().examples([ROWS[0], row], targets=True)


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(DataError, match="1 training rows"):
        made(ROWS[:1])
    with pytest.raises(RecipeError, match=r"train\.batch"):
        made(batch=1)
    with pytest.raises(RecipeError, match=r"model\.switches\.pooling"):
        made(switches="{pooling: last}")
    with pytest.raises(RecipeError, match="needs an encoder"):
        made(preset="gpt-mini").model_config()

"""Captions: a tiny model learns to say what pictures show, alone and in company, and says it again from its folder."""

import numpy as np
import pytest
import torch

from formary.data.images import data_uri
from formary.errors import DataError, RecipeError
from formary.evaluate.labelled import measured
from formary.hub import checkpoint
from formary.infer.answers import answers
from formary.infer.loaded import load
from formary.recipe.presets import preset
from formary.recipe.schema import Evaluate, Recipe
from formary.tasks.caption import Caption

_RNG = np.random.default_rng(7)
SAID = {"up": "light above and dark below", "down": "dark above, light below", "left": "the left is light"}


def picture(where):
    pixels = _RNG.integers(0, 40, (8, 8, 1), dtype=np.uint8)
    pixels[{"up": np.s_[:4], "down": np.s_[4:], "left": np.s_[:, :4]}[where]] += 180
    return data_uri(pixels)


@pytest.fixture(scope="module")
def rows():
    return [{"image": picture(where), "caption": said} for _ in range(8) for where, said in SAID.items()]


def recipe(tokenizer=None, **train):
    return Recipe.model_validate(
        {
            "name": "t",
            "task": "caption",
            "data": {"sources": ["x"], "tokenizer": tokenizer or {"kind": "characters"}},
            "model": {
                "preset": "caption-mini",
                "size": "1x32",
                "switches": {"image_size": 8, "patch_size": 4, "channels": 1},
            },
            "train": {"batch": 8, "context": 40, "objective": {"longest_target": 40}, **train},
        }
    )


@pytest.fixture(scope="module")
def task(rows):
    asked = recipe()
    return Caption.learn(asked, Caption.vocabulary(asked, rows), rows, start=None)


@pytest.fixture(scope="module")
def network(task, rows):
    from formary.model.topologies import build

    torch.manual_seed(0)
    made = build(task.model_config(), seed=0).train()
    optimiser = torch.optim.AdamW(made.parameters(), lr=5e-3)
    batch = task.collate(task.examples(rows, targets=True))
    for _ in range(120):
        loss, count = task.loss(made, batch)
        (loss / count).backward()
        optimiser.step()
        optimiser.zero_grad()
    return made.eval()


def test_it_says_what_pictures_show_that_it_has_not_seen(task, network):
    fresh = [{"image": picture(where)} for where in SAID]
    together = answers(task, network, fresh)
    assert [answer["text"] for answer in together] == list(SAID.values())
    assert [answers(task, network, [row])[0] for row in fresh] == together
    assert answers(task, network, fresh, beams=2) == together


def test_the_vocabulary_is_that_of_captions_alone(task):
    assert "+" not in task.tokenizer.vocab and "l" in task.tokenizer.vocab  # a data URI has a +, captions have none


def test_the_loss_counts_captions_and_their_ends(task, network, rows):
    batch = task.collate(task.examples(rows[:3], targets=True))
    _, count = task.loss(network, batch)
    assert int(count) == sum(len(row["caption"]) + 1 for row in rows[:3])
    assert batch["pixels"].shape == (3, 1, 8, 8) and next(iter(batch)) == "pixels"


def test_a_training_step_changes_pictures_alone_and_depends_on_nothing_but_its_number(rows):
    asked = recipe(augment={"crop": 2, "erase": 0.5})
    task = Caption.learn(asked, Caption.vocabulary(asked, rows), rows, start=None)
    examples = task.examples(rows[:5], targets=True)
    plain, one, again, other = task.collate(examples), *(task.training_batch(examples, step) for step in (3, 3, 4))
    assert torch.equal(one["pixels"], again["pixels"]) and not torch.equal(one["pixels"], other["pixels"])
    assert not torch.equal(one["pixels"], plain["pixels"])
    for name in ("decoder_tokens", "targets"):
        assert torch.equal(one[name], plain[name])


def test_captions_that_the_tokenizer_writes_otherwise_are_counted_and_one_is_shown(rows):
    told = [{**row, "caption": row["caption"].replace("light", "half-light")} for row in rows[:6]]
    for tokenizer, noted in (
        (
            {"kind": "wordpiece", "vocab_size": 60},
            ["'half-light above and dark below' comes out as 'half - light above"],
        ),
        ({"kind": "bpe", "vocab_size": 280}, []),
    ):
        asked = recipe(tokenizer)
        task = Caption.learn(asked, Caption.vocabulary(asked, told), told, start=None)
        task.examples(told, targets=True)
        assert len(task.notes()) == len(noted)
        for note, said in zip(task.notes(), noted):
            assert said in note and note.startswith("6 targets were not written by this tokenizer as they stand")


def test_a_folder_gives_the_same_captions(task, network, rows, tmp_path):
    checkpoint.save(tmp_path, network, formary={"task": "caption", "settings": task.settings()})
    task.tokenizer.save(tmp_path)
    again = load(tmp_path)
    assert again.predict(rows[:3]) == answers(task, network, rows[:3])


def test_it_is_measured_beside_the_most_frequent_caption(task, network, rows):
    found = measured(
        task,
        rows[:6],
        answers(task, network, rows[:6]),
        training=rows[6:],
        settings=Evaluate(bootstrap=100),
        split="test",
    )
    exact = next(metric for metric in found["metrics"] if metric["metric"] == "exact_match")
    assert exact["model"]["value"] == 1 and set(exact["baselines"]) == {"most frequent text"}
    assert exact["baselines"]["most frequent text"]["value"] == pytest.approx(1 / 3)


def test_what_cannot_be_read_or_written_is_named(task, rows):
    with pytest.raises(DataError, match=r"row 2.*image"):
        task.examples([rows[0], {"caption": "x"}], targets=True)
    with pytest.raises(DataError, match=r"row 1.*caption"):
        task.examples([{"image": rows[0]["image"], "caption": None}], targets=True)
    with pytest.raises(RecipeError, match="encoder reads pictures"):
        task.head(preset("seq2seq-mini", vocab_size=50, context=16, size="1x32"))

"""What comes next is learned by both kinds of model; items are no words; what is unknown is said; texts stand in for clicks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.errors import DataError, RecipeError, RequestError
from formary.hub import checkpoint
from formary.model.topologies import build
from formary.recipe.reading import parse
from formary.tasks.cross_entropy import IGNORED
from formary.tasks.next_item import SPECIAL, NextItem
from formary.tasks.sampled import sampled_loss

RING = [f"film {number} (19{number:02})" for number in range(12)]  # after each comes the next


def ring(start, count):
    return [RING[(start + step) % 12] for step in range(count)]


ROWS = [{"user": str(n), "history": ring(n, 8)} for n in range(12)]


def made(preset="sasrec-mini", rows=ROWS, *, context=16, described=(), switches="{dropout: 0.0}", **objective):
    recipe = parse(
        f"""
        name: t
        task: next_item
        data: {{sources: [x]}}
        model: {{preset: {preset}, size: 2x32, switches: {switches}}}
        train: {{batch: 12, context: {context}, objective: {objective or "{}"}}}
        """
    )
    tokenizer = NextItem.vocabulary(recipe, [*rows, *({"item": item, "text": ""} for item in described)])
    return NextItem.learn(recipe, tokenizer, rows, start=None)


PRESETS = pytest.mark.parametrize("preset", ["sasrec-mini", "bert4rec-mini"])


@PRESETS
def test_the_next_item_is_learned_and_what_was_seen_is_not_recommended(learned, preset):
    task = made(preset, mask_rate=0.2)
    network = learned(task, ROWS, steps=150 if task.causal else 500)
    asked = [{"history": ring(n, 7), "item": RING[(n + 7) % 12]} for n in range(12)]
    for row, answer in zip(asked, task.predict(network, asked, k=20)):
        names = [entry["item"] for entry in answer["items"]]
        assert names[0] == row["item"] and answer["rank"] == 1 and answer["candidates"] == 5
        assert len(names) == 5 and not set(names) & set(row["history"])
        assert sum(entry["score"] for entry in answer["items"]) == pytest.approx(1.0)
    whole = task.predict(network, asked, exclude_seen=False)
    assert all(len(answer["items"]) == 10 and answer["candidates"] == 12 for answer in whole)


@pytest.mark.parametrize(
    "objective",
    [{"item_loss": "sampled_softmax", "negatives": 8}, {"item_loss": "bce", "negatives": 3}, {"item_loss": "bpr"}],
    ids=lambda given: given["item_loss"],
)
def test_sampled_losses_learn_too(learned, objective):
    task = made(**objective)
    answers = task.predict(
        learned(task, ROWS, steps=150), [{"history": ring(n, 5), "item": RING[(n + 5) % 12]} for n in range(12)]
    )
    assert np.mean([answer["rank"] for answer in answers]) < 1.5


def test_an_item_is_a_token_of_its_own_whatever_it_is_called(tmp_path):
    rows = [{"history": ["The Sea", "the sea", "a", "☃ 雪", "a"]}]
    task = made(rows=rows)
    assert [name for name in task.tokenizer.vocab if name not in SPECIAL.values()] and task.tokenizer.vocab_size == 8
    assert task.names[4] == "a"  # the most frequent first
    task.tokenizer.save(tmp_path)
    from tokenizers import Tokenizer

    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert read.encode("The Sea\nthe sea\n☃ 雪").ids == task.known_items(["The Sea", "the sea", "☃ 雪"])
    with pytest.raises(DataError, match=r"an item is called \[MASK\]"):
        made(rows=[{"history": ["a", "[MASK]"]}])


@PRESETS
def test_unknown_items_are_said_and_nobody_is_too_new(preset):
    task = made(preset)
    network = build(task.model_config(), seed=0).eval()
    known, mixed, new, text = task.predict(
        network,
        [
            {"history": ring(0, 3)},
            {"history": ["?", *ring(0, 3)]},
            {"history": []},
            {"history": f"{RING[0]},{RING[1]},{RING[2]}"},
        ],
    )
    assert mixed["unknown"] == ["?"] and mixed["items"] == known["items"] == text["items"] and "unknown" not in known
    assert len(new["items"]) == 10
    assert any("'?' (1)" in note for note in task.notes())
    (answer,) = task.predict(network, [{"history": ["?"], "item": "never seen"}])
    assert answer["rank"] is None and any("no training row has" in note for note in task.notes())
    (answer,) = task.predict(network, [{"history": ring(0, 3), "item": RING[0]}])
    assert answer["rank"] is None and any("exclude_seen: false" in note for note in task.notes())


@PRESETS
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(preset):
    task = made(preset)
    network = build(task.model_config(), seed=1).eval()
    rows = [{"history": ring(n, n)} for n in range(9)]
    for row, answer in zip(rows, task.predict(network, rows)):
        (alone,) = task.predict(network, [row])
        assert [e["item"] for e in alone["items"]] == [e["item"] for e in answer["items"]]
        assert [e["score"] for e in alone["items"]] == pytest.approx([e["score"] for e in answer["items"]], abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(2, 12))
def test_every_item_of_a_long_history_is_learned_once(count, context):
    rows = [{"history": [f"i{number}" for number in range(count)]}, {"history": ["a", "b"]}]
    task = made(rows=rows, context=context)
    found = [example for example in task.examples(rows[:1], targets=True)]
    taught = [task.names[int(t)] for example in found for t in example.target if t != IGNORED]
    assert taught == rows[0]["history"]
    for example in found:  # what is read before a target is what came before it
        for read, target in zip(example.inputs, example.target):
            name = task.names[int(target)] if target != IGNORED else None
            if name and read != task.tokenizer.bos_id:
                assert task.names[int(read)] == f"i{int(name[1:]) - 1}"
        assert len(example.inputs) <= context


def test_a_held_out_row_is_scored_by_its_item_alone_and_the_newest_part_is_read():
    task = made(context=4)
    (example,) = task.examples([{"history": ring(0, 8), "item": RING[8]}], targets=True)
    assert [task.names[int(i)] for i in example.inputs] == ring(4, 4)
    assert [t for t in example.target if t != IGNORED] == task.known_items([RING[8]])
    (example,) = made("bert4rec-mini", context=4).examples([{"history": ring(0, 8), "item": RING[8]}], targets=True)
    assert [task.names[int(i)] for i in example.inputs] == [*ring(5, 3), "[MASK]"]


def test_the_loss_is_the_cross_entropy_of_the_items_of_training():
    task = made(described=["new"])
    network = build(task.model_config(), seed=0).eval()
    batch = task.collate(task.examples(ROWS[:3], targets=True))
    loss, count = task.loss(network, batch)
    logits = network.head(network(batch["tokens"]))[..., : task.seen]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    assert int(count) == 24 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert task.seen == task.tokenizer.vocab_size - 1


def test_masks_are_drawn_in_training_only_and_always_some():
    task = made("bert4rec-mini", mask_rate=0.3)
    batch = task.collate(task.examples(ROWS, targets=True))
    torch.manual_seed(0)
    masked = task._masked(batch)
    hidden = masked["tokens"] == task.tokenizer.mask_id
    assert hidden.any(dim=1).all() and (hidden == (masked["targets"] != IGNORED)).all()
    assert (masked["targets"][hidden] == batch["tokens"][hidden]).all() and 0.1 < hidden.float().mean() < 0.5
    asked = task.collate(task.examples([{"history": ring(0, 4), "item": RING[4]}], targets=True))
    assert (task._masked(asked)["tokens"] == asked["tokens"]).all()
    assert (task._masked(asked)["targets"] == asked["targets"]).all()


@pytest.mark.parametrize("kind", ["sampled_softmax", "bce", "bpr"])
def test_sampled_losses_equal_their_formulas(kind):
    torch.manual_seed(0)
    hidden, weight, bias, targets = torch.randn(5, 8), torch.randn(30, 8), torch.randn(30), torch.arange(5) + 4
    arguments = {"kind": kind, "draws": 40, "first": 4, "fixed": True}
    loss, count = sampled_loss(hidden, targets, weight, bias, **arguments)
    assert loss == sampled_loss(hidden, targets, weight, bias, **arguments)[0] and int(count) == 5
    shape = (40,) if kind == "sampled_softmax" else (5, 40)
    drawn = torch.randint(4, 30, shape, generator=torch.Generator().manual_seed(0)).expand(5, 40)
    total = 0.0
    for row in range(5):
        scores = weight @ hidden[row] + bias
        right, wrong = scores[targets[row]], scores[drawn[row]]
        keep = drawn[row] != targets[row]
        if kind == "sampled_softmax":
            total += float(torch.cat([right[None], wrong[keep]]).logsumexp(0) - right)
        elif kind == "bce":
            total -= float(right.sigmoid().log() + ((1 - wrong[keep].sigmoid()).log()).sum() / 40)
        else:
            total -= float((right - wrong[keep]).sigmoid().log().sum() / 40)
    assert float(loss) == pytest.approx(total, rel=1e-4)


def described(preset="sasrec-mini", **objective):
    """A ring whose items are known by their angle; one of them, the ninth, is in no training row."""
    angles = np.arange(12) * 2 * np.pi / 12
    vectors = np.stack([f(k * angles) for k in (1, 2, 3) for f in (np.cos, np.sin)], axis=1).astype(np.float32)
    rows = [{"history": [item for item in row["history"] if item != RING[9]]} for row in ROWS]
    task = made(preset, rows, described=RING, **objective)
    task.describe(RING, vectors)
    return task, rows


@PRESETS
@pytest.mark.parametrize("alone", [0.5, 1.0])
def test_an_item_that_has_only_a_text_is_recommended(learned, preset, alone):
    task, rows = described(preset, described_alone=alone, mask_rate=0.3)
    network = learned(task, rows, steps=300)
    assert task.seen == task.tokenizer.vocab_size - 1 and task.choices == 12
    (answer,) = task.predict(network, [{"history": ring(5, 4), "item": RING[9]}])
    assert answer["rank"] <= 3 and answer["new"] == {"rank": 1, "tied": 1, "candidates": 1}
    assert not network.embedder.known.table.requires_grad
    held = task.collate(task.examples([{"history": ring(5, 4), "item": RING[9]}], targets=True))
    assert task.loss(network, held)[0].item() > 0.01  # it competes with all where it is asked for
    table = network.embedder.vectors()
    new = task.known_items([RING[9]])[0]
    known = network.embedder.known
    assert torch.allclose(table[new], known.projection(known.table[new]), atol=1e-6)


@PRESETS
def test_a_finished_model_recommends_the_same(tmp_path, preset):
    for task in (made(preset), described(preset)[0]):
        network = build(task.model_config(), seed=0).eval()
        task.prepare(network)
        folder = tmp_path / str(task.choices + (task.features is not None))
        folder.mkdir()
        checkpoint.save(folder, network, formary={"task": "next_item", "settings": task.settings()})
        loaded = checkpoint.load(folder)
        again = NextItem.of_model(loaded.config, task.tokenizer, loaded.formary["settings"])
        rows = [{"history": ring(0, 4), "item": RING[9]}]
        assert again.predict(loaded.network, rows) == task.predict(network, rows)


def test_what_cannot_be_followed_is_refused():
    task = made()
    network = build(task.model_config(), seed=0).eval()
    for option, message in (({"k": 0}, "k: 0"), ({"k": "3"}, "k: '3'"), ({"beams": 2}, "beams: is no option")):
        with pytest.raises(RequestError, match=message):
            task.predict(network, [{"history": []}], **option)
    with pytest.raises(DataError, match="row 2: field 'history' is missing"):
        task.predict(network, [{"history": []}, {"text": "x"}])
    with pytest.raises(DataError, match="at least two"):
        made(rows=[{"history": ["a", "a"]}])
    with pytest.raises(RecipeError, match="does not score the tokens"):
        task.head(
            build(task.model_config(), seed=0).config.__class__(**{**vars(task.model_config()), "vocab_size": 99})
        )

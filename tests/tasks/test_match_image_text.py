"""Pictures and texts matched: a tiny model learns which belong together, and finds them by one another."""

import numpy as np
import pytest
import torch

from formary.data.images import data_uri
from formary.errors import DataError, RecipeError
from formary.evaluate.labelled import measured
from formary.hub import checkpoint
from formary.infer.loaded import load
from formary.model.topologies import build
from formary.recipe.presets import preset
from formary.recipe.schema import Evaluate, Recipe
from formary.tasks.match_image_text import MatchImageText
from formary.tasks.reading import in_batches

_RNG = np.random.default_rng(7)
SAID = {"up": "a bright sky over dark ground", "down": "snow at night", "left": "the left side is lit"}


def picture(where):
    pixels = _RNG.integers(0, 40, (8, 8, 1), dtype=np.uint8)
    pixels[{"up": np.s_[:4], "down": np.s_[4:], "left": np.s_[:, :4]}[where]] += 180
    return data_uri(pixels)


def pairs():
    return [{"image": picture(where), "text": said} for _ in range(8) for where, said in SAID.items()]


@pytest.fixture(scope="module")
def rows():
    return pairs()


def recipe(**changes):
    values = {
        "name": "t",
        "task": "match_image_text",
        "data": {"sources": ["x"], "tokenizer": {"kind": "characters"}},
        "model": {
            "preset": "clip-mini",
            "size": "1x32",
            "switches": {"image_size": 8, "patch_size": 4, "channels": 1, "shared_width": 16},
        },
        "train": {"batch": 8, "context": 40},
    }
    return Recipe.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def task(rows):
    asked = recipe()
    return MatchImageText.learn(asked, MatchImageText.vocabulary(asked, rows), rows, start=None)


@pytest.fixture(scope="module")
def network(task):
    made = build(task.model_config(), seed=0).train()
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-3)
    for _ in range(200):
        batch = task.collate(task.examples(pairs(), targets=True))
        loss, count = task.loss(made, batch)
        (loss / count).backward()
        optimiser.step()
        optimiser.zero_grad()
    return made.eval()


def test_texts_are_found_for_pictures_it_has_not_seen(task, network):
    fresh = [{"image": picture(where), "candidates": list(SAID.values())} for where in SAID]
    found = task.predict(network, fresh)
    assert [answer["label"] for answer in found] == list(SAID.values())
    for answer in found:
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["probability"] == answer["probabilities"][answer["label"]] > 0.5


def test_rows_may_have_a_picture_a_text_or_both(task, network, rows):
    both, seen, read = task.predict(network, [rows[0], {"image": rows[0]["image"]}, {"text": rows[0]["text"]}])
    assert set(seen) == {"image_vector"} and set(read) == {"text_vector"}
    assert both["image_vector"] == pytest.approx(seen["image_vector"], abs=1e-5)
    assert both["text_vector"] == pytest.approx(read["text_vector"], abs=1e-5)
    assert np.linalg.norm(both["image_vector"]) == pytest.approx(1, abs=1e-5)
    assert both["similarity"] == pytest.approx(np.dot(both["image_vector"], both["text_vector"]))
    other = task.predict(network, [{**rows[0], "text": rows[1]["text"]}])[0]
    assert both["similarity"] > other["similarity"]


def test_the_loss_is_that_of_finding_each_other_both_ways(task, network, rows):
    """By hand, as the pseudocode of CLIP's figure 3 has it, of rows with different texts."""
    batch = task.collate(task.examples(rows[:3], targets=True))
    loss, count = task.loss(network, batch)
    seen = torch.nn.functional.normalize(network.encode(batch["pixels"]), dim=-1)
    read = torch.nn.functional.normalize(network.encode_text(batch["tokens"], mask=batch["mask"]), dim=-1)
    logits = seen @ read.T * network.similarity_scale.exp()
    own = torch.arange(3)
    logits = logits.detach()
    cross_entropy = torch.nn.functional.cross_entropy
    assert float((loss / count).detach()) == pytest.approx(
        float((cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2), abs=1e-5
    )
    assert int(count) == 3


def test_the_same_text_of_another_picture_is_no_contrast(task, network, rows):
    alike = [rows[0], {**rows[3], "text": rows[0]["text"]}]
    loss, _ = task.loss(network, task.collate(task.examples(alike, targets=True)))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)


def test_it_is_measured_both_ways_beside_the_nearest_picture(task, network, rows):
    answers = task.predict(network, rows[:6], targets=True)
    found = measured(task, rows[:6], answers, training=rows[6:], settings=Evaluate(bootstrap=100), split="test")
    metrics = {metric["metric"]: metric for metric in found["metrics"]}
    assert {"text_retrieval_recall_at_1", "text_retrieval_mrr", "image_retrieval_mrr"} <= set(metrics)
    first = metrics["text_retrieval_recall_at_1"]
    assert first["model"]["value"] == 1 and "3 different candidates" in first["protocol"]
    assert first["baselines"]["text of the nearest picture"]["value"] == 1  # the pictures are that easy
    assert "6 different candidates" in metrics["image_retrieval_mrr"]["protocol"]
    assert found["details"]["worst"][0]["image"].startswith("data:image/png")


def test_classes_are_known_by_texts_alone(task, network):
    shot = task.zero_shot("{label}", sorted(SAID.values()))
    shown = [{"image": picture(where), "label": said} for where, said in SAID.items()]
    answers = shot.predict(network, shown)
    assert [answer["label"] for answer in answers] == list(SAID.values())
    assert set(answers[0]["probabilities"]) == set(SAID.values())
    with pytest.raises(DataError, match="no place for the label"):
        task.zero_shot("a picture", ["a"])


@pytest.mark.parametrize("preset", ["clip-mini", "clip-base"])
def test_a_folder_gives_the_same_vectors_here_and_in_transformers(preset, rows, tmp_path):
    transformers = pytest.importorskip("transformers")
    asked = recipe(model={**recipe().model.model_dump(), "preset": preset})
    task = MatchImageText.learn(asked, MatchImageText.vocabulary(asked, rows), rows, start=None)
    network = build(task.model_config(), seed=0).eval()
    checkpoint.save(tmp_path, network, formary={"task": task.name, "settings": task.settings()})
    task.tokenizer.save(tmp_path)
    given, again = task.predict(network, rows[:3]), load(tmp_path).predict(rows[:3])
    for one, other in zip(given, again):
        assert one["image_vector"] == pytest.approx(other["image_vector"], abs=1e-5)
        assert one["text_vector"] == pytest.approx(other["text_vector"], abs=1e-5)
    if preset == "clip-mini":  # takes means, which CLIP in transformers does not
        assert load(tmp_path).family == "formary"
        return
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    batch = task.collate(task.examples(rows[:3], targets=True))
    with torch.no_grad():
        theirs = model(
            input_ids=batch["tokens"], pixel_values=batch["pixels"], attention_mask=batch["mask"].long()
        ).text_embeds
    assert theirs.numpy() == pytest.approx(np.array([one["text_vector"] for one in given]), abs=1e-4)


def test_validation_contrasts_as_many_rows_as_training_does(task, rows):
    examples = task.examples(rows[:7], targets=True)
    batches = list(in_batches(task, examples, batch=4))
    assert [len(batch["pixels"]) for batch in batches] == [4, 3]
    assert torch.equal(torch.cat([batch["pixels"] for batch in batches]), task.collate(examples)["pixels"])


def test_a_training_step_depends_on_nothing_but_its_number(rows):
    asked = recipe(train={"batch": 8, "context": 40, "augment": {"crop": 2, "flip": True}})
    task = MatchImageText.learn(asked, MatchImageText.vocabulary(asked, rows), rows, start=None)
    examples = task.examples(rows[:4], targets=True)
    one, again, other = (task.training_batch(examples, step) for step in (3, 3, 4))
    assert torch.equal(one["pixels"], again["pixels"]) and not torch.equal(one["pixels"], other["pixels"])
    assert torch.equal(one["tokens"], other["tokens"])


def test_what_cannot_be_read_or_learned_is_named(task, network, rows):
    with pytest.raises(DataError, match=r"row 2.*image"):
        task.examples([rows[0], {"text": "x"}], targets=True)
    with pytest.raises(DataError, match=r"row 1.*text"):
        task.examples([{"image": rows[0]["image"], "text": None}], targets=True)
    for given in ("a text", ["one"], ["same", "same"], [1, 2]):
        with pytest.raises(DataError, match=r"row 1: field 'candidates' must be a list of two or more"):
            task.predict(network, [{"image": rows[0]["image"], "candidates": given}])
    with pytest.raises(DataError, match=r"row 1: field 'text' is missing"):
        task.predict(network, [{}])
    with pytest.raises(RecipeError, match="needs two towers"):
        task.head(preset("vit-mini", vocab_size=1, context=16, size="1x32"))
    with pytest.raises(DataError, match="1 training rows"):
        MatchImageText.learn(recipe(), task.tokenizer, rows[:1], start=None)
    with pytest.raises(RecipeError, match="at least 2"):
        MatchImageText.learn(recipe(train={"batch": 1, "context": 40}), task.tokenizer, rows, start=None)

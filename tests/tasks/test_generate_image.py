"""Pictures pixel by pixel: a tiny model learns what its labels look like, goes on from half a picture, and says how likely one is."""

import io
import math
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image

from formary.data.images import data_uri
from formary.errors import DataError, RecipeError
from formary.evaluate.labelled import measured
from formary.hub import checkpoint
from formary.infer.answers import answers, measurable
from formary.infer.loaded import load
from formary.model.topologies import build
from formary.recipe.presets import preset
from formary.recipe.schema import Evaluate, Recipe
from formary.tasks.generate_image import GenerateImage

SIDE = 6
SHAPES = {"bars": np.s_[:, ::2], "steps": np.s_[::2]}


def picture(label, dark=0):
    pixels = np.full((SIDE, SIDE, 3), dark, dtype=np.uint8)
    pixels[SHAPES[label]] = (200, 120, 0)
    return data_uri(pixels)


def pixels_of(uri):
    return np.array(Image.open(io.BytesIO(b64decode(uri.split(",")[1]))).convert("RGB"))


def recipe(**objective):
    return Recipe.model_validate(
        {
            "name": "t",
            "task": "generate_image",
            "data": {"sources": ["x"]},
            "model": {"preset": "gpt-mini", "size": "2x32", "switches": {"position": "learned"}},
            "train": {"batch": 8, "objective": {"side": SIDE, "colours": 4, **objective}},
        }
    )


@pytest.fixture(scope="module")
def rows():
    return [{"image": picture(label, dark), "label": label} for label in SHAPES for dark in (0, 60)] * 4


@pytest.fixture(scope="module")
def task(rows):
    asked = recipe()
    return GenerateImage.learn(asked, GenerateImage.vocabulary(asked, rows), rows, start=None)


@pytest.fixture(scope="module")
def network(task, rows):
    torch.manual_seed(0)
    made = build(task.model_config(), seed=0).train()
    optimiser = torch.optim.AdamW(made.parameters(), lr=3e-3)
    examples = task.examples(rows, targets=True)
    for step in range(220):
        loss, count = task.loss(made, task.training_batch(examples, step))
        (loss / count).backward()
        optimiser.step()
        optimiser.zero_grad()
    return made.eval()


def test_the_vocabulary_is_colours_and_labels(task):
    assert task.palette.names == ["#000000", "#3c3c3c", "#c87800"]
    assert task.labels == ["bars", "steps"] and task.tokenizer.vocab_size == 2 + 3 + 2
    assert task.model_config().context == SIDE * SIDE


def test_it_paints_what_a_label_asks_for(task, network):
    asked = [{"label": label, "seed": seed} for label in SHAPES for seed in range(4)]
    together = answers(task, network, asked)
    light = np.array([pixels_of(answer["image"])[..., 0] == 200 for answer in together]).reshape(2, 4, SIDE, SIDE)
    for made, label in zip(light, SHAPES):
        agree = {name: (made == (pixels_of(picture(name))[..., 0] == 200)).mean() for name in SHAPES}
        assert agree[label] > 0.85 and agree[label] == max(agree.values()) and min(agree.values()) < 0.7
    assert answers(task, network, asked[2:3]) == together[2:3]  # alone as in company
    assert len({answer["image"] for answer in together}) > 2  # a seed is another picture


def test_it_goes_on_from_the_upper_part(task, network):
    for label in SHAPES:
        for dark in (0, 60):
            (answer,) = answers(task, network, [{"image": picture(label, dark), "keep": 0.5}], temperature=0.0)
            assert np.array_equal(pixels_of(answer["image"]), pixels_of(picture(label, dark)))


def test_what_is_kept_stays_as_it_was(task, network):
    odd = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    odd[0, 1:3] = (200, 120, 0)
    (answer,) = answers(task, network, [{"image": data_uri(odd), "label": "steps", "keep": 0.34}])
    assert np.array_equal(pixels_of(answer["image"])[:2], odd[:2])


def test_each_pixel_is_chosen_from_what_the_network_says_of_all_before_it(task, network):
    (answer,) = answers(task, network, [{"label": "steps"}], temperature=0.0)
    tokens = [task.tokenizer.vocab["steps"]]
    with torch.no_grad():
        for _ in range(SIDE * SIDE):
            tokens.append(int(network.head(network(torch.tensor([tokens]))[0, -1]).argmax()))
    assert (task.codes([answer]).reshape(-1) + task.first).tolist() == tokens[1:]


def test_likelihood_is_that_of_the_networks_own_distribution(task, network, rows):
    """The probabilities of pictures, multiplied pixel by pixel, with a pixel more each time."""
    few = rows[:3]
    found = measurable(task, network, few)
    for row, answer in zip(few, found):
        tokens = [task.tokenizer.vocab[row["label"]], *(task.codes([row]).reshape(-1).astype(int) + task.first)]
        nats = 0.0
        with torch.no_grad():
            for end in range(1, len(tokens)):
                logits = network.head(network(torch.tensor([tokens[:end]]))[:, -1])
                nats -= float(torch.log_softmax(logits, dim=-1)[0, tokens[end]])
        assert answer["bits"] == pytest.approx(nats / math.log(2), abs=1e-3)
        assert answer["pixels"] == SIDE * SIDE


def test_a_tenth_of_training_is_not_told_the_label(task, rows):
    examples = task.examples(rows, targets=True)
    begins = torch.cat([task.training_batch(examples, step)["tokens"][:, 0] for step in range(60)])
    share = float((begins == task.tokenizer.bos_id).float().mean())
    assert 0.06 < share < 0.14
    assert torch.equal(task.training_batch(examples, 7)["tokens"], task.training_batch(examples, 7)["tokens"])


def test_evaluation_beside_baselines(task, network, rows):
    given = measurable(task, network, rows)
    settings = Evaluate(bootstrap=100)
    found = measured(task, rows, given, training=rows, settings=settings, split="test")
    first = found["metrics"][0]
    assert first["metric"] == "bits_per_dimension" and set(first["baselines"]) == {
        "colours of each place",
        "2-D Markov (left, above)",
    }
    assert first["model"]["value"] < first["baselines"]["2-D Markov (left, above)"]["value"]
    assert found["details"]["worst"][0]["image"].startswith("data:image/png")
    assert found["leakage"]["rows"] == len(rows)


def test_it_is_the_same_from_its_folder(task, network, tmp_path):
    checkpoint.save(tmp_path, network, formary={"task": "generate_image", "settings": task.settings()})
    task.tokenizer.save(tmp_path)
    again = load(tmp_path)
    asked = [{"label": "bars", "seed": 3}, {"image": picture("steps"), "keep": 0.5}]
    assert again.predict(asked) == answers(task, network, asked)
    assert again.predict(["bars"]) == answers(task, network, [{"label": "bars"}])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"label": "bras"}, "field 'label' holds 'bras', which the model does not know; did you mean 'bars'"),
        ({"image": "x.gif"}, "row 1: field 'image': x.gif: there is no such file"),
        ({"image": "data:image/png;base64,AAAA"}, "not a PNG or JPEG picture"),
        ({"label": "bars", "image": None, "keep": 2}, None),
        ({"image": picture("bars"), "keep": 1}, "field 'keep' holds 1; give the share"),
        ({"image": picture("bars"), "keep": "half"}, "field 'keep' holds 'half'"),
        ({"label": "bars", "seed": "one"}, "row 1: field 'seed' holds 'one'; give a whole number"),
    ],
)
def test_bad_rows_are_told(task, network, row, says):
    if says is None:
        assert answers(task, network, [row])[0]["image"]
        return
    with pytest.raises(DataError, match=says):
        answers(task, network, [row])


def test_labels_that_training_lacks_are_noted_where_pictures_are_measured(task, rows, network):
    fresh = GenerateImage.of_model(network.config, task.tokenizer, task.settings())
    fresh.likelihood(network, [{"image": picture("bars"), "label": "dots"}])
    assert fresh.notes() == ["labels that no training row has tell the model nothing: 'dots' (1)"]


def test_what_cannot_be_trained_is_refused(rows, task):
    with pytest.raises(RecipeError, match=r"train.objective.side: 65 x 65 pixels are 4,225 tokens"):
        GenerateImage.vocabulary(recipe(side=65), rows)
    with pytest.raises(DataError, match="label '#fff' is called as the model calls a colour"):
        GenerateImage.vocabulary(recipe(), [{"image": picture("bars"), "label": "#fff"}])
    with pytest.raises(RecipeError, match=r"model\.start: not a model of pictures in these colours"):
        task.head(preset("gpt-mini", vocab_size=50, context=64, size="1x32"))

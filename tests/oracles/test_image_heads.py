"""Classifiers of pictures against transformers, both ways: the same logits, labels and scale of pixels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from formary.data.images import data_uri
from formary.data.tokenizer import wordless
from formary.hub.checkpoint import load, save
from formary.infer.loaded import load as load_model
from formary.model.topologies import build
from formary.recipe.presets import preset
from formary.tasks.classify_image import ClassifyImage

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 12,
    "patch_size": 4,
    "id2label": {0: "cat", 1: "dog", 2: "owl"},
}
PIXELS = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
PROCESSOR = {"do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def shaken(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def theirs(stem, **fields):
    config = getattr(transformers, f"{stem}Config")(**{**SIZES, **fields})
    return shaken(getattr(transformers, f"{stem}ForImageClassification")(config))


@torch.no_grad()
def logits_of(network):
    return network.head(network.summary(network(PIXELS)))


@pytest.mark.parametrize("stem", ["ViT", "DeiT"])
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_their_classifier_gives_the_same_logits_here(stem, problem, tmp_path):
    model = theirs(stem, problem_type=problem)
    model.save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    assert checkpoint.left_out == () and checkpoint.config.labels == ("cat", "dog", "owl")
    assert checkpoint.config.problem == {"s": "single", "m": "multi"}[problem[0]]
    with torch.no_grad():
        oracle = model(PIXELS).logits
    torch.testing.assert_close(logits_of(checkpoint.network), oracle, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("stem", "tokens"), [("ViT", 1), ("DeiT", 2)])
def test_our_classifier_gives_the_same_logits_there(stem, tokens, tmp_path):
    switches = {
        "image_size": 12,
        "patch_size": 4,
        "class_tokens": tokens,
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.4, 0.5, 0.6),
    }
    config = preset("vit-mini", vocab_size=0, context=9 + tokens, size="2x24", switches=switches)
    task = ClassifyImage(wordless(), context=1, kind="single", labels=["a", "b", "c", "d"])
    from formary.tasks.pictures import PictureReader

    task.pictures = PictureReader.of_config(config)
    network = shaken(build(task.head(config)))
    save(tmp_path, network)
    model = getattr(transformers, f"{stem}ForImageClassification").from_pretrained(tmp_path).eval()
    assert model.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}
    with torch.no_grad():
        oracle = model(PIXELS).logits
    torch.testing.assert_close(logits_of(network), oracle, atol=1e-4, rtol=1e-4)
    again = load(tmp_path)
    assert again.family == stem.lower() and again.config.image_mean == (0.1, 0.2, 0.3)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == {"height": 12, "width": 12}


def test_the_mean_over_patches_without_a_class_token_is_kept_in_our_own_layout(tmp_path):
    switches = {"image_size": 12, "patch_size": 4, "class_tokens": 0, "channels": 3}
    config = preset("vit-mini", vocab_size=0, context=9, size="2x24", switches=switches)
    task = ClassifyImage(wordless(), context=1, kind="single", labels=["a", "b"])
    from formary.tasks.pictures import PictureReader

    task.pictures = PictureReader.of_config(config)
    network = shaken(build(task.head(config)))
    save(tmp_path, network)
    again = load(tmp_path)
    assert again.family == "formary" and again.config.pooling == "mean"
    torch.testing.assert_close(logits_of(again.network), logits_of(network))


def test_a_foreign_checkpoint_answers_pictures_of_any_size_as_transformers_does(tmp_path):
    model = theirs("ViT")
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 12, "width": 12}, **PROCESSOR)
    processor.save_pretrained(tmp_path)
    picture = np.random.default_rng(2).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    (answer,) = load_model(tmp_path).predict([{"image": data_uri(picture)}], precision="float32")
    small = np.array(Image.fromarray(picture).resize((12, 12), Image.Resampling.BILINEAR))
    read = (small / 255 - PROCESSOR["image_mean"]) / PROCESSOR["image_std"]
    with torch.no_grad():
        oracle = model(torch.from_numpy(read).permute(2, 0, 1)[None].float()).logits[0].softmax(0)
    assert answer["label"] == ["cat", "dog", "owl"][int(oracle.argmax())]
    found = [answer["probabilities"][name] for name in ("cat", "dog", "owl")]
    torch.testing.assert_close(torch.tensor(found), oracle, atol=1e-4, rtol=1e-4)


def test_pixels_are_scaled_as_their_processor_scales_them(tmp_path):
    processor_kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    processor = processor_kind(size={"height": 12, "width": 12}, **PROCESSOR)
    from formary.tasks.pictures import PictureReader

    picture = np.random.default_rng(3).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    try:
        expected = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"]
    except ImportError:
        pytest.skip("the processor needs torchvision")
    reader = PictureReader(12, 3, tuple(PROCESSOR["image_mean"]), tuple(PROCESSOR["image_std"]))
    assert np.allclose(reader.pixels([picture]), expected, atol=1e-5)

"""Detectors against transformers, both ways: the same logits and boxes, with and without positions between layers."""

import json

import pytest
import torch

from formary.hub.checkpoint import load, save
from formary.model.config import ModelConfig, TransformerConfig
from formary.model.topologies import build

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": [12, 12],
    "patch_size": 4,
    "num_detection_tokens": 5,
    "id2label": {0: "cat", 1: "dog", 2: "owl"},
}
PIXELS = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def shaken(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@torch.no_grad()
def found(network):
    return network.head(network(PIXELS))


def same(network, model):
    with torch.no_grad():
        oracle = model(PIXELS)
    logits, boxes = found(network)
    assert logits.shape == (2, 5, 4) and boxes.shape == (2, 5, 4)
    torch.testing.assert_close(logits, oracle.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(boxes, oracle.pred_boxes, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("between", [True, False])
def test_their_detector_finds_the_same_here(between, tmp_path):
    model = shaken(
        transformers.YolosForObjectDetection(transformers.YolosConfig(**SIZES, use_mid_position_embeddings=between))
    )
    model.save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    assert checkpoint.left_out == () and checkpoint.family == "yolos"
    assert (
        checkpoint.config.labels == ("cat", "dog", "owl") and checkpoint.config.transformer.layer_positions == between
    )
    same(checkpoint.network, model)


@pytest.mark.parametrize("between", [True, False])
def test_our_detector_finds_the_same_there(between, tmp_path):
    stack = TransformerConfig(
        layers=2, width=24, heads=3, norm_eps=1e-12, causal=False, context=9 + 1 + 5, layer_positions=between
    )
    config = ModelConfig(
        topology="encoder", transformer=stack, vocab_size=0, head="detect", labels=("a", "b", "c"), image_size=12,
        patch_size=4, detection_tokens=5, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6), initialisation="vit",
    )  # fmt: skip
    network = shaken(build(config))
    save(tmp_path, network)
    model = transformers.YolosForObjectDetection.from_pretrained(tmp_path).eval()
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    same(network, model)
    again = load(tmp_path)
    assert again.family == "yolos" and again.config == config
    said = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert said["image_processor_type"] == "YolosImageProcessor" and said["size"] == {"height": 12, "width": 12}


def test_a_bare_backbone_is_read_and_written(tmp_path):
    model = shaken(transformers.YolosModel(transformers.YolosConfig(**SIZES), add_pooling_layer=False))
    model.save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    assert checkpoint.config.head == "none" and checkpoint.config.detection_tokens == 5
    again = tmp_path / "again"
    again.mkdir()
    save(again, checkpoint.network)
    theirs = transformers.YolosModel.from_pretrained(again, add_pooling_layer=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(PIXELS).last_hidden_state, model(PIXELS).last_hidden_state)
        torch.testing.assert_close(checkpoint.network(PIXELS), model(PIXELS).last_hidden_state, atol=1e-4, rtol=1e-4)

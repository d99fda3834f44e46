"""CLIP against transformers, both ways: the same vectors and similarities, texts of different length in one batch."""

import pytest
import torch

from formary.errors import CheckpointError
from formary.hub.checkpoint import load, save
from formary.model.config import ModelConfig, TransformerConfig
from formary.model.topologies import build

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "vocab_size": 30,
    "max_position_embeddings": 9,
    "bos_token_id": 4,
    "eos_token_id": 5,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 1,
}
PIXELS = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[4, 9, 17, 29, 5], [4, 8, 5, 0, 0], [4, 28, 6, 5, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()


def shaken(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@torch.no_grad()
def same(network, model):
    oracle = model(input_ids=TOKENS, pixel_values=PIXELS, attention_mask=MASK.long())
    seen, read, scale = network(PIXELS, TOKENS, mask=MASK)
    torch.testing.assert_close(seen, oracle.image_embeds, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read, oracle.text_embeds, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen @ read.T * scale, oracle.logits_per_image, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_their_towers_give_the_same_here(activation, tmp_path):
    more = {"hidden_act": activation}
    config = transformers.CLIPConfig(text_config=TEXT | more, vision_config=VISION | more, projection_dim=20)
    model = shaken(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    assert checkpoint.left_out == () and checkpoint.family == "clip"
    assert (checkpoint.config.bos_id, checkpoint.config.eos_id, checkpoint.config.pad_id) == (4, 5, 0)
    same(checkpoint.network, model)


def ours(**changes):
    text = TransformerConfig(layers=2, width=24, heads=3, context=9)
    vision = TransformerConfig(layers=3, width=16, heads=2, causal=False, context=10)
    fields = {
        "topology": "two_towers", "transformer": text, "encoder": vision, "vocab_size": 30, "head": "none",
        "image_size": 12, "patch_size": 4, "patch_bias": False, "patch_norm": True, "channels": 1, "shared_width": 20,
        "image_mean": (0.1,), "image_std": (0.4,), "eos_id": 5, "initialisation": "bert",
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


def test_our_towers_give_the_same_there(tmp_path):
    config = ours()
    assert config.pooling == "last"
    network = shaken(build(config))
    save(tmp_path, network)
    same(network, transformers.CLIPModel.from_pretrained(tmp_path).eval())
    again = load(tmp_path)
    assert again.family == "clip" and again.config == config


def test_how_pictures_are_cut_is_read_and_written_as_they_do(tmp_path):
    save(tmp_path, shaken(build(ours(image_cut=True))))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.do_center_crop and processor.crop_size["height"] == 12 and processor.size["shortest_edge"] == 12
    assert load(tmp_path).config.image_cut


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_id": 2},  # transformers would look for the largest id
        {"patch_bias": True},
        {"transformer": TransformerConfig(layers=2, width=24, heads=3, causal=False, context=9), "pooling": "mean"},
    ],
)
def test_what_clip_cannot_hold_is_kept_in_our_own_layout(changes, tmp_path):
    config = ours(**changes)
    network = shaken(build(config))
    save(tmp_path, network)
    again = load(tmp_path)
    assert again.family == "formary" and again.config == config
    for before, after in zip(network(PIXELS, TOKENS, mask=MASK), again.network(PIXELS, TOKENS, mask=MASK)):
        torch.testing.assert_close(before, after)


def test_a_tower_of_wrong_size_is_named(tmp_path):
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"projection_dim": 20', '"projection_dim": 21'))
    with pytest.raises(CheckpointError, match=r"visual_projection\.weight has shape \(20, 16\)"):
        load(tmp_path)

"""CLIP (Radford et al. 2021): a tower for pictures and one for texts, whose vectors meet in one space.

Both are pre-norm stacks; a text is read from left to right, and its vector is its last token's. A checkpoint of one tower
alone is not read.
"""

from __future__ import annotations

from formary.errors import CheckpointError
from formary.hub.families.family import HF_ACTIVATIONS, Family, HfConfig, Rule, activation, ids, table
from formary.model.config import ModelConfig, TransformerConfig

_LEGACY_END = 2  # with this eos_token_id transformers takes the largest id of a text for its end


def _stack(hf: HfConfig, *, causal: bool, context: int) -> TransformerConfig:
    return TransformerConfig(
        layers=hf["num_hidden_layers"],
        width=hf["hidden_size"],
        heads=hf["num_attention_heads"],
        ffn_width=hf["intermediate_size"],
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        activation=activation(hf, "hidden_act", "quick_gelu"),
        causal=causal,
        dropout=hf.get("attention_dropout", 0.0),
        context=context,
    )


def _config(hf: HfConfig, names: frozenset[str]) -> ModelConfig:
    text, vision = _OF_TEXTS | hf["text_config"], _OF_PICTURES | hf["vision_config"]
    image, patch = vision["image_size"], vision["patch_size"]
    return ModelConfig(
        topology="two_towers",
        transformer=_stack(text, causal=True, context=text["max_position_embeddings"]),
        encoder=_stack(vision, causal=False, context=(image // patch) ** 2 + 1),
        vocab_size=text["vocab_size"],
        head="none",
        pooling="last",
        image_size=image,
        patch_size=patch,
        patch_bias=False,
        patch_norm=True,
        channels=vision["num_channels"],
        shared_width=hf.get("projection_dim", 512),
        image_cut=hf.get("do_center_crop", False),
        image_mean=tuple(hf.get("image_mean") or ()),
        image_std=tuple(hf.get("image_std") or ()),
        initialisation="bert",
        **ids(text),
    )


def _hf_config(config: ModelConfig) -> HfConfig:
    assert config.encoder is not None
    if config.eos_id in (None, _LEGACY_END):
        raise CheckpointError(
            f"CLIP in transformers finds the end of a text by its id, which cannot be {config.eos_id}"
        )
    return {
        "architectures": ["CLIPModel"],
        "projection_dim": config.shared_width,
        **({"do_center_crop": True} if config.image_cut else {}),
        **({"image_mean": list(config.image_mean)} if config.image_mean else {}),
        **({"image_std": list(config.image_std)} if config.image_std else {}),
        "text_config": {
            **_hf_stack(config.transformer),
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.transformer.context,
            "projection_dim": config.shared_width,
            "bos_token_id": config.bos_id,
            "eos_token_id": config.eos_id,
            "pad_token_id": config.pad_id,
        },
        "vision_config": {
            **_hf_stack(config.encoder),
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_channels": config.channels,
            "projection_dim": config.shared_width,
        },
    }


def _hf_stack(stack: TransformerConfig) -> HfConfig:
    return {
        "hidden_size": stack.width,
        "intermediate_size": stack.ffn_width,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "hidden_act": HF_ACTIVATIONS[stack.activation],
        "layer_norm_eps": stack.norm_eps,
        "attention_dropout": stack.dropout,
    }


# What transformers takes for granted, as the first checkpoints leave it out.
_OF_TEXTS: HfConfig = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
_OF_PICTURES: HfConfig = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
}


def _tower(ours: str, theirs: str) -> dict[str, str | tuple[str, ...]]:
    layer, block = f"{theirs}.encoder.layers.{{i}}", f"{ours}.blocks.{{i}}"
    return {
        f"{block}.attention_norm": f"{layer}.layer_norm1",
        f"{block}.attention.qkv": tuple(f"{layer}.self_attn.{x}_proj" for x in ("q", "k", "v")),
        f"{block}.attention.output": f"{layer}.self_attn.out_proj",
        f"{block}.ffn_norm": f"{layer}.layer_norm2",
        f"{block}.ffn.input": f"{layer}.mlp.fc1",
        f"{block}.ffn.output": f"{layer}.mlp.fc2",
    }


_SEEN, _READ = "vision_model", "text_model"
_TABLE = table(
    pictures={
        "embedder.first": Rule((f"{_SEEN}.embeddings.class_embedding",), squeezed=True),
        "embedder.positions": Rule((f"{_SEEN}.embeddings.position_embedding.weight",), squeezed=True),
        "embedder.patches": f"{_SEEN}.embeddings.patch_embedding",
        "embedder.norm": f"{_SEEN}.pre_layrnorm",
        **_tower("encoder", _SEEN),
        "encoder.norm": f"{_SEEN}.post_layernorm",
        "projection": "visual_projection",
    },
    texts={
        "text_embedder.tokens": f"{_READ}.embeddings.token_embedding",
        "text_embedder.positions": f"{_READ}.embeddings.position_embedding",
        **_tower("transformer", _READ),
        "transformer.norm": f"{_READ}.final_layer_norm",
        "text_projection": "text_projection",
    },
    both={"similarity_scale": Rule(("logit_scale",), squeezed=True)},
)

CLIP = Family(
    name="clip",
    model_types=("clip",),
    config=_config,
    hf_config=_hf_config,
    rules=lambda config: _TABLE,
)

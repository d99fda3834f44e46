"""ViT (Dosovitskiy et al. 2021): a pre-norm encoder over image patches.

The backbone and, where the checkpoint has one, its pooler; a classifier's weights are left out on reading.
"""

from __future__ import annotations

from typing import Any

from formary.errors import CheckpointError
from formary.hub.families.family import HF_ACTIVATIONS, Family, HfConfig, activation, refuse, table
from formary.model.config import ModelConfig, TransformerConfig


def _config(hf: HfConfig, names: frozenset[str]) -> ModelConfig:
    image, patch = _square(hf, "image_size", 224), _square(hf, "patch_size", 16)
    pooler = "vit.pooler.dense.weight" in names
    if pooler:
        refuse(hf, "pooler_act", "tanh")
        refuse(hf, "pooler_output_size", hf["hidden_size"])
    stack = TransformerConfig(
        layers=hf["num_hidden_layers"],
        width=hf["hidden_size"],
        heads=hf["num_attention_heads"],
        ffn_width=hf["intermediate_size"],
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        activation=activation(hf, "hidden_act", "gelu"),
        qkv_bias=hf.get("qkv_bias", True),
        causal=False,
        dropout=hf.get("hidden_dropout_prob", 0.0),
        context=(image // patch) ** 2 + 1,
    )
    return ModelConfig(
        topology="encoder",
        transformer=stack,
        vocab_size=0,
        head="none",
        pooler=pooler,
        image_size=image,
        patch_size=patch,
        channels=hf.get("num_channels", 3),
        initialisation="vit",
    )


def _square(hf: HfConfig, key: str, default: int) -> int:
    size: Any = hf.get(key, default)
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise CheckpointError(f"{key} {size}: only square images and patches are supported")
    return int(sides.pop())


def _hf_config(config: ModelConfig) -> HfConfig:
    stack = config.transformer
    return {
        "architectures": ["ViTModel"],
        "hidden_size": stack.width,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "intermediate_size": stack.ffn_width,
        "hidden_act": HF_ACTIVATIONS[stack.activation],
        "hidden_dropout_prob": stack.dropout,
        "attention_probs_dropout_prob": stack.dropout,
        "layer_norm_eps": stack.norm_eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "qkv_bias": stack.qkv_bias,
        "pooler_act": "tanh",
        "pooler_output_size": stack.width,
    }


_LAYER = "vit.encoder.layer.{i}"
_TABLE = table(
    embedder={
        "embedder.first": "vit.embeddings.cls_token",
        "embedder.positions": "vit.embeddings.position_embeddings",
        "embedder.patches": "vit.embeddings.patch_embeddings.projection",
    },
    blocks={
        "transformer.blocks.{i}.attention_norm": f"{_LAYER}.layernorm_before",
        "transformer.blocks.{i}.attention.qkv": tuple(
            f"{_LAYER}.attention.attention.{x}" for x in ("query", "key", "value")
        ),
        "transformer.blocks.{i}.attention.output": f"{_LAYER}.attention.output.dense",
        "transformer.blocks.{i}.ffn_norm": f"{_LAYER}.layernorm_after",
        "transformer.blocks.{i}.ffn.input": f"{_LAYER}.intermediate.dense",
        "transformer.blocks.{i}.ffn.output": f"{_LAYER}.output.dense",
    },
    end={"transformer.norm": "vit.layernorm", "pooler.dense": "vit.pooler.dense"},
)

VIT = Family(
    name="vit",
    model_types=("vit",),
    config=_config,
    hf_config=_hf_config,
    rules=lambda config: _TABLE,
    prefix="vit.",
    task_heads=("classifier.",),
)

"""ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021): pre-norm encoders over image patches.

The backbone with its pooler, where the checkpoint has one, or with a classifier. How pixels are scaled stands beside
config.json, in preprocessor_config.json; `hub.checkpoint` reads both as one.
"""

from __future__ import annotations

from typing import Any

from formary.errors import CheckpointError
from formary.hub.families.family import HF_ACTIVATIONS, Family, HfConfig, Rule, activation, refuse, table
from formary.hub.families.labels import LabelHeads
from formary.model.config import ModelConfig, TransformerConfig


def backbone(hf: HfConfig, names: frozenset[str], *, name: str, tokens: int) -> ModelConfig:
    """The config of an encoder over patches.

    Args:
        name: with which the names of its weights begin.
        tokens: learned vectors before the patches.
    """
    image, patch = _square(hf, "image_size", 224), _square(hf, "patch_size", 16)
    pooler = f"{name}.pooler.dense.weight" in names
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
        context=(image // patch) ** 2 + tokens,
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
        class_tokens=tokens,
        image_mean=tuple(hf.get("image_mean") or ()),
        image_std=tuple(hf.get("image_std") or ()),
        initialisation="vit",
    )


def _square(hf: HfConfig, key: str, default: int) -> int:
    size: Any = hf.get(key, default)
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise CheckpointError(f"{key} {size}: only square images and patches are supported")
    return int(sides.pop())


def hf_backbone(config: ModelConfig, stem: str) -> HfConfig:
    """The reverse of `backbone`; `stem` begins the name of its class."""
    stack = config.transformer
    return {
        "architectures": [f"{stem}Model"],
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
        **({"image_mean": list(config.image_mean)} if config.image_mean else {}),
        **({"image_std": list(config.image_std)} if config.image_std else {}),
        "pooler_act": "tanh",
        "pooler_output_size": stack.width,
    }


def backbone_rules(name: str, first: tuple[str, ...]) -> dict[str, Rule]:
    """Where the weights of an encoder over patches are; `first` names the vectors before the patches."""
    layer = f"{name}.encoder.layer.{{i}}"
    return table(
        embedder={
            "embedder.first": tuple(f"{name}.embeddings.{token}" for token in first),
            "embedder.positions": f"{name}.embeddings.position_embeddings",
            "embedder.patches": f"{name}.embeddings.patch_embeddings.projection",
        },
        blocks={
            "transformer.blocks.{i}.attention_norm": f"{layer}.layernorm_before",
            "transformer.blocks.{i}.attention.qkv": tuple(
                f"{layer}.attention.attention.{x}" for x in ("query", "key", "value")
            ),
            "transformer.blocks.{i}.attention.output": f"{layer}.attention.output.dense",
            "transformer.blocks.{i}.ffn_norm": f"{layer}.layernorm_after",
            "transformer.blocks.{i}.ffn.input": f"{layer}.intermediate.dense",
            "transformer.blocks.{i}.ffn.output": f"{layer}.output.dense",
        },
        end={"transformer.norm": f"{name}.layernorm", "pooler.dense": f"{name}.pooler.dense"},
    )


def _family(name: str, stem: str, first: tuple[str, ...], others: tuple[str, ...] = ()) -> Family:
    rules = backbone_rules(name, first)
    return Family(
        name=name,
        model_types=(name,),
        config=lambda hf, names: backbone(hf, names, name=name, tokens=len(first)),
        hf_config=lambda config: hf_backbone(config, stem),
        rules=lambda config: rules if config.class_tokens == len(first) else {},
        prefix=f"{name}.",
        labels=LabelHeads(stem, {"classify": "classifier"}, bias=True, classifier="ForImageClassification"),
        task_heads=("classifier.", *others),
    )


VIT = _family("vit", "ViT", ("cls_token",))
# With a teacher DeiT has two classifiers, of which Formary builds neither.
DEIT = _family("deit", "DeiT", ("cls_token", "distillation_token"), ("cls_classifier.", "distillation_classifier."))

"""YOLOS (Fang et al. 2021): a ViT with detection tokens behind its patches, each of which says a class and a box.

The backbone's rules are those of `vit`; here are the detection tokens, positions added between layers, and the two networks
of the head. Pictures have to be square.
"""

from __future__ import annotations

import dataclasses

from formary.hub.families.family import Family, HfConfig, table
from formary.hub.families.labels import labels_of
from formary.hub.families.vit import backbone, backbone_rules, hf_backbone
from formary.model.config import ModelConfig

_CLASSES, _BOXES = "class_labels_classifier", "bbox_predictor"
_RULES = backbone_rules("vit", ("cls_token",)) | table(
    detection={
        "embedder.last": "vit.embeddings.detection_tokens",
        "transformer.between": "vit.encoder.mid_position_embeddings",
    },
    head={
        f"head.{ours}.{layer}": f"{theirs}.layers.{layer}"
        for ours, theirs in (("classes", _CLASSES), ("boxes", _BOXES))
        for layer in range(3)
    },
)


def _config(hf: HfConfig, names: frozenset[str]) -> ModelConfig:
    config, found = backbone(hf, names, name="vit", tokens=1), hf.get("num_detection_tokens", 100)
    stack = dataclasses.replace(
        config.transformer,
        context=config.context + found,
        layer_positions=hf.get("use_mid_position_embeddings", True),
    )
    config = dataclasses.replace(config, transformer=stack, detection_tokens=found)
    if f"{_CLASSES}.layers.0.weight" not in names:
        return config
    return dataclasses.replace(config, head="detect", labels=labels_of(hf))


def _hf_config(config: ModelConfig) -> HfConfig:
    said = hf_backbone(config, "Yolos") | {
        "image_size": [config.image_size, config.image_size],
        "num_detection_tokens": config.detection_tokens,
        "use_mid_position_embeddings": config.transformer.layer_positions,
    }
    if config.head != "detect":
        return said
    names = dict(enumerate(config.labels))
    return said | {
        "architectures": ["YolosForObjectDetection"],
        "id2label": {str(number): name for number, name in names.items()},
        "label2id": {name: number for number, name in names.items()},
    }


YOLOS = Family(
    name="yolos",
    model_types=("yolos",),
    config=_config,
    hf_config=_hf_config,
    rules=lambda config: _RULES if config.class_tokens == 1 and config.detection_tokens else {},
    prefix="vit.",
    task_heads=(f"{_CLASSES}.", f"{_BOXES}."),
)

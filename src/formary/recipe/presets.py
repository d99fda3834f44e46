"""Models by name, and one dial: `size: 6x384` is layers x width.

A preset is a family's switches with sizes; every switch can be replaced by name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from formary.errors import RecipeError, nearest
from formary.model.config import ModelConfig, Topology, TransformerConfig
from formary.recipe.schema import Train

_GPT2: dict[str, Any] = {
    "activation": "gelu_tanh",
    "position": "learned",
    "topology": "decoder",
    "initialisation": "gpt2",
}
# Qwen3's switches: rotary positions, RMS norms (also of queries and keys), gated SiLU, no biases.
_MODERN: dict[str, Any] = {
    "norm": "rms",
    "norm_eps": 1e-6,
    "activation": "silu",
    "gated": True,
    "position": "rope",
    "qk_norm": True,
    "bias": False,
    "topology": "decoder",
    "initialisation": "gpt2",
}
_BERT: dict[str, Any] = {
    "norm_position": "post",
    "norm_eps": 1e-12,
    "causal": False,
    "topology": "encoder",
    "head": "masked",
    "head_bias": True,
    "embedding_norm": True,
    "token_types": 2,
    "pooler": True,
    "initialisation": "bert",
}
_BART: dict[str, Any] = {
    "norm_position": "post",
    "topology": "encoder_decoder",
    "embedding_norm": True,
    "position_offset": 2,
    "head_bias": True,
    "initialisation": "bart",
}
_T5: dict[str, Any] = {
    "norm": "rms",
    "norm_eps": 1e-6,
    "activation": "gelu_tanh",
    "gated": True,
    "position": "relative_bias",
    "attention_scale": 1.0,
    "bias": False,
    "topology": "encoder_decoder",
    "tied_embeddings": False,
    "initialisation": "t5",
}
_VIT: dict[str, Any] = {
    "norm_eps": 1e-12,
    "causal": False,
    "topology": "encoder",
    "head": "none",
    "embedder": "patches",
    "initialisation": "vit",
}
_CAPTION: dict[str, Any] = {
    "topology": "encoder_decoder",
    "embedder": "patches",
    "class_tokens": 0,
    "initialisation": "llama",
}

# CLIP's switches (Radford et al. 2021, section 2.4). The small one takes means of patches and of tokens that see one another,
# which learns far more from few pictures than a class token and the end of a causal text.
_CLIP: dict[str, Any] = {
    "topology": "two_towers",
    "embedder": "patches",
    "head": "none",
    "patch_bias": False,
    "patch_norm": True,
    "initialisation": "bert",
}

# The published sizes for MovieLens: Kang and McAuley 2018, section 4.1; Sun et al. 2019, section 4.4.
_SASREC: dict[str, Any] = {
    "activation": "relu",
    "position": "learned",
    "topology": "decoder",
    "initialisation": "bert",
    "layers": 2,
    "width": 64,
    "heads": 2,
    "ffn_width": 64,
    "dropout": 0.2,
}
_BERT4REC: dict[str, Any] = {
    **_BERT,
    "token_types": 0,
    "pooler": False,
    "layers": 2,
    "width": 64,
    "heads": 2,
    "dropout": 0.1,
}

# Small encoders as published for series (Nie et al. 2023, appendix A.1.4) and tables (Gorishniy et al. 2021, appendix E).
_SERIES: dict[str, Any] = {
    "position": "none",
    "causal": False,
    "topology": "encoder",
    "head": "none",
    "embedder": "series",
    "patch_size": 16,
    "initialisation": "vit",
}
_COLUMNS: dict[str, Any] = {
    "activation": "relu",
    "gated": True,
    "position": "none",
    "causal": False,
    "topology": "encoder",
    "head": "none",
    "embedder": "columns",
    "initialisation": "vit",
}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt-mini": {**_MODERN, "layers": 6, "width": 256},
    "fast": {**_MODERN, "layers": 6, "width": 256},
    "gpt2-mini": {**_GPT2, "layers": 6, "width": 256},
    "gpt2": {**_GPT2, "layers": 12, "width": 768, "heads": 12},
    "gpt2-medium": {**_GPT2, "layers": 24, "width": 1024, "heads": 16},
    "bert-mini": {**_BERT, "layers": 4, "width": 256},
    "bert-base": {**_BERT, "layers": 12, "width": 768, "heads": 12},
    "seq2seq-mini": {**_T5, "layers": 3, "width": 256},
    "bart-base": {**_BART, "layers": 6, "width": 768, "heads": 12},
    "t5-small": {**_T5, "layers": 8, "width": 512, "heads": 6, "head_width": 64, "ffn_width": 1024},
    "sasrec-mini": _SASREC,
    "bert4rec-mini": _BERT4REC,
    "vit-mini": {**_VIT, "layers": 6, "width": 96, "heads": 3, "ffn_width": 192, "image_size": 32, "patch_size": 4},
    "yolos-mini": {
        **_VIT,
        "layers": 6,
        "width": 128,
        "heads": 4,
        "ffn_width": 256,
        "image_size": 64,
        "patch_size": 8,
        "detection_tokens": 20,
    },
    "caption-mini": {**_MODERN, **_CAPTION, "layers": 3, "width": 192, "image_size": 64, "patch_size": 8},
    "clip-mini": {
        **_CLIP,
        "causal": False,
        "pooling": "mean",
        "class_tokens": 0,
        "layers": 3,
        "width": 192,
        "image_size": 64,
        "patch_size": 8,
        "shared_width": 128,
    },
    "clip-base": {
        **_CLIP,
        "activation": "gelu_quick",
        "layers": 12,
        "width": 512,
        "heads": 8,
        "image_size": 224,
        "patch_size": 32,
        "shared_width": 512,
    },
    "vit-base": {**_VIT, "layers": 12, "width": 768, "heads": 12, "image_size": 224, "patch_size": 16},
    "series-mini": {**_SERIES, "layers": 3, "width": 128, "heads": 8, "ffn_width": 256, "dropout": 0.2},
    "table-mini": {**_COLUMNS, "layers": 3, "width": 64, "heads": 4, "dropout": 0.1},
}

# What a preset says of training from scratch, where the recipe does not; benchmarks/switches.py measures it.
TRAINING: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "optimiser": {"name": "muon", "lr": 0.01, "matrix_lr": 0.03, "weight_decay": 0.01},
        "schedule": {"name": "wsd", "warmup": 0.02, "decay": 0.6, "final": 0.0},
    }
}

RAMPED = ("fast",)
"""The presets under which causal training begins with short sequences, from a quarter of the context on."""

_MODEL_FIELDS = {field.name for field in dataclasses.fields(ModelConfig)} - {"transformer", "encoder"}
_STACK_FIELDS = {field.name for field in dataclasses.fields(TransformerConfig)}


def preset(
    name: str,
    *,
    vocab_size: int,
    context: int,
    size: str | None = None,
    switches: dict[str, Any] | None = None,
    topology: Topology | None = None,
) -> ModelConfig:
    """The config of a preset for a vocabulary and a context (tokens), with a size and switches of one's own.

    Raises:
        RecipeError: no such preset or switch (the nearest is suggested), not of the wanted topology, or sizes that
            do not fit together.
    """
    if name not in PRESETS:
        raise RecipeError(
            f"model.preset: there is no '{name}'; {nearest(name, PRESETS) or ''} presets: {', '.join(PRESETS)}"
        )
    fields: dict[str, Any] = dict(PRESETS[name])
    if topology is not None and fields["topology"] != topology:
        fitting = [other for other, other_fields in PRESETS.items() if other_fields["topology"] == topology]
        raise RecipeError(
            f"model.preset: this task needs {'an' if topology[0] == 'e' else 'a'} {topology}, '{name}' is a {fields['topology']}; try {', '.join(fitting)}"
        )
    if size is not None:
        layers, width = (int(number) for number in size.split("x"))
        for dependent in ("heads", "head_width", "ffn_width"):
            fields.pop(dependent, None)
        fields.update(layers=layers, width=width)
    for switch, value in (switches or {}).items():
        if switch not in _MODEL_FIELDS | _STACK_FIELDS:
            raise RecipeError(
                f"model.switches: there is no '{switch}'; {nearest(switch, _MODEL_FIELDS | _STACK_FIELDS)}"
            )
        fields[switch] = value
    fields.setdefault("heads", heads_for(fields["width"]))
    if fields.get("gated"):
        fields.setdefault("ffn_width", gated_width(fields["width"]))
    outer = {key: value for key, value in fields.items() if key in _MODEL_FIELDS}
    stack = {"context": context, **{key: value for key, value in fields.items() if key in _STACK_FIELDS}}
    if outer["topology"] not in ("encoder_decoder", "two_towers"):
        return ModelConfig(transformer=TransformerConfig(**stack), vocab_size=vocab_size, **outer)
    encoder = TransformerConfig(**{**stack, "causal": False, "cross_attention": False})
    writes = {"causal": True, "cross_attention": True} if outer["topology"] == "encoder_decoder" else {}
    return ModelConfig(
        transformer=TransformerConfig(**{**stack, **writes}), encoder=encoder, vocab_size=vocab_size, **outer
    )


def training_of(name: str, train: dict[str, Any], *, ramps: bool = True) -> dict[str, Any]:
    """A recipe's train section with what a preset says of training, where the recipe is silent.

    Numbers that belong to another optimiser or schedule than the one asked for are left out.

    Args:
        ramps: whether sequences of the task can be cut short.
    """
    filled = dict(train)
    context = train.get("context", Train.model_fields["context"].default)
    if (
        ramps
        and name in RAMPED
        and "ramp" not in train
        and isinstance(context, int)
        and context > 4
        and not context % 4
    ):
        filled["ramp"] = {"first": context // 4}
    for section, fields in TRAINING.get(name, {}).items():
        own = {} if train.get(section) is None else train[section]
        if isinstance(own, dict) and own.get("name", fields["name"]) == fields["name"]:
            filled[section] = {**fields, **own}
    return filled


def heads_for(width: int) -> int:
    """Heads of 64 numbers where the width divides, else of 32, else one head."""
    for head_width in (64, 32):
        if width % head_width == 0 and width >= 2 * head_width:
            return width // head_width
    return 1


def gated_width(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of 32: as many weights as an ungated 4 x width (Shazeer 2020)."""
    return -(-8 * width // 3 // 32) * 32

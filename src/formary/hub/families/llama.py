"""Llama and its relatives: SmolLM2 and Mistral (as Llama), Qwen2 (biased queries, keys, values), Qwen3 (their norms).

One layout of names for all; the families differ in switches only.
Stretched rotary positions other than Llama 3's and sliding windows are refused rather than computed wrongly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from formary.errors import CheckpointError
from formary.hub.families.family import HF_ACTIVATIONS, Family, HfConfig, activation, ids, table
from formary.hub.families.labels import LabelHeads
from formary.model.config import ModelConfig, RopeScaling, TransformerConfig

_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}


def _config(hf: HfConfig, names: frozenset[str]) -> ModelConfig:
    kind = hf["model_type"]
    theta, scaling = _rope(hf)
    context = hf.get("max_position_embeddings", _CONTEXT[kind])
    _refuse_window(hf, kind, context)
    attention_bias, ffn_bias = hf.get("attention_bias", False), hf.get("mlp_bias", False)
    stack = TransformerConfig(
        layers=hf["num_hidden_layers"],
        width=hf["hidden_size"],
        heads=hf["num_attention_heads"],
        kv_heads=hf.get("num_key_value_heads"),
        head_width=hf.get("head_dim") or (128 if kind == "qwen3" else None),
        ffn_width=hf["intermediate_size"],
        norm="rms",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        activation=activation(hf, "hidden_act", "silu"),
        gated=True,
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=kind == "qwen3",
        # We have one switch for the biases behind attention and in the feed-forward network: where the checkpoint
        # has only one of the two, the other is zero (`_may_lack`), which is the same function.
        bias=attention_bias or ffn_bias,
        qkv_bias=attention_bias or kind == "qwen2",
        dropout=hf.get("attention_dropout", 0.0),
        context=context,
    )
    return ModelConfig(
        topology="decoder",
        transformer=stack,
        vocab_size=hf["vocab_size"],
        tied_embeddings=hf.get("tie_word_embeddings", False),
        initialisation="llama",
        **(ids(hf, bos=1, eos=2) if kind in ("llama", "mistral") else ids(hf)),
    )


def _rope(hf: HfConfig) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from transformers 5's rope_parameters or the older rope_theta and rope_scaling."""
    rope: dict[str, Any] = {**(hf.get("rope_parameters") or {}), **(hf.get("rope_scaling") or {})}
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    for fields in (hf, rope):
        if fields.get("partial_rotary_factor") not in (None, 1.0):
            raise CheckpointError(
                "partial_rotary_factor: rotary positions on a part of each head only are not supported"
            )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"rope_scaling of type '{kind}' is not supported; Formary reads 'default' and 'llama3'")
    scaling = RopeScaling(
        factor=rope["factor"],
        low_frequency_factor=rope["low_freq_factor"],
        high_frequency_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
    )
    return theta, scaling


def _refuse_window(hf: HfConfig, kind: str, context: int) -> None:
    window = hf.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind in ("qwen2", "qwen3") and not hf.get("use_sliding_window", False):
        window = None
    types = set(hf.get("layer_types") or [])
    if types - {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"layer_types {sorted(types)}: only full_attention is supported")
    windowed = "sliding_attention" in types or hf.get("max_window_layers", 0) < hf["num_hidden_layers"]
    if window is not None and windowed and window < context:
        raise CheckpointError(
            f"sliding_window {window} is shorter than max_position_embeddings {context}, and Formary attends to the "
            f"whole context; to use the model on at most {window} tokens, where both are the same, set "
            f"max_position_embeddings to {window} in its config.json"
        )


def _may_lack(hf: HfConfig) -> tuple[str, ...]:
    attention, ffn = hf.get("attention_bias", False), hf.get("mlp_bias", False)
    return (*(() if ffn else (r"\.mlp\..*\.bias$",)), *(() if attention else (r"\.self_attn\.o_proj\.bias$",)))


def _hf_config(config: ModelConfig) -> HfConfig:
    stack = config.transformer
    scaling = stack.rope_scaling
    stretch = scaling and {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": stack.width,
        "intermediate_size": stack.ffn_width,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.kv_heads,
        "head_dim": stack.head_width,
        "hidden_act": HF_ACTIVATIONS[stack.activation],
        "max_position_embeddings": stack.context,
        "rms_norm_eps": stack.norm_eps,
        "rope_theta": stack.rope_theta,
        "rope_scaling": stretch,
        "attention_dropout": stack.dropout,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _llama(config: ModelConfig) -> HfConfig:
    bias = config.transformer.bias
    return {"architectures": ["LlamaForCausalLM"], **_hf_config(config), "attention_bias": bias, "mlp_bias": bias}


def _qwen2(config: ModelConfig) -> HfConfig:
    stack = config.transformer
    if stack.q_head_width * stack.heads != stack.width:
        raise CheckpointError("Qwen2 has no head_dim of its own")
    return {"architectures": ["Qwen2ForCausalLM"], **_hf_config(config), "use_sliding_window": False}


def _qwen3(config: ModelConfig) -> HfConfig:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        **_hf_config(config),
        "attention_bias": False,
        "use_sliding_window": False,
    }


_ATTENTION = "model.layers.{i}.self_attn"
_TABLE = table(
    embedder={"embedder.tokens": "model.embed_tokens"},
    blocks={
        "transformer.blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
        "transformer.blocks.{i}.attention.qkv": (
            f"{_ATTENTION}.q_proj",
            f"{_ATTENTION}.k_proj",
            f"{_ATTENTION}.v_proj",
        ),
        "transformer.blocks.{i}.attention.query_norm": f"{_ATTENTION}.q_norm",
        "transformer.blocks.{i}.attention.key_norm": f"{_ATTENTION}.k_norm",
        "transformer.blocks.{i}.attention.output": f"{_ATTENTION}.o_proj",
        "transformer.blocks.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
        "transformer.blocks.{i}.ffn.input": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
        "transformer.blocks.{i}.ffn.output": "model.layers.{i}.mlp.down_proj",
    },
    end={"transformer.norm": "model.norm", "head.weight": "lm_head.weight"},
)


def _labels(stem: str) -> LabelHeads:
    return LabelHeads(stem, {"classify": "score", "tag": "score"})


LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral"),
    config=_config,
    hf_config=_llama,
    rules=lambda config: _TABLE,
    prefix="model.",
    outside=("lm_head.",),
    labels=_labels("Llama"),
    task_heads=("score.", "classifier.", "qa_outputs."),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    may_lack=_may_lack,
)
QWEN2 = dataclasses.replace(LLAMA, name="qwen2", model_types=("qwen2",), hf_config=_qwen2, labels=_labels("Qwen2"))
QWEN3 = dataclasses.replace(LLAMA, name="qwen3", model_types=("qwen3",), hf_config=_qwen3, labels=_labels("Qwen3"))

"""GPT-2 (Radford et al. 2019), and DistilGPT-2, which has the same layout.

Its matrices are stored (in, out) and query, key and value are already fused.
"""

from __future__ import annotations

from formary.hub.families.family import HF_ACTIVATIONS, Family, HfConfig, Rule, activation, ids, refuse, table
from formary.hub.families.labels import LabelHeads
from formary.model.config import ModelConfig, TransformerConfig


def _config(hf: HfConfig, names: frozenset[str]) -> ModelConfig:
    refuse(hf, "scale_attn_by_inverse_layer_idx", False)
    refuse(hf, "add_cross_attention", False)
    stack = TransformerConfig(
        layers=hf["n_layer"],
        width=hf["n_embd"],
        heads=hf["n_head"],
        ffn_width=hf.get("n_inner"),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=activation(hf, "activation_function", "gelu_new"),
        attention_scale=None if hf.get("scale_attn_weights", True) else 1.0,
        dropout=hf.get("resid_pdrop", 0.1),
        context=hf.get("n_positions", 1024),
    )
    return ModelConfig(
        topology="decoder",
        transformer=stack,
        vocab_size=hf["vocab_size"],
        tied_embeddings=hf.get("tie_word_embeddings", True),
        initialisation="gpt2",
        **ids(hf, bos=50256, eos=50256),
    )


def _hf_config(config: ModelConfig) -> HfConfig:
    stack = config.transformer
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_layer": stack.layers,
        "n_embd": stack.width,
        "n_head": stack.heads,
        "n_inner": stack.ffn_width,
        "n_positions": stack.context,
        "n_ctx": stack.context,
        "activation_function": HF_ACTIVATIONS[stack.activation],
        "layer_norm_epsilon": stack.norm_eps,
        "scale_attn_weights": stack.attention_scale != 1.0,
        "resid_pdrop": stack.dropout,
        "embd_pdrop": stack.dropout,
        "attn_pdrop": stack.dropout,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _turned(name: str) -> Rule:
    return Rule((name,), transposed=True)


_TABLE = table(
    embedder={"embedder.tokens": "transformer.wte", "embedder.positions": "transformer.wpe"},
    blocks={
        "transformer.blocks.{i}.attention_norm": "transformer.h.{i}.ln_1",
        "transformer.blocks.{i}.attention.qkv": _turned("transformer.h.{i}.attn.c_attn"),
        "transformer.blocks.{i}.attention.output": _turned("transformer.h.{i}.attn.c_proj"),
        "transformer.blocks.{i}.ffn_norm": "transformer.h.{i}.ln_2",
        "transformer.blocks.{i}.ffn.input": _turned("transformer.h.{i}.mlp.c_fc"),
        "transformer.blocks.{i}.ffn.output": _turned("transformer.h.{i}.mlp.c_proj"),
    },
    end={"transformer.norm": "transformer.ln_f", "head.weight": "lm_head.weight"},
)

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    config=_config,
    hf_config=_hf_config,
    rules=lambda config: _TABLE,
    prefix="transformer.",
    outside=("lm_head.",),
    labels=LabelHeads("GPT2", {"classify": "score", "tag": "classifier"}),
    task_heads=("score.", "classifier.", "qa_outputs.", "multiple_choice_head."),
    copies={"lm_head.weight": "transformer.wte.weight"},
)

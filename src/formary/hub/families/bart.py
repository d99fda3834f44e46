"""BART (Lewis et al. 2019): a post-norm encoder-decoder with learned positions that begin at 2.

Both sides and the head share one token embedding.
"""

from __future__ import annotations

import math

from formary.errors import CheckpointError
from formary.hub.families.family import HF_ACTIVATIONS, Family, HfConfig, Rule, activation, ids, table
from formary.model.config import ModelConfig, TransformerConfig


def _config(hf: HfConfig, names: frozenset[str]) -> ModelConfig:
    def stack(side: str) -> TransformerConfig:
        return TransformerConfig(
            layers=hf[f"{side}_layers"],
            width=hf["d_model"],
            heads=hf[f"{side}_attention_heads"],
            ffn_width=hf[f"{side}_ffn_dim"],
            norm_eps=1e-5,
            norm_position="post",
            activation=activation(hf, "activation_function", "gelu"),
            causal=side == "decoder",
            cross_attention=side == "decoder",
            dropout=hf.get("dropout", 0.1),
            context=hf.get("max_position_embeddings", 1024),
        )

    return ModelConfig(
        topology="encoder_decoder",
        transformer=stack("decoder"),
        encoder=stack("encoder"),
        vocab_size=hf["vocab_size"],
        tied_embeddings=hf.get("tie_word_embeddings", True),
        head_bias=True,
        embedding_norm=True,
        embedding_scale=math.sqrt(hf["d_model"]) if hf.get("scale_embedding", False) else 1.0,
        position_offset=2,
        initialisation="bart",
        decoder_start_id=hf.get("decoder_start_token_id", 2),
        **ids(hf, bos=0, eos=2, pad=1),
    )


def _hf_config(config: ModelConfig) -> HfConfig:
    encoder, decoder = config.encoder, config.transformer
    assert encoder is not None
    if not config.tied_embeddings:
        raise CheckpointError("an untied BART has a token embedding of its own on each side too; ours share one")
    return {
        "architectures": ["BartForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": decoder.width,
        "encoder_layers": encoder.layers,
        "decoder_layers": decoder.layers,
        "encoder_attention_heads": encoder.heads,
        "decoder_attention_heads": decoder.heads,
        "encoder_ffn_dim": encoder.ffn_width,
        "decoder_ffn_dim": decoder.ffn_width,
        "activation_function": HF_ACTIVATIONS[decoder.activation],
        "dropout": decoder.dropout,
        "attention_dropout": decoder.dropout,
        "max_position_embeddings": decoder.context,
        "scale_embedding": config.embedding_scale != 1.0,
        "decoder_start_token_id": config.decoder_start_id,
        "forced_eos_token_id": config.eos_id,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _side(ours: str, theirs: str, embedder: str) -> dict[str, str | tuple[str, ...]]:
    layer, block = f"model.{theirs}.layers.{{i}}", f"{ours}.blocks.{{i}}"
    return {
        f"{embedder}.positions": f"model.{theirs}.embed_positions",
        f"{embedder}.norm": f"model.{theirs}.layernorm_embedding",
        f"{block}.attention.qkv": tuple(f"{layer}.self_attn.{x}_proj" for x in ("q", "k", "v")),
        f"{block}.attention.output": f"{layer}.self_attn.out_proj",
        f"{block}.attention_norm": f"{layer}.self_attn_layer_norm",
        f"{block}.cross.query": f"{layer}.encoder_attn.q_proj",
        f"{block}.cross.key_value": tuple(f"{layer}.encoder_attn.{x}_proj" for x in ("k", "v")),
        f"{block}.cross.output": f"{layer}.encoder_attn.out_proj",
        f"{block}.cross_norm": f"{layer}.encoder_attn_layer_norm",
        f"{block}.ffn.input": f"{layer}.fc1",
        f"{block}.ffn.output": f"{layer}.fc2",
        f"{block}.ffn_norm": f"{layer}.final_layer_norm",
    }


_TABLE = table(
    shared={"embedder.tokens": "model.shared"},
    encoder=_side("encoder", "encoder", "embedder"),
    decoder=_side("transformer", "decoder", "decoder_embedder"),
    head={"head.weight": "lm_head.weight", "head.bias": Rule(("final_logits_bias",), row=True)},
)

BART = Family(
    name="bart",
    model_types=("bart",),
    config=_config,
    hf_config=_hf_config,
    rules=lambda config: _TABLE,
    prefix="model.",
    outside=("lm_head.", "final_logits_bias"),
    task_heads=("classification_head.", "qa_outputs."),
    copies={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    },
    may_lack=lambda hf: (r"^final_logits_bias$",),
)

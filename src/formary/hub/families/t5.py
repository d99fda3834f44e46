"""T5 (Raffel et al. 2020), version 1.0 (ReLU, tied head with scaled logits) and 1.1 (gated, untied).

Attention scores are not scaled; the first block of each side holds the relative bias of all its blocks.
"""

from __future__ import annotations

from formary.errors import CheckpointError
from formary.hub.families.family import ACTIVATIONS, HF_ACTIVATIONS, Family, HfConfig, Rule, Table, ids, table
from formary.model.config import ModelConfig, TransformerConfig

# The context is a promise of ours only: relative positions have no end. 512 is what T5 was trained on.
_CONTEXT = 512


def _config(hf: HfConfig, names: frozenset[str]) -> ModelConfig:
    gate, _, act = str(hf.get("feed_forward_proj", "relu")).rpartition("-")
    act = "gelu_new" if (gate, act) == ("gated", "gelu") else act
    if gate not in ("", "gated") or act not in ACTIVATIONS:
        raise CheckpointError(f"feed_forward_proj '{hf['feed_forward_proj']}' is not one Formary knows")

    def stack(layers: int, *, decoder: bool) -> TransformerConfig:
        return TransformerConfig(
            layers=layers,
            width=hf["d_model"],
            heads=hf["num_heads"],
            head_width=hf["d_kv"],
            ffn_width=hf["d_ff"],
            norm="rms",
            norm_eps=hf.get("layer_norm_epsilon", 1e-6),
            activation=ACTIVATIONS[act],
            gated=gate == "gated",
            position="relative_bias",
            relative_buckets=hf.get("relative_attention_num_buckets", 32),
            relative_max_distance=hf.get("relative_attention_max_distance", 128),
            causal=decoder,
            cross_attention=decoder,
            bias=False,
            attention_scale=1.0,
            dropout=hf.get("dropout_rate", 0.1),
            context=hf.get("n_positions", _CONTEXT),
        )

    # Whether logits are scaled goes back to T5 1.0's tied head; transformers 5 writes it down on its own and no longer
    # says in the config whether the head is tied, but the weights do.
    scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True) is not False)
    return ModelConfig(
        topology="encoder_decoder",
        transformer=stack(hf.get("num_decoder_layers") or hf["num_layers"], decoder=True),
        encoder=stack(hf["num_layers"], decoder=False),
        vocab_size=hf["vocab_size"],
        tied_embeddings="lm_head.weight" not in names,
        logit_scale=hf["d_model"] ** -0.5 if scaled else 1.0,
        initialisation="t5",
        decoder_start_id=hf.get("decoder_start_token_id", hf.get("pad_token_id", 0)),
        **ids(hf, eos=1, pad=0),
    )


def _hf_config(config: ModelConfig) -> HfConfig:
    encoder, decoder = config.encoder, config.transformer
    assert encoder is not None
    if config.tied_embeddings != (config.logit_scale != 1.0):
        raise CheckpointError("T5's logits are scaled exactly when its head is tied")
    act = "gelu" if decoder.gated and decoder.activation == "gelu_tanh" else HF_ACTIVATIONS[decoder.activation]
    if decoder.gated and decoder.activation == "gelu":
        raise CheckpointError("T5's gated-gelu is the tanh approximation")
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": decoder.width,
        "d_kv": decoder.head_width,
        "d_ff": decoder.ffn_width,
        "num_layers": encoder.layers,
        "num_decoder_layers": decoder.layers,
        "num_heads": decoder.heads,
        "feed_forward_proj": f"gated-{act}" if decoder.gated else act,
        "layer_norm_epsilon": decoder.norm_eps,
        "relative_attention_num_buckets": decoder.relative_buckets,
        "relative_attention_max_distance": decoder.relative_max_distance,
        "dropout_rate": decoder.dropout,
        "n_positions": decoder.context,
        "scale_decoder_outputs": config.logit_scale != 1.0,
        "tie_word_embeddings": config.tied_embeddings,
        "decoder_start_token_id": config.decoder_start_id,
    }


def _side(ours: str, theirs: str, *, gated: bool) -> dict[str, str | tuple[str, ...] | Rule]:
    layers, block = f"{theirs}.block.{{i}}.layer", f"{ours}.blocks.{{i}}"
    first = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ffn = f"{layers}.{2 if theirs == 'decoder' else 1}"
    inputs = ("wi_0", "wi_1") if gated else ("wi",)
    return {
        f"{ours}.relative_bias.weight": first,
        f"{block}.attention_norm": f"{layers}.0.layer_norm",
        f"{block}.attention.qkv": tuple(f"{layers}.0.SelfAttention.{x}" for x in ("q", "k", "v")),
        f"{block}.attention.output": f"{layers}.0.SelfAttention.o",
        f"{block}.cross_norm": f"{layers}.1.layer_norm",
        f"{block}.cross.query": f"{layers}.1.EncDecAttention.q",
        f"{block}.cross.key_value": tuple(f"{layers}.1.EncDecAttention.{x}" for x in ("k", "v")),
        f"{block}.cross.output": f"{layers}.1.EncDecAttention.o",
        f"{block}.ffn_norm": f"{ffn}.layer_norm",
        f"{block}.ffn.input": tuple(f"{ffn}.DenseReluDense.{x}" for x in inputs),
        f"{block}.ffn.output": f"{ffn}.DenseReluDense.wo",
        f"{ours}.norm": f"{theirs}.final_layer_norm",
    }


def _table(gated: bool) -> Table:
    return table(
        shared={"embedder.tokens": "shared", "head.weight": "lm_head.weight"},
        encoder=_side("encoder", "encoder", gated=gated),
        decoder=_side("transformer", "decoder", gated=gated),
    )


_TABLES = {gated: _table(gated) for gated in (True, False)}

T5 = Family(
    name="t5",
    model_types=("t5",),
    config=_config,
    hf_config=_hf_config,
    rules=lambda config: _TABLES[config.transformer.gated],
    task_heads=("classifier.", "classification_head.", "qa_outputs."),
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
)

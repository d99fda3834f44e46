"""BERT (with MiniLM), RoBERTa and DistilBERT: post-norm encoders with learned positions.

The weights say what a checkpoint is: with BERT's prediction layers a masked language model, without them a backbone,
or one with a head over labels (`hub.families.labels`). The three differ in names, and in what comes after the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

from formary.errors import CheckpointError
from formary.hub.families.family import (
    HF_ACTIVATIONS,
    Family,
    HfConfig,
    Ids,
    Rule,
    Table,
    activation,
    ids,
    refuse,
    table,
)
from formary.hub.families.labels import LabelHeads
from formary.model.config import ModelConfig, TransformerConfig


def _stack(hf: HfConfig, context: int) -> TransformerConfig:
    refuse(hf, "position_embedding_type", "absolute")
    refuse(hf, "is_decoder", False)
    return TransformerConfig(
        layers=hf["num_hidden_layers"],
        width=hf["hidden_size"],
        heads=hf["num_attention_heads"],
        ffn_width=hf["intermediate_size"],
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        norm_position="post",
        activation=activation(hf, "hidden_act", "gelu"),
        causal=False,
        dropout=hf.get("hidden_dropout_prob", 0.1),
        context=context,
    )


def _model(
    hf: HfConfig,
    stack: TransformerConfig,
    special: Ids,
    *,
    masked: bool,
    pooler: bool = False,
    next_sentence: bool = False,
    token_types: int = 0,
    position_offset: int = 0,
) -> ModelConfig:
    return ModelConfig(
        topology="encoder",
        transformer=stack,
        vocab_size=hf["vocab_size"],
        head="masked" if masked else "none",
        tied_embeddings=hf.get("tie_word_embeddings", True) or not masked,
        head_bias=masked,
        embedding_norm=True,
        position_offset=position_offset,
        token_types=token_types,
        pooler=pooler,
        next_sentence=next_sentence,
        initialisation="bert",
        **special,
    )


def _bert(hf: HfConfig, names: frozenset[str]) -> ModelConfig:
    return _model(
        hf,
        _stack(hf, hf.get("max_position_embeddings", 512)),
        ids(hf, pad=0),
        masked="cls.predictions.transform.dense.weight" in names,
        pooler="bert.pooler.dense.weight" in names,
        next_sentence="cls.seq_relationship.weight" in names,
        token_types=hf.get("type_vocab_size", 2),
    )


def _roberta(hf: HfConfig, names: frozenset[str]) -> ModelConfig:
    found = ids(hf, bos=0, eos=2, pad=1)
    if found["pad_id"] is None:
        raise CheckpointError("pad_token_id is missing: RoBERTa counts its positions from the one after it")
    offset = found["pad_id"] + 1
    stack = _stack(hf, hf.get("max_position_embeddings", 512) - offset)
    masked = "lm_head.dense.weight" in names
    if masked and stack.activation != "gelu":
        raise CheckpointError(f"hidden_act '{hf.get('hidden_act')}': RoBERTa's prediction layer has 'gelu' in any case")
    return _model(
        hf,
        stack,
        found,
        masked=masked,
        pooler="roberta.pooler.dense.weight" in names,
        token_types=hf.get("type_vocab_size", 2),
        position_offset=offset,
    )


def _distilbert(hf: HfConfig, names: frozenset[str]) -> ModelConfig:
    # Sinusoidal positions, where asked for, are stored among the weights like learned ones.
    stack = _stack(
        {
            "num_hidden_layers": hf["n_layers"],
            "hidden_size": hf["dim"],
            "num_attention_heads": hf["n_heads"],
            "intermediate_size": hf["hidden_dim"],
            "hidden_act": hf.get("activation", "gelu"),
            "hidden_dropout_prob": hf.get("dropout", 0.1),
        },
        hf.get("max_position_embeddings", 512),
    )
    return _model(hf, stack, ids(hf, pad=0), masked="vocab_transform.weight" in names)


def _sizes(config: ModelConfig) -> HfConfig:
    stack = config.transformer
    if config.head == "masked" and not config.tied_embeddings:
        raise CheckpointError("an untied BERT or RoBERTa has two output biases; ours has one")
    if not config.token_types:
        raise CheckpointError("BERT and RoBERTa have token types")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": stack.width,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "intermediate_size": stack.ffn_width,
        "hidden_act": HF_ACTIVATIONS[stack.activation],
        "hidden_dropout_prob": stack.dropout,
        "attention_probs_dropout_prob": stack.dropout,
        "layer_norm_eps": stack.norm_eps,
        "max_position_embeddings": stack.context + config.position_offset,
        "position_embedding_type": "absolute",
        "type_vocab_size": config.token_types,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _bert_hf(config: ModelConfig) -> HfConfig:
    masked = "BertForPreTraining" if config.next_sentence else "BertForMaskedLM"
    return {"architectures": [masked if config.head == "masked" else "BertModel"], **_sizes(config)}


def _roberta_hf(config: ModelConfig) -> HfConfig:
    return {"architectures": ["RobertaForMaskedLM" if config.head == "masked" else "RobertaModel"], **_sizes(config)}


def _distilbert_hf(config: ModelConfig) -> HfConfig:
    stack = config.transformer
    return {
        "architectures": ["DistilBertForMaskedLM" if config.head == "masked" else "DistilBertModel"],
        "vocab_size": config.vocab_size,
        "dim": stack.width,
        "n_layers": stack.layers,
        "n_heads": stack.heads,
        "hidden_dim": stack.ffn_width,
        "activation": HF_ACTIVATIONS[stack.activation],
        "dropout": stack.dropout,
        "attention_dropout": stack.dropout,
        "max_position_embeddings": stack.context,
        "sinusoidal_pos_embds": False,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _table(
    prefix: str,
    block: str,
    layers: tuple[tuple[str, ...], str, str, str, str, str],
    masked: tuple[str, str, str, str],
    more: Mapping[str, str | Rule],
) -> Table:
    """The weights of all three.

    Args:
        block: how the name of a block begins; `layers` are those in it, in the order of ours below.
        masked: the prediction head's dense layer, norm, bias and output matrix.
        more: what not all of them have.
    """
    parts = ("attention.output", "attention_norm", "ffn.input", "ffn.output", "ffn_norm")
    qkv, *single = layers
    return table(
        embedder={
            "embedder.tokens": f"{prefix}embeddings.word_embeddings",
            "embedder.positions": f"{prefix}embeddings.position_embeddings",
            "embedder.norm": f"{prefix}embeddings.LayerNorm",
        },
        attention={"transformer.blocks.{i}.attention.qkv": tuple(f"{prefix}{block}.{x}" for x in qkv)},
        blocks={f"transformer.blocks.{{i}}.{ours}": f"{prefix}{block}.{x}" for ours, x in zip(parts, single)},
        head=dict(zip(("head.dense", "head.norm", "head.bias", "head.weight"), masked)),
        more=more,
    )


_SELF = "attention.self"
_BERT_LAYERS = (
    (f"{_SELF}.query", f"{_SELF}.key", f"{_SELF}.value"),
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_CLS, _MASKED = "cls.predictions", "cls.predictions.transform"
_BERT_TABLE = _table(
    "bert.",
    "encoder.layer.{i}",
    _BERT_LAYERS,
    (f"{_MASKED}.dense", f"{_MASKED}.LayerNorm", f"{_CLS}.bias", f"{_CLS}.decoder.weight"),
    {
        "embedder.types": "bert.embeddings.token_type_embeddings",
        "pooler.dense": "bert.pooler.dense",
        # Theirs is (follows, random), ours (random, follows).
        "next_sentence": Rule(("cls.seq_relationship",), flipped=True),
    },
)
_ROBERTA_TABLE = _table(
    "roberta.",
    "encoder.layer.{i}",
    _BERT_LAYERS,
    ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight"),
    {"embedder.types": "roberta.embeddings.token_type_embeddings", "pooler.dense": "roberta.pooler.dense"},
)
_DISTILBERT_TABLE = _table(
    "distilbert.",
    "transformer.layer.{i}",
    (
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out_lin",
        "sa_layer_norm",
        "ffn.lin1",
        "ffn.lin2",
        "output_layer_norm",
    ),
    ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector.weight"),
    {},
)

BERT = Family(
    name="bert",
    model_types=("bert",),
    config=_bert,
    hf_config=_bert_hf,
    rules=lambda config: _BERT_TABLE,
    prefix="bert.",
    outside=("cls.",),
    labels=LabelHeads(
        "Bert",
        {"classify": "classifier", "tag": "classifier", "span": "qa_outputs", "choice": "classifier"},
        "bert.pooler.dense",
    ),
    # Heads on single positions do not read the pooler, yet older checkpoints of them carry it.
    task_heads=("classifier.", "qa_outputs.", "bert.pooler."),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)
ROBERTA = Family(
    name="roberta",
    model_types=("roberta",),
    config=_roberta,
    hf_config=_roberta_hf,
    rules=lambda config: _ROBERTA_TABLE,
    prefix="roberta.",
    outside=("lm_head.",),
    labels=LabelHeads(
        "Roberta",
        {"classify": "classifier.out_proj", "tag": "classifier", "span": "qa_outputs", "choice": "classifier"},
        pooler="classifier.dense",
        choice_pooler="roberta.pooler.dense",
    ),
    task_heads=("classifier.", "qa_outputs.", "roberta.pooler."),
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
)
DISTILBERT = Family(
    name="distilbert",
    model_types=("distilbert",),
    config=_distilbert,
    hf_config=_distilbert_hf,
    rules=lambda config: _DISTILBERT_TABLE,
    prefix="distilbert.",
    outside=("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
    labels=LabelHeads(
        "DistilBert",
        {"classify": "classifier", "tag": "classifier", "span": "qa_outputs", "choice": "classifier"},
        pooler="pre_classifier",
        activation="relu",
    ),
    task_heads=("classifier.", "pre_classifier.", "qa_outputs."),
    copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
)

"""The models that tasks train: fresh ones as the recipe asks, and loaded ones with the head that a task needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from formary.data.tokenizer import Tokenizer
from formary.errors import RecipeError
from formary.model.config import ModelConfig, Topology
from formary.model.topologies import Network, build
from formary.recipe.presets import PRESETS, preset
from formary.recipe.schema import Recipe

_SEEING = (
    "image_size", "patch_size", "patch_bias", "conv_stem", "patch_norm", "channels", "class_tokens", "detection_tokens",
    "image_cut", "image_mean", "image_std",
)  # fmt: skip
"""What a config says of pictures."""


def scratch_config(recipe: Recipe, tokenizer: Tokenizer, topology: Topology) -> ModelConfig:
    """The config of the recipe's model section, with the tokenizer's vocabulary and ids and the training context.

    Raises:
        RecipeError: the preset is of another topology, or the sizes do not fit together.
    """
    config = preset(
        recipe.model.preset,
        vocab_size=tokenizer.vocab_size,
        context=recipe.train.context,
        size=recipe.model.size,
        switches=recipe.model.switches,
        topology=topology,
    )
    return dataclasses.replace(config, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


def picture_config(recipe: Recipe, tokenizer: Tokenizer, topology: Topology) -> ModelConfig:
    """The config of the recipe's model section for pictures: as long a sequence as they have patches and learned tokens.

    Raises:
        RecipeError: the preset is of another topology or reads no pictures, or the sizes do not fit together.
    """
    config = scratch_config(recipe, tokenizer, topology)
    if config.image_size is None or config.patch_size is None or config.image_size % config.patch_size:
        raise RecipeError(
            f"model.switches: pictures of image_size {config.image_size} pixels are not cut into whole patches of "
            f"patch_size {config.patch_size}; choose one that divides the other"
        )
    tokens = (config.image_size // config.patch_size) ** 2 + config.class_tokens + config.detection_tokens
    stack = "transformer" if config.encoder is None else "encoder"
    return dataclasses.replace(config, **{stack: dataclasses.replace(getattr(config, stack), context=tokens)})


def joined_config(seeing: ModelConfig, wording: ModelConfig, topology: Topology) -> ModelConfig:
    """The config of one model made of two: one that reads pictures, and one that writes or reads texts.

    Args:
        topology: encoder_decoder, where the second writes what the first has seen, or two_towers.

    Raises:
        RecipeError: the first is no encoder of patches, or the second does not do what is asked or has another width.
    """
    if seeing.topology != "encoder" or seeing.embedder != "patches":
        raise RecipeError("model.start: beside model.start_text it has to be an encoder of pictures, such as a ViT")
    pictures = {name: getattr(seeing, name) for name in _SEEING}
    encoder, texts = seeing.transformer, wording.transformer
    plain: dict[str, Any] = {"labels": (), "pooler": False, "next_sentence": False, "embedder": "patches"}
    plain["encoder"] = encoder
    if topology == "two_towers":
        if wording.encoder is not None or not wording.reads_text:
            raise RecipeError("model.start_text: has to be an encoder or a decoder of texts, such as BERT or GPT-2")
        pooling = "last" if texts.causal else "mean"
        towers: dict[str, Any] = {"head": "none", "tied_embeddings": True, "head_bias": False, "pooling": pooling}
        towers["shared_width"] = texts.width
        return dataclasses.replace(wording, topology=topology, **plain, **pictures, **towers)
    if wording.topology != "decoder" or wording.head != "linear":
        raise RecipeError("model.start_text: has to be a decoder that writes, such as GPT-2")
    if encoder.width != texts.width:
        raise RecipeError(
            f"model.start_text: writes from vectors of {texts.width} numbers, and model.start gives {encoder.width}; "
            "take two models of one width"
        )
    crossing = dataclasses.replace(texts, cross_attention=True)
    start = wording.bos_id if wording.bos_id is not None else wording.eos_id
    return dataclasses.replace(
        wording, topology=topology, transformer=crossing, decoder_start_id=start, **plain, **pictures
    )


def joined(seeing: Network, wording: Network, topology: Topology, *, seed: int | None = None) -> Network:
    """One network of two, with the weights of both; what joins them (cross-attention, projections) is new.

    Args:
        seed: of what is new.
    """
    network = build(joined_config(seeing.config, wording.config, topology), seed=seed)
    of_texts = "decoder_embedder." if topology == "encoder_decoder" else "text_embedder."
    given = {name.replace("transformer.", "encoder.", 1): weight for name, weight in seeing.named_parameters()}
    given = {name: weight for name, weight in given.items() if name.startswith(("embedder.", "encoder."))}
    for name, weight in wording.named_parameters():
        given[of_texts + name.removeprefix("embedder.") if name.startswith("embedder.") else name] = weight
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in given:
                parameter.copy_(given[name])
    return network


def asks_for_decoder(recipe: Recipe) -> bool:
    """Whether the preset to train from scratch is a decoder."""
    return PRESETS.get(recipe.model.preset, {}).get("topology") == "decoder"


def reading_topology(recipe: Recipe) -> Literal["encoder", "decoder"]:
    """What a task that reads texts trains from scratch: a decoder where the preset is one, else an encoder."""
    return "decoder" if asks_for_decoder(recipe) else "encoder"


def reading_tokens(recipe: Recipe) -> str:
    """Which special tokens that model reads."""
    return "causal_lm" if asks_for_decoder(recipe) else "masked_lm"


def with_label_head(
    config: ModelConfig,
    tokenizer: Tokenizer,
    task: str,
    *,
    head: Literal["classify", "tag", "span", "choice"],
    labels: Sequence[str],
) -> ModelConfig:
    """A model's config with a head over labels, read straight from its hidden states.

    Raises:
        RecipeError: the model is an encoder-decoder.
    """
    if config.encoder is not None:
        kind = "an encoder-decoder" if config.topology == "encoder_decoder" else "two towers"
        raise RecipeError(f"model: task {task} needs an encoder or a decoder, and this is {kind}")
    return dataclasses.replace(
        config,
        head=head,
        labels=tuple(labels),
        problem="single",
        head_bias=True,
        pooler=False,
        next_sentence=False,
        tied_embeddings=True,
        pad_id=tokenizer.pad_id if config.pad_id is None else config.pad_id,
    )


def with_language_head(config: ModelConfig, tokenizer: Tokenizer, *, end: int) -> ModelConfig:
    """A model's config that writes: a head over labels gives way, and ids that it lacks are the tokenizer's."""
    if config.labelled:
        config = dataclasses.replace(config, head="linear", labels=(), head_bias=False)
    return dataclasses.replace(
        config,
        bos_id=tokenizer.bos_id if config.bos_id is None else config.bos_id,
        eos_id=end if config.eos_id is None else config.eos_id,
        pad_id=tokenizer.pad_id if config.pad_id is None else config.pad_id,
    )


def context_of(config: ModelConfig, settings: Mapping[str, Any]) -> int:
    """Tokens that a finished model's task reads: as it was trained, within what the model can."""
    return min(int(settings.get("context", config.context)), config.context)

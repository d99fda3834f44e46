"""Which weights of a loaded model train, and how fast: all, the head, the last blocks, or low-rank updates.

`prepare` sets a network up for it, `finish` leaves a plain network behind.
"""

from __future__ import annotations

import re

from torch import nn

from formary.errors import RecipeError
from formary.hub.weights import stack_of
from formary.model.config import ModelConfig
from formary.model.topologies import Network
from formary.recipe.schema import Tune
from formary.train import lora

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_LAST_NORM = ("transformer.norm.", "encoder.norm.")
_MEETING = ("projection.", "text_projection.", "similarity_scale")  # what stands for a head where two towers meet
_DEEPEST = ("embedder", "relative_bias")  # what every block depends on


def prepare(network: Network, tune: Tune, *, seed: int) -> None:
    """Freeze what does not train and insert what trains instead; a head for labels always trains.

    Raises:
        RecipeError: nothing would train.
    """
    if tune.method == "full":
        return
    for name, parameter in network.named_parameters():
        in_last = tune.method == "last" and _in_last(name, network.config, tune.layers)
        parameter.requires_grad_(in_last or _of_head(name, network.config, tune))
    if tune.method == "lora":
        lora.insert(network, tune, seed=seed)
    if not trainable_count(network):
        raise RecipeError(
            f"train.tune.method: {tune.method} leaves nothing to train, as the model has no head with weights of its "
            f"own; choose last, lora or full"
        )


def finish(network: Network) -> None:
    """Merge what was inserted and let every weight train again."""
    lora.merge(network)
    for parameter in network.parameters():
        parameter.requires_grad_(True)


def trainable_count(network: nn.Module) -> int:
    """Numbers that train."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def lr_scale(name: str, config: ModelConfig, tune: Tune | None) -> float:
    """The share of the learning rate for a weight: `layer_decay` to the power of its distance from the head.

    The embeddings are the deepest; each side of an encoder-decoder counts from its own top.
    Source: layer-wise decay as in ELECTRA's fine-tuning (Clark et al. 2020, appendix B).
    """
    if tune is None or tune.layer_decay is None:
        return 1.0
    block = _BLOCK.search(name)
    if block:
        return tune.layer_decay ** (stack_of(name, config).layers - int(block[1]))
    if any(part in name for part in _DEEPEST):
        deepest = max(stack.layers for stack in (config.transformer, config.encoder) if stack is not None)
        return tune.layer_decay ** (deepest + 1)
    return 1.0


def _in_last(name: str, config: ModelConfig, layers: int) -> bool:
    """Whether a weight is in the last `layers` blocks of its stack, or in the norm after them."""
    block = _BLOCK.search(name)
    if block is None:
        return name.startswith(_LAST_NORM)
    return int(block[1]) >= stack_of(name, config).layers - layers


def _of_head(name: str, config: ModelConfig, tune: Tune) -> bool:
    if config.topology == "two_towers":
        return name.startswith(_MEETING)
    if config.labelled:
        return name.startswith(("head.", "pooler."))
    return tune.method == "head" and name.startswith("head.")

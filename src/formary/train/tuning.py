"""Which weights of a loaded model train, and how fast: all, the head, the last blocks, or low-rank updates.

`prepare` sets a network up for it, `finish` leaves a plain network behind.
"""

from __future__ import annotations

import re

from torch import nn

from formary.model.config import ModelConfig
from formary.model.topologies import Network
from formary.recipe.schema import Tune
from formary.train import lora

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


def prepare(network: Network, tune: Tune, *, seed: int) -> None:
    """Freeze what does not train and insert what trains instead; a head for labels always trains."""
    if tune.method == "full":
        return
    top = network.config.transformer.layers - tune.layers
    for name, parameter in network.named_parameters():
        block = _BLOCK.search(name)
        in_last = tune.method == "last" and (name.startswith("transformer.norm") or (block and int(block[1]) >= top))
        parameter.requires_grad_(bool(in_last) or _of_head(name, network.config, tune))
    if tune.method == "lora":
        lora.insert(network, tune, seed=seed)


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

    Source: layer-wise decay as in ELECTRA's fine-tuning (Clark et al. 2020, appendix B).
    """
    if tune is None or tune.layer_decay is None:
        return 1.0
    stack = config.encoder if name.startswith("encoder.") and config.encoder is not None else config.transformer
    block = _BLOCK.search(name)
    if block:
        depth = int(block[1]) + 1
    else:
        depth = 0 if "embedder" in name else stack.layers + 1
    return tune.layer_decay ** (stack.layers + 1 - depth)


def _of_head(name: str, config: ModelConfig, tune: Tune) -> bool:
    if config.labelled:
        return name.startswith(("head.", "pooler."))
    return tune.method == "head" and name.startswith("head.")

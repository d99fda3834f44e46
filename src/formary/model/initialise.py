"""Initial weights as each family published them.

gpt2: normal 0.02, residual outputs divided by sqrt(2 x layers) (Radford et al. 2019, section 2.3).
zero_outputs: normal 0.02, residual outputs zero, so that a block begins as nothing (Zhang et al. 2019, section 3).
llama, bert, bart: normal 0.02. vit: truncated normal 0.02 (Dosovitskiy et al. 2021); with detection tokens positions are
sines and cosines (Beyer et al. 2022), theirs those of places spread over the picture.
Convolutions of a stem: normal, so that each keeps the variance (He et al. 2015, section 2.2).
t5: normal with the standard deviation that keeps each product at unit variance (Raffel et al. 2020; Mesh TensorFlow).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from formary.model.attention import Attention, RelativeBias
from formary.model.block import FeedForward
from formary.model.config import ModelConfig


@torch.no_grad()
def initialise(network: nn.Module, config: ModelConfig, *, seed: int | None = None) -> None:
    """Fill all weights in place; norms start at 1, biases at 0.

    Args:
        seed: of the generator; torch's global generator when left out.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith(("norm.weight", "value_mix.weight")) else 0.0)
        elif config.conv_stem and parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, generator=generator)
        elif config.initialisation == "vit":
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    if config.topology == "two_towers":
        network.get_parameter("similarity_scale").fill_(math.log(1 / 0.07))  # Radford et al. 2021, section 2.5
    if config.initialisation == "gpt2":
        _scale_residual_outputs(network, 1 / math.sqrt(2 * config.transformer.layers))
    if config.initialisation == "zero_outputs":
        _scale_residual_outputs(network, 0.0)
    if config.detection_tokens and config.initialisation == "vit":
        _spread_positions(network.get_parameter("embedder.positions"), config)
    if config.initialisation == "t5":
        _unit_variance(network, config, generator)


def _scale_residual_outputs(network: nn.Module, scale: float) -> None:
    for module in network.modules():
        if isinstance(module, Attention | FeedForward):
            module.output.weight *= scale


def _spread_positions(positions: nn.Parameter, config: ModelConfig) -> None:
    quarter, tokens = config.transformer.width // 4, config.detection_tokens
    side = math.isqrt(positions.shape[1] - config.class_tokens - tokens)
    rates = math.pi * 16 ** torch.linspace(0, 1, quarter)
    for start, count, across in ((config.class_tokens, side**2, side), (-tokens, tokens, math.isqrt(tokens - 1) + 1)):
        places = (torch.arange(across) + 0.5) / across
        angles = torch.cartesian_prod(places, places)[:count, :, None] * rates
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        positions[0, start:][:count, : 4 * quarter] = 0.3 * waves


def _unit_variance(network: nn.Module, config: ModelConfig, generator: torch.Generator | None) -> None:
    width = config.transformer.width
    for name, parameter in network.named_parameters():
        if name.endswith("embedder.tokens.weight"):
            parameter.normal_(0.0, 1.0, generator=generator)
        elif name == "head.weight":
            parameter.normal_(0.0, width**-0.5, generator=generator)
    for module in network.modules():
        if isinstance(module, Attention):
            inner = module.heads * module.head_width
            projection = module.query if module.cross else module.qkv
            projection.weight.normal_(0.0, width**-0.5, generator=generator)
            # Queries carry the 1 / sqrt(head_width) that T5 leaves out of the attention scores.
            projection.weight[:inner] *= module.head_width**-0.5
            if module.cross:
                module.key_value.weight.normal_(0.0, width**-0.5, generator=generator)
            module.output.weight.normal_(0.0, inner**-0.5, generator=generator)
        elif isinstance(module, FeedForward):
            module.input.weight.normal_(0.0, width**-0.5, generator=generator)
            module.output.weight.normal_(0.0, module.output.in_features**-0.5, generator=generator)
        elif isinstance(module, RelativeBias):
            module.weight.normal_(0.0, width**-0.5, generator=generator)

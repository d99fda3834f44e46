"""The exponential moving average of the weights, and the exchange of a network's weights for others.

The average is what is validated and kept where `train.ema` is given; training goes on from the network's own weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from formary.model.topologies import Network
from formary.train.parts import part_like


class Average:
    """Exponential moving average of the weights (Polyak and Juditsky 1992); `decay` is its memory per step."""

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        self.updates = 0

    def update(self, network: Network) -> None:
        """Move the average towards the network's weights; early on it forgets faster, as there is little to keep."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))
        current = [parameter.detach() for parameter in network.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)


@contextmanager
def averaged(network: Network, average: Average | None) -> Iterator[None]:
    """The network with its averaged weights inside the block, its own again after."""
    if average is None:
        yield
        return
    own = {name: tensor.clone() for name, tensor in weights_of(network).items()}
    put_weights(network, average.weights)
    try:
        yield
    finally:
        put_weights(network, own)


@torch.no_grad()
def put_weights(network: Network, weights: Mapping[str, Tensor]) -> None:
    """Copy weights, whole or in parts, into the network's own, by name."""
    for name, parameter in network.named_parameters():
        parameter.copy_(part_like(weights[name], parameter))


def weights_of(network: Network) -> dict[str, Tensor]:
    """The network's own weights by name; they share its memory."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}

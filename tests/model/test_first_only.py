"""A network that is read from its first position spares its last block the others, and says the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from formary.model.topologies import Encoder, build
from formary.recipe.presets import preset


def _encoder(**stack: object) -> Encoder:
    config = preset("bert-mini", vocab_size=50, context=16, size="2x64")
    config = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, **stack))  # type: ignore[arg-type]
    network = build(config, seed=3)
    assert isinstance(network, Encoder)
    return network.eval()


@pytest.mark.parametrize("stack", [{}, {"position": "relative_bias"}, {"position": "rope"}, {"norm_position": "pre"}])
@pytest.mark.parametrize("padded", [False, True])
def test_the_first_position_alone_is_that_of_the_whole(stack: dict[str, object], padded: bool) -> None:
    network = _encoder(**stack)
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9)[None] < torch.tensor([[9], [4], [6]]) if padded else None
    whole = network(tokens, mask=mask)
    first = network(tokens, mask=mask, first_only=True)
    assert first.shape == (3, 1, 64)
    torch.testing.assert_close(first, whole[:, :1], atol=1e-6, rtol=1e-5)


def test_its_gradient_is_that_of_the_whole() -> None:
    network = _encoder()
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    gradients = []
    for first_only in (False, True):
        network.zero_grad()
        network(tokens, first_only=first_only)[:, 0].square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_training_in_bfloat16_writes_attention_out_and_learns_the_same() -> None:
    network = _encoder()
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(9)[None] < torch.tensor([[9], [4], [6]])
    gradients = []
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            hidden = network(tokens, mask=mask)
        hidden[:, 0].float().sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999

"""Update rules: torch's where torch has them, Muon against its definition and torch's, state in and out."""

import pytest
import torch
from torch import nn

from formary.recipe import schema
from formary.train.optimisers import Muon, Optimiser, orthogonalise


def network():
    torch.manual_seed(0)
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))])
    holder = nn.Module()
    holder.transformer = module
    holder.embedding = nn.Embedding(5, 6)
    return holder


def step(module, optimiser, factor=1.0):
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimiser.step(factor)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_standard_rules_equal_torchs(name):
    ours, theirs = network(), network()
    settings = schema.Optimiser(name=name, lr=0.01, weight_decay=0.0)
    optimiser = Optimiser(ours, settings)
    reference = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.95)),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.95),
    }[name](theirs.parameters())
    for _ in range(3):
        step(ours, optimiser)
        torch.manual_seed(1)
        for parameter in theirs.parameters():
            parameter.grad = torch.randn_like(parameter)
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_muon_equals_torchs_muon():
    mine, other = nn.Parameter(torch.randn(7, 4)), None
    other = nn.Parameter(mine.detach().clone())
    ours = Muon([mine], lr=0.02, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.Muon([other], lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True)
    for seed in range(3):
        torch.manual_seed(seed)
        mine.grad = torch.randn(7, 4)
        other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    # torch's runs its iteration in bfloat16, ours in float32.
    torch.testing.assert_close(mine, other, atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 9, 5), (3, 6, 6)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.5 and values.max() < 1.35


def test_only_matrices_decay_and_muon_takes_the_hidden_ones():
    module = network()
    optimiser = Optimiser(module, schema.Optimiser(name="muon", weight_decay=0.1))
    adam, muon = optimiser.parts
    assert {p.shape for p in muon.param_groups[0]["params"]} == {torch.Size([8, 6]), torch.Size([6, 8])}
    assert all(p.ndim < 2 for group in adam.param_groups if group["weight_decay"] == 0 for p in group["params"])
    assert [p.shape for p in adam.param_groups[0]["params"]] == [torch.Size([5, 6])]


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_saved_state_continues_exactly(name):
    settings = schema.Optimiser(name=name, lr=0.01)
    one = network()
    first = Optimiser(one, settings)
    step(one, first)
    two = network()
    two.load_state_dict(one.state_dict())
    second = Optimiser(two, settings)
    second.load_state(first.state())
    step(one, first, 0.5)
    step(two, second, 0.5)
    for mine, other in zip(one.parameters(), two.parameters()):
        assert torch.equal(mine, other)


def test_l1_pulls_matrices_towards_zero():
    module = network()
    optimiser = Optimiser(module, schema.Optimiser(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, l1=0.5))
    before = module.embedding.weight.detach().clone()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step(1.0)
    torch.testing.assert_close(module.embedding.weight, before - 0.05 * before.sign())


def test_frozen_parameters_are_left_alone():
    module = network()
    module.embedding.weight.requires_grad_(False)
    before = module.embedding.weight.clone()
    optimiser = Optimiser(module, schema.Optimiser(name="adamw", lr=0.1, weight_decay=0.5, l1=0.1))
    step(module, optimiser)
    assert torch.equal(module.embedding.weight, before)
    assert not any(name.startswith("embedding.") for name in optimiser.state())


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
def test_without_scales_the_groups_are_matrices_then_the_rest(name):
    module = network()
    optimiser = Optimiser(module, schema.Optimiser(name=name, weight_decay=0.1))
    named = list(module.named_parameters())
    hidden = [p for n, p in named if name == "muon" and p.ndim == 2 and ".blocks." in n]
    groups = [group["params"] for part in optimiser.parts for group in part.param_groups]
    matrices = [p for n, p in named if p.ndim >= 2 and not any(p is h for h in hidden)]
    expected = [matrices, [p for _, p in named if p.ndim < 2], *([hidden] if hidden else [])]
    assert [[id(p) for p in group] for group in groups] == [[id(p) for p in group] for group in expected]


def scale_of(name):
    return 0.25 if name.startswith("embedding") else 0.5 if name.endswith("bias") or ".2." in name else 1.0


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
def test_a_scaled_weight_moves_by_that_share_in_the_first_step(name):
    plain, scaled = network(), network()
    before = [parameter.detach().clone() for parameter in plain.parameters()]
    settings = schema.Optimiser(name=name, lr=0.01, weight_decay=0.1)
    step(plain, Optimiser(plain, settings), 0.5)
    step(scaled, Optimiser(scaled, settings, lr_scale=scale_of), 0.5)
    for (label, moved), whole, start in zip(scaled.named_parameters(), plain.parameters(), before, strict=True):
        torch.testing.assert_close(moved - start, scale_of(label) * (whole - start), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_saved_state_continues_exactly_with_scales(name):
    settings = schema.Optimiser(name=name, lr=0.01)
    one, two = network(), network()
    first = Optimiser(one, settings, lr_scale=scale_of)
    step(one, first)
    two.load_state_dict(one.state_dict())
    second = Optimiser(two, settings, lr_scale=scale_of)
    second.load_state(first.state())
    step(one, first, 0.5)
    step(two, second, 0.5)
    for mine, other in zip(one.parameters(), two.parameters()):
        assert torch.equal(mine, other)

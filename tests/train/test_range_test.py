"""The range test: it finds a rate near the best one, leaves everything as it was, and the same run finds the same."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from formary.errors import FormaryError
from formary.recipe.schema import Optimiser as Settings
from formary.recipe.schema import Train
from formary.train.machine import Runtime
from formary.train.optimisers import Optimiser
from formary.train.range_test import STEPS, at, choose, find_lr, smooth

CPU = Runtime(device=torch.device("cpu"), precision="float32", threads=1)
RATES = [1e-7 * 10 ** (step / 10) for step in range(STEPS)]


class Line(nn.Module):
    """Least squares in 20 dimensions, as a network."""

    config = None

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(20, 1))
        self.dropout = nn.Dropout(0.1)


class Points:
    """Batches of noisy points on a known plane; what a step reads is a function of the step."""

    steps_per_epoch = 10

    def __init__(self, scale=1.0):
        self.scale = scale

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        inputs = self.scale * torch.randn(32, 20, generator=generator)
        answers = inputs @ torch.linspace(-1, 1, 20)[:, None] + 0.1 * torch.randn(32, 1, generator=generator)
        return {"tokens": inputs, "targets": answers}


def squares(network, batch):
    errors = network.dropout(batch["tokens"]) @ network.weight - batch["targets"]
    return (errors**2).sum(), torch.tensor(len(errors))


def settings(name="sgd", **fields):
    return Train(optimiser=Settings(name=name, momentum=0.0, weight_decay=0.0, lr="auto"), clip=None, **fields)


def loss_after(lr, name, steps=60):
    """The mean loss of the last of `steps` steps at a constant rate."""
    torch.manual_seed(0)
    network, points = Line(), Points()
    optimiser = Optimiser(network, at(settings(name).optimiser, lr))
    losses = []
    for step in range(steps):
        summed, count = squares(network, points.batch(step))
        (summed / count).backward()
        optimiser.step(1.0)
        losses.append(float(summed.detach()) / int(count))
    last = float(np.mean(losses[-10:]))
    return last if math.isfinite(last) else math.inf


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_rate_found_is_within_a_decade_of_the_best_one(name):
    found = find_lr(squares, Line(), Points(), settings(name), CPU)
    losses = {rate: loss_after(rate, name) for rate in RATES[::5]}
    best = min(losses, key=losses.__getitem__)
    assert best / 10 <= found.lr <= best * 10
    assert loss_after(found.lr, name) < 0.5 * loss_after(1e-6, name)


def test_nothing_of_the_run_is_changed():
    network = Line().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    find_lr(squares, network, Points(), settings(), CPU)
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    assert network.weight.grad is None and not network.training


def test_what_is_found_depends_on_the_run_alone():
    first = find_lr(squares, Line(), Points(), settings("adam"), CPU)
    torch.manual_seed(99)
    assert find_lr(squares, Line(), Points(), settings("adam"), CPU) == first
    assert find_lr(squares, Line(), Points(), settings("adam", seed=2), CPU).losses != first.losses


def test_the_sweep_ends_where_the_loss_diverges():
    found = find_lr(squares, Line(), Points(scale=5), settings("sgd"), CPU)
    assert len(found.rates) < STEPS and found.smoothed[-1] > 4 * min(found.smoothed)
    assert found.lr < found.rates[-1]


def test_muon_keeps_the_ratio_of_its_two_rates():
    asked = Settings(name="muon", lr="auto", matrix_lr=0.03)
    assert at(asked, 2e-3).lr == 2e-3 and at(asked, 2e-3).matrix_lr == pytest.approx(0.06)
    assert at(asked.model_copy(update={"name": "adamw"}), 2e-3).matrix_lr == 0.03


@given(st.floats(-5.5, -1.5), st.floats(0.1, 10), st.floats(0.3, 3))
def test_a_rate_between_the_middle_of_a_smooth_fall_and_its_foot_is_chosen(middle, height, sharpness):
    losses = [1 + height / (1 + math.exp(sharpness * 3 * (math.log10(rate) - middle))) for rate in RATES]
    foot = middle + 1.5
    rising = [loss + (10 * height if math.log10(rate) > foot else 0) for rate, loss in zip(RATES, losses)]
    found = choose(RATES, rising)
    assert middle - 0.3 < math.log10(found.lr) < middle + 0.8
    assert f"{found.lr:g}" in found.why


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=30))
def test_smoothing_stays_between_the_least_and_the_greatest_loss(losses):
    assert all(min(losses) - 1e-9 <= mean <= max(losses) + 1e-9 for mean in smooth(losses))
    assert smooth(losses)[0] == pytest.approx(losses[0])


def test_a_loss_that_never_falls_or_is_not_finite_is_told():
    for losses in ([1.0 + rate for rate in RATES], [math.nan], [1.0, math.inf]):
        with pytest.raises(FormaryError, match=r"train\.optimiser\.lr: auto finds no learning rate"):
            choose(RATES[: len(losses)], losses)

"""A training of so many seconds: the whole schedule and ramp go by in the time, and what diverges ends early."""

import pytest
import torch
from torch import nn

from formary.recipe.schema import Optimiser, Schedule, Train
from formary.train import timed
from formary.train.machine import Runtime
from formary.train.schedules import lr_factor
from formary.train.timed import as_it_was, in_shares, train_for

CPU = Runtime(device=torch.device("cpu"), precision="float32", threads=1)


class Line(nn.Module):
    config = None

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(20, 1))


class Points:
    """Batches of points on a plane, which also note what share of the run they were asked at."""

    steps_per_epoch = 10

    def __init__(self):
        self.asked = []

    def batch(self, step):
        inputs = torch.randn(32, 20, generator=torch.Generator().manual_seed(step))
        return {"tokens": inputs, "targets": inputs @ torch.linspace(-1, 1, 20)[:, None]}

    def at(self, step, done):
        self.asked.append(done)
        return self.batch(step)


class Clock:
    """Each look at it is half a second later, so a step takes half a second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.5
        return self.now


def squares(network, batch):
    return ((batch["tokens"] @ network.weight - batch["targets"]) ** 2).sum(), torch.tensor(32)


def settings(lr=0.1, **fields):
    return Train(optimiser=Optimiser(name="sgd", momentum=0.0, weight_decay=0.0, lr=lr), clip=None, **fields)


def test_steps_are_done_until_the_time_is_over_and_the_clock_drives_the_run():
    network, points = Line(), Points()
    done = train_for(10.0, squares, network, points, settings(), CPU, clock=Clock())
    assert (done.steps, done.seconds, done.tokens, done.diverged) == (20, 10.0, 20 * 32 * 20, False)
    assert points.asked == [step / 20 for step in range(20)]
    loss, count = squares(network, points.batch(99))
    assert loss / count < 0.2


def test_the_schedule_goes_by_the_clock(monkeypatch):
    seen = []
    monkeypatch.setattr(timed, "lr_factor", lambda *given: seen.append(lr_factor(*given)) or seen[-1])
    schedule = Schedule(name="wsd", warmup=0.2, decay=0.5, final=0.0)
    train_for(10.0, squares, Line(), Points(), settings(schedule=schedule), CPU, clock=Clock())
    assert seen[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.01)
    assert seen[10] == pytest.approx(1, abs=0.01) and seen[-1] == pytest.approx(0.125, abs=0.02)


def test_a_warm_up_in_steps_becomes_the_share_that_it_is():
    assert in_shares(Schedule(warmup=30), 300).warmup == pytest.approx(0.1)
    assert in_shares(Schedule(warmup=0.02), 300).warmup == 0.02
    assert in_shares(Schedule(warmup=500), 300).warmup < 1


def test_a_training_whose_loss_is_not_finite_ends():
    done = train_for(1000.0, squares, Line(), Points(), settings(lr=1e30), CPU, clock=Clock())
    assert done.diverged and done.steps < 30


def test_what_is_tried_leaves_the_network_as_it_was():
    network = Line()
    before, state = network.weight.clone(), torch.random.get_rng_state()
    with as_it_was(network):
        train_for(2.0, squares, network, Points(), settings(), CPU, clock=Clock())
        assert not torch.equal(network.weight, before)
    assert torch.equal(network.weight, before) and network.weight.grad is None
    assert torch.equal(torch.random.get_rng_state(), state)

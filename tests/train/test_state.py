"""What a training is between two steps: which checkpoints stay, and the random numbers of every source."""

import json
import math
import random

import numpy as np
import torch

from formary.train import rng
from formary.train.state import Progress


def test_every_source_of_random_numbers_comes_back():
    rng.seed_all(5)
    random.gauss(0, 1), np.random.normal(), torch.randn(3)  # leaves halves of pairs behind
    tensors, values = rng.captured()
    values = json.loads(json.dumps(values))

    def drawn():
        return random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(4).tolist()

    expected = drawn()
    rng.seed_all(99)
    assert drawn() != expected
    rng.put_back({name: tensor.clone() for name, tensor in tensors.items()}, values)
    assert drawn() == expected


def at(step, progress=None):
    progress = progress or Progress()
    progress.step = step
    return progress


def test_the_best_validations_are_remembered_and_kept():
    progress = Progress()
    kept = [at(step, progress).validated(loss, loss, keep=2) for step, loss in enumerate([3, 2, 2.5, 4, 1], 1)]
    assert kept == [True, True, True, False, True]
    assert progress.to_keep == {2, 5} and (progress.best_step, progress.best) == (5, 1)
    assert progress.validations_without_gain == 0


def test_where_the_best_is_lost_the_next_best_takes_its_place():
    progress = Progress()
    for step, loss in enumerate([3, 1, 2], 1):
        at(step, progress).validated(loss, loss, keep=2)
    progress.forget_best(2)
    assert (progress.best_step, progress.best, progress.best_loss) == (3, 2, 2)
    progress.forget_best(3)
    assert progress.best_step == 0 and math.isinf(progress.best)


def test_a_checkpoint_of_every_so_many_hours_stays():
    progress = Progress()
    for step in range(1, 11):
        at(step, progress)
        progress.seconds += 1000
        progress.count_hours(1.0)
    assert progress.hourly == [4, 8] == sorted(progress.to_keep)


def test_a_skipped_step_does_not_enter_the_mean_loss():
    progress = Progress()
    for loss in (1.0, None, 3.0):
        progress.passed(10, 0.5, loss)
    mean, rate, left = progress.recent(total=6)
    assert (mean, rate, left) == (2.0, 20.0, 1.5)
    progress.passed(10, 0.5, None)
    assert math.isnan(progress.recent(total=6)[0])

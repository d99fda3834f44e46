"""The batch that fits: rules on given trials, real trials within a bound, and the limit of a container."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from formary.errors import FormaryError
from formary.recipe.schema import Train
from formary.train import fit
from formary.train.fit import LARGEST, STEPS_PER_PASS, Trial, choose, find_batch, largest_sensible
from formary.train.machine import Runtime

CPU = Runtime(device=torch.device("cpu"), precision="float32", threads=1)
MIB = 2**20


def trials(*seconds, each=MIB):
    return [Trial(2**n, each * 2**n, per_sequence) for n, per_sequence in enumerate(seconds)]


@given(st.integers(1, 10**6))
def test_a_pass_keeps_its_steps_where_it_has_rows_enough(sequences):
    size = largest_sensible(sequences)
    assert size & (size - 1) == 0 and 1 <= size <= min(LARGEST, sequences)
    if size > fit.SMALLEST:
        assert sequences // size >= STEPS_PER_PASS
    if sequences >= 2 * size and fit.SMALLEST <= size < LARGEST:
        assert sequences // (2 * size) < STEPS_PER_PASS


def test_the_largest_that_fits_is_taken_in_the_fastest_pieces():
    found = choose(trials(4.0, 2.0, 1.0, 1.5, 1.6), cap=16, free=100 * MIB, settings=Train())
    assert (found.batch, found.micro_batch) == (16, 4)
    assert "batch 16 in pieces of 4" in found.why


def test_the_whole_batch_goes_at_once_where_that_is_as_fast():
    assert choose(trials(4.0, 1.0, 0.99, 1.02), cap=8, free=1, settings=Train()).micro_batch is None


def test_what_does_not_fit_is_said():
    found = choose(trials(4.0, 1.0), cap=64, free=3 * MIB, settings=Train())
    assert (found.batch, found.micro_batch) == (2, None) and "more do not fit" in found.why


def test_a_micro_batch_of_the_recipe_is_kept_and_the_batch_may_be_larger():
    found = choose(trials(4.0, 1.0), cap=32, free=1, settings=Train(micro_batch=2))
    assert (found.batch, found.micro_batch) == (32, 2)


def test_sequences_that_are_contrasted_are_not_cut():
    assert choose(trials(1.0, 2.0, 3.0), cap=4, free=1, settings=Train(), cuttable=False).micro_batch is None


class Wide(nn.Module):
    """A network whose pass keeps about 4 MiB per sequence."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


def loss_of(network, batch):
    spread = batch["tokens"].expand(-1, MIB) * network.weight
    return spread.sin().sum(), torch.tensor(len(spread))


def longest(count):
    return {"tokens": torch.ones(count, 1)}


def found_within(monkeypatch, free, **options):
    monkeypatch.setattr(fit, "free_memory", lambda runtime: free)
    return find_batch(loss_of, Wide(), longest, Train(), CPU, sequences=10**5, **options)


def test_trials_stop_within_the_free_memory_and_leave_the_network_alone(monkeypatch):
    network = Wide()
    monkeypatch.setattr(fit, "free_memory", lambda runtime: 150 * MIB)
    random = torch.get_rng_state()
    found = find_batch(loss_of, network, longest, Train(), CPU, sequences=10**5)
    assert found.trials[-1].bytes <= found.free <= 105 * MIB
    assert 1 <= found.batch <= 16  # at least 4 MiB each
    assert network.weight.grad is None and torch.equal(torch.get_rng_state(), random)


def test_memory_grows_with_the_sequences(monkeypatch):
    found = found_within(monkeypatch, 10**10)
    assert [trial.sequences for trial in found.trials] == [1, 2, 4, 8, 16, 32, 64]
    assert 64 * 4 * MIB <= found.trials[-1].bytes <= 64 * 20 * MIB
    assert found.batch == LARGEST


def test_no_room_at_all_is_told(monkeypatch):
    with pytest.raises(FormaryError, match=r"train\.batch: auto finds no room.*lower train\.context"):
        found_within(monkeypatch, 1)


def test_running_out_on_a_device_ends_the_trials(monkeypatch):
    def limited(network, batch):
        if len(batch["tokens"]) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return loss_of(network, batch)

    monkeypatch.setattr(fit, "free_memory", lambda runtime: 10**10)
    found = find_batch(limited, Wide(), longest, Train(), CPU, sequences=10**5)
    assert found.batch == 4

    def broken(network, batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        find_batch(broken, Wide(), longest, Train(), CPU, sequences=10**5)


def test_the_containers_limit_counts(monkeypatch):
    monkeypatch.setattr(fit, "_container_rooms", lambda: iter([12345]))
    assert fit.free_memory(CPU) == 12345
    monkeypatch.setattr(fit, "_container_rooms", lambda: iter([]))
    assert fit.free_memory(CPU) > MIB

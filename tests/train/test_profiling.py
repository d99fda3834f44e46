"""The profile: a Chrome trace that opens, and times by kind that add up to the time that passed."""

import gzip
import json
import time

import pytest
import torch

from formary.train.profiling import FOLDER, KINDS, REST, TABLE, TRACE, Profile, kind_of, said, times_of


class Batches:
    steps_per_epoch = 7

    def batch(self, step):
        return {"tokens": torch.arange(4 + step)}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Some steps of a network with a matrix product, attention, a norm and an optimiser."""
    run = tmp_path_factory.mktemp("run")
    profile = Profile(run, key="mine", skipped=2, steps=3)
    batches = profile.batches(Batches())
    linear, norm = torch.nn.Linear(256, 256), torch.nn.LayerNorm(256)
    optimiser = torch.optim.AdamW(linear.parameters())
    for step in range(8):
        assert torch.equal(batches.batch(step)["tokens"], torch.arange(4 + step))
        hidden = norm(linear(torch.randn(4, 32, 256))).view(4, 32, 4, 64).transpose(1, 2)
        torch.nn.functional.scaled_dot_product_attention(hidden, hidden, hidden).sum().backward()
        optimiser.step()
        time.sleep(0.01)
        profile.stepped()
    profile.finish()
    return run, profile


def test_the_trace_is_one_that_a_browser_opens(profiled):
    trace = json.loads(gzip.decompress((profiled[0] / FOLDER / TRACE).read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::addmm", "formary: data"} <= names
    assert sum(event.get("name") == "formary: data" and event.get("ph") == "X" for event in trace["traceEvents"]) == 3


def test_every_kind_of_work_is_found_and_the_shares_add_up(profiled):
    times = json.loads((profiled[0] / FOLDER / TABLE).read_text())
    kinds = {entry["kind"]: entry for entry in times["kinds"]}
    assert times["key"] == "mine" and times["steps"] == 3
    assert {"matrix products", "attention", "norms and activations", "optimiser", "data", REST} <= kinds.keys()
    assert kinds.keys() <= {*KINDS, REST}
    assert sum(entry["share"] for entry in kinds.values()) == pytest.approx(1.0)
    assert sum(entry["seconds"] for entry in kinds.values()) == pytest.approx(times["seconds"], rel=0.05)
    assert kinds[REST]["seconds"] > 0.025, "the sleeps are nobody's operation"
    products = [entry for entry in times["operations"] if entry["name"] == "aten::addmm"]
    assert products and products[0]["calls"] == 3 and products[0]["kind"] == "matrix products"


def test_the_table_is_told_in_lines(profiled):
    head, *lines = said(profiled[1].times)
    assert "3 steps" in head and len(lines) == len(profiled[1].times["kinds"])


class Event:
    def __init__(self, name, above=None, spent=1.0):
        self.name, self.cpu_parent, self.is_async, self.device_type = name, above, False, "DeviceType.CPU"
        self.self_cpu_time_total, self.self_device_time_total = spent, 0.0


def test_an_operation_belongs_to_what_it_is_called_within():
    assert kind_of(Event("aten::mm", Event("Optimizer.step#Muon.step"))) == "optimiser"
    assert kind_of(Event("aten::mm", Event("_ChunkedCrossEntropy"))) == "loss"
    assert kind_of(Event("aten::mm", Event("aten::linear"))) == "matrix products"
    assert kind_of(Event("aten::bmm")) == "attention"
    assert kind_of(Event("aten::copy_")) == "other operations"


def test_times_are_those_of_operations_without_what_they_call():
    found = times_of([Event("aten::mm", spent=2e6), Event("aten::copy_", spent=1e6)], steps=2, seconds=4.0)
    assert {entry["kind"]: entry["seconds"] for entry in found["kinds"]} == {
        "matrix products": 2.0,
        "other operations": 1.0,
        REST: 1.0,
    }


def test_a_training_too_short_to_profile_leaves_nothing(tmp_path):
    profile = Profile(tmp_path)
    profile.stepped()
    profile.finish()
    assert profile.times is None and not (tmp_path / FOLDER).exists()

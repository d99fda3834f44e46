"""Measuring a model: the right work is done, counted and divided."""

import statistics
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import formary
from formary.errors import RequestError
from formary.infer import bench, kernels
from formary.infer.bench import Figure, Workload
from formary.infer.engine import Engine

SMALL = Workload(prompt=4, new=5, batches=(1, 3), prefill=9, texts=6, rounds=2)


@pytest.fixture(scope="module")
def model(finished):
    return formary.load(finished.model)


@given(st.lists(st.floats(min_value=0.01, max_value=1e6), min_size=1, max_size=9))
def test_a_figure_is_the_median_and_its_spread_over_the_rounds(values):
    figure = Figure("float32", "writing", "tokens/s", tuple(values))
    assert figure.median == statistics.median(values)
    assert figure.spread == pytest.approx((max(values) - min(values)) / statistics.median(values))


def test_exactly_the_tokens_that_were_asked_for_are_written_and_timed(model):
    engine = Engine(model.network, slots=3)
    began = time.perf_counter()
    written = bench.write(model, engine, [(1, 2, 3), (2, 3, 4), (3, 4, 5)], 7)
    took = time.perf_counter() - began
    assert engine.statistics.generated_tokens == 3 * (7 + 1)
    assert 0 < written.first_seconds < took
    assert 3 * 7 / written.tokens_per_second + written.first_seconds <= took


def test_a_token_that_ends_texts_does_not_end_the_measurement(model):
    engine = Engine(model.network, slots=1)
    usual = model.generate("the", temperature=0, max_tokens=1).tokens[0]
    model.generation_config["eos_token_id"] = usual
    try:
        bench.write(model, engine, [tuple(model.tokenizer.encode("the"))], 4)
    finally:
        del model.generation_config["eos_token_id"]
    assert engine.statistics.generated_tokens == 5


def test_reading_a_prompt_reads_all_of_it_and_writes_one_token(model):
    engine = Engine(model.network, slots=1)
    assert bench.read(model, engine, tuple(range(1, 12))) > 0
    assert engine.statistics.prompt_tokens == 11 and engine.statistics.generated_tokens == 1


def test_a_decoder_is_measured_writing_and_reading_in_every_round_with_each_kernel(model):
    networks = {"one": model.network, "two": model.network}
    figures = bench.measure(model, networks, SMALL, bandwidth=1e9)
    found = {(figure.kernel, figure.measure): figure for figure in figures}
    names = ["writing, 1 at once", "first token after 4", "writing, 3 at once", "reading 9 tokens"]
    assert list(found) == [(kernel, name) for kernel in networks for name in names]
    assert all(len(figure.values) == SMALL.rounds and min(figure.values) > 0 for figure in figures)
    one = found["one", "writing, 1 at once"]
    assert one.bandwidth_share == pytest.approx(kernels.weight_bytes(model.network) * one.median / 1e9)
    assert found["one", "writing, 3 at once"].bandwidth_share is None


@pytest.mark.parametrize("task", ["masked_lm", "denoise"])
def test_the_other_kinds_of_models_are_measured_too(finished_runs, task):
    other = formary.load(finished_runs(task).model)
    figures = bench.measure(other, {"float32": other.network}, SMALL.fitting(other))
    names = [figure.measure for figure in figures]
    assert names == ["6 texts"] if task == "masked_lm" else "writing, 3 at once" in names


def test_every_kernel_of_the_machine_is_measured_and_answers_alike(model):
    networks = bench.networks_of(model)
    assert tuple(networks) == kernels.available() and networks["float32"] is model.network
    tokens = torch.tensor([model.tokenizer.encode("the cat sat")])
    with torch.inference_mode():
        logits = [network.head(network(tokens)) for network in networks.values()]
    for other in logits[1:]:
        assert (other - logits[0]).norm() < 0.05 * logits[0].norm()


def test_a_workload_is_shortened_to_the_context(model):
    context = model.config.context
    fitted = Workload().fitting(model)
    assert fitted.prompt + fitted.new < context and fitted.prefill < context
    assert SMALL.fitting(model) == SMALL


@pytest.mark.parametrize("wrong", [{"prompt": 0}, {"new": -1}, {"batches": ()}, {"batches": (1, 0)}, {"rounds": 0}])
def test_a_workload_that_measures_nothing_is_refused_by_name(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Workload(**wrong)


def test_texts_of_mixed_length_are_the_same_at_every_call():
    texts = bench.mixed_texts(300)
    lengths = [len(text.split()) for text in texts]
    assert texts == bench.mixed_texts(300) and texts[:50] != bench.mixed_texts(50, seed=1)
    assert min(lengths) >= 3 and max(lengths) <= 256 and len(set(lengths)) > 30


def test_the_bandwidth_is_that_of_the_tensor_that_is_read():
    torch.set_num_threads(1)
    assert 1e7 < bench.read_bandwidth(0.02, read_bytes=2**22) < 1e13

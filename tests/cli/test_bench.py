"""formary bench: the figures of infer.bench in a table or as JSON, with what makes them doubtful."""

import json

import pytest
import torch

import formary
from formary.infer.kernels import weight_bytes

TINY = ["--no-compile", "--threads", 1, "--prompt", 4, "--new", 4, "--prefill", 8, "--batch", "1,2", "--rounds", 2]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_json_has_every_figure_with_its_rounds_and_what_they_belong_to(finished, command):
    result = command("bench", finished.model, *TINY, "--json")
    found = json.loads(result.stdout)
    network = formary.load(finished.model).network
    assert found["kernels"]["float32"]["bytes_per_token"] == weight_bytes(network)
    assert found["threads"] == 1 and found["bandwidth_bytes_per_s"] > 0 and found["peak_memory_bytes"] > 10**8
    figures = {figure["measure"]: figure for figure in found["figures"] if figure["kernel"] == "float32"}
    assert set(figures) == {"writing, 1 at once", "writing, 2 at once", "first token after 4", "reading 8 tokens"}
    assert all(len(figure["values"]) == 2 for figure in figures.values())


def test_the_table_shows_medians_and_says_what_was_measured(finished, command):
    result = command("bench", finished.model, *TINY)
    assert result.exit_code == 0, result.stderr
    for words in (
        "writing, 2 at once, tokens/s",
        "of what memory gives",
        "weights read for a token, MB",
        "Medians of 2 rounds",
    ):
        assert words in result.stdout


def test_what_does_not_fit_the_context_is_shortened_and_said(finished, command):
    shown = command("bench", finished.model, "--no-compile", "--threads", 1, "--rounds", 1, "--batch", 1).stdout
    assert "shortened from 512 to 31 tokens to fit the context" in shown
    assert "a single round says nothing about noise" in shown


def test_an_encoder_is_measured_in_texts(finished_runs, command):
    shown = command("bench", finished_runs("masked_lm").model, "--threads", 1, "--texts", 5, "--rounds", 1).stdout
    assert "5 texts, texts/s" in shown and "shortened" not in shown


@pytest.mark.parametrize("batch", ["", "1,x", "0", "1,,2"])
def test_batches_that_are_no_numbers_are_refused(finished, command, batch):
    result = command("bench", finished.model, "--batch", batch)
    assert result.exit_code == 2 and "--batch" in result.stderr and "--batch 1,8" in result.stderr

"""The plan of a training: its arithmetic by hand, what makes it larger, and its errors."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from formary.cli.main import app
from formary.errors import FormaryError
from formary.train.plan import GPUS, count, plan, size, span

SMALL = {"parameters": 124e6, "tokens": 300e9, "gpus": "8xA100-40GB", "layers": 12, "width": 768}


def formary(*words):
    return CliRunner().invoke(app, ["plan", *words])


def test_the_arithmetic_is_that_of_the_sources():
    made = plan(**SMALL, utilisation=0.5)
    per_token = 6 * 124e6 + 12 * 12 * 768 * 1024
    assert made.flops == per_token * 300e9
    assert made.tokens_per_second == pytest.approx(8 * 312e12 * 0.5 / per_token)
    assert made.seconds == pytest.approx(300e9 / made.tokens_per_second)
    assert made.state_bytes == 16 * 124e6 and made.checkpoint_bytes == 12 * 124e6 and made.model_bytes == 4 * 124e6
    assert made.data_bytes == 600e9 and made.dollars == pytest.approx(8 * 1.2 * made.seconds / 3600)


def test_fsdp_holds_a_part_and_what_is_whole_for_a_moment():
    whole, spread = (plan(**SMALL, parallel=kind, micro_batch=8) for kind in ("ddp", "fsdp"))
    assert spread.state_bytes == whole.state_bytes / 8
    embedding = 50304 * 768
    assert spread.gathered_bytes == pytest.approx(8 * (embedding + 2 * (124e6 - embedding) / 12))
    assert spread.memory < whole.memory and spread.communication_seconds > whole.communication_seconds


def test_the_kind_and_the_pieces_are_what_fits():
    assert plan(parameters=1e9, tokens=1e9, gpus="8xH100").parallel == "ddp"
    assert plan(parameters=13e9, tokens=1e9, gpus="64xH100").parallel == "fsdp"
    assert plan(parameters=1e8, tokens=1e9, gpus="H100").parallel == "none"
    assert not plan(parameters=70e9, tokens=1e9, gpus="1xT4").fits
    assert plan(**SMALL).tokens_per_step == 2**19


@given(
    st.floats(2e8, 3e10),
    st.integers(1, 256),
    st.sampled_from(sorted(GPUS)),
    st.booleans(),
    st.sampled_from([512, 2048]),
)
def test_recomputing_saves_memory_and_takes_time_and_more_cards_are_faster(parameters, cards, gpu, recompute, context):
    given = {"parameters": parameters, "tokens": 1e10, "context": context, "parallel": "fsdp", "micro_batch": 1}
    one = plan(**given, gpus=f"{cards}x{gpu}", recompute=recompute)
    more = plan(**given, gpus=f"{2 * cards}x{gpu}", recompute=recompute)
    assert more.seconds == pytest.approx(one.seconds / 2) and more.dollars == pytest.approx(one.dollars)
    assert more.state_bytes <= one.state_bytes
    again = plan(**given, gpus=f"{cards}x{gpu}", recompute=True)
    assert again.activation_bytes <= one.activation_bytes and again.seconds >= one.seconds
    weights = 12 * one.shape.layers * one.shape.width**2 + one.shape.vocab_size * one.shape.width
    assert 0.8 < weights / parameters < 1.25


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--params", "1.5e9", "--tokens", "3e10", "--gpus", "8xH10"], "did you mean 'H100'?"),
        (["--params", "1.5e9", "--tokens", "3e10", "--gpus", "eight"], "known cards are"),
        (["--params", "1.5e9", "--tokens", "3e10", "--gpus", "0xH100"], "such as 8xH100"),
        (["--params", "many", "--tokens", "3e10", "--gpus", "8xH100"], "--params many: is not a number"),
        (["--params", "1.5e9", "--gpus", "8xH100"], "give --tokens or --text"),
        (["--params", "1.5e9", "--tokens", "1", "--text", "1", "--gpus", "8xH100"], "give --tokens or --text"),
        (["--params", "1e6", "--tokens", "3e10", "--gpus", "H100"], "the embedding alone"),
        (["--params", "1e9", "--tokens", "3e10", "--gpus", "H100", "--mfu", "35"], "is a share of the peak"),
        (["--params", "1e9", "--tokens", "-3", "--gpus", "H100"], "must be above 0"),
        (["--params", "1e9", "--tokens", "3e9", "--gpus", "H100", "--parallel", "dp"], "is auto, ddp or fsdp"),
    ],
)
def test_what_cannot_be_planned_is_named(words, said):
    result = formary(*words)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.stderr


def test_the_command_prints_a_plan_for_people_and_for_programs():
    said = formary("--params", "1.5B", "--text", "1TB", "--gpus", "8xH100")
    assert said.exit_code == 0 and "1.5 B parameters" in said.stdout and "cost         $" in said.stdout
    values = json.loads(formary("--params", "124M", "--tokens", "300B", "--gpus", "8xA100", "--json").stdout)
    assert values["fits"] and values["shape"]["parameters"] == 124e6
    large = formary("--params", "70B", "--tokens", "1T", "--gpus", "8xA100")
    assert (
        "does not fit" in large.stdout and "note: it does not fit: --checkpointing, more or larger GPUs" in large.stdout
    )


def test_numbers_are_said_as_people_say_them():
    assert (count(124e6), count(1.5e9), count(3e11), count(512)) == ("124 M", "1.5 B", "300 B", "512")
    assert (size(18e9), size(1.2e12), size(2.5e6)) == ("18 GB", "1.2 TB", "2.5 MB")
    assert (span(40), span(90 * 60), span(5 * 86400)) == ("40 seconds", "1.5 hours", "5.0 days")
    with pytest.raises(FormaryError):
        plan(**{**SMALL, "gpus": "8 x"})

"""`formary doctor`: what it finds, what it says is missing, and its exit code."""

import json
import time

import pytest
from typer.testing import CliRunner

from formary.cli import doctor as module
from formary.cli.main import app

measure = module.measure


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "measure", lambda: measure(0.001, size=32, read_bytes=2**16))


def examine_json():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_a_machine_with_everything_can_train():
    code, found = examine_json()
    assert code == 0 and found["problems"] == []
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_bytes"] > 0
    assert found["torch"]["threads"] >= 1 and found["torch"]["precision"] in ("float32", "bfloat16")


def test_a_missing_library_is_named_with_the_command_that_gets_it(monkeypatch):
    installed = module._installed
    monkeypatch.setattr(module, "_installed", lambda name: name != "tokenizers" and installed(name))
    code, found = examine_json()
    assert code == 1
    assert "tokenizers" in found["problems"][0] and "install formary" in found["problems"][0]


def test_without_torch_the_rest_is_still_shown(monkeypatch):
    installed = module._installed
    monkeypatch.setattr(module, "_installed", lambda name: name != "torch" and installed(name))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "missing:" in result.output and "processor" in result.output


def test_a_missing_extra_stops_nothing_and_shows_its_command(monkeypatch):
    installed = module._installed
    monkeypatch.setattr(module, "_installed", lambda name: name != "jieba" and installed(name))
    code, found = examine_json()
    assert code == 0
    assert found["extras"]["zh"]["missing"] == ["jieba"]
    assert found["extras"]["zh"]["command"].endswith('install "formary[zh]"')
    assert found["extras"]["zh"]["command"] in CliRunner().invoke(app, ["doctor"]).output


def test_every_extra_of_the_package_says_what_it_is_for():
    assert all(extra["for"] for extra in module.examine()["extras"].values())


def test_a_full_disk_is_a_problem(monkeypatch):
    monkeypatch.setattr(module, "_LEAST_DISK", 10**18)
    code, found = examine_json()
    assert code == 1 and "free" in found["problems"][0]


def test_the_hub_setting_is_shown(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert module.examine()["hub"]["offline"] is True
    assert "offline" in CliRunner().invoke(app, ["doctor"]).output


def test_without_a_compiler_only_compilation_is_lost(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    code, found = examine_json()
    assert code == 0 and found["compiler"]["path"] is None and "machine.compile" in found["notes"][0]


def test_measured_speeds_are_positive_and_a_product_takes_the_time_it_takes():
    began = time.perf_counter()
    found = measure(0.01, size=64, read_bytes=2**20)
    assert time.perf_counter() - began > 0.02  # it did measure
    assert set(found) - {"int8_gflops"} == {"fp32_gflops", "bf16_gflops", "memory_gb_per_s"}
    assert min(found.values()) > 0

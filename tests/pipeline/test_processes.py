"""A run in two processes, as a user starts it: the same result as by one, and one clear line when something goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

RECIPE = """
name: tiny
data: {sources: [corpus], documents: line, tokenizer: {kind: characters}}
model: {preset: gpt-mini, size: 1x32}
train: {steps: 8, batch: 4, context: 32, validate_every: 4, save_every: 2, optimiser: {lr: 0.01}}
evaluate: {baselines: false, bootstrap: 100}
generate: {prompts: [the], max_tokens: 5}
machine: {precision: float32}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("run")
    (folder / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        rows = [{"text": " ".join(rng.choice(words, 20)) + "."} for _ in range(60)]
        (folder / "corpus" / f"part-{number:05d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def command(place, run, *more):
    return [sys.executable, "-m", "formary", "run", str(place / "recipe.yaml"), "--folder", str(run), *more]


def formary(place, run, *more, **environment):
    env = {name: value for name, value in os.environ.items() if name != "RANK"} | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command(place, run, *more), env=env, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def by_one(place):
    done = formary(place, place / "one")
    assert done.returncode == 0, done.stderr
    return place / "one"


def test_two_processes_prepare_learn_and_report_what_one_does(place, by_one):
    done = formary(place, place / "two", "--processes", "2", "--set", "machine.parallel=fsdp")
    assert done.returncode == 0, done.stderr
    assert "2 processes (fsdp)" in done.stdout and done.stdout.count("report:") == 1
    assert "Traceback" not in done.stderr and "W1" not in done.stderr
    two = place / "two"
    for name in ("data/documents/train.jsonl", "data/documents/story.json", "data/tokens/train/tokens.bin"):
        assert (two / name).read_bytes() == (by_one / name).read_bytes()
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (by_one, two))
    for key, tensor in weights.items():
        np.testing.assert_allclose(others[key], tensor, rtol=1e-3, atol=1e-3)
    again = formary(place, place / "two")
    assert "nothing to do" in again.stdout


def test_what_is_wrong_is_said_once(place):
    wrong = formary(place, place / "wrong", "--processes=2", "--set", "train.tune.method=head")
    assert wrong.returncode == 2 and wrong.stderr.count("error:") == 1 and "train.tune" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    none = formary(place, place / "wrong", "--processes", "2", "--set", "machine.parallel=none")
    assert none.returncode == 2 and none.stderr.strip().splitlines() == [
        "error: machine.parallel: none, and 2 processes were started; start one, or write auto, ddp or fsdp"
    ]


def test_processes_within_processes_and_with_seeds_are_refused(place):
    within = formary(place, place / "x", "--processes", "2", RANK="0", WORLD_SIZE="2")
    assert within.returncode == 2 and "already started" in within.stderr
    seeds = formary(place, place / "x", "--processes", "2", "--seeds", "2")
    assert seeds.returncode == 2 and "--seeds and --folds run one after the other" in seeds.stderr
    half = formary(place, place / "x", RANK="1")
    assert half.returncode == 2


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_one_line_and_the_same_command_goes_on(place):
    run, log = place / "killed", place / "killed.txt"
    more = ["--set", "train.steps=3000", "--set", "train.validate_every=1000"]
    with log.open("w") as said:
        started = subprocess.Popen(command(place, run, "--processes", "2", *more), stdout=said, stderr=said)
        deadline = time.monotonic() + 200
        while not list(run.glob("checkpoints/*/step-*/complete")) and time.monotonic() < deadline:
            time.sleep(0.1)
        follower = next(
            child
            for child in psutil.Process(started.pid).children(recursive=True)
            if child.environ().get("RANK") == "1"
        )
        follower.send_signal(signal.SIGKILL)
        assert started.wait(timeout=100) == 2
    errors = [line for line in log.read_text().splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(errors) == 1 and "process 1 of 2 (counted from 0) was killed (SIGKILL" in errors[0]
    steps = max(int(path.parent.name[5:]) for path in run.glob("checkpoints/*/step-*/complete"))
    on = formary(place, run, "--set", f"train.steps={steps + 4}", "--allow-changed")
    assert on.returncode == 0 and "resuming from step" in on.stdout, on.stderr

"""`formary selftest --faults`: what is tried on the user's disk, what it says, and that a loss is not hidden."""

import re
import subprocess
import sys
import textwrap

import pytest

FAULTS = (
    "kill -9",
    "kill -9 in a save",
    "SIGTERM",
    "full disk",
    "flipped bit",
    "error while loading data",
    "vanished data file",
)


def selftest(folder, kills):
    words = [sys.executable, "-m", "formary", "selftest", "--faults", "--folder", str(folder), "--kills", str(kills)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def program(text, *words):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, words)], capture_output=True, text=True, check=False
    )


def test_no_fault_loses_a_training(tmp_path):
    done = selftest(tmp_path, kills=6)
    assert done.returncode == 0, done.stdout + done.stderr
    for fault in FAULTS:
        tried = re.search(rf"^  {re.escape(fault)}: (\d+) of (\d+), nothing lost$", done.stdout, re.MULTILINE)
        assert tried and tried[1] == tried[2] != "0", done.stdout
    assert "LOST" not in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing(tmp_path):
    done = selftest(tmp_path, kills=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill -9: 100 of 100" in done.stdout and "kill -9 in a save: 100 of 100" in done.stdout


def test_where_no_disk_may_be_mounted_long_files_are_forbidden_instead(tmp_path):
    done = program(
        """
        import sys
        from pathlib import Path
        from formary.pipeline import faults
        faults.shutil.which = lambda name: None
        lab = faults._Lab(Path(sys.argv[1]))
        lab.learn_reference()
        outcome = faults._full_disk(lab, 2)
        print(outcome.how, outcome.survived, outcome.tried, outcome.lost)
        """,
        tmp_path / "lab",
    )
    assert "RLIMIT_FSIZE" in done.stdout and "2 2 []" in done.stdout, done.stdout + done.stderr


def test_a_training_that_loses_its_random_numbers_is_caught(tmp_path):
    done = program(
        """
        import sys
        from pathlib import Path
        from formary.pipeline import faults
        from formary.train import rng
        rng.put_back = lambda tensors, values: None
        lab = faults._Lab(Path(sys.argv[1]))
        lab.learn_reference()
        outcome = faults._term(lab, 2)
        print(outcome.survived, "of", outcome.tried, outcome.lost)
        """,
        tmp_path / "lab",
    )
    assert "0 of 3" in done.stdout and "other weights than the undisturbed training" in done.stdout, done.stdout


def test_a_loss_is_told_and_ends_with_1(tmp_path, monkeypatch, command):
    from formary.pipeline import faults

    outcome = faults.Outcome("kill -9", "at random")
    outcome.count("run-3: other weights")
    monkeypatch.setattr(faults, "inject", lambda place, **_: [outcome])
    done = command("selftest", "--faults", "--folder", tmp_path)
    assert done.exit_code == 1 and "LOST" in done.stdout and "what was lost lies in" in done.stdout
    assert len(list(tmp_path.iterdir())) == 1  # left to look at


def test_what_to_test_and_where_have_to_be_named(tmp_path, command):
    assert command("selftest").exit_code == 2
    missing = command("selftest", "--faults", "--folder", tmp_path / "nowhere")
    assert missing.exit_code == 2 and "is no folder" in missing.stderr

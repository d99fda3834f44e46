"""formary top: what a run's folder says of it, drawn; it reads on while another process writes."""

import fcntl
import json
import os

import pytest
from typer.testing import CliRunner

from formary.cli.main import app
from formary.cli.top import plot, sparkline
from formary.pipeline.watching import Watcher, runs_in


def record(folder, *records, mode="a"):
    with (folder / "metrics.jsonl").open(mode) as file:
        file.write("".join(json.dumps(one) + "\n" for one in records))


def step(number, **values):
    return {
        "step": number,
        "loss": 4.0 / number,
        "lr": 0.1,
        "tokens_per_second": 900.0,
        "seconds": 2.0 * number,
    } | values


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: tiny\ntask: classify\n")
    (folder / "log.txt").write_text("tiny\n")
    (folder / "stages.json").write_text(json.dumps({"documents": {}, "tokenizer": {}}))
    (folder / "live.json").write_text(json.dumps({"total": 40, "pid": os.getpid()}))
    record(folder, *(step(number) for number in range(1, 9)))
    record(folder, {"step": 8, "validation_loss": 0.75, "validation_accuracy": 0.9, "seconds": 16.0})
    record(folder, {"step": 8, "sample": "it writes this"})
    return folder


@pytest.fixture
def at_work(run):
    """While another file handle holds the log, as a run does."""
    with (run / "log.txt").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        yield run


def test_a_run_at_work_is_seen_with_its_pace_and_memory(at_work):
    status = Watcher(at_work).look()
    assert (status.name, status.state, status.step, status.total) == ("tiny", "train", 8, 40)
    assert status.seconds_left == pytest.approx(64.0)
    assert status.memory > 1 << 20
    assert status.best["step"] == 8 and status.sample == "it writes this"


def test_a_run_that_nobody_works_in_was_stopped_or_is_finished(run):
    status = Watcher(run).look()
    assert status.state == "stopped" and status.memory is None and status.seconds_left is None
    done = {stage: {} for stage in ("documents", "tokenizer", "train", "evaluate", "report")}
    (run / "stages.json").write_text(json.dumps(done))
    assert Watcher(run).look().state == "finished"


def test_it_reads_on_and_waits_for_lines_to_be_whole(run):
    watcher = Watcher(run)
    assert watcher.look().step == 8
    record(run, step(9))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "loss"')
    assert watcher.look().step == 9
    with (run / "metrics.jsonl").open("a") as file:
        file.write(": 0.1}\n")
    assert watcher.look().step == 10 and len(watcher.look().training) == 10


def test_a_resumed_run_is_read_from_its_beginning(run):
    watcher = Watcher(run)
    watcher.look()
    fresh = run / "fresh"
    fresh.write_text(json.dumps(step(1)) + "\n")
    os.replace(fresh, run / "metrics.jsonl")
    assert [one["step"] for one in watcher.look().training] == [1]


def test_what_is_not_a_number_is_no_point(run):
    record(run, step(9, loss=None), {"step": 10, "validation_loss": None})
    status = Watcher(run).look()
    assert len(status.curve("loss")) == 8 and status.best["step"] == 8


def test_once_shows_curves_rate_and_sample(run):
    shown = CliRunner().invoke(app, ["top", str(run), "--once"])
    assert shown.exit_code == 0, shown.output
    for words in ("tiny", "classify", "stopped", "step 8 of 40", "20%", "900 tokens/s", "training loss", "validation"):
        assert words in shown.output, words
    assert "step 8, loss 0.75, accuracy 0.9" in shown.output and "it writes this" in shown.output
    assert any(0x2800 < ord(letter) < 0x2900 for letter in shown.output)


def test_a_run_on_pictures_is_counted_in_images(run):
    (run / "recipe.yaml").write_text("name: tiny\ntask: classify_image\n")
    shown = CliRunner().invoke(app, ["top", str(run), "--once"])
    assert "900 images/s" in shown.output and "tokens/s" not in shown.output
    (found,) = json.loads(CliRunner().invoke(app, ["top", str(run), "--json"]).stdout)
    assert found["unit"] == "images"


def test_a_folder_of_runs_is_a_table_and_without_a_terminal_it_ends(run):
    other = run.parent / "other"
    other.mkdir()
    (other / "recipe.yaml").write_text("name: other\n")
    (other / "log.txt").write_text("")
    os.utime(other / "log.txt", (1, 1))
    (run.parent / "notes").mkdir()
    assert runs_in(run.parent) == [run, other]
    shown = CliRunner().invoke(app, ["top", str(run.parent)])
    assert shown.exit_code == 0
    assert "tiny" in shown.output and "other" in shown.output and "not begun" in shown.output and "8/40" in shown.output


def test_json_says_the_same(run):
    shown = CliRunner().invoke(app, ["top", str(run), "--json"])
    (found,) = json.loads(shown.stdout)
    assert found["step"] == 8 and found["loss"] == 0.5 and found["best_validation_loss"] == 0.75


def test_a_folder_without_runs_is_a_mistake_of_the_user(tmp_path):
    for folder, why in ((tmp_path, "holds none"), (tmp_path / "gone", "no such folder")):
        shown = CliRunner().invoke(app, ["top", str(folder)])
        assert shown.exit_code == 2 and why in shown.output


def test_a_curve_goes_from_its_first_to_its_last_point():
    rows = plot([("training", [(0, 4.0), (10, 2.0)], "")], 30, 6).plain.split("\n")
    drawn = [[ord(letter) - 0x2800 if ord(letter) >= 0x2800 else 0 for letter in row] for row in rows[1:-1]]
    assert drawn[0][-26] & 0x01, "top left"
    assert drawn[-1][-1] & 0x80, "bottom right"
    columns = [max(row[place] for row in drawn) > 0 for place in range(len(drawn[0]) - 20, len(drawn[0]))]
    assert all(columns), "without a gap"
    assert rows[1].split()[0] == "4" and rows[-2].split()[0] == "2" and rows[-1].split() == ["0", "10"]


def test_a_sparkline_rises_with_its_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(list(range(100)), 10)) == 10
    assert sparkline([1.0, float("nan"), 1.0], 5) == "▁▁" and sparkline([], 5) == ""

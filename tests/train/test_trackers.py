"""Trackers are told every record, go on after a resume, and never end a training; with the real libraries where they are."""

import json
import time

import pytest

from formary.errors import MissingExtra
from formary.train import trackers
from formary.train.trackers import FILE, check, opened

RECORDS = [(1, {"loss": 2.5, "lr": 0.1}), (2, {"loss": 2.0, "lr": 0.05}), (2, {"sample": "Once upon"})]
SETTINGS = {"name": "tiny", "train": {"steps": 2, "optimiser": {"lr": 0.1}}, "model": {"start": None}}


def track(run, names, records=RECORDS, key="one", said=None):
    with opened(
        names, run=run, name="tiny", settings=SETTINGS, key=key, say=(said if said is not None else []).append
    ) as found:
        for step, values in records:
            for tracker in found:
                tracker.record(step, values)
    return json.loads((run / FILE).read_text())


@pytest.fixture
def client(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_mlflow_holds_numbers_texts_and_settings_in_the_run_folder(tmp_path, client):
    number = track(tmp_path, ["mlflow"])["mlflow"]
    run = client.get_run(number)
    assert run.info.status == "FINISHED" and run.info.run_name == "tiny"
    assert run.data.params == {"name": "tiny", "train.steps": "2", "train.optimiser.lr": "0.1"}
    assert [(m.step, m.value) for m in client.get_metric_history(number, "loss")] == [(1, 2.5), (2, 2.0)]
    assert run.info.artifact_uri.startswith((tmp_path / "mlflow-artifacts").as_uri())
    (sample,) = (tmp_path / "mlflow-artifacts").rglob("step-00000002.txt")
    assert sample.read_text() == "Once upon"


def test_a_resumed_training_goes_on_in_its_mlflow_run_and_another_begins_one(tmp_path, client):
    first = track(tmp_path, ["mlflow"])["mlflow"]
    assert track(tmp_path, ["mlflow"], [(3, {"loss": 1.5})])["mlflow"] == first
    assert [m.step for m in client.get_metric_history(first, "loss")] == [1, 2, 3]
    assert track(tmp_path, ["mlflow"], key="two")["mlflow"] != first


def test_an_mlflow_run_that_was_stopped_says_so(tmp_path, client):
    with (
        pytest.raises(KeyboardInterrupt),
        opened(["mlflow"], run=tmp_path, name="tiny", settings={}, key="one", say=print),
    ):
        raise KeyboardInterrupt
    assert client.get_run(json.loads((tmp_path / FILE).read_text())["mlflow"]).info.status == "KILLED"


def test_wandb_writes_offline_into_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said = []
    number = track(tmp_path, ["wandb"], said=said)["wandb"]
    assert f"run {number}, offline" in said[0]
    (folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{number}")
    (log,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 60  # a process of W&B's own writes it, in its own time
    while b"loss" not in (content := log.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert b"loss" in content and b"Once upon" in content and b"optimiser" in content


def test_a_tracker_that_fails_is_said_once_and_left_out(tmp_path, monkeypatch):
    class Broken:
        run, place = "x", "nowhere"

        def record(self, step, values):
            raise ConnectionError("the server is gone\nand more")

        def finish(self, *, whole):
            raise ConnectionError("still gone")

    monkeypatch.setitem(trackers._KINDS, "mlflow", lambda *given: Broken())
    monkeypatch.setattr(trackers, "check", lambda names: None)
    said = []
    track(tmp_path, ["mlflow"], said=said)
    assert said == ["mlflow: nowhere", "mlflow failed and is told no more of this run (the server is gone)"]


def test_a_tracker_that_cannot_be_reached_does_not_stop_the_training(tmp_path, monkeypatch):
    def refuse(*given):
        raise ConnectionError("no route")

    monkeypatch.setitem(trackers._KINDS, "wandb", refuse)
    monkeypatch.setattr(trackers, "check", lambda names: None)
    said = []
    track(tmp_path, ["wandb"], said=said)
    assert said == ["wandb could not be reached and is left out (no route)"]


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "formary\[wandb\]"'):
        check(["wandb"])

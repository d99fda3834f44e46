"""Trackers of experiments: every record of a run is told to MLflow or Weights & Biases too.

An adapter is a name of the run there, its settings, and numbers and texts by step. A tracker that fails (a server that is
gone) is said once and left out; the training goes on. A resumed run goes on in the same run of the tracker.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from formary import durable
from formary.errors import MissingExtra

FILE = "trackers.json"
"""In the run folder: the name of this training in each tracker."""

_SETTING_LENGTH = 500  # characters of a setting that MLflow surely takes
_SETTINGS_AT_ONCE = 100


class Tracker(Protocol):
    """What a run tells of itself as it learns."""

    run: str  # how the tracker calls this run
    place: str  # where it is kept, for people

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Take in the record of a step: numbers and texts by name."""
        ...

    def finish(self, *, whole: bool) -> None:
        """The training is over, to its end or not."""
        ...


def check(names: Sequence[str]) -> None:
    """Raises MissingExtra where the library of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(name, f"machine.trackers: {name}")


@contextmanager
def opened(
    names: Sequence[str],
    *,
    run: Path,
    name: str,
    settings: Mapping[str, Any],
    key: str,
    say: Callable[[str], object],
) -> Iterator[list[Tracker]]:
    """The trackers by these names, for a training; they are finished at the end of the block.

    Args:
        run: the run folder, which holds what stays local.
        name: of the run.
        settings: the recipe as nested mappings.
        key: of the training; another key is another run in the tracker.
        say: is told where the records go, and what went wrong.

    Raises:
        MissingExtra: a library is not installed.
    """
    check(names)
    known = durable.read_json(run / FILE)
    known = known if known.get("key") == key else {"key": key}
    flat = dict(_flattened(settings))
    trackers: list[Tracker] = []
    for one in names:
        try:
            made = _KINDS[one](run, name, flat, known.get(one))
        except Exception as error:
            say(f"{one} could not be reached and is left out ({_first_line(error)})")
            continue
        known[one] = made.run
        trackers.append(_Careful(one, made, say))
        say(f"{one}: {made.place}")
    if names:
        durable.write_json(run / FILE, known)
    try:
        yield trackers
    except BaseException:
        for tracker in trackers:
            tracker.finish(whole=False)
        raise
    for tracker in trackers:
        tracker.finish(whole=True)


class MLflow:
    """Runs in MLflow: at MLFLOW_TRACKING_URI where that is set, else in mlflow.db of the run folder."""

    def __init__(self, run: Path, name: str, settings: Mapping[str, Any], known: str | None) -> None:
        import mlflow

        for library in ("mlflow", "alembic"):  # which tell of every table that they make
            logging.getLogger(library).setLevel(logging.ERROR)

        given = os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or f"sqlite:///{(run / 'mlflow.db').resolve()}"
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(os.environ.get("MLFLOW_EXPERIMENT_NAME", "formary"))
        if experiment is not None:
            number = experiment.experiment_id
        else:
            beside = None if given else (run / "mlflow-artifacts").resolve().as_uri()
            number = self._client.create_experiment(
                os.environ.get("MLFLOW_EXPERIMENT_NAME", "formary"), artifact_location=beside
            )
        if known is None:
            self.run = str(self._client.create_run(number, run_name=name).info.run_id)
            params = [
                mlflow.entities.Param(field, str(value)[:_SETTING_LENGTH])
                for field, value in settings.items()
                if value is not None
            ]
            for start in range(0, len(params), _SETTINGS_AT_ONCE):
                self._client.log_batch(self.run, params=params[start : start + _SETTINGS_AT_ONCE])
        else:
            self.run = known
            self._client.set_terminated(known, "RUNNING")
        self._metric = mlflow.entities.Metric
        self.place = f"run {self.run} at {uri}"

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        import time

        now = int(time.time() * 1000)
        numbers = [self._metric(name, float(value), now, step) for name, value in values.items() if _is_number(value)]
        self._client.log_batch(self.run, metrics=numbers)
        for name, value in values.items():
            if isinstance(value, str):
                self._client.log_text(self.run, value, f"{name}/step-{step:08d}.txt")

    def finish(self, *, whole: bool) -> None:
        self._client.set_terminated(self.run, "FINISHED" if whole else "KILLED")


class WandB:
    """Runs in Weights & Biases: in wandb/ of the run folder (`wandb sync` sends them), or sent where WANDB_MODE=online."""

    def __init__(self, run: Path, name: str, settings: Mapping[str, Any], known: str | None) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "formary"),
            name=name,
            id=known,
            resume="allow" if known else None,
            dir=str(run),
            config=dict(settings),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                silent=True, console="off", x_disable_stats=True, disable_git=True, save_code=False
            ),
        )
        self.run = str(self._run.id)
        self.place = f"run {self.run}, {mode}, in {run / 'wandb'}"

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def finish(self, *, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


_KINDS: dict[str, Callable[[Path, str, Mapping[str, Any], str | None], Tracker]] = {"mlflow": MLflow, "wandb": WandB}


class _Careful:
    """A tracker whose failure ends the tracking, not the training."""

    def __init__(self, name: str, tracker: Tracker, say: Callable[[str], object]) -> None:
        self.name, self.tracker, self.say = name, tracker, say
        self.run, self.place = tracker.run, tracker.place
        self.works = True

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        self._try(lambda: self.tracker.record(step, values))

    def finish(self, *, whole: bool) -> None:
        self._try(lambda: self.tracker.finish(whole=whole))

    def _try(self, work: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            work()
        except Exception as error:
            self.works = False
            self.say(f"{self.name} failed and is told no more of this run ({_first_line(error)})")


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

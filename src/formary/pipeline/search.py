"""Hyperparameter search: the same recipe with other settings, judged by validation; test rows are never looked at.

Every trial is an ordinary run up to `train` in trials/N, on data that is prepared once. Optuna (Akiba et al. 2019, extra
`search`) says what is tried next and remembers it in study.db, so a killed search goes on with the trial it was at.
Of finished trials only the best keeps its weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from formary import durable
from formary.data.files import ALTERNATIVES
from formary.errors import FormaryError, MissingExtra, RecipeError
from formary.pipeline.context import existing
from formary.pipeline.fitting import SWITCHED
from formary.pipeline.repeat import share_data
from formary.pipeline.run import RunResult, file_fingerprints, owned, refuse_other, run, stage_keys
from formary.pipeline.search_page import page_of
from formary.recipe import Recipe, read, to_yaml
from formary.recipe.bundled import PACKAGE, RECIPE, find, recipe_of, run_folder
from formary.recipe.space import Dimension, judged_by, plain, space_of, told, value_at

_STEPS = 10  # of a run, at which trials are compared for pruning
_WARM_UP = 2  # of them, before which no trial is pruned
_FEW = 4  # trials that are finished before one is pruned, or an importance is said
_END = "...\n"  # of a scalar by itself, in YAML
_STATES = {"COMPLETE": "done", "PRUNED": "stopped early", "FAIL": "failed"}


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        folder: of the search.
        best: the recipe with the best settings, best.yaml.
        summary: as in summary.json: "metric", "value", "trial", "settings", "importance", "trials", "notes".
        run: the best one's run to the report, if it was asked for.
    """

    folder: Path
    best: Path
    summary: dict[str, Any]
    run: RunResult | None = None

    def lines(self) -> list[str]:
        """What was found, in sentences."""
        summary = self.summary
        said = [f"best of {len(summary['trials'])} trials: {summary['metric']} {summary['value']:.4f}"]
        said[0] += f" (trial {summary['trial']})"
        said += [f"  {field}: {plain(value)}" for field, value in summary["settings"].items()]
        if summary["importance"]:
            shares = (f"{field} {share:.0%}" for field, share in summary["importance"].items())
            said.append(f"what mattered: {', '.join(shares)} (share of the variance among these trials)")
        return [*said, *(f"note: {note}" for note in summary["notes"])]


def search(
    recipe: str | Path,
    *,
    trials: int | None = None,
    minutes: float | None = None,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    console: Console | None = None,
    run_best: bool = False,
) -> Found:
    """Try settings of a recipe until `trials` trainings are done or `minutes` have passed; best.yaml is the best.

    Args:
        recipe: the path of one, or the name of a ready one.
        trials, minutes: instead of the recipe's search.trials and search.minutes.
        overrides: "search.sampler=random" and the like.
        folder: where the search is kept; search/ in the recipe's run folder when left out.
        run_best: measure the best model on the test rows and write its report.

    Raises:
        MissingExtra: Optuna is not installed.
        RecipeError: a field of the search does not exist, or trials could not be compared by it.
        FormaryError: no trial could be finished.
    """
    optuna = _optuna()
    path = find(str(recipe))
    made = _for_trials(read(path, overrides))
    if made.privacy:
        raise RecipeError(
            "privacy: a search trains many times on the same rows, and each time spends epsilon; search on public rows, or "
            "try a few settings by hand and count them all"
        )
    limit, most = trials or made.search.trials, minutes or made.search.minutes
    space = space_of(made, _check_of(path, overrides))
    if folder is None:
        refuse_other(run_folder(made) / "search" / "prepared", made, path, path.parent)
    folder = Path(folder or run_folder(made) / "search")
    console = console or Console()
    began = time.monotonic()
    with owned(folder):
        prepared = folder / "prepared"
        if not prepared.exists() and (run_folder(made) / "data").exists():
            share_data(run_folder(made), prepared)
        run(made, base=path.parent, file=path, folder=prepared, until="prepare", console=console)
        _check_validation(prepared)
        key = _key(made, space, stage_keys(made, file_fingerprints(made, path.parent, prepared).values())["train"])
        study = _study(optuna, folder, key, direction="maximize" if judged_by(made) == "metric" else "minimize")
        trying = _Trying(optuna, study, made, path, overrides, space, folder, console)
        trying.take_up_what_was_stopped()
        while (done := len(trying.finished())) < limit and not trying.exhausted():
            if done and most is not None and time.monotonic() - began > 60 * most:
                console.print(f"{most:g} minutes have passed: {done} of {limit} trials are done", highlight=False)
                break
            trying.one(done, limit)
        summary = trying.summary()
        best = _write_best(folder, made, path, overrides, summary)
        durable.write_json(folder / "summary.json", summary)
        page = page_of(made.name, summary, lower_is_better=judged_by(made) == "loss")
        durable.write_text(folder / "search.html", page)
    result = None
    if run_best:
        chosen = {**summary["settings"], "train.best": judged_by(made)}
        settings = [*overrides, *(_override(field, value) for field, value in chosen.items())]
        result = run(path, overrides=settings, folder=folder / "trials" / summary["folder"], console=console)
    return Found(folder, best, summary, result)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingExtra("search", "hyperparameter search") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _for_trials(recipe: Recipe) -> Recipe:
    """The recipe with its best weights chosen by what the search compares."""
    measure = judged_by(recipe)
    if measure == "metric" and recipe.pretrains:
        raise RecipeError("search.metric: metric is for tasks on rows; pretraining is judged by its loss")
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"best": measure})})


def _check_of(path: Path, overrides: Sequence[str]) -> Callable[[str, Any], None]:
    """Says whether the recipe can have a value in a field; its errors are those of reading a recipe."""
    from formary.model.config import TransformerConfig
    from formary.recipe.presets import preset

    whole = {field.name for field in dataclasses.fields(TransformerConfig) if str(field.type).startswith("int")}

    def check(field: str, value: Any) -> None:
        model = read(path, [*overrides, _override(field, value)]).model
        if not field.startswith("model.") or field == "model.start":
            return
        switch = field.removeprefix("model.switches.")
        if model.start is not None and switch not in SWITCHED:
            raise RecipeError(f"{field}: a loaded model can have only its dropout and pooling switched")
        if switch in whole and isinstance(value, float):
            raise RecipeError(f"{field}: takes whole numbers (got {value!r})")
        if model.start is None:
            preset(model.preset, vocab_size=1, context=64, size=model.size, switches=model.switches)

    return check


def _override(field: str, value: Any) -> str:
    written = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return f"{field}={written.removesuffix(_END).strip()}"


def _check_validation(prepared: Path) -> None:
    story = json.loads((prepared / "data" / "documents" / "story.json").read_text(encoding="utf-8"))
    if not story["splits"]["validation"]["rows"]:
        raise RecipeError("data.split.validation: there are no validation rows, and a search is judged by them alone")


def _key(recipe: Recipe, space: Sequence[Dimension], train: str) -> str:
    """What trials depend on: another recipe, space or data begins another study in the same file."""
    about = [train, judged_by(recipe), [dataclasses.asdict(dimension) for dimension in space]]
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:12]


def _study(optuna: Any, folder: Path, key: str, *, direction: str) -> Any:
    storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / 'study.db').resolve()}")
    pruner = optuna.pruners.MedianPruner(n_startup_trials=_FEW, n_warmup_steps=_WARM_UP)
    return optuna.create_study(storage=storage, study_name=key, direction=direction, pruner=pruner, load_if_exists=True)


class _Trying:
    """The trials of one study."""

    def __init__(
        self,
        optuna: Any,
        study: Any,
        recipe: Recipe,
        path: Path,
        overrides: Sequence[str],
        space: Sequence[Dimension],
        folder: Path,
        console: Console,
    ) -> None:
        self.optuna, self.study, self.recipe, self.path = optuna, study, recipe, path
        self.overrides, self.space, self.folder, self.console = overrides, space, folder, console
        self.best_first = -1 if judged_by(recipe) == "metric" else 1

    def finished(self) -> list[Any]:
        """The trials that count: trained to the end, pruned, or failed for a reason that lies in their settings."""
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state.name in ("COMPLETE", "PRUNED") or "error" in trial.user_attrs
        ]

    def exhausted(self) -> bool:
        """Whether everything in a space of lists was tried."""
        if not all(dimension.choices for dimension in self.space):
            return False
        tried = {json.dumps(trial.params, sort_keys=True) for trial in self.finished()}
        return len(tried) >= math.prod(len(dimension.choices) for dimension in self.space)

    def take_up_what_was_stopped(self) -> None:
        """Trials that a kill left running are tried again first, in the same folder: their checkpoints are there."""
        states = self.optuna.trial.TrialState
        for trial in self.study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            self.study.tell(trial.number, state=states.FAIL)
            if len(trial.params) == len(self.space):
                self.study.enqueue_trial(trial.params, user_attrs={"folder": _folder_of(trial)})
        if not self.study.get_trials(deepcopy=False) and (own := self._own()):
            self.study.enqueue_trial(own)  # the best is then never worse than the recipe

    def one(self, number: int, limit: int) -> None:
        """Ask for settings, train with them, tell what came of it."""
        settings = self.recipe.search
        sampler = (
            self.optuna.samplers.RandomSampler if settings.sampler == "random" else self.optuna.samplers.TPESampler
        )
        # A sampler made anew for every trial draws the same whether or not the search was stopped in between.
        self.study.sampler = sampler(seed=self.recipe.train.seed + number)
        trial = self.study.ask()
        chosen = {dimension.field: self._suggested(trial, dimension) for dimension in self.space}
        self._print(f"trial {number + 1} of {limit}: {told(chosen)}")
        place = self.folder / "trials" / _folder_of(trial)
        states = self.optuna.trial.TrialState
        if (same := self._tried(trial)) is not None:
            trial.set_user_attr("folder", _folder_of(same))
            self._print(f"  as trial {same.number}: {self._says(same.value)}")
            self.study.tell(trial, same.value)
            return
        from formary.train.loop import Stopped

        began = time.monotonic()
        try:
            value = self._train(trial, chosen, place)
        except Stopped as stopped:
            self.study.tell(trial, state=states.PRUNED)
            self._print(f"  {stopped}: worse than the median of the trials before")
        except FormaryError as error:
            if error.exit_code != FormaryError.exit_code:  # Ctrl-C: this trial is taken up by the next call
                raise
            trial.set_user_attr("error", str(error))
            self.study.tell(trial, state=states.FAIL)
            self._print(f"  failed: {error}")
        else:
            trial.set_user_attr("seconds", round(time.monotonic() - began, 1))
            self.study.tell(trial, value)
            self._print(f"  {self._says(value)}, after {time.monotonic() - began:.0f} s")
        self._tidy()

    def _own(self) -> dict[str, Any]:
        """The recipe's own settings as a trial, where they all lie in the space."""
        own = {dimension.field: value_at(self.recipe, dimension.field) for dimension in self.space}
        if not all(dimension.holds(own[dimension.field]) for dimension in self.space):
            return {}
        return {d.field: _named(own[d.field]) if d.choices else own[d.field] for d in self.space}

    def _suggested(self, trial: Any, dimension: Dimension) -> Any:
        if dimension.choices:
            by_name = {_named(choice): choice for choice in dimension.choices}
            return by_name[trial.suggest_categorical(dimension.field, list(by_name))]
        if dimension.whole:
            return trial.suggest_int(dimension.field, int(dimension.low), int(dimension.high), log=dimension.log)
        return trial.suggest_float(dimension.field, dimension.low, dimension.high, log=dimension.log)

    def _tried(self, trial: Any) -> Any | None:
        """An earlier trial with the same settings, trained to the end: training again would give the same."""
        whole = (self.optuna.trial.TrialState.COMPLETE,)
        earlier = self.study.get_trials(deepcopy=False, states=whole)
        return next((other for other in earlier if other.params == trial.params), None)

    def _train(self, trial: Any, chosen: Mapping[str, Any], place: Path) -> float:
        recipe = _with(self.path, self.overrides, chosen)
        if not (place / "stages.json").exists():
            share_data(self.folder / "prepared", place)
        told_steps: set[int] = set()

        def watch(share: float, badness: float) -> bool:
            value, step = badness * self.best_first, int(share * _STEPS)
            self._print(f"  {share:.0%}: {self._says(value)}")
            if not self.recipe.search.prune or share >= 1 or step in told_steps or not math.isfinite(value):
                return False
            told_steps.add(step)
            trial.report(value, step)
            return bool(trial.should_prune())

        run(recipe, base=self.path.parent, folder=place, until="train", console=Console(quiet=True), watch=watch)
        return self._measured(place)

    def _measured(self, place: Path) -> float:
        """The best validation of a finished training."""
        from formary.train.records import read_records

        name = self._measure(place)
        values = [value for record in read_records(place / "metrics.jsonl") if (value := record.get(name)) is not None]
        if not values:
            raise FormaryError(f"{place}: no validation gave a number")
        return float(min(values, key=lambda value: value * self.best_first))

    def _measure(self, place: Path) -> str:
        from formary.train.records import read_records

        if self.best_first == 1:
            return "validation_loss"
        names = (name for record in read_records(place / "metrics.jsonl") for name in record)
        others = ("validation_loss", "validation_seconds", "validation_bits_per_byte")
        return next((name for name in names if name.startswith("validation_") and name not in others), "validation_")

    def _says(self, value: float) -> str:
        return f"validation {'loss' if self.best_first == 1 else 'metric'} {value:.4f}"

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _best(self) -> Any | None:
        whole = self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.COMPLETE,))
        return min(whole, key=lambda trial: (trial.value * self.best_first, trial.number), default=None)

    def _tidy(self) -> None:
        """Leave the weights of the best trial only; records, log and recipe of every trial stay."""
        best = self._best()
        for trial in self.finished():
            place = self.folder / "trials" / _folder_of(trial)
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
            if best is None or _folder_of(trial) != _folder_of(best):
                for name in ("model", "adapter"):
                    shutil.rmtree(place / name, ignore_errors=True)

    def summary(self) -> dict[str, Any]:
        """All trials and the best of them, JSON-able."""
        best, rows = self._best(), self.finished()
        if best is None:
            reasons = [trial.user_attrs["error"] for trial in rows if "error" in trial.user_attrs]
            raise FormaryError(
                f"no trial could be trained to the end ({len(rows)} tried): {(reasons or ['all pruned'])[-1]}"
            )
        trials = [
            {
                "trial": trial.number,
                "state": _STATES[trial.state.name],
                "value": trial.value if trial.state.name == "COMPLETE" else None,
                "settings": self._decoded(trial.params),
                **{name: trial.user_attrs[name] for name in ("seconds", "error") if name in trial.user_attrs},
            }
            for trial in rows
        ]
        measure = self._measure(self.folder / "trials" / _folder_of(best))
        notes = [
            f"the {measure.replace('_', ' ')} of the best of {len(rows)} trials flatters it, it was chosen by it; only "
            "the test rows, which no trial has seen, tell how good it is"
        ]
        return {
            "metric": measure.replace("_", " "),
            "value": best.value,
            "trial": best.number,
            "folder": _folder_of(best),
            "settings": self._decoded(best.params),
            "importance": self._importance(),
            "trials": trials,
            "notes": notes,
        }

    def _decoded(self, params: Mapping[str, Any]) -> dict[str, Any]:
        by_field = {dimension.field: dimension for dimension in self.space}
        return {
            field: next((c for c in by_field[field].choices if _named(c) == value), value)
            for field, value in params.items()
        }

    def _importance(self) -> dict[str, float]:
        """Each field's share of the variance among the trials (fANOVA, Hutter et al. 2014); {} where there are too few."""
        values = {trial.value for trial in self.finished() if trial.value is not None}
        if len(values) < _FEW or len(self.space) < 2:
            return {}
        evaluator = self.optuna.importance.FanovaImportanceEvaluator(seed=self.recipe.train.seed)
        found = self.optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        return {field: float(share) for field, share in found.items()}


def _folder_of(trial: Any) -> str:
    return str(trial.user_attrs.get("folder", trial.number))


def _named(choice: Any) -> Any:
    """A choice as Optuna keeps it: lists and mappings as JSON."""
    return choice if isinstance(choice, str | int | float | bool | None) else json.dumps(choice)


def _with(path: Path, overrides: Sequence[str], chosen: Mapping[str, Any]) -> Recipe:
    return _for_trials(read(path, [*overrides, *(_override(field, value) for field, value in chosen.items())]))


# What is left ------------------------------------------------------------------------------------------------------------


def _write_best(folder: Path, recipe: Recipe, path: Path, overrides: Sequence[str], summary: Mapping[str, Any]) -> Path:
    """The recipe with the best settings: whole, named NAME-best, its paths as they are seen from its own folder."""
    best = _with(path, overrides, summary["settings"])
    values = best.model_copy(update={"name": f"{recipe.name}-best", "run_folder": None, "search": recipe.search})
    there = moved(values, path.parent, folder)
    head = [f"# The best of {len(summary['trials'])} trials of {path.name}: {summary['metric']} {summary['value']:.4f}"]
    head += [f"#   {field}: {plain(value)}" for field, value in summary["settings"].items()]
    durable.write_text(folder / "best.yaml", "\n".join(head) + "\n\n" + to_yaml(there))
    return folder / "best.yaml"


def moved(recipe: Recipe, base: Path, folder: Path) -> Recipe:
    """The recipe with its relative paths counted from another folder; ids and files of packages are no paths."""

    def seen(name: str) -> str:
        if ALTERNATIVES in name:
            return ALTERNATIVES.join(map(seen, name.split(ALTERNATIVES)))
        if name.startswith(PACKAGE) or Path(name).expanduser().is_absolute():
            return name
        return os.path.relpath((base / name).resolve() if base.exists() else base / name, folder.resolve())

    def found(name: str | None) -> str | None:
        if name is None:
            return None
        if name.startswith(RECIPE):
            return RECIPE + os.path.relpath(recipe_of(name, base).resolve(), folder.resolve())
        place = None if name.startswith(PACKAGE) else existing(name, base)
        return name if place is None else os.path.relpath(place.resolve(), folder.resolve())

    data = recipe.data
    tokenizer = data.tokenizer.model_copy(update={"path": found(data.tokenizer.path)})
    augment = data.augment.model_copy(update={"synonyms": found(data.augment.synonyms)})
    lists = {part: [seen(name) for name in getattr(data, part)] for part in ("sources", "validation", "test")}
    data = data.model_copy(update={**lists, "tokenizer": tokenizer, "augment": augment})
    starts = {"start": found(recipe.model.start), "start_text": found(recipe.model.start_text)}
    model = recipe.model.model_copy(update=starts)
    return recipe.model_copy(update={"data": data, "model": model})

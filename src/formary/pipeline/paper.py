"""Gathers what a finished run left in its folder into the data that the report and the model card show."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import psutil
import torch

from formary.data import tokenizer as tokenizers
from formary.evaluate.interval import Interval
from formary.pipeline.context import Context, open_tokens
from formary.pipeline.findings import Energy, Metric, ReportData, Sample
from formary.pipeline.foretold import compared, said
from formary.pipeline.private import statement
from formary.recipe import to_yaml
from formary.train.machine import cpu_name, physical_cores, runtime
from formary.train.profiling import FOLDER, TABLE
from formary.train.records import read_records
from formary.train.settled import BATCH_FILE, LR_FILE, found_in
from formary.train.stability import incidents_of
from formary.version import __version__

_WATTS_PER_CORE = 15.0  # a busy core of a common desktop or server processor, its share of the board included


def gather(context: Context) -> ReportData:
    """The report's data, read from the run folder; nothing is measured here."""
    recipe, folder = context.recipe, context.folder
    records = read_records(folder / "metrics.jsonl")
    evaluation = _json(folder / "evaluation.json")
    config = _json(context.model / "formary.json")
    training = [record for record in records if "loss" in record]
    settled = runtime(recipe.machine)
    metrics = [
        Metric(
            metric=entry["metric"],
            protocol=entry["protocol"],
            model=Interval.from_json(entry["model"]),
            baselines={name: Interval.from_json(value) for name, value in entry["baselines"].items()},
            verdicts=entry["verdicts"],
        )
        for entry in evaluation.get("metrics", [])
    ]
    taken = [Sample(**sample) for sample in evaluation.get("samples", [])]
    along = [Sample(prompt="", text=record["sample"], step=record["step"]) for record in records if "sample" in record]
    return ReportData(
        name=recipe.name,
        description=recipe.description,
        task=recipe.task,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        formary_version=__version__,
        recipe=to_yaml(recipe),
        story=_story(context),
        tokenizer=_tokenizer_facts(context),
        model=_model_facts(context, config),
        training=training,
        validation=[record for record in records if "validation_loss" in record],
        lr_finder=found_in(folder / LR_FILE, context.keys["train"]),
        batch_finder=found_in(folder / BATCH_FILE, context.keys["train"]),
        incidents=incidents_of(folder),
        forecast=said(foretold) if (foretold := compared(folder, context.keys["train"])) else "",
        privacy=statement(config["privacy"]) if "privacy" in config else (),
        profile=found_in(folder / FOLDER / TABLE, context.keys["train"]),
        metrics=metrics,
        samples=[*taken, *along],
        details=evaluation.get("details", {}),
        leakage=evaluation.get("leakage", {"rows": 0, "of": 0, "examples": []}),
        notes=evaluation.get("notes", []),
        machine={
            "cpu": cpu_name(),
            "cores": physical_cores(),
            "threads": settled.threads,
            "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "torch": torch.__version__,
            "precision": settled.precision,
        },
        times=context.times,
        energy=_energy(context, settled.threads),
        hashes={name: key[:16] for name, key in context.keys.items() if name in ("documents", "tokens", "train")},
        next_commands=next_commands(context),
    )


def next_commands(context: Context) -> list[str]:
    """What to try after a run, as commands that work as they stand."""
    recipe = context.recipe
    usual = {"masked_lm": "[MASK]", "denoise": "Once <extra_id_0> a time"}.get(recipe.task, "Once")
    prompt = (recipe.generate.prompts or [usual])[0].replace("\n", " ").strip() or usual
    generate = ["generate" if recipe.pretrains else "predict", str(context.model), prompt]
    generate += ["--temperature", "0.7"] if recipe.task == "causal_lm" else []
    if not recipe.pretrains:
        split = "test" if context.rows("test") else "train"
        generate[-1] = str(context.documents / f"{split}.jsonl")
    if recipe.train.epochs:
        field, more = "train.epochs=", 2 * recipe.train.epochs
    else:
        field, more = "train.steps=", 2 * (recipe.train.steps or 1000)
    run = ["run"]
    for word in context.called:
        if run[-1] == "--set" and word.startswith(field):
            run.pop()  # it gets another value
        else:
            run.append(word)
    formary = program("formary")
    return [
        f"{formary} {shlex.join(generate)}",
        f"{formary} {shlex.join([*run, '--set', f'{field}{more:g}'])}",
        f"{program('tensorboard')} --logdir {shlex.quote(str(context.folder / 'tensorboard'))}",
    ]


def program(name: str) -> str:
    """How to call a program of our environment from here: its name where PATH finds it, else its path."""
    ours = Path(sysconfig.get_path("scripts")) / name
    found = shutil.which(name)
    if not ours.exists() or (found and Path(found).samefile(ours)):
        return name
    here = Path.cwd()
    return shlex.quote(str(ours.relative_to(here) if ours.is_relative_to(here) else ours))


def _story(context: Context) -> dict[str, Any]:
    story = _json(context.documents / "story.json")
    for split, counts in story.get("splits", {}).items():
        if context.recipe.pretrains:
            counts["tokens"] = open_tokens(context, split).tokens if counts["rows"] else 0
    return story


def _tokenizer_facts(context: Context) -> dict[str, Any]:
    path = context.recipe.data.tokenizer.path or context.recipe.model.words
    words = tokenizers.load(context.tokenizer)
    if not words.vocab_size:
        return {}
    facts: dict[str, Any] = {
        "kind": f"loaded from {path}" if path else context.recipe.data.tokenizer.kind,
        "vocab_size": words.vocab_size,
    }
    if context.recipe.pretrains:
        facts["bytes_per_token"] = round(open_tokens(context, "train").bytes_per_token, 3)
    return facts


def _model_facts(context: Context, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "preset": context.recipe.model.named,
        **facts.get("model", {}),
        "trained_steps": facts.get("step"),
        "best_step": facts.get("best_step"),
        "trained_tokens": facts.get("tokens"),
    }


def _energy(context: Context, threads: int) -> Energy:
    seconds = sum(context.times.values())
    watts = threads * _WATTS_PER_CORE
    cores = "1 busy core" if threads == 1 else f"{threads} busy cores"
    return Energy(
        kwh=seconds * watts / 3.6e6,
        assumption=f"{cores} at {_WATTS_PER_CORE:.0f} W each, the board included, for {seconds:.0f} s; not measured",
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values

"""The commands that execute a recipe: run, and its single steps prepare, train, evaluate and report."""

from __future__ import annotations

import json as json_format
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from formary.cli.predict import Columns, mapping
from formary.errors import FormaryError

if TYPE_CHECKING:
    from formary.pipeline.run import RunResult

Target = Annotated[str, typer.Argument(help="A recipe file, or the name of a ready recipe (see `formary recipes`).")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a field, e.g. --set train.steps=200.")
]
Folder = Annotated[Path | None, typer.Option(help="The run folder; runs/NAME when left out.")]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Start N processes with torchrun, which share the work: best one for each GPU or socket.",
    ),
]
AllowChanged = Annotated[
    bool,
    typer.Option("--allow-changed", help="Go on with a stopped training although its data or its recipe has changed."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, everything else to stderr.")]


def run(
    recipe: Target,
    set_: Overrides = None,
    folder: Folder = None,
    seeds: Annotated[
        int | None, typer.Option(help="Run under this many seeds: mean and spread, and what the models say together.")
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(metavar="K", help="Cross-validate: one run for each of K folds, measured on every row once."),
    ] = None,
    processes: Processes = None,
    allow_changed: AllowChanged = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Watch some training steps: a Chrome trace, and a table of where the time goes."
        ),
    ] = False,
    json: AsJson = False,
) -> None:
    """Do everything a recipe asks for: prepare, train, evaluate, report. What is up to date is not done again."""
    if seeds is not None and folds is not None:
        raise FormaryError("--seeds and --folds: give one of them")
    if profile:
        set_ = [*(set_ or ()), "machine.profile=true"]
    if (seeds is not None or folds is not None) and (processes is not None or "RANK" in os.environ):
        raise FormaryError(
            "--seeds and --folds run one after the other in one process; for several processes give the commands yourself, "
            "each with --set train.seed=... (or data.split.fold) and --folder"
        )
    _start_several(processes)
    if seeds is not None or folds is not None:
        _repeat(recipe, seeds, folds, set_, folder, json)
        return
    result = _execute(recipe, set_, folder, json, until="report", allow_changed=allow_changed)
    if json:
        return
    say(f"\nreport: {result.report}\nmodel:  {result.model}")
    if profile and "train" not in result.did:
        say("nothing was trained, so there was nothing to profile; name another folder with --folder")
    if result.did:
        say("next, try:")
        for command in _next_commands(result):
            say(f"  {command}")


def _repeat(
    recipe: str, seeds: int | None, folds: int | None, overrides: list[str] | None, folder: Path | None, json: bool
) -> None:
    from formary.pipeline.repeat import cross_validate, repeat

    several = repeat if folds is None else cross_validate
    console = _console(json)
    found = several(recipe, folds or seeds or 0, overrides=overrides or (), folder=folder, console=console)
    if json:
        values: dict[str, Any] = {"metrics": found.metrics, "ensemble": found.ensemble}
        if folds is not None:
            values |= {"validation": found.validation, "pooled": found.pooled, "notes": found.notes}
        print(json_format.dumps(values, ensure_ascii=False))
        return
    say(f"\nover {len(found.runs)} {'seeds' if folds is None else 'folds'}, mean and standard deviation:")
    for metric in (*found.metrics, *found.validation):
        say(
            f"  {metric['metric'].replace('_', ' ')} {metric['mean']:.4f} ± {metric['spread']:.4f} ({metric['protocol']})"
        )
    if found.pooled:
        say(f"every row by the model that had not learned it ({found.pooled[0]['protocol']}):")
    for metric in found.pooled:
        say(f"  {metric['says']}")
    for metric in found.ensemble:
        say(f"  together: {metric['says']}")
    for note in found.notes:
        say(f"note: {note}")
    say("reports: " + ", ".join(str(result.report) for result in found.runs))


def prepare(
    recipe: Target,
    set_: Overrides = None,
    folder: Folder = None,
    processes: Processes = None,
    json: AsJson = False,
) -> None:
    """Read, clean and split the data, train the tokenizer, write token shards."""
    _start_several(processes)
    _execute(recipe, set_, folder, json, until="prepare")


def train(
    recipe: Target,
    set_: Overrides = None,
    folder: Folder = None,
    processes: Processes = None,
    allow_changed: AllowChanged = False,
    json: AsJson = False,
) -> None:
    """Train the model (after `prepare`, where that is not up to date). A stopped training goes on where it stood."""
    _start_several(processes)
    _execute(recipe, set_, folder, json, until="train", allow_changed=allow_changed)


def report(recipe: Target, set_: Overrides = None, folder: Folder = None, json: AsJson = False) -> None:
    """Write report.html and the model card (after the stages before, where they are not up to date)."""
    result = _execute(recipe, set_, folder, json, until="report")
    if not json:
        say(f"report: {result.report}")


def evaluate(
    target: Annotated[str, typer.Argument(help="A recipe, or a model folder, GGUF file or hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Argument(help="For a model: texts, rows with answers, or benchmarks (files, or names of ready ones)."),
    ] = None,
    set_: Overrides = None,
    folder: Folder = None,
    json: AsJson = False,
    documents: Annotated[
        str | None, typer.Option(help="How plain text becomes documents: file (if left out), line, paragraph.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens scored per window; half the context if left out.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Measure on at most this many tokens.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Ask a causal model, with this many solved examples before each question.")
    ] = None,
    examples: Annotated[
        str | None, typer.Option(help="Rows to take the examples from; some of DATA are set aside if left out.")
    ] = None,
    column: Columns = None,
    zero_shot: Annotated[
        str | None,
        typer.Option(help="Of match_image_text: a text such as 'a picture of a {label}' classifies labelled pictures."),
    ] = None,
) -> None:
    """Measure a recipe's model on its test split, or any model on data of yours: texts, rows, or benchmarks."""
    from formary.pipeline.stages import findings

    given: dict[str, Any] = {"--documents": documents, "--stride": stride, "--max-tokens": max_tokens}
    given |= {"--shots": shots, "--examples": examples, "--column": column, "--zero-shot": zero_shot}
    of_recipes = {"--set": set_, "--folder": folder}
    for option, value in (of_recipes if data else given).items():
        if value is not None:
            raise FormaryError(
                f"{option} belongs to {'a recipe; here a model is measured on texts' if data else 'a model and texts; for a recipe use --set evaluate.stride=... and the like'}"
            )
    if not data:
        done = _execute(target, set_, folder, json, until="evaluate")
        if not (json or done.did):
            for sentence in findings(done.metrics):
                say(sentence)
        return
    from formary.pipeline.measure import measure

    result = measure(
        target,
        data,
        documents=documents or "file",
        stride=stride,
        max_tokens=max_tokens,
        shots=shots,
        examples=examples,
        columns=mapping(column),
        zero_shot=zero_shot,
        console=None if json else Console(stderr=True),
    )
    if json:
        print(json_format.dumps(result, ensure_ascii=False))
        return
    apart = dict.fromkeys(metric["protocol"] for metric in result["metrics"] if "benchmarks" in result)
    for protocol in apart or (None,):
        for sentence in findings([m for m in result["metrics"] if protocol in (None, m["protocol"])]):
            say(sentence)
    for note in result.get("notes", ()):
        print(f"note: {note}", file=sys.stderr)


def _start_several(processes: int | None) -> None:
    """Give this very command to N processes, if so many are asked for, and end as they do."""
    if processes is None:
        return
    from formary.train.processes import start

    arguments = sys.argv[1:]
    place = next(i for i, word in enumerate(arguments) if word.partition("=")[0] == "--processes")
    raise typer.Exit(start(arguments[:place] + arguments[place + (1 if "=" in arguments[place] else 2) :], processes))


def _execute(
    recipe: str,
    overrides: list[str] | None,
    folder: Path | None,
    json: bool,
    *,
    until: str,
    allow_changed: bool = False,
) -> RunResult:
    from formary.pipeline.run import run as execute

    result = execute(
        recipe,
        overrides=overrides or (),
        folder=folder,
        until=until,
        console=_console(json),
        allow_changed=allow_changed,
    )
    if json:
        values: dict[str, Any] = {"folder": str(result.folder), "did": result.did, "metrics": result.metrics}
        values |= {"model": str(result.model), "report": str(result.report)}
        print(json_format.dumps(values, ensure_ascii=False))
    return result


def _console(json: bool) -> Console | None:
    """Where a run speaks: beside --json to stderr, and without bars."""
    return Console(stderr=True, force_interactive=False) if json else None


def say(text: str) -> None:
    """A line as it is: paths and commands are neither coloured nor broken."""
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def _next_commands(result: RunResult) -> list[str]:
    facts = result.folder / "next.json"
    return list(json_format.loads(facts.read_text(encoding="utf-8"))) if facts.exists() else []

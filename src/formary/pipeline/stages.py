"""The stages of a run, in order, each with what it depends on and what it does.

documents -> items -> tokenizer -> tokens -> train -> evaluate -> report. A stage reads and writes the run folder only; the
work itself is done by the rooms below. Nothing heavy is imported until a stage really runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formary import durable
from formary.pipeline.context import SPLITS, Context
from formary.recipe.schema import Recipe


@dataclass(frozen=True)
class Stage:
    """One stage: the recipe fields its result depends on (beside the stage before it), its work, what that leaves."""

    name: str
    says: str
    depends: Callable[[Recipe], Any]
    work: Callable[[Context], float | None]  # the seconds that earlier, interrupted goes had put into it
    leaves: tuple[str, ...]  # in the run folder; when one of them is gone the stage is done again
    for_rows: bool = True  # whether labelled tasks have it
    wanted: Callable[[Recipe], bool] = lambda recipe: True  # whether a recipe asks for it at all
    together: bool = False  # whether all processes of a run work at it; the leader alone does the others


def _documents(context: Context) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from formary.data import parts
    from formary.data.documents import prepare_parts, write_documents
    from formary.data.records import RowForm
    from formary.tasks.registry import labelled_task

    task = labelled_task(context.recipe.task)
    form, data, processes = task.form if task else RowForm(), context.recipe.data, context.processes
    in_parts = parts.wanted(data, context.base, processes=processes.count)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = context.console
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        bar = progress.add_task("reading", total=None)

        def report(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        if in_parts:
            prepare_parts(data, context.documents, base=context.base, form=form, share=processes.share, progress=report)
            processes.wait()
        if not processes.leads:
            return
        story = write_documents(
            data, context.documents, base=context.base, form=form, progress=report, from_parts=in_parts
        )
    console.print(f"  {_documents_of(story['rows_read'])} read, {_size(story['bytes_read'])}")
    for step in story["steps"]:
        if step["dropped"] or step["changed"]:
            name = str(step["step"]).replace("_", " ")
            console.print(f"  {name}: {step['dropped']:,} dropped, {step['changed']:,} changed")
    across = story["duplicates_across_splits"]
    if across["exact"] or across["near"]:
        console.print(
            f"  training rows that also occur in validation or test: {across['exact']:,} exactly, "
            f"{across['near'] or 0:,} nearly; {across['removed']:,} removed from training"
        )
    for split, counts in story["splits"].items():
        size = f", {_size(counts['bytes'])}" if "bytes" in counts else ""
        console.print(f"  {split}: {_documents_of(counts['rows'])}{size}")
    for warning in story["warnings"]:
        console.print(f"  note: {warning}")


def _documents_of(count: int) -> str:
    return f"{count:,} document" if count == 1 else f"{count:,} documents"


def _size(count: float) -> str:
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_:
            return f"{count / bytes_:,.1f} {unit}"
    return f"{count:.0f} bytes"


def _items(context: Context) -> None:
    from formary.pipeline.catalogue import write_catalogue

    write_catalogue(context)


def _tokenizer(context: Context) -> None:
    from formary.data import tokenizer
    from formary.data.shards import read_texts
    from formary.pipeline.catalogue import catalogue_rows
    from formary.pipeline.labelled import texts_of
    from formary.pipeline.model import tokenizer_of
    from formary.tasks.registry import labelled_task

    recipe, settings = context.recipe, context.recipe.data.tokenizer
    path, task = settings.path or recipe.model.words, labelled_task(recipe.task)
    vocabulary = getattr(task, "vocabulary", None)
    source = f"loaded from {path}" if path else settings.kind
    if path:
        made = tokenizer_of(context, path)
    elif vocabulary:
        rows = [*context.rows_of("train"), *catalogue_rows(context)]
        made, source = vocabulary(recipe, rows), "what the training rows hold"
    elif task:
        texts = texts_of(context.rows_of("train"))
        made = tokenizer.train(texts, settings, task=task.special_tokens(recipe))
    else:
        made = tokenizer.train(read_texts(context.documents / "train.jsonl"), settings, task=recipe.task)
    with durable.new_folder(context.tokenizer) as folder:
        made.save(folder)
    if made.vocab_size:
        context.console.print(f"  {source}, {made.vocab_size:,} tokens in the vocabulary")
    else:
        context.console.print("  none is needed: the rows are not read in words")


def _tokens(context: Context) -> None:
    from formary.data import tokenizer
    from formary.data.shard_parts import join_token_parts, stretches, write_token_parts
    from formary.data.shards import write_tokens

    made, processes = tokenizer.load(context.tokenizer), context.processes
    how: dict[str, Any] = {"words": context.recipe.data.words, "end_of_document": context.recipe.task == "causal_lm"}
    for split in SPLITS:
        documents, folder = context.documents / f"{split}.jsonl", context.tokens(split)
        if processes.count > 1 and len(stretches(documents)) > 1:
            write_token_parts(documents, folder, made, share=processes.share, **how)
            processes.wait()
            meta = join_token_parts(documents, folder) if processes.leads else {}
        elif processes.leads:
            meta = write_tokens(documents, folder, made, **how)
        if not processes.leads:
            continue
        context.console.print(f"  {split}: {meta['tokens']:,} tokens")


def _train(context: Context) -> float:
    from formary.pipeline import resuming
    from formary.pipeline.foretold import measured_training
    from formary.train.forecast import reset_peak

    if context.processes.leads:
        resuming.claim(context, context.data, allow_changed=context.allow_changed)
    context.processes.wait()
    began = time.perf_counter()
    reset_peak()
    seconds = trained(context)
    if context.processes.leads:
        resuming.finished(context)
        measured_training(context, seconds + time.perf_counter() - began)
    return seconds


def trained(context: Context) -> float:
    """Train as the recipe's task does it, and return the seconds that earlier goes took."""
    from formary.tasks.registry import labelled_task

    if task := labelled_task(context.recipe.task):
        from formary.pipeline.labelled import train_rows

        return train_rows(context, task)
    from formary.pipeline.pretraining import train_text

    return train_text(context)


def _evaluate(context: Context) -> None:
    from formary.tasks.registry import labelled_task

    if labelled_task(context.recipe.task):
        from formary.pipeline.labelled import evaluate_rows

        result = evaluate_rows(context)
    else:
        from formary.pipeline.pretraining import evaluate_text

        result = evaluate_text(context)
    durable.write_json(context.folder / "evaluation.json", result)
    for sentence in findings(result["metrics"]):
        context.console.print(f"  {sentence}")


def _report(context: Context) -> None:
    from formary.pipeline.card import write_model_card
    from formary.pipeline.paper import gather
    from formary.pipeline.report import write_report

    report = gather(context)
    durable.write_json(context.folder / "next.json", list(report.next_commands))
    write_report(context.folder / "report.html", report)
    write_model_card(context.model / "README.md", report)


def findings(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Metrics as sentences: what they were measured on, then each with its interval and beside its baselines."""
    if not metrics:
        return []
    from formary.evaluate.labelled import LEAK_FREE

    said = [(f"{LEAK_FREE}: " if LEAK_FREE in metric["protocol"] else "") + str(metric["says"]) for metric in metrics]
    return [f"measured on: {metrics[0]['protocol']}", *said]


STAGES: tuple[Stage, ...] = (
    Stage(
        "documents",
        "read, clean and split the data",
        lambda recipe: recipe.data.model_dump(
            exclude={
                "tokenizer": True,
                "words": True,
                "items": True,
                "split": set() if recipe.data.split.folds else {"folds", "fold"},
            }
        ),
        _documents,
        ("data/documents/story.json", *(f"data/documents/{split}.jsonl" for split in SPLITS)),
        together=True,
    ),
    Stage(
        "items",
        "turn the texts of the items into vectors",
        lambda recipe: recipe.data.items.model_dump() if recipe.data.items else None,
        _items,
        ("data/items/items.jsonl", "data/items/vectors.safetensors"),
        wanted=lambda recipe: recipe.data.items is not None,
    ),
    Stage(
        "tokenizer",
        "train or load the tokenizer",
        lambda recipe: [recipe.data.tokenizer.model_dump(), recipe.task, recipe.model.preset, recipe.model.words],
        _tokenizer,
        ("data/tokenizer/tokenizer.json",),
    ),
    Stage(
        "tokens",
        "encode the documents into token shards",
        lambda recipe: recipe.data.words,
        _tokens,
        tuple(f"data/tokens/{split}/{name}" for split in SPLITS for name in ("meta.json", "tokens.bin")),
        for_rows=False,
        together=True,
    ),
    Stage(
        "train",
        "train the model",
        lambda recipe: [
            recipe.task,
            recipe.model.model_dump(),
            recipe.train.model_dump(
                exclude={"keep", "save_every", "sample_every", "histograms_every", "activation_checkpointing", "ramp"}
            ),
            recipe.machine.model_dump(exclude={"threads", "parallel", "profile", "trackers"}),
            *([recipe.privacy.model_dump()] if recipe.privacy else []),
            *([recipe.train.ramp.model_dump()] if recipe.train.ramp else []),
        ],
        _train,
        ("model/model.safetensors", "metrics.jsonl"),
        together=True,
    ),
    Stage(
        "evaluate",
        "measure it beside the baselines, and let it write",
        lambda recipe: [recipe.evaluate.model_dump(), recipe.generate.model_dump()],
        _evaluate,
        ("evaluation.json",),
    ),
    Stage(
        "report",
        "write report.html and the model card",
        lambda recipe: [recipe.name, recipe.description],
        _report,
        ("report.html", "model/README.md"),
    ),
)


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages that a recipe goes through."""
    return tuple(stage for stage in STAGES if (stage.for_rows or recipe.pretrains) and stage.wanted(recipe))

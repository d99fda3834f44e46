"""The train and evaluate stages of labelled tasks: from rows with answers to a fine-tuned, measured model.

What a task is, is the task's; which metrics and baselines its answers get, is evaluate's. Here they meet the run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import nlargest
from typing import TYPE_CHECKING, Any

from formary import durable
from formary.pipeline.context import Context

if TYPE_CHECKING:
    from formary.data.tokenizer import Tokenizer
    from formary.infer.loaded import Model
    from formary.model.config import ModelConfig
    from formary.model.topologies import Network
    from formary.recipe.schema import Recipe, Train
    from formary.tasks.protocol import Batches, LabelledTask, Row
    from formary.train.machine import Runtime

_SCORED_ROWS = 2000  # validation rows that choose the best weights
_WRITTEN_ROWS = 200  # of them where an answer is written token by token
_SHOWN = 5  # predictions in the report
_NO_TEXT = ("label", "tags", "role", "id")  # columns and fields whose strings are not the language of the rows


def train_rows(context: Context, kind: type[LabelledTask]) -> float:
    """Fine-tune the model of `model.start`, or train one from scratch, on the training rows.

    Returns:
        seconds of training before this go, as every train stage.
    """
    from formary.data import tokenizer
    from formary.errors import RecipeError
    from formary.pipeline.learning import learn, merge
    from formary.pipeline.model import generation_defaults, save_model, say_model
    from formary.pipeline.private import private_facts, private_training
    from formary.tasks.protocol import ReferringTask
    from formary.tasks.reading import RowBatches, in_batches
    from formary.train.machine import runtime
    from formary.train.privacy import one_of_each
    from formary.train.settled import settle
    from formary.train.tuning import prepare, trainable_count

    recipe, settled = context.recipe, runtime(context.recipe.machine)
    if kind.answers == "texts":
        from formary.evaluate.texts import library

        library()  # what measures texts is missed before training, not after
    words = tokenizer.load(context.tokenizer)
    rows, validation_rows = context.rows_of("train"), context.rows_of("validation")
    task, network = _task_and_network(context, kind, words, rows)
    prepare(network, recipe.train.tune, seed=recipe.train.seed)
    if hasattr(task, "prepare"):
        task.prepare(network)
    say_model(context, network, settled)
    if recipe.train.tune.method != "full":
        context.console.print(f"  {trainable_count(network):,} of them train ({recipe.train.tune.method})")
    examples = task.examples(rows, targets=True, where="training row")
    validation = task.examples(validation_rows, targets=True, where="validation row")
    for note in task.notes():
        context.console.print(f"  {note}")
    for line in _first_example(task, examples):
        context.console.print(f"  {line}", markup=False, highlight=False)  # its brackets are the data's
    if isinstance(task, ReferringTask):
        task.remember(network.to(settled.device), [*examples, *validation], precision=settled.autocast)
    if not validation:
        context.console.print("  no validation rows: the last weights will count as the best")

    def remade(numbers: Train) -> Batches:
        return RowBatches(task, examples, numbers)

    settings = settle(
        task.loss,
        network,
        settings=recipe.train,
        batches=remade,
        longest=lambda count: task.collate(nlargest(count, examples, key=lambda example: len(example.inputs))),
        cuttable=not getattr(task, "contrasts", False),
        runtime=settled,
        run=context.folder,
        key=context.keys["train"],
        console=context.console,
    )
    batches: Batches = RowBatches(task, examples, settings)
    together = (settings.micro_batch or settings.batch_size) if getattr(task, "contrasts", False) else None
    private = None
    if recipe.privacy:
        if getattr(task, "kind", None) == "regression":
            raise RecipeError(
                "train.objective.kind: a regression takes its scale from the rows, so it cannot be trained privately; "
                "make classes of the numbers, or take the privacy section out"
            )
        draw = one_of_each(examples, len(rows))
        private, batches = private_training(context, network, settings, rows=len(rows), draw=draw, collate=task.collate)
    progress = learn(
        context,
        task.loss,
        network,
        words,
        batches=batches,
        remade=remade,
        validation=(lambda: in_batches(task, validation, batch=together)) if validation else None,
        settings=settings,
        runtime=settled,
        private=private,
        score=_score(task, validation_rows[:_SCORED_ROWS], settled) if recipe.train.best == "metric" else None,
    )
    told = private_facts(private)
    if not context.processes.leads:
        return progress.seconds_before
    merge(context, network)
    if hasattr(task, "finish"):
        task.finish(network)
    generation = generation_defaults(recipe)
    if hasattr(task, "generation"):
        generation = task.generation(generation)
    save_model(context, network, words, progress, generation=generation, settings=task.settings(), told=told)
    return progress.seconds_before


def evaluate_rows(context: Context) -> dict[str, Any]:
    """Measure the finished model on the test rows beside the baselines; also without test rows like training rows."""
    from formary.evaluate.labelled import measured
    from formary.infer.answers import answers
    from formary.infer.loaded import load
    from formary.pipeline.answering import fresh_task
    from formary.pipeline.telling import sample
    from formary.tasks.protocol import LikelihoodTask

    model = load(context.model)
    task = fresh_task(model)
    split = next((name for name in ("test", "validation") if context.rows(name)), None)
    if split is None:
        context.console.print("  no test or validation rows: nothing is measured")
        return {"split": None, "metrics": [], "samples": []}
    if split == "validation":
        context.console.print(
            "  no test rows: measured on validation, which also chose the weights; that flatters the model a little"
        )
    folds = bool(context.recipe.data.split.folds)
    wanted = dict.fromkeys([split, "validation"] if folds else [split])
    rows_of = {name: context.rows_of(name) for name in wanted}
    by_split, notes = _answers(context, model, task, rows_of)
    rows, given = rows_of[split], by_split[split]
    training, settings = context.rows_of("train"), context.recipe.evaluate
    result = measured(task, rows, given, training=training, settings=settings, split=split)
    durable.write_json(context.folder / "predictions.json", given)
    for note in [*notes[split], *result["notes"]]:
        context.console.print(f"  note: {note}")
    if folds:  # what the fold's rows get from the model that has not learned them
        durable.write_json(context.folder / "fold_predictions.json", by_split["validation"])
    shown: Sequence[Row] = rows[:_SHOWN]
    said = given[:_SHOWN]
    if isinstance(task, LikelihoodTask):
        shown = task.showing(shown)
        said = answers(task, model.network, shown)
    result["samples"] = [sample(task, row, answer) for row, answer in zip(shown, said)]
    return result


def _answers(
    context: Context, model: Model, task: LabelledTask, rows_of: Mapping[str, list[dict[str, Any]]]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]]:
    """The answers to the rows of splits, and what the task notes on each; the model of the start is loaded once."""
    from formary.pipeline.answering import answered
    from formary.pipeline.model import loaded_start
    from formary.tasks.protocol import ReferringTask
    from formary.train.machine import runtime

    settled = runtime(context.recipe.machine)
    model.network.to(settled.device)
    referring = task if isinstance(task, ReferringTask) else None
    start = loaded_start(context, model.tokenizer).to(settled.device) if referring else None
    given, notes = {}, {}
    for split, rows in rows_of.items():
        if referring and start:
            examples = task.examples(rows, targets=True, where=f"{split} row")
            referring.remember(start, examples, precision=settled.autocast)
        given[split], notes[split] = answered(
            model, rows, precision=settled.autocast, console=context.console, task=task, targets=False
        )
    return given, notes


def texts_of(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Every text in the rows, however deep, but labels and tags: what a tokenizer is trained on."""
    for row in rows:
        yield from _strings({name: value for name, value in row.items() if name not in _NO_TEXT})


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in _NO_TEXT:
                yield from _strings(inner)
    elif isinstance(value, list):
        if value and all(isinstance(inner, str) for inner in value):
            yield " ".join(value)
        else:
            for inner in value:
                yield from _strings(inner)


def _task_and_network(
    context: Context, kind: type[LabelledTask], words: Tokenizer, rows: list[dict[str, Any]]
) -> tuple[LabelledTask, Network]:
    from formary.model.topologies import build, with_head
    from formary.pipeline.catalogue import catalogue_rows, catalogue_vectors
    from formary.pipeline.model import loaded_start

    def learned(start: ModelConfig | None) -> LabelledTask:
        task = kind.learn(recipe, words, rows, start=start)
        if hasattr(task, "describe") and recipe.data.items is not None:
            task.describe([row["item"] for row in catalogue_rows(context)], catalogue_vectors(context))
        return task

    recipe = context.recipe
    if recipe.model.start is None:
        task = learned(None)
        return task, build(task.model_config(), seed=recipe.train.seed)
    start = loaded_start(context, words)
    task = learned(start.config)
    return task, with_head(start, _switched(task.head(start.config), recipe), seed=recipe.train.seed)


def _switched(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The loaded model's config with what the recipe switches of it."""
    import dataclasses

    stacks = {
        name: dataclasses.replace(stack, dropout=recipe.model.switches["dropout"])
        for name, stack in (("transformer", config.transformer), ("encoder", config.encoder))
        if stack is not None and "dropout" in recipe.model.switches
    }
    return dataclasses.replace(config, **stacks)  # type: ignore[arg-type]


def _score(task: LabelledTask, rows: list[dict[str, Any]], settled: Runtime) -> Callable[[Network], tuple[str, float]]:
    """The task's first metric on the validation rows, turned so that higher is better."""
    from formary.evaluate.labelled import headline
    from formary.infer.answers import measurable
    from formary.tasks.protocol import LikelihoodTask, WritingTask

    if isinstance(task, WritingTask) and not isinstance(task, LikelihoodTask):
        rows = rows[:_WRITTEN_ROWS]

    def score(network: Network) -> tuple[str, float]:
        return headline(task, rows, measurable(task, network, rows, precision=settled.autocast))

    return score


def _first_example(task: LabelledTask, examples: list[Any]) -> list[str]:
    """The first training example as the task shows it, for tasks whose rows are rendered before they are learned."""
    shown = getattr(task, "show", None)
    return list(shown(examples[0])) if shown and examples else []

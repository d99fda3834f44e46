"""The stages of a run, in order, each with what it depends on and what it does.

documents -> tokenizer -> tokens -> train -> evaluate -> report. A stage reads and writes the run folder only; the
work itself is done by the rooms below. Nothing heavy is imported until a stage really runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from formary import durable
from formary.recipe.schema import Recipe

if TYPE_CHECKING:
    from formary.data.shards import TokenShards
    from formary.data.tokenizer import Tokenizer
    from formary.model.topologies import Network

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Context:
    """What a stage is given: the recipe, where its paths count from, the run folder, and where to speak."""

    recipe: Recipe
    called: str  # the recipe as the user named it, for the commands we suggest
    base: Path
    folder: Path
    console: Console
    keys: dict[str, str]  # stage -> hash of everything its result depends on
    times: dict[str, float]  # stage -> seconds it took

    @property
    def documents(self) -> Path:
        return self.folder / "data" / "documents"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "data" / "tokenizer"

    def tokens(self, split: str) -> Path:
        return self.folder / "data" / "tokens" / split

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def rows(self, split: str) -> int:
        """Documents in a split, as the data story counted them."""
        story = json.loads((self.documents / "story.json").read_text(encoding="utf-8"))
        return int(story["splits"][split]["rows"])


@dataclass(frozen=True)
class Stage:
    """One stage: the recipe fields its result depends on (beside the stage before it), and its work."""

    name: str
    says: str
    depends: Callable[[Recipe], Any]
    work: Callable[[Context], None]


def _documents(context: Context) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from formary.data.documents import write_documents

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=context.console, transient=True) as progress:
        bar = progress.add_task("reading", total=None)
        story = write_documents(
            context.recipe.data,
            context.documents,
            base=context.base,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    context.console.print(f"  {story['rows_read']:,} documents read, {story['bytes_read'] / 1e6:,.1f} MB")
    for step in story["steps"]:
        if step["dropped"] or step["changed"]:
            context.console.print(f"  {step['step']}: {step['dropped']:,} dropped, {step['changed']:,} changed")
    across = story["duplicates_across_splits"]
    if across["exact"] or across["near"]:
        context.console.print(
            f"  duplicates across splits: {across['exact']:,} exact, {across['near']:,} near, "
            f"{across['removed']:,} removed from training"
        )
    for split, counts in story["splits"].items():
        context.console.print(f"  {split}: {counts['rows']:,} documents, {counts['bytes'] / 1e6:,.2f} MB")


def _tokenizer(context: Context) -> None:
    from formary.data import tokenizer
    from formary.data.shards import read_texts

    settings = context.recipe.data.tokenizer
    if settings.path:
        made = tokenizer.load(context.base / settings.path)
    else:
        made = tokenizer.train(read_texts(context.documents / "train.jsonl"), settings, task=context.recipe.task)
    with durable.new_folder(context.tokenizer) as folder:
        made.save(folder)
    context.console.print(f"  vocabulary of {made.vocab_size:,}")


def _tokens(context: Context) -> None:
    from formary.data import tokenizer
    from formary.data.shards import write_tokens

    made = tokenizer.load(context.tokenizer)
    for split in SPLITS:
        meta = write_tokens(
            context.documents / f"{split}.jsonl",
            context.tokens(split),
            made,
            words=context.recipe.data.words,
            end_of_document=context.recipe.task == "causal_lm",
        )
        context.console.print(f"  {split}: {meta['tokens']:,} tokens")


def _train(context: Context) -> None:
    import dataclasses
    import shutil

    from formary.hub import checkpoint
    from formary.train.loop import train
    from formary.train.machine import runtime

    recipe, identity = context.recipe, context.keys["train"]
    settled = runtime(recipe.machine)
    tokenizer, task = made_task(context)
    network = starting_network(context, tokenizer)
    from formary.model.topologies import parameter_count

    config = network.config.transformer
    context.console.print(
        f"  {recipe.model.start or recipe.model.preset}: {parameter_count(network):,} parameters, "
        f"{config.layers} x {config.width}, {settled.threads} threads, {settled.precision} on {settled.device}"
    )
    checkpoints = context.folder / "checkpoints"
    progress = train(
        task,
        network,
        training=open_tokens(context, "train"),
        validation=open_tokens(context, "validation") if context.rows("validation") else None,
        settings=recipe.train,
        runtime=settled,
        run=context.folder,
        checkpoints=checkpoints / identity[:12],
        console=context.console,
        sample=sampler(context, tokenizer),
        compiled=recipe.machine.compile,
    )
    with durable.new_folder(context.model) as folder:
        checkpoint.save(
            folder,
            network.to("cpu"),
            generation=generation_defaults(recipe),
            formary={"task": recipe.task, "recipe": identity, "name": recipe.name, **dataclasses.asdict(progress)},
        )
        tokenizer.save(folder)
    for other in checkpoints.iterdir():  # of recipes this run folder held before
        if other.name != identity[:12]:
            shutil.rmtree(other, ignore_errors=True)


def _evaluate(context: Context) -> None:
    from formary.evaluate.language_model import evaluate
    from formary.infer.loaded import load
    from formary.train.machine import runtime

    settled = runtime(context.recipe.machine)
    _, task = made_task(context)
    model = load(context.model)
    split = "test" if context.rows("test") else "validation"
    if not context.rows(split):
        context.console.print("  no test or validation rows: nothing to evaluate on")
        result: dict[str, Any] = {"split": None, "metrics": []}
    else:
        result = evaluate(
            task,
            model.network,
            open_tokens(context, split),
            training=open_tokens(context, "train"),
            settings=context.recipe.evaluate,
            runtime=settled,
            split=split,
        )
    result["samples"] = samples(context, model)
    durable.write_json(context.folder / "evaluation.json", result)
    for metric in result["metrics"]:
        context.console.print(f"  {metric['says']}")


def _report(context: Context) -> None:
    from formary.pipeline.paper import gather
    from formary.pipeline.report import write_model_card, write_report

    report = gather(context)
    durable.write_json(context.folder / "next.json", list(report.next_commands))
    write_report(context.folder / "report.html", report)
    write_model_card(context.model / "README.md", report)


def open_tokens(context: Context, split: str) -> TokenShards:
    """The token shards of a split."""
    from formary.data.shards import TokenShards

    return TokenShards.open(context.tokens(split))


def made_task(context: Context) -> tuple[Tokenizer, Any]:
    """The run's tokenizer and its task."""
    from formary.data import tokenizer
    from formary.tasks.registry import task_class

    made = tokenizer.load(context.tokenizer)
    return made, task_class(context.recipe.task)(context.recipe, made)


def starting_network(context: Context, tokenizer: Tokenizer) -> Network:
    """The network to train: fresh from the recipe's preset, or the weights of `model.start`.

    Raises:
        RecipeError: the weights have another vocabulary than the tokenizer, or a shorter context than asked for.
    """
    from formary.errors import RecipeError
    from formary.hub import checkpoint
    from formary.model.topologies import build

    recipe = context.recipe
    if recipe.model.start is None:
        _, task = made_task(context)
        return build(task.model_config(), seed=recipe.train.seed)
    local = context.base / recipe.model.start
    network = checkpoint.load(local if local.exists() else recipe.model.start).network
    if network.config.vocab_size < tokenizer.vocab_size:
        raise RecipeError(
            f"model.start: {recipe.model.start} knows {network.config.vocab_size} tokens, the tokenizer has "
            f"{tokenizer.vocab_size}; set data.tokenizer.path to {recipe.model.start}"
        )
    if network.config.context < recipe.train.context:
        raise RecipeError(
            f"train.context: {recipe.train.context} is longer than the {network.config.context} that {recipe.model.start} can read"
        )
    return network


def generation_defaults(recipe: Recipe) -> dict[str, Any]:
    """The recipe's generate section as generation_config.json says it."""
    generate = recipe.generate
    values = {
        "do_sample": generate.temperature > 0,
        "temperature": generate.temperature or None,
        "top_k": generate.top_k or 0,
        "top_p": generate.top_p,
        "min_p": generate.min_p,
        "repetition_penalty": generate.repetition_penalty,
        "max_new_tokens": generate.max_tokens,
    }
    return {name: value for name, value in values.items() if value is not None}


def sampler(context: Context, tokenizer: Tokenizer) -> Callable[[Network], str] | None:
    """A function that lets the network in training write from the recipe's first prompt; None for encoders."""
    if context.recipe.task != "causal_lm" or not context.recipe.train.sample_every:
        return None
    from formary.infer.loaded import Model

    prompts = context.recipe.generate.prompts or [""]

    def sample(network: Network) -> str:
        model = Model(network, tokenizer, defaults=generation_defaults(context.recipe))
        training = network.training
        written = model.generate(prompts[0], max_tokens=60, seed=context.recipe.generate.seed)
        network.train(training)
        return prompts[0] + written.text

    return sample


def samples(context: Context, model: Any) -> list[dict[str, Any]]:
    """What the finished model writes from the recipe's prompts, or fills in for masked models."""
    generate = context.recipe.generate
    if context.recipe.task == "causal_lm":
        settings = generate.model_dump(exclude={"prompts"}, exclude_none=True)
        prompts = generate.prompts or [""]
        return [
            {"prompt": prompt, "text": model.generate(prompt, **settings).text, "settings": settings}
            for prompt in prompts
        ]
    if context.recipe.task == "masked_lm":
        return [{"prompt": prompt, "text": _filled(model, prompt), "settings": {}} for prompt in generate.prompts]
    settings = {"max_tokens": generate.max_tokens, "temperature": 0.0}
    return [
        {"prompt": prompt, "text": model.generate(prompt, **settings).text, "settings": settings}
        for prompt in generate.prompts
    ]


def _filled(model: Any, prompt: str) -> str:
    candidates = model.fill(prompt)
    first = candidates[0] if candidates and isinstance(candidates[0], list) else candidates
    return ", ".join(f"{candidate.text} ({candidate.probability:.0%})" for candidate in first[:5])


STAGES: tuple[Stage, ...] = (
    Stage(
        "documents",
        "read, clean and split the data",
        lambda recipe: recipe.data.model_dump(exclude={"tokenizer", "words"}),
        _documents,
    ),
    Stage(
        "tokenizer",
        "train or load the tokenizer",
        lambda recipe: [recipe.data.tokenizer.model_dump(), recipe.task],
        _tokenizer,
    ),
    Stage("tokens", "encode the documents into token shards", lambda recipe: recipe.data.words, _tokens),
    Stage(
        "train",
        "train the model",
        lambda recipe: [
            recipe.task,
            recipe.model.model_dump(),
            recipe.train.model_dump(exclude={"keep", "save_every", "sample_every"}),
            recipe.machine.model_dump(exclude={"threads"}),
            recipe.generate.model_dump(exclude={"prompts", "seed"}),
        ],
        _train,
    ),
    Stage(
        "evaluate",
        "measure it beside the baselines, and let it write",
        lambda recipe: [recipe.evaluate.model_dump(), recipe.generate.model_dump()],
        _evaluate,
    ),
    Stage("report", "write report.html and the model card", lambda recipe: [recipe.name, recipe.description], _report),
)

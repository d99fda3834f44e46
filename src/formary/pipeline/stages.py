"""The stages of a run, in order, each with what it depends on and what it does.

documents -> tokenizer -> tokens -> train -> evaluate -> report. A stage reads and writes the run folder only; the
work itself is done by the rooms below. Nothing heavy is imported until a stage really runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formary import durable
from formary.pipeline.context import SPLITS, Context, open_tokens
from formary.recipe.schema import Recipe, Train

if TYPE_CHECKING:
    from pathlib import Path

    from formary.data.tokenizer import Tokenizer
    from formary.model.topologies import Network
    from formary.tasks.protocol import PretrainingTask
    from formary.train.loop import Progress
    from formary.train.machine import Runtime


@dataclass(frozen=True)
class Stage:
    """One stage: the recipe fields its result depends on (beside the stage before it), its work, what that leaves."""

    name: str
    says: str
    depends: Callable[[Recipe], Any]
    work: Callable[[Context], float | None]  # the seconds that earlier, interrupted goes had put into it
    leaves: tuple[str, ...]  # in the run folder; when one of them is gone the stage is done again
    for_rows: bool = True  # whether labelled tasks have it


def _documents(context: Context) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from formary.data.documents import write_documents
    from formary.data.records import RowForm
    from formary.tasks.registry import labelled_task

    task = labelled_task(context.recipe.task)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = context.console
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading", total=None)
        story = write_documents(
            context.recipe.data,
            context.documents,
            base=context.base,
            form=task.form if task else RowForm(),
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
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
        console.print(f"  {split}: {_documents_of(counts['rows'])}, {_size(counts['bytes'])}")
    for warning in story["warnings"]:
        console.print(f"  note: {warning}")


def _documents_of(count: int) -> str:
    return f"{count:,} document" if count == 1 else f"{count:,} documents"


def _size(count: float) -> str:
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_:
            return f"{count / bytes_:,.1f} {unit}"
    return f"{count:.0f} bytes"


def _tokenizer(context: Context) -> None:
    from formary.data import tokenizer
    from formary.data.shards import read_texts
    from formary.pipeline.labelled import texts_of
    from formary.tasks.registry import labelled_task

    recipe, settings = context.recipe, context.recipe.data.tokenizer
    path = settings.path or recipe.model.start
    if path:
        made = tokenizer_of(context, path)
    else:
        task = labelled_task(recipe.task)
        if task:
            texts = texts_of(context.rows_of("train"))
            made = tokenizer.train(texts, settings, task=task.special_tokens(recipe))
        else:
            made = tokenizer.train(read_texts(context.documents / "train.jsonl"), settings, task=recipe.task)
    with durable.new_folder(context.tokenizer) as folder:
        made.save(folder)
    source = f"loaded from {path}" if path else settings.kind
    context.console.print(f"  {source}, {made.vocab_size:,} tokens in the vocabulary")


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


def _train(context: Context) -> float:
    from formary.tasks.registry import labelled_task

    if task := labelled_task(context.recipe.task):
        from formary.pipeline.labelled import train_rows

        return train_rows(context, task)
    return _pretrain(context)


def _pretrain(context: Context) -> float:
    from formary.errors import RecipeError
    from formary.train.loop import TokenBytes, train
    from formary.train.machine import runtime
    from formary.train.settled import settle

    recipe = context.recipe
    if recipe.train.tune.method != "full":
        raise RecipeError("train.tune.method: pretraining trains all weights; other ways are for tasks on rows")
    settled = runtime(recipe.machine)
    tokenizer, task = made_task(context)
    network = starting_network(context, task, tokenizer)
    check_prompts(context.recipe, tokenizer, network)
    say_model(context, network, settled)
    validation = open_tokens(context, "validation")
    if validation.tokens < 2:
        context.console.print("  no validation text: the last weights will count as the best")
    training = open_tokens(context, "train")
    settings = settle(
        task.loss,
        network,
        settings=recipe.train,
        batches=lambda numbers: _with(recipe, numbers, tokenizer).training_batches(training),
        runtime=settled,
        run=context.folder,
        key=context.keys["train"],
        console=context.console,
    )
    task = _with(recipe, settings, tokenizer)
    progress = train(
        task.loss,
        network,
        batches=task.training_batches(training),
        validation=(lambda: task.validation_batches(validation, max_tokens=recipe.train.validation_tokens))
        if validation.tokens > 1
        else None,
        settings=settings,
        runtime=settled,
        run=context.folder,
        checkpoints=checkpoint_folder(context),
        console=context.console,
        token_bytes=TokenBytes(training.bytes_per_token, validation.bytes_per_token) if task.covers_text else None,
        sample=sampler(context, tokenizer),
        compiled=recipe.machine.compile,
        watch=context.watch,
    )
    save_model(context, network, tokenizer, progress, generation=generation_defaults(recipe))
    return progress.seconds_before


def say_model(context: Context, network: Network, settled: Runtime) -> None:
    """Tell the user what is about to be trained, and on what."""
    from formary.model.topologies import parameter_count

    model, config = context.recipe.model, network.config.transformer
    threads = f"{settled.threads} {'thread' if settled.threads == 1 else 'threads'}"
    context.console.print(
        f"  {model.start or model.preset}: {parameter_count(network):,} parameters, {config.layers} x {config.width}, "
        f"{threads}, {settled.precision} on {settled.device}"
    )


def checkpoint_folder(context: Context) -> Path:
    """Where this training keeps its checkpoints; those of another recipe in this run folder are deleted."""
    import shutil

    checkpoints, mine = context.folder / "checkpoints", context.keys["train"][:12]
    if checkpoints.is_dir():
        for other in checkpoints.iterdir():  # metrics.jsonl can follow only one
            if other.name != mine:
                shutil.rmtree(other, ignore_errors=True)
    return checkpoints / mine


def save_model(
    context: Context,
    network: Network,
    tokenizer: Tokenizer,
    progress: Progress,
    *,
    generation: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write the finished model's folder; `settings` is what its task needs to know later."""
    import math

    from formary.hub import checkpoint
    from formary.model.topologies import parameter_count

    recipe = context.recipe
    facts: dict[str, Any] = {"task": recipe.task, "recipe": context.keys["train"], "name": recipe.name}
    stack, names = network.config.transformer, frozenset(name for name, _ in network.named_parameters())
    facts["settings"] = settings or {}
    facts["model"] = {
        "family": checkpoint.representing(network.config, names).name,
        "parameters": parameter_count(network),
        "layers": stack.layers,
        "width": stack.width,
        "heads": stack.heads,
        "context": stack.context,
        "vocab_size": network.config.vocab_size,
    }
    facts |= {"step": progress.step, "best_step": progress.best_step or progress.step, "tokens": progress.tokens}
    facts |= {"best_loss": progress.best_loss} if math.isfinite(progress.best_loss) else {}
    with durable.new_folder(context.model) as folder:
        checkpoint.save(folder, network.to("cpu"), generation=generation, formary=facts)
        tokenizer.save(folder)


def _evaluate(context: Context) -> None:
    from formary.tasks.registry import labelled_task

    if task := labelled_task(context.recipe.task):
        from formary.pipeline.labelled import evaluate_rows

        result = evaluate_rows(context, task)
    else:
        result = _evaluate_language_model(context)
    durable.write_json(context.folder / "evaluation.json", result)
    for sentence in findings(result["metrics"]):
        context.console.print(f"  {sentence}")


def _evaluate_language_model(context: Context) -> dict[str, Any]:
    from formary.evaluate.language_model import evaluate
    from formary.infer.loaded import load
    from formary.train.machine import runtime

    settled = runtime(context.recipe.machine)
    tokenizer, task = made_task(context)
    _put_generation_defaults(context)
    model = load(context.model)
    check_prompts(context.recipe, tokenizer, model.network)
    split = next((name for name in ("test", "validation") if open_tokens(context, name).tokens > 1), None)
    if split is None:
        context.console.print("  no test or validation text: nothing is measured")
        result: dict[str, Any] = {"split": None, "metrics": []}
    else:
        if split == "validation":
            context.console.print(
                "  no test text: measured on validation, which also chose the weights; that flatters the model a little"
            )
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
    return result


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
    return [f"measured on: {metrics[0]['protocol']}", *(str(metric["says"]) for metric in metrics)]


def made_task(context: Context) -> tuple[Tokenizer, PretrainingTask]:
    """The run's tokenizer and its pretraining task."""
    from formary.data import tokenizer
    from formary.train.settled import recorded

    made, recipe = tokenizer.load(context.tokenizer), context.recipe
    return made, _with(recipe, recorded(recipe.train, context.folder, context.keys["train"]), made)


def _with(recipe: Recipe, settings: Train, tokenizer: Tokenizer) -> PretrainingTask:
    """The recipe's pretraining task with these settings of training."""
    from formary.tasks.registry import pretraining_task

    return pretraining_task(recipe.task)(recipe.model_copy(update={"train": settings}), tokenizer)


def tokenizer_of(context: Context, reference: str) -> Tokenizer:
    """The tokenizer at a path, or of a model: a folder, a GGUF file, or a hub id."""
    from formary.data import tokenizer
    from formary.infer.loaded import load

    path = context.located(reference)
    if path is not None and path.suffix != ".gguf":
        return tokenizer.load(path)
    return load(path or reference).tokenizer


def starting_network(context: Context, task: PretrainingTask, tokenizer: Tokenizer) -> Network:
    """The network to train: fresh from the recipe's preset, or the weights of `model.start`.

    Raises:
        RecipeError: the weights belong to another kind of model, have another vocabulary than the tokenizer, or a
            shorter context than asked for.
    """
    from formary.errors import RecipeError
    from formary.model.topologies import build

    recipe, wanted = context.recipe, task.model_config()
    if recipe.model.start is None:
        return build(wanted, seed=recipe.train.seed)
    network = loaded_start(context, tokenizer)
    if network.config.topology != wanted.topology:
        raise RecipeError(
            f"model.start: {recipe.model.start} is an {network.config.topology} and task {recipe.task} trains an "
            f"{wanted.topology}".replace("an decoder", "a decoder")
        )
    return network


def loaded_start(context: Context, tokenizer: Tokenizer) -> Network:
    """The network of `model.start`.

    Raises:
        RecipeError: it has another vocabulary than the tokenizer, or a shorter context than asked for.
    """
    from formary.errors import RecipeError
    from formary.infer.loaded import load

    recipe = context.recipe
    assert recipe.model.start is not None
    start = load(context.located(recipe.model.start) or recipe.model.start)
    if not tokenizer.vocab.items() <= start.tokenizer.vocab.items():
        raise RecipeError(
            f"model.start: {recipe.model.start} has another vocabulary than the run's tokenizer, its weights would "
            "mean nothing; leave out data.tokenizer.path, so that the model's own is taken"
        )
    if start.config.context < recipe.train.context:
        raise RecipeError(
            f"train.context: {recipe.train.context} is longer than the {start.config.context} that {recipe.model.start} can read"
        )
    return start.network


def check_prompts(recipe: Recipe, tokenizer: Tokenizer, network: Network) -> None:
    """See before an hour of training, not after, that the model can take the recipe's prompts.

    Raises:
        RecipeError: a prompt is longer than the context, or has no mask to fill.
    """
    from formary.errors import RecipeError

    config = network.config
    longest = (config.encoder or config).context
    mask = tokenizer.backend.id_to_token(tokenizer.mask_id) if tokenizer.mask_id is not None else None
    for prompt in recipe.generate.prompts:
        count = len(tokenizer.backend.encode(prompt).ids)
        if count > longest:
            raise RecipeError(
                f"generate.prompts: {prompt[:60]!r} has {count} tokens and the context is {longest}; "
                "shorten it, or raise train.context"
            )
        if recipe.task == "masked_lm" and not any(name and name in prompt for name in ("[MASK]", mask)):
            raise RecipeError(f"generate.prompts: {prompt[:60]!r} has no [MASK] for the model to fill in")


def _put_generation_defaults(context: Context) -> None:
    """Give the model the recipe's present `generate` section as its defaults: that needs no new training."""
    path = context.model / "generation_config.json"
    if not path.exists():  # an encoder
        return
    held = json.loads(path.read_text(encoding="utf-8"))
    ids = {name: value for name, value in held.items() if name.endswith("_token_id")}
    wanted = {**ids, **generation_defaults(context.recipe)}
    if wanted != held:
        durable.write_json(path, wanted)


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
        lambda recipe: recipe.data.model_dump(
            exclude={"tokenizer": True, "words": True, "split": set() if recipe.data.split.folds else {"folds", "fold"}}
        ),
        _documents,
        ("data/documents/story.json", *(f"data/documents/{split}.jsonl" for split in SPLITS)),
    ),
    Stage(
        "tokenizer",
        "train or load the tokenizer",
        lambda recipe: [recipe.data.tokenizer.model_dump(), recipe.task, recipe.model.preset, recipe.model.start],
        _tokenizer,
        ("data/tokenizer/tokenizer.json",),
    ),
    Stage(
        "tokens",
        "encode the documents into token shards",
        lambda recipe: recipe.data.words,
        _tokens,
        tuple(f"data/tokens/{split}/meta.json" for split in SPLITS),
        for_rows=False,
    ),
    Stage(
        "train",
        "train the model",
        lambda recipe: [
            recipe.task,
            recipe.model.model_dump(),
            recipe.train.model_dump(exclude={"keep", "save_every", "sample_every"}),
            recipe.machine.model_dump(exclude={"threads"}),
        ],
        _train,
        ("model/model.safetensors", "metrics.jsonl"),
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
    return tuple(stage for stage in STAGES if stage.for_rows or recipe.pretrains)

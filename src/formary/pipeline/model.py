"""The model of a run: where it starts from, what is said of it, where it is saved.

What the train stages of pretraining and of labelled tasks share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from formary import durable
from formary.pipeline.context import Context
from formary.recipe.schema import Recipe

if TYPE_CHECKING:
    from formary.data.tokenizer import Tokenizer
    from formary.model.topologies import Network
    from formary.train.machine import Runtime
    from formary.train.state import Progress


def loaded_start(context: Context, tokenizer: Tokenizer) -> Network:
    """The network of `model.start`, joined with that of `model.start_text` where there is one.

    Raises:
        RecipeError: it has another vocabulary than the tokenizer, or a shorter context than asked for.
    """
    from formary.errors import RecipeError
    from formary.infer.loaded import load
    from formary.tasks.models import joined
    from formary.tasks.registry import labelled_task

    recipe = context.recipe
    assert recipe.model.start is not None and recipe.model.words is not None
    start = load(context.located(recipe.model.start) or recipe.model.start)
    words = start
    if recipe.model.start_text is not None:
        words = load(context.located(recipe.model.start_text) or recipe.model.start_text)
    if not tokenizer.vocab.items() <= words.tokenizer.vocab.items():
        raise RecipeError(
            f"model.start: {recipe.model.words} has another vocabulary than the run's tokenizer, its weights would "
            "mean nothing; leave out data.tokenizer.path, so that the model's own is taken"
        )
    if start.config.reads_text and start.config.context < recipe.train.context:
        raise RecipeError(
            f"train.context: {recipe.train.context} is longer than the {start.config.context} that {recipe.model.start} can read"
        )
    if words is start:
        return start.network
    task: Any = labelled_task(recipe.task)  # one whose models are joined has one topology, as `fitting` checks
    return joined(start.network, words.network, task.topologies[0], seed=recipe.train.seed)


def tokenizer_of(context: Context, reference: str) -> Tokenizer:
    """The tokenizer at a path, or of a model: a folder, a GGUF file, or a hub id."""
    from formary.data import tokenizer
    from formary.infer.loaded import load

    path = context.located(reference)
    if path is not None and path.suffix != ".gguf":
        return tokenizer.load(path)
    return load(path or reference).tokenizer


def say_model(context: Context, network: Network, settled: Runtime) -> None:
    """Tell the user what is about to be trained, and on what."""
    from formary.model.topologies import parameter_count
    from formary.train.parallel import kind_for

    model, config = context.recipe.model, network.config.transformer
    threads = f"{settled.threads} {'thread' if settled.threads == 1 else 'threads'}"
    if settled.processes.count > 1:
        threads = f"{settled.processes.count} processes ({kind_for(settled.parallel, network, settled)}) of {threads}"
    context.console.print(
        f"  {model.named}: {parameter_count(network):,} parameters, {config.layers} x {config.width}, "
        f"{threads}, {settled.precision} on {settled.device}"
    )


def describer(tokenizer: Tokenizer) -> Callable[[Mapping[str, Any]], list[str]]:
    """A function that gives the text of every sequence of a batch, for what is told of skipped steps; none of what is no text."""

    def describe(batch: Mapping[str, Any]) -> list[str]:
        if "tokens" not in batch:
            return []
        rows = batch["tokens"].reshape(len(batch["tokens"]), -1)  # several texts of one row come one after another
        return [tokenizer.decode(row.tolist()) for row in rows]

    return describe


def save_model(
    context: Context,
    network: Network,
    tokenizer: Tokenizer,
    progress: Progress,
    *,
    generation: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    told: Mapping[str, Any] | None = None,
) -> None:
    """Write the finished model's folder; `settings` is what its task needs to know later, `told` what else formary.json
    is to say of the training."""
    import math

    from formary.hub import checkpoint
    from formary.model.topologies import parameter_count
    from formary.pipeline.catalogue import ITEMS

    recipe = context.recipe
    facts: dict[str, Any] = {"task": recipe.task, "recipe": context.keys["train"], "name": recipe.name}
    stack, names = network.config.transformer, frozenset(name for name, _ in network.named_parameters())
    facts |= {"settings": settings or {}, **(told or {})}
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
        if tokenizer.vocab_size:
            tokenizer.save(folder)
        if recipe.data.items is not None:  # what stands for the items that a model recommends
            durable.write_text(folder / ITEMS, (context.catalogue / ITEMS).read_text(encoding="utf-8"))


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

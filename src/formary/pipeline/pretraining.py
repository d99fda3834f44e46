"""The train and evaluate stages of pretraining: from token shards to a measured model that writes.

What is learned from running text is the task's; how its loss is measured, is evaluate's. Here they meet the run folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from formary import durable
from formary.pipeline.context import Context, open_tokens
from formary.pipeline.model import (
    generation_defaults,
    loaded_start,
    save_model,
    say_model,
)
from formary.recipe.schema import Recipe, Train

if TYPE_CHECKING:
    from formary.data.tokenizer import Tokenizer
    from formary.model.topologies import Network
    from formary.tasks.protocol import Batches, PretrainingTask


def train_text(context: Context) -> float:
    """Pretrain a model on the run's tokens.

    Returns:
        seconds of training before this go, as every train stage.
    """
    from formary.errors import RecipeError
    from formary.pipeline.learning import learn, merge
    from formary.pipeline.private import private_facts, private_training
    from formary.tasks.causal_lm import CausalLM
    from formary.train.loop import TokenBytes
    from formary.train.machine import runtime
    from formary.train.settled import settle
    from formary.train.tuning import prepare, trainable_count

    recipe = context.recipe
    if recipe.train.tune.method != "full" and recipe.model.start is None:
        raise RecipeError(
            "train.tune.method: pretraining from scratch trains all weights; other ways are for models that were trained "
            "before (model.start)"
        )
    settled = runtime(recipe.machine)
    tokenizer, task = made_task(context)
    network = starting_network(context, task, tokenizer)
    check_prompts(context.recipe, tokenizer, network)
    prepare(network, recipe.train.tune, seed=recipe.train.seed)
    say_model(context, network, settled)
    if recipe.train.tune.method != "full":
        context.console.print(f"  {trainable_count(network):,} of them train ({recipe.train.tune.method})")
    validation = open_tokens(context, "validation")
    if validation.tokens < 2:
        context.console.print("  no validation text: the last weights will count as the best")
    training = open_tokens(context, "train")

    def remade(numbers: Train) -> Batches:
        return _with(recipe, numbers, tokenizer).training_batches(training)

    settings = settle(
        task.loss,
        network,
        settings=recipe.train,
        batches=remade,
        runtime=settled,
        run=context.folder,
        key=context.keys["train"],
        console=context.console,
    )
    task = _with(recipe, settings, tokenizer)
    batches: Batches = task.training_batches(training)
    private = None
    if recipe.privacy:
        assert isinstance(task, CausalLM)
        private, batches = private_training(
            context,
            network,
            settings,
            rows=training.documents,
            draw=task.document_draws(training),
            collate=task.collate_documents,
        )
    progress = learn(
        context,
        task.loss,
        network,
        tokenizer,
        batches=batches,
        remade=remade,
        validation=(lambda: task.validation_batches(validation, max_tokens=recipe.train.validation_tokens))
        if validation.tokens > 1
        else None,
        settings=settings,
        runtime=settled,
        private=private,
        token_bytes=TokenBytes(training.bytes_per_token, validation.bytes_per_token) if task.covers_text else None,
        sample=sampler(context, tokenizer),
    )
    told = private_facts(private)
    if not context.processes.leads:
        return progress.seconds_before
    merge(context, network)
    save_model(context, network, tokenizer, progress, generation=generation_defaults(recipe), told=told)
    return progress.seconds_before


def evaluate_text(context: Context) -> dict[str, Any]:
    """Measure the finished model on the test text beside the baselines, and let it write."""
    from formary.evaluate.language_model import evaluate
    from formary.infer.loaded import load
    from formary.pipeline.progress import bar
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
        with bar(context.console, "reading") as progress:
            result = evaluate(
                task,
                model.network,
                open_tokens(context, split),
                training=open_tokens(context, "train"),
                settings=context.recipe.evaluate,
                runtime=settled,
                split=split,
                progress=progress,
            )
    result["samples"] = samples(context, model)
    return result


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

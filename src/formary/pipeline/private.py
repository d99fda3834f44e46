"""The private training of a run: which rows it draws from, and what is told of it before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from formary.pipeline.context import Context

if TYPE_CHECKING:
    from formary.model.topologies import Network
    from formary.recipe.schema import Train
    from formary.tasks.protocol import Batch, Example
    from formary.train.privacy import Draw, PoissonBatches, PrivateTraining


def private_training(
    context: Context,
    network: Network,
    settings: Train,
    *,
    rows: int,
    draw: Draw,
    collate: Callable[[Sequence[Example]], Batch],
) -> tuple[PrivateTraining, PoissonBatches]:
    """The gradients of a private training, attached to the network, and its batches.

    Raises:
        DataError: too few rows.
    """
    from formary.tasks.protocol import total_steps
    from formary.train.privacy import PrivateTraining

    assert context.recipe.privacy is not None
    private = PrivateTraining(context.recipe.privacy, rows=rows, expected=settings.batch_size)
    batches = private.batches(draw, collate)
    private.plan(total_steps(settings, batches))
    private.attach(network, micro_batch=settings.micro_batch)
    context.console.print(f"  {private.says()}", highlight=False)
    return private, batches


def private_facts(private: PrivateTraining | None) -> dict[str, Any]:
    """For formary.json; the layers are not watched any more."""
    if private is None:
        return {}
    private.detach()
    return {"privacy": private.facts()}


def statement(facts: dict[str, Any]) -> list[str]:
    """What a private training promises, and what not, as sentences."""
    spent, delta = f"{facts['epsilon']:.2f}", f"{facts['delta']:g}"
    sentences = [
        f"Trained with differential privacy: epsilon {spent} at delta {delta} for each of {facts['rows']:,} training rows "
        f"(DP-SGD: rows drawn with chance {facts['sample_rate']:.4g} in each of {facts['steps']:,} steps, gradients "
        f"clipped to {facts['clip']:g}, noise multiplier {facts['noise_multiplier']:.4g}; counted by Opacus "
        f"{facts['opacus']}, accountant {facts['accountant']}).",
        "It bounds what the weights tell of any one row, not of a person who wrote several; the number of rows, the names of "
        "labels and the recipe count as known.",
        "It does not cover validation and test rows, which chose the weights and measured them, nor metrics.jsonl, the "
        "report and its baselines, which show rows and what was measured on them.",
        "It counts this training alone: settings that were tried on the same rows before cost privacy of their own.",
    ]
    if facts["seeded"]:
        sentences.append("The seed of its noise is in the recipe: for who knows it, there is no privacy.")
    return sentences

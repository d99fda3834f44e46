"""From what a train stage has made ready to a trained network: what every kind of task gives to the loop, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from formary.pipeline.context import Context

if TYPE_CHECKING:
    from formary.data.tokenizer import Tokenizer
    from formary.model.topologies import Network
    from formary.recipe.schema import Train
    from formary.tasks.protocol import Batch, Batches
    from formary.train.loop import TokenBytes
    from formary.train.machine import Runtime
    from formary.train.parallel import Loss
    from formary.train.privacy import PrivateTraining
    from formary.train.state import Progress


def learn(
    context: Context,
    loss_of: Loss,
    network: Network,
    tokenizer: Tokenizer,
    *,
    batches: Batches,
    remade: Callable[[Train], Batches],
    validation: Callable[[], Iterable[Batch]] | None,
    settings: Train,
    runtime: Runtime,
    private: PrivateTraining | None,
    token_bytes: TokenBytes | None = None,
    score: Callable[[Network], tuple[str, float]] | None = None,
    sample: Callable[[Network], str] | None = None,
) -> Progress:
    """Train `network` in the run folder as the recipe says; arguments and errors are those of `train.loop.train`.

    Args:
        remade: the batches as other settings make them, for a `context.trainer` that tries some.
    """
    from formary.pipeline.model import describer
    from formary.pipeline.resuming import checkpoint_folder
    from formary.pipeline.seeing import seeing
    from formary.recipe.schema import unit_of
    from formary.train.loop import train

    recipe = context.recipe
    with seeing(context) as seen:
        return (context.trainer or train)(
            loss_of,
            network,
            batches=batches,
            validation=validation,
            settings=settings,
            runtime=runtime,
            run=context.folder,
            checkpoints=checkpoint_folder(context),
            console=context.console,
            token_bytes=token_bytes,
            score=score,
            sample=sample,
            describe=describer(tokenizer),
            spikes=None if private else recipe.spikes,
            compiled=recipe.machine.compile,
            watch=context.watch,
            private=private,
            seeing=seen,
            unit=unit_of(recipe.task),
            **({"remade": remade} if context.trainer else {}),
        )


def merge(context: Context, network: Any) -> None:
    """Save an adapter that was trained, and make a plain network of what was tuned."""
    from formary.train.lora import save_adapter
    from formary.train.tuning import finish

    tune = context.recipe.train.tune
    if tune.method == "lora":
        save_adapter(context.folder / "adapter", network, tune, base=str(context.recipe.model.start))
    finish(network)

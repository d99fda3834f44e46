"""Running out of memory: noticed as such, and told with the batch it happened on and the numbers that fit."""

from __future__ import annotations

from collections.abc import Callable

import torch

from formary.errors import FormaryError
from formary.recipe.schema import Train
from formary.tasks.protocol import Batch, read_of, size_of


class OutOfMemory(FormaryError):
    """A batch did not fit: the message names its shape, and what fits."""


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def explained(step: int, batch: Batch, settings: Train, attempt: Callable[[int], object]) -> OutOfMemory:
    """What to tell of a batch that did not fit.

    Args:
        attempt: a pass over the batch in pieces of so many sequences; ever smaller ones are tried until one fits.
    """
    sequences = len(read_of(batch))
    tokens = size_of(batch) // sequences
    piece = settings.micro_batch or sequences
    said = f"step {step}: memory ran out on {sequences} sequences of {tokens} tokens"
    said += f" in pieces of {piece}" if piece < sequences else ""
    while piece > 1:
        piece //= 2
        try:
            attempt(piece)
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            continue
        return OutOfMemory(
            f"{said}; {piece} at a time fit: --set train.micro_batch={piece} learns the same in smaller pieces and goes "
            f"on from the last checkpoint, or lower train.batch (now {settings.batch}) to {piece}"
        )
    return OutOfMemory(
        f"{said}; not even one sequence fits: lower train.context (now {settings.context}) to {max(2, tokens // 2)}, or "
        "take a smaller model.size"
    )

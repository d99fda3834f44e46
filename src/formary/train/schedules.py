"""How the learning rate moves over a run, as a factor of its peak.

Every schedule warms up linearly, then follows its own curve down to the `final` share at the last step.
"""

from __future__ import annotations

import math

from formary.recipe.schema import Schedule


def warmup_steps(schedule: Schedule, total: int) -> int:
    """`warmup` below 1 is a share of the run, from 1 on a number of steps."""
    steps = schedule.warmup * total if schedule.warmup < 1 else schedule.warmup
    return min(int(steps), total)


def lr_factor(schedule: Schedule, step: int, total: int) -> float:
    """The factor on the peak learning rate for optimiser step `step` of `total`, counted from 0.

    wsd: constant until the last `decay` share of the run, then linear to `final` (Hu et al. 2024, section 4).
    cosine: Loshchilov and Hutter 2017, eq. 5, one period.
    """
    warmup = warmup_steps(schedule, total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    progress = min(progress, 1.0)
    final = schedule.final
    match schedule.name:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - final) * progress
        case "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        case "exponential":
            return float(max(final, 1e-4) ** progress)
        case "wsd":
            begins = 1 - schedule.decay
            return 1.0 if progress <= begins else final + (1 - final) * (1 - progress) / schedule.decay

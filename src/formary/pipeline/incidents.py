"""What the report tells of skipped steps and roll-backs: why, on which text, and the gradient norm of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

_SHOWN = 10


def post_mortem(incidents: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The lines of incidents.jsonl as the page shows them; None where nothing went wrong."""
    if not incidents:
        return None
    backs = [one for one in incidents if one["why"] == "rolled back"]
    skipped = [one for one in incidents if one["why"] != "rolled back"]
    heading = f"{len(skipped):,} {'step was' if len(skipped) == 1 else 'steps were'} skipped"
    if backs:
        heading += f", and training went back {'once' if len(backs) == 1 else f'{len(backs)} times'}"
    return {
        "heading": heading,
        "backs": [
            f"After step {skip['step']:,} it went back to step {back['step']:,}, and went on with {back['lr_factor']:g} "
            "of the learning rate."
            for skip, back in pairwise(incidents)
            if back["why"] == "rolled back"
        ],
        "shown": [_shown(one) for one in skipped[:_SHOWN]],
        "more": max(0, len(skipped) - _SHOWN),
    }


def _shown(one: Mapping[str, Any]) -> dict[str, Any]:
    layers = [(name, "not finite" if norm is None else f"{norm:.3g}") for name, norm in one.get("layers", {}).items()]
    worst = [
        ("not finite" if text["loss"] is None else f"{text['loss']:.3g}", text["text"], text["sequence"] + 1)
        for text in one.get("worst", [])
    ]
    shape = " sequences of ".join(f"{size:,}" for size in one.get("shape", [])[:2])
    return {"step": one["step"], "why": one["why"], "shape": shape, "layers": layers, "worst": worst}

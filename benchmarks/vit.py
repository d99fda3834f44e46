"""Training speed of a ViT beside transformers' ViTForImageClassification in the same plain loop: images per second.

    python benchmarks/vit.py [--rounds 7] [--threads 2] [--only NAME]

The same pictures, labels, optimiser (torch's fused AdamW) and number of weights on both sides, taken in turn: one step is a
forward pass, the cross-entropy, the backward pass and the update. No dropout. Pictures are noise: what they show has no
influence on the time. Before the timing both get the same weights, and their logits are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peers import in_turn, machine, median_ratio

from formary.data.tokenizer import wordless
from formary.hub import checkpoint
from formary.model.topologies import build, parameter_count
from formary.recipe.presets import preset
from formary.tasks.models import with_label_head

CLOSE = 1e-4  # the most that logits in float32 may differ


class Size(NamedTuple):
    """A model and a batch of pictures."""

    side: int
    patch: int
    channels: int
    layers: int
    width: int
    heads: int
    ffn_width: int
    batch: int
    labels: int


SIZES = {
    "fashion-vit, 28 x 28, 6 x 64, batch 128": Size(28, 4, 1, 6, 64, 2, 128, 128, 10),
    "vit-mini, 32 x 32, 6 x 96, batch 128": Size(32, 4, 3, 6, 96, 3, 192, 128, 10),
    "ViT-S/16, 224 x 224, 12 x 384, batch 8": Size(224, 16, 3, 12, 384, 6, 1536, 8, 1000),
}


def compare(name: str, size: Size, rounds: int, dtype: torch.dtype) -> None:
    """Print one row per contestant."""
    from transformers import ViTForImageClassification

    switches = {
        "image_size": size.side, "patch_size": size.patch, "channels": size.channels, "heads": size.heads,
        "ffn_width": size.ffn_width, "dropout": 0.0,
    }  # fmt: skip
    positions = (size.side // size.patch) ** 2 + 1
    asked = f"{size.layers}x{size.width}"
    plain = preset("vit-mini", vocab_size=1, context=positions, size=asked, switches=switches)
    labels = [str(number) for number in range(size.labels)]
    config = with_label_head(plain, wordless(), "classify_image", head="classify", labels=labels)
    config = dataclasses.replace(config, vocab_size=0, pad_id=None)
    ours = build(config, seed=0).train()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), ours)
        theirs = ViTForImageClassification.from_pretrained(folder).train()
    assert parameter_count(ours) == sum(parameter.numel() for parameter in theirs.parameters())
    pixels = torch.randn(size.batch, size.channels, size.side, size.side)
    targets = torch.randint(0, size.labels, (size.batch,))
    optimisers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for model in (ours, theirs)]
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)

    def our_logits() -> torch.Tensor:
        hidden = ours(pixels, first_only=ours.reads_first)
        logits: torch.Tensor = ours.head(ours.summary(hidden))
        return logits

    def step(number: int) -> None:
        with autocast:
            logits = our_logits() if number == 0 else theirs(pixel_values=pixels).logits
            loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        optimisers[number].step()
        optimisers[number].zero_grad()

    with torch.no_grad():
        apart = (our_logits() - theirs(pixel_values=pixels).logits).abs().max().item()
    assert apart < CLOSE, f"the two models differ by {apart}"
    seconds = in_turn({"formary": lambda: step(0), "transformers": lambda: step(1)}, rounds)
    for contestant in seconds:
        rate = size.batch / statistics.median(seconds[contestant])
        ratio = median_ratio(seconds["transformers"], seconds[contestant])
        print(f"| {name} | {str(dtype).removeprefix('torch.')} | {contestant} | {rate:,.0f} | {ratio} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="a part of a model's name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    print(machine())
    print("| model and batch | precision | library | images/s | times transformers |")
    print("|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for name, size in SIZES.items():
            if arguments.only is None or arguments.only in name:
                compare(name, size, arguments.rounds, dtype)


if __name__ == "__main__":
    main()

"""Training speed beside transformers' GPT2LMHeadModel in the same plain loop: tokens per second, and use of the machine.

    python benchmarks/train.py [--rounds 7] [--threads 2]

The same batch, optimiser (torch's fused AdamW) and number of weights on both sides, taken in turn. "of GEMM peak" is
6 x weights x tokens / seconds over what a 2048 x 2048 float32 product reaches in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import warnings

import torch
from peers import in_turn, machine, median_ratio

from formary.model.topologies import build, parameter_count
from formary.recipe.presets import preset
from formary.tasks.cross_entropy import cross_entropy

SIZES = {
    "6 x 384, vocabulary 8192, 16 x 256": (8192, "6x384", 16, 256),
    "GPT-2 124M, 2 x 512": (50257, "12x768", 2, 512),
}
PRODUCT = 2048


def compare(name: str, vocab_size: int, size: str, batch: int, context: int, rounds: int, dtype: torch.dtype) -> None:
    """Print one row per contestant."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width = (int(number) for number in size.split("x"))
    config = preset("gpt2", vocab_size=vocab_size, context=context, size=size)
    ours = build(config, seed=0)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_positions=context, n_embd=width, n_layer=layers, n_head=config.transformer.heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    ).train()  # fmt: skip
    weights = parameter_count(ours)
    assert weights == sum(parameter.numel() for parameter in theirs.parameters())
    tokens = torch.randint(0, vocab_size, (batch, context + 1))
    optimisers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for model in (ours, theirs)]
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)

    def our_step() -> None:
        with autocast:
            loss, count = cross_entropy(ours.head, ours(tokens[:, :-1]), tokens[:, 1:])
        (loss / count).backward()
        optimisers[0].step()
        optimisers[0].zero_grad()

    def their_step() -> None:
        with autocast:
            logits = theirs(input_ids=tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimisers[1].step()
        optimisers[1].zero_grad()

    left, right = torch.randn(2, PRODUCT, PRODUCT).unbind()

    def product() -> None:
        for _ in range(4):
            left @ right

    seconds = in_turn({"formary": our_step, "transformers": their_step, "product": product}, rounds)
    peak = 4 * 2 * PRODUCT**3 / statistics.median(seconds["product"])
    for contestant in ("formary", "transformers"):
        rate = batch * context / statistics.median(seconds[contestant])
        print(
            f"| {name} | {str(dtype).removeprefix('torch.')} | {contestant} | {rate:,.0f} | {6 * weights * rate / peak:.2f} "
            f"| {median_ratio(seconds['transformers'], seconds[contestant])} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    print(machine())
    print("| model and batch | precision | library | tokens/s | of float32 GEMM peak | times transformers |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for name, size in SIZES.items():
            compare(
                name,
                *size,
                rounds=arguments.rounds if "124M" not in name else max(3, arguments.rounds // 2),
                dtype=dtype,
            )


if __name__ == "__main__":
    main()

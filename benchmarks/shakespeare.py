"""Wall time to validation loss 1.886 on Shakespeare's characters: nanoGPT's CPU recipe and Formary's, in turn.

    python benchmarks/shakespeare.py [--rounds 3] [--threads 2] [--precision float32] [--nanogpt CHECKOUT]
    python benchmarks/shakespeare.py --equal-time [--processor-time]

nanoGPT's recipe is written here from its README's settings and the GPT-2 paper (4 layers, 4 heads, 128 wide, context
64, 2000 steps of 12, AdamW, cosine from 1e-3, no dropout); with --nanogpt its own model.py is used. Both sides
measure the whole validation split in windows that do not overlap, and measuring does not count as training time.
--equal-time asks the other question: the loss after just as many seconds as nanoGPT's whole run took in that round, with the
recipe's schedule stretched over them. Where other work shares the machine, --threads 1 --processor-time counts the seconds that
the process itself computed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import ROOT, machine
from rich.console import Console
from torch import Tensor, nn

from formary.data import tokenizer as tokenizers
from formary.data.shards import TokenShards
from formary.model.topologies import build, parameter_count
from formary.pipeline.run import run as execute
from formary.recipe import Recipe, read
from formary.tasks.registry import pretraining_task
from formary.train.loop import train, validation_loss
from formary.train.machine import runtime
from formary.train.records import read_records
from formary.train.timed import train_for

Clock = Callable[[], float]

TARGET = 1.886
RECIPE = ROOT / "recipes" / "shakespeare.yaml"
FORMARY = ["train.steps=190", "train.validate_every=10"]
CONTEXT, BATCH, STEPS, WIDTH, LAYERS, HEADS, VOCAB = 64, 12, 2000, 128, 4, 4, 65


class Block(nn.Module):
    """GPT-2's block, as its paper and nanoGPT's README describe it (no biases)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.attention, self.projection = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q, k, v = (
            part.view(batch, seq, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.attention(self.attention_norm(x)).split(WIDTH, dim=2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, seq, WIDTH)
        x = x + self.projection(attended)
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class NanoGPT(nn.Module):
    """nanoGPT's baby GPT for a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("projection.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return logits, F.cross_entropy(logits.view(-1, VOCAB), targets.reshape(-1))


def checkout_model(path: Path) -> nn.Module:
    """The model of a nanoGPT checkout on this machine."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": CONTEXT}
    model: nn.Module = module.GPT(module.GPTConfig(**sizes, bias=False, vocab_size=VOCAB, dropout=0.0))
    return model


@dataclass(frozen=True)
class Result:
    """When a run first measured the target, in seconds of training, and where it ended."""

    seconds: float
    reached: float | None
    loss: float
    parameters: int


def nanogpt(seed: int, checkout: Path | None, clock: Clock) -> Result:
    """nanoGPT's loop: AdamW (0.9, 0.99), weight decay 0.1 on matrices, warm-up 100, cosine 1e-3 to 1e-4, clip 1."""
    torch.manual_seed(seed)
    text = (ROOT / "recipes/data/shakespeare.txt").read_text(encoding="utf-8")
    places = {character: place for place, character in enumerate(sorted(set(text)))}
    data = torch.tensor([places[character] for character in text])
    cut = int(0.9 * len(data))
    training, validation = data[:cut], data[cut:]
    model = checkout_model(checkout) if checkout else NanoGPT()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    seconds, reached, loss_now = 0.0, None, math.inf
    for step in range(STEPS):
        began = clock()
        progress = (step - 100) / (STEPS - 100)
        factor = (step + 1) / 101 if step < 100 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * factor
        starts = torch.randint(len(training) - CONTEXT, (BATCH,))
        rows = torch.stack([training[start : start + CONTEXT + 1] for start in starts])
        _, loss = model(rows[:, :-1], rows[:, 1:])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        seconds += clock() - began
        if (step + 1) % (50 if step > 1500 else 250) == 0:
            loss_now = measured(model, validation)
            if reached is None and loss_now <= TARGET:
                reached = seconds
    return Result(seconds, reached, loss_now, sum(parameter.numel() for parameter in model.parameters()))


@torch.no_grad()
def measured(model: nn.Module, data: Tensor) -> float:
    """Mean loss over the whole split in windows that do not overlap."""
    total = 0.0
    windows = (len(data) - 1) // CONTEXT
    for start in range(0, windows, 64):
        rows = torch.stack(
            [data[i * CONTEXT : i * CONTEXT + CONTEXT + 1] for i in range(start, min(start + 64, windows))]
        )
        total += float(model(rows[:, :-1], rows[:, 1:])[1]) * len(rows)
    return total / windows


def formary(seed: int, recipe: Recipe, prepared: Path) -> Result:
    """The recipe `shakespeare`, shortened to what the target needs."""
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
    tokenizer = tokenizers.load(prepared / "data" / "tokenizer")
    task = pretraining_task(recipe.task)(recipe, tokenizer)
    network = build(task.model_config(), seed=seed)
    validation = TokenShards.open(prepared / "data/tokens/validation")
    with tempfile.TemporaryDirectory() as folder:
        progress = train(
            task.loss,
            network,
            batches=task.training_batches(TokenShards.open(prepared / "data/tokens/train")),
            validation=lambda: task.validation_batches(validation, max_tokens=recipe.train.validation_tokens),
            settings=recipe.train,
            runtime=runtime(recipe.machine),
            run=Path(folder),
            checkpoints=Path(folder) / "checkpoints",
            console=Console(quiet=True),
        )
        records = [record for record in read_records(Path(folder) / "metrics.jsonl") if "validation_loss" in record]
    reached = [record["seconds"] for record in records if record["validation_loss"] <= TARGET]
    return Result(
        progress.seconds, reached[0] if reached else None, records[-1]["validation_loss"], parameter_count(network)
    )


def for_seconds(seconds: float, seed: int, recipe: Recipe, prepared: Path, clock: Clock) -> Result:
    """The recipe `shakespeare` for as long as the other side trained."""
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
    task = pretraining_task(recipe.task)(recipe, tokenizers.load(prepared / "data" / "tokenizer"))
    network = build(task.model_config(), seed=seed)
    settled = runtime(recipe.machine)
    training = task.training_batches(TokenShards.open(prepared / "data/tokens/train"))
    done = train_for(seconds, task.loss, network, training, recipe.train, settled, clock=clock)
    validation = TokenShards.open(prepared / "data/tokens/validation")
    with torch.no_grad():
        batches = task.validation_batches(validation, max_tokens=recipe.train.validation_tokens)
        loss = validation_loss(task.loss, network, batches, settled)
    return Result(done.seconds, None, loss, parameter_count(network))


def told(seed: int, name: str, result: Result) -> None:
    when = f"{result.reached:.1f} s" if result.reached else "not reached"
    print(
        f"seed {seed}, {name}: {result.parameters:,} weights, loss {TARGET} after {when}; "
        f"{result.loss:.3f} at the end ({result.seconds:.1f} s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--nanogpt", type=Path, default=None, help="a nanoGPT checkout, to use its own model.py")
    parser.add_argument("--equal-time", action="store_true", help="compare the losses after equal time")
    parser.add_argument("--processor-time", action="store_true", help="of the process, not of the clock on the wall")
    arguments = parser.parse_args()
    if arguments.processor_time and not (arguments.equal_time and arguments.threads == 1):
        parser.error("--processor-time goes with --equal-time --threads 1: several threads count several times")
    clock = time.process_time if arguments.processor_time else time.perf_counter
    recipe = read(
        RECIPE, [*FORMARY, f"machine.threads={arguments.threads}", f"machine.precision={arguments.precision}"]
    )
    torch.set_num_threads(arguments.threads)
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "run"
        execute(recipe, base=RECIPE.parent, folder=prepared, until="tokens", console=Console(quiet=True))
        ratios, lower = [], []
        for seed in range(arguments.rounds):
            theirs = nanogpt(seed, arguments.nanogpt, clock)
            told(seed, "nanoGPT's recipe", theirs)
            if arguments.equal_time:
                ours = for_seconds(theirs.seconds, seed, recipe, prepared, clock)
                told(seed, f"formary ({arguments.precision}), equal time", ours)
                lower.append(theirs.loss - ours.loss)
                continue
            ours = formary(seed, recipe, prepared)
            told(seed, f"formary ({arguments.precision})", ours)
            if ours.reached:
                ratios.append(ours.reached / (theirs.reached or theirs.seconds))
    for values, says in (
        (ratios, f"formary / nanoGPT's recipe, seconds to {TARGET}"),
        (lower, "loss of nanoGPT's recipe less formary's, after equal time"),
    ):
        if values:
            print(f"{says}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()

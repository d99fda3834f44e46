"""Measures any causal model on any texts: `formary evaluate MODEL DATA`, without a recipe or a run folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formary.data.shards import TokenShards, write_tokens
from formary.data.source import read
from formary.errors import FormaryError
from formary.evaluate.language_model import causal_metrics
from formary.infer.loaded import load
from formary.model.topologies import Decoder
from formary.recipe.schema import Evaluate, Machine
from formary.train.machine import runtime


def measure(
    model: str,
    data: Sequence[str],
    *,
    documents: str = "file",
    stride: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of `model` on `data` (files, folders, globs), with 95 % intervals.

    Raises:
        FormaryError: not a causal model, or the data cannot be read.
    """
    loaded = load(model)
    if not isinstance(loaded.network, Decoder):
        raise FormaryError(
            f"{model}: only causal models can be measured on plain text; this one is an {loaded.config.topology}"
        )
    with tempfile.TemporaryDirectory(prefix="formary-") as scratch:
        rows = Path(scratch) / "documents.jsonl"
        with rows.open("w", encoding="utf-8") as file:
            for row in read(data, documents=documents):
                file.write(json.dumps({"text": row.values["text"]}, ensure_ascii=False) + "\n")
        write_tokens(rows, Path(scratch) / "tokens", loaded.tokenizer)
        shards = TokenShards.open(Path(scratch) / "tokens")
        settings = Evaluate(baselines=False, stride=stride, max_tokens=max_tokens)
        metrics = causal_metrics(
            loaded.network, shards, training=None, settings=settings, runtime=runtime(Machine()), split="given texts"
        )
    return {"model": model, "documents": shards.documents, "metrics": metrics}

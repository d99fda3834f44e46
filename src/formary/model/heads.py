"""Heads: from hidden states to what a task reads: logits over a vocabulary, or one vector for a sequence.

A head holds weights only; losses belong to the tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from formary.model.block import activate
from formary.model.config import ModelConfig


class LanguageHead(nn.Module):
    """Logits over the vocabulary; "masked" puts BERT's dense layer, activation and norm before (Devlin et al. 2019).

    With tied embeddings the output matrix is the token embedding itself (Press and Wolf 2017).
    """

    def __init__(self, config: ModelConfig, embedding: nn.Embedding) -> None:
        super().__init__()
        stack = config.transformer
        self.scale = config.logit_scale
        self.weight = embedding.weight if config.tied_embeddings else nn.Parameter(torch.empty_like(embedding.weight))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None
        self.masked = config.head == "masked"
        if self.masked:
            self.activation = stack.activation
            self.dense = nn.Linear(stack.width, stack.width)
            self.norm = nn.LayerNorm(stack.width, eps=stack.norm_eps)

    def prepare(self, hidden: Tensor) -> Tensor:
        """What is multiplied with the output matrix: (batch, seq, width) -> the same shape."""
        if self.masked:
            hidden = self.norm(activate(self.dense(hidden), self.activation))
        return hidden * self.scale if self.scale != 1.0 else hidden

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (batch, seq, vocab_size)."""
        return nn.functional.linear(self.prepare(hidden), self.weight, self.bias)


class Pooler(nn.Module):
    """BERT's summary of a sequence: tanh of a dense layer on the first position's hidden state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, seq, width) -> (batch, width)."""
        return torch.tanh(self.dense(hidden[:, 0]))

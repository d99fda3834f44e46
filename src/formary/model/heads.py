"""Heads: from hidden states to what a task reads: logits over a vocabulary or labels, boxes, one vector for a sequence.

A head holds weights only; losses belong to the tasks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from formary.model.block import activate
from formary.model.config import ModelConfig
from formary.model.dropout import Dropout


class LanguageHead(nn.Module):
    """Logits over the vocabulary; "masked" puts BERT's dense layer, activation and norm before (Devlin et al. 2019).

    With tied embeddings the output matrix is the token embedding itself (Press and Wolf 2017).
    """

    def __init__(self, config: ModelConfig, embedding: nn.Embedding) -> None:
        super().__init__()
        stack = config.transformer
        self.scale, self.cap = config.logit_scale, config.logit_cap
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

    def capped(self, logits: Tensor) -> Tensor:
        """Logits bent to stay within `cap`: cap x tanh(logits / cap) (Gemma Team 2024, section 2)."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (batch, seq, vocab_size)."""
        return self.capped(nn.functional.linear(self.prepare(hidden), self.weight, self.bias))


class LabelHead(nn.Module):
    """Logits over labels, from summaries of sequences or from each position's hidden state (Devlin et al. 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = Dropout(config.transformer.dropout)
        self.output = nn.Linear(config.transformer.width, len(config.labels), bias=config.head_bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., width) -> logits (..., labels)."""
        logits: Tensor = self.output(self.dropout(vectors))
        return logits


class ForecastHead(nn.Module):
    """What is said of each step to come, a value or quantiles of it, from all hidden states (Nie et al. 2023, section 3.1).

    Numbers are in the unit of the series' instance norm.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.horizon is not None and config.patch_size is not None
        stack = config.transformer
        self.horizon, self.says = config.horizon, len(config.labels)
        self.dropout = Dropout(stack.dropout)
        self.output = nn.Linear(stack.context // config.patch_size * stack.width, self.horizon * self.says)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, patches, width) -> (batch, horizon, labels)."""
        steps: Tensor = self.output(self.dropout(hidden.flatten(1)))
        return steps.reshape(len(hidden), self.horizon, self.says)


class DetectionHead(nn.Module):
    """What each detection token has found and where: two networks of three layers (Carion et al. 2020, section 3.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.tokens = config.transformer.width, config.detection_tokens
        self.classes = nn.ModuleList(nn.Linear(width, out) for out in (width, width, len(config.labels) + 1))
        self.boxes = nn.ModuleList(nn.Linear(width, out) for out in (width, width, 4))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, seq, width) -> logits (batch, tokens, labels + 1), the last of nothing, and boxes (batch, tokens, 4).

        A box is its centre, width and height, as shares of the picture's width and height.
        """
        return self.said(hidden[:, -self.tokens :])

    def said(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The same of any vectors (batch, vectors, width)."""
        logits, boxes = vectors, vectors
        for number, (of_class, of_box) in enumerate(zip(self.classes, self.boxes)):
            logits = of_class(logits.relu() if number else logits)
            boxes = of_box(boxes.relu() if number else boxes)
        return logits, boxes.sigmoid()


HEADS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "classify": LabelHead,
    "tag": LabelHead,
    "span": LabelHead,
    "choice": LabelHead,
    "forecast": ForecastHead,
    "detect": DetectionHead,
}
"""By `ModelConfig.head`, those that read hidden states or summaries alone; language heads share the token embedding."""


class Pooler(nn.Module):
    """A dense layer on the vector of a sequence, in BERT its first position's, then BERT's tanh or DistilBERT's relu."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.transformer.width, config.transformer.width)
        self.activate = torch.tanh if config.pooler_activation == "tanh" else torch.relu

    def forward(self, vectors: Tensor) -> Tensor:
        """(batch, width) -> (batch, width)."""
        return self.activate(self.dense(vectors))


def pooled(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """(batch, seq, width) -> (batch, width): the first position, the last or the mean of those where mask is True."""
    if pooling == "first":
        return hidden[:, 0]
    mask = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden.dtype)
    if pooling == "mean":
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    last = ((mask > 0) * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=mask.device), last]

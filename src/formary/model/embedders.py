"""Embedders: from token ids, pixels or other things to the vectors a Transformer reads.

One class per modality, in `EMBEDDERS` by its name in a config; each adds absolute positions where the family has them and
the norm and dropout after. All take the batch's input first and give (batch, seq, width).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from formary.model.config import ModelConfig, TransformerConfig
from formary.model.dropout import Dropout
from formary.model.norms import InstanceNorm, make_norm


class TextEmbedder(nn.Module):
    """Token vectors, plus positions (learned or sinusoidal) and token types where the config has them."""

    def __init__(self, config: ModelConfig, stack: TransformerConfig, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        self.tokens = tokens if tokens is not None else nn.Embedding(config.vocab_size, stack.width)
        self.scale = config.embedding_scale
        self.dropout = Dropout(stack.dropout)
        self.offset = config.position_offset
        self.positions: nn.Embedding | None = None
        if stack.position == "learned":
            self.positions = nn.Embedding(stack.context + config.position_offset, stack.width)
        self.sinusoids: Tensor | None
        sinusoidal = sinusoids(stack.context, stack.width) if stack.position == "sinusoidal" else None
        self.register_buffer("sinusoids", sinusoidal, persistent=False)
        self.types = nn.Embedding(config.token_types, stack.width) if config.token_types else None
        self.norm = nn.LayerNorm(stack.width, eps=stack.norm_eps) if config.embedding_norm else None
        self.known = Features(config, stack) if config.features else None

    def vectors(self, tokens: Tensor | None = None) -> Tensor:
        """(..., width) of token ids, or (vocab_size, width) of all: what is learned of them and what is known."""
        learned: Tensor = self.tokens.weight if tokens is None else self.tokens(tokens)
        return learned if self.known is None else self.known(learned, tokens)

    def forward(self, tokens: Tensor, *, positions: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """Vectors (batch, seq, width) for token ids (batch, seq); positions count from 0."""
        vectors = self.vectors(tokens)
        if self.scale != 1.0:
            vectors = vectors * self.scale
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if self.positions is not None:
            vectors = vectors + self.positions(positions + self.offset)
        if self.sinusoids is not None:
            vectors = vectors + self.sinusoids[positions]
        if self.types is not None:
            vectors = vectors + self.types(torch.zeros_like(tokens) if types is None else types)
        if self.norm is not None:
            vectors = self.norm(vectors)
        return cast(Tensor, self.dropout(vectors))


class ValueEmbedder(nn.Module):
    """Token vectors that attention adds to its values (after Jordan et al., modded-nanogpt, record of December 2024).

    What a token is then need not be carried through the residual stream to be attended to.
    """

    def __init__(self, config: ModelConfig, stack: TransformerConfig) -> None:
        super().__init__()
        self.count = stack.value_embeddings
        self.tables = nn.Embedding(config.vocab_size, self.count * stack.kv_head_count * stack.q_head_width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """One (batch, seq, kv_heads x head_width) for each table, for token ids (batch, seq)."""
        return self.tables(tokens).chunk(self.count, dim=-1)


class Features(nn.Module):
    """What is known of tokens before anything is learned, such as vectors of items' texts, brought to the width.

    In training the learned vectors of some are left out, so that what is known suffices by itself (DropoutNet, Volkovs et
    al. 2017, section 3.2); tokens of which nothing is known always keep theirs.
    """

    def __init__(self, config: ModelConfig, stack: TransformerConfig) -> None:
        super().__init__()
        self.alone = config.features_alone
        self.table = nn.Parameter(torch.zeros(config.vocab_size, config.features), requires_grad=False)
        self.projection = nn.Linear(config.features, stack.width)

    def forward(self, learned: Tensor, tokens: Tensor | None) -> Tensor:
        """Learned vectors (..., width) of token ids, or of all where None, and what is known of them."""
        features = self.table if tokens is None else self.table[tokens]
        known = features.any(dim=-1, keepdim=True)
        alone = self.alone if self.training or self.alone == 1.0 else 0.0
        if alone:
            learned = learned.masked_fill(known & (torch.rand(known.shape, device=known.device) < alone), 0.0)
        return learned + self.projection(features) * known


class PatchEmbedder(nn.Module):
    """Image patches as vectors, after the learned class vectors (Dosovitskiy et al. 2021, eq. 1; Touvron et al. 2021, 4).

    Behind the patches stand the learned vectors of detection tokens, where there are any (Fang et al. 2021, section 3.1).
    In CLIP a norm follows (Radford et al. 2021, section 2.4).
    """

    def __init__(self, config: ModelConfig, stack: TransformerConfig) -> None:
        super().__init__()
        assert config.image_size is not None and config.patch_size is not None
        self.dropout = Dropout(stack.dropout)
        size, bias = config.patch_size, config.patch_bias
        self.patches: nn.Module
        if config.conv_stem:
            self.patches = conv_stem(config.channels, stack.width, size)
        else:
            self.patches = nn.Conv2d(config.channels, stack.width, size, stride=size, bias=bias)
        self.first = nn.Parameter(torch.zeros(config.class_tokens, 1, stack.width)) if config.class_tokens else None
        found = config.detection_tokens
        self.last = nn.Parameter(torch.zeros(1, found, stack.width)) if found else None
        length = (config.image_size // size) ** 2 + config.class_tokens + found
        self.positions = nn.Parameter(torch.zeros(1, length, stack.width))
        self.norm = make_norm(stack) if config.patch_norm else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Vectors (batch, class_tokens + patches + detection_tokens, width) for pixels (batch, channels, height, width)."""
        vectors = self.patches(pixels).flatten(2).transpose(1, 2)
        if self.first is not None:
            vectors = torch.cat([self.first.transpose(0, 1).expand(len(pixels), -1, -1), vectors], dim=1)
        if self.last is not None:
            vectors = torch.cat([vectors, self.last.expand(len(pixels), -1, -1)], dim=1)
        vectors = vectors + self.positions
        return cast(Tensor, self.dropout(vectors if self.norm is None else self.norm(vectors)))


class SeriesEmbedder(nn.Module):
    """Stretches of a series as vectors (PatchTST, Nie et al. 2023, section 3.1), one channel at a time.

    A step has the series' value, which is NaN where it is missing or still to come, and what is known of it at any time
    (calendar, plans). The last steps are the future, of which only the latter is known.
    """

    def __init__(self, config: ModelConfig, stack: TransformerConfig) -> None:
        super().__init__()
        assert config.patch_size is not None
        self.patch = config.patch_size
        self.norm = InstanceNorm(config.instance_norm)
        self.patches = nn.Linear(self.patch * (config.channels + 1), stack.width)
        self.positions = nn.Parameter(torch.zeros(1, stack.context // self.patch, stack.width))
        self.dropout = Dropout(stack.dropout)

    def forward(self, steps: Tensor) -> Tensor:
        """Vectors (batch, steps / patch, width) for steps (batch, steps, channels)."""
        values, others = steps[..., :1], steps[..., 1:]
        given = ~values.isnan()
        level, unit = self.norm.statistics(values[..., 0])
        normed = self.norm(values.nan_to_num(), level[..., None], unit[..., None])  # no NaN may meet a gradient
        read = torch.cat([torch.where(given, normed, 0.0), given.to(others.dtype), others], dim=-1)
        vectors = self.patches(read.reshape(len(steps), -1, self.patch * read.shape[-1]))
        return cast(Tensor, self.dropout(vectors + self.positions))


class ColumnEmbedder(nn.Module):
    """The cells of a row as vectors, after one learned class vector (FT-Transformer, Gorishniy et al. 2021, section 3.1).

    A number scales its column's vector, a category has one of its own; both are added to the column's bias. NaN is a
    missing number, and has a vector of its own too, as the category 0 is a missing one.
    """

    def __init__(self, config: ModelConfig, stack: TransformerConfig) -> None:
        super().__init__()
        sizes = config.column_sizes
        self.numeric = [place for place, size in enumerate(sizes) if size == 0]
        self.named = [place for place, size in enumerate(sizes) if size > 0]
        self.order = [[*self.numeric, *self.named].index(place) for place in range(len(sizes))]
        starts = [0]
        for place in self.named:
            starts.append(starts[-1] + sizes[place])
        self.starts = starts[:-1]
        self.first = nn.Parameter(torch.zeros(1, 1, stack.width))
        self.biases = nn.Parameter(torch.zeros(len(sizes), stack.width))
        self.numbers = nn.Parameter(torch.zeros(len(self.numeric), stack.width))
        self.missing = nn.Parameter(torch.zeros(len(self.numeric), stack.width))
        self.categories = nn.Parameter(torch.zeros(starts[-1], stack.width))
        self.dropout = Dropout(stack.dropout)

    def forward(self, cells: Tensor) -> Tensor:
        """Vectors (batch, 1 + columns, width) for cells (batch, columns): scaled numbers, and numbers of categories."""
        numbers = cells[:, self.numeric, None]
        lost = numbers.isnan()
        scaled = torch.where(lost, self.missing, torch.where(lost, 0.0, numbers) * self.numbers)
        places = cells[:, self.named].long() + torch.tensor(self.starts, dtype=torch.long, device=cells.device)
        vectors = torch.cat([scaled, self.categories[places]], dim=1)[:, self.order] + self.biases
        return cast(Tensor, self.dropout(torch.cat([self.first.expand(len(cells), -1, -1), vectors], dim=1)))


def conv_stem(channels: int, width: int, patch: int) -> nn.Sequential:
    """Pixels (batch, channels, height, width) to patches (batch, width, height / patch, width / patch).

    By 3 x 3 convolutions, each of which halves the picture and doubles its numbers, instead of one product for each patch: a
    small model then need not learn from few pictures what neighbours are (after Xiao et al. 2021, section 3; no batch norm).
    """
    widths = [channels, *(max(1, 2 * width // 2**left) for left in range(patch.bit_length() - 1, 0, -1))]
    halving = [nn.Conv2d(*sizes, 3, stride=2, padding=1) for sizes in pairwise(widths)]
    return nn.Sequential(*[layer for conv in halving for layer in (nn.GELU(), conv)][1:])


def sinusoids(context: int, width: int) -> Tensor:
    """Fixed positions (context, width): sines in the first half, cosines in the second (Vaswani et al. 2017, 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
    angles = torch.outer(torch.arange(context, dtype=torch.float32), rates)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


EMBEDDERS: dict[str, Callable[[ModelConfig, TransformerConfig], nn.Module]] = {
    "tokens": TextEmbedder,
    "patches": PatchEmbedder,
    "series": SeriesEmbedder,
    "columns": ColumnEmbedder,
}
"""By `ModelConfig.embedder`: built from the config and the stack that reads the vectors."""

"""The ways to put a Transformer to work on sequences: decoder, encoder, encoder-decoder, two towers.

Each joins embedders, one or two stacks and a head; `build` picks by `config.topology`.
`forward` gives hidden states; `head` turns them into logits, so that a loss may do that piece by piece.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from formary.model.attention import Cache, Rotary
from formary.model.config import ModelConfig, Topology
from formary.model.embedders import EMBEDDERS, TextEmbedder, ValueEmbedder, sinusoids
from formary.model.heads import HEADS, LanguageHead, Pooler, pooled
from formary.model.initialise import initialise
from formary.model.transformer import Transformer


class Decoder(nn.Module):
    """Reads left to right and predicts what comes next: GPT-2, Llama, SmolLM2, Qwen."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedder = TextEmbedder(config, config.transformer)
        valued = config.transformer.value_embeddings > 0
        self.value_embedder = ValueEmbedder(config, config.transformer) if valued else None
        self.transformer = Transformer(config.transformer)
        self.head: nn.Module
        self.head = HEADS[config.head](config) if config.head in HEADS else LanguageHead(config, self.embedder.tokens)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states (batch, seq, width) for token ids (batch, seq); arguments as in `Transformer.forward`."""
        vectors = self.embedder(tokens, positions=positions)
        values = self.value_embedder(tokens) if self.value_embedder is not None else ()
        return self.transformer(vectors, positions=positions, mask=mask, cache=cache, values=values)

    def summary(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """One vector for each sequence, (batch, width): the last real position's; mask is True at real tokens."""
        return pooled(hidden, mask, self.config.pooling)


class Encoder(nn.Module):
    """Reads a whole sequence at once, both ways: BERT, RoBERTa, DistilBERT, MiniLM on text, ViT on images."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedder = EMBEDDERS[config.embedder](config, config.transformer)
        self.head: nn.Module | None = HEADS[config.head](config) if config.head in HEADS else None
        if config.head in ("linear", "masked") and isinstance(self.embedder, TextEmbedder):
            self.head = LanguageHead(config, self.embedder.tokens)
        self.transformer = Transformer(config.transformer)
        self.pooler = Pooler(config) if config.pooler else None
        # BERT's second objective: does sentence B follow sentence A? Read from the pooled vector; 1 = it follows.
        self.next_sentence = nn.Linear(config.transformer.width, 2) if config.next_sentence else None

    @property
    def reads_first(self) -> bool:
        """Whether `summary` needs the first position alone."""
        return self.config.pooling == "first"

    def forward(
        self,
        inputs: Tensor,
        *,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """Hidden states (batch, seq, width).

        Args:
            inputs: what its embedder reads: token ids (batch, seq), pixels (batch, channels, height, width), ...
            mask: True at real tokens, (batch, seq); everything when left out.
            types: token types (batch, seq), BERT's sentence A and B.
            first_only: give the first position alone, (batch, 1, width), which costs less.
        """
        vectors = self.embedder(inputs) if types is None else self.embedder(inputs, types=types)
        return self.transformer(vectors, mask=padding_mask(mask), first_only=first_only)

    def summary(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """One vector for each sequence, (batch, width), pooled as the config says and then through the pooler, if any."""
        vectors = pooled(hidden, mask, self.config.pooling)
        return vectors if self.pooler is None else self.pooler(vectors)


class EncoderDecoder(nn.Module):
    """Reads one sequence and writes another: BART, T5, Marian; captions of pictures.

    Two sides that read tokens share the token embedding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.encoder is not None
        self.config = config
        self.embedder = EMBEDDERS[config.embedder](config, config.encoder)
        self.encoder = Transformer(config.encoder)
        shared = self.embedder.tokens if isinstance(self.embedder, TextEmbedder) else None
        self.decoder_embedder = TextEmbedder(config, config.transformer, tokens=shared)
        self.transformer = Transformer(config.transformer)
        self.head = LanguageHead(config, self.decoder_embedder.tokens)

    def encode(self, inputs: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The memory (batch, memory_seq, width) of what the embedder reads, such as source ids (batch, memory_seq).

        Args:
            mask: True at real tokens, (batch, memory_seq); everything when left out.
        """
        return self.encoder(self.embedder(inputs), mask=padding_mask(mask))

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor | None,
        *,
        memory_mask: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states (batch, seq, width) of target ids given the memory; memory_mask is True at real tokens."""
        vectors = self.decoder_embedder(tokens, positions=positions)
        hidden = self.transformer(
            vectors, positions=positions, mask=mask, memory=memory, memory_mask=padding_mask(memory_mask), cache=cache
        )
        return cast(Tensor, hidden)

    def forward(self, source: Tensor, target: Tensor, *, source_mask: Tensor | None = None) -> Tensor:
        """Hidden states (batch, target_seq, width) for source ids and the target ids shifted right."""
        return self.decode(target, self.encode(source, mask=source_mask), memory_mask=source_mask)


class TwoTowers(nn.Module):
    """Reads two kinds of things, pictures and texts, and gives both vectors in one space (CLIP, Radford et al. 2021).

    `embedder` and `encoder` are the pictures' tower, `text_embedder` and `transformer` the texts'.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.encoder is not None and config.shared_width is not None
        self.config = config
        self.embedder = EMBEDDERS[config.embedder](config, config.encoder)
        self.encoder = Transformer(config.encoder)
        self.projection = nn.Linear(config.encoder.width, config.shared_width, bias=False)
        self.text_embedder = TextEmbedder(config, config.transformer)
        self.transformer = Transformer(config.transformer)
        self.text_projection = nn.Linear(config.transformer.width, config.shared_width, bias=False)
        self.head: nn.Module | None = None
        # By the exponential of this similarities are multiplied before they compete; learned, begins at log(1 / 0.07).
        self.similarity_scale = nn.Parameter(torch.zeros(1))

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by, (1,); at most 100 (Radford et al. 2021, section 2.5)."""
        return self.similarity_scale.exp().clamp(max=100.0)

    def encode(self, inputs: Tensor) -> Tensor:
        """Vectors (batch, shared_width), not of length 1, of what the embedder reads: pixels (batch, channels, height, width)."""
        pooling = "first" if self.config.class_tokens else "mean"
        return cast(Tensor, self.projection(pooled(self.encoder(self.embedder(inputs)), None, pooling)))

    def encode_text(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The same of token ids (batch, seq); mask is True at real tokens, which stand before the padding."""
        seen = None if self.config.transformer.causal else padding_mask(mask)
        hidden = self.transformer(self.text_embedder(tokens), mask=seen)
        return cast(Tensor, self.text_projection(pooled(hidden, mask, self.config.pooling)))

    def forward(self, inputs: Tensor, tokens: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of length 1 of both, (batch, shared_width) each, and what their products are multiplied by."""
        seen = nn.functional.normalize(self.encode(inputs), dim=-1)
        read = nn.functional.normalize(self.encode_text(tokens, mask=mask), dim=-1)
        return seen, read, self.scale


Network = Decoder | Encoder | EncoderDecoder | TwoTowers


_KINDS: dict[Topology, type[Network]] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "encoder_decoder": EncoderDecoder,
    "two_towers": TwoTowers,
}


def padding_mask(mask: Tensor | None) -> Tensor | None:
    """(batch, seq), True at real tokens -> (batch, 1, 1, seq) as attention takes it."""
    return None if mask is None else mask.bool()[:, None, None, :]


def build(config: ModelConfig, *, seed: int | None = None, empty: bool = False) -> Network:
    """A model with freshly initialised weights.

    Args:
        seed: of the initial weights; torch's global generator when left out.
        empty: leave the weights without memory (on the meta device), for those that are loaded right after; the
            fixed tables of positions are computed.
    """
    kind = _KINDS[config.topology]
    if empty:
        with torch.device("meta"):
            network = kind(config)
        _compute_tables(network)
        return network
    network = kind(config)
    initialise(network, config, seed=seed)
    return network


@torch.no_grad()
def with_head(network: Network, config: ModelConfig, *, seed: int | None = None) -> Network:
    """A network of `config` with the weights of `network` where name, shape and, for a head, kind and labels agree."""
    other, old = build(config, seed=seed), dict(network.named_parameters())
    same_head = (network.config.head, network.config.labels) == (config.head, config.labels)
    for name, parameter in other.named_parameters():
        if name in old and old[name].shape == parameter.shape and (same_head or not name.startswith("head.")):
            parameter.copy_(old[name])
        elif name == "embedder.positions" and name in old and old[name].shape[1] < parameter.shape[1]:
            parameter[:, : old[name].shape[1]] = old[name]  # vectors were added behind
    return other


def _compute_tables(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, Transformer) and module.rotary is not None:
            module.rotary = Rotary(module.config)
        elif isinstance(module, TextEmbedder) and module.sinusoids is not None:
            module.sinusoids = sinusoids(*module.sinusoids.shape)


def parameter_count(network: nn.Module) -> int:
    """Trainable numbers, tied matrices counted once."""
    return sum(parameter.numel() for parameter in network.parameters())

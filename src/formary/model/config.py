"""What a model is, in numbers and switches: the same code with other switches is another family.

`TransformerConfig` describes one stack of blocks; `ModelConfig` puts embedders and a head around one or two stacks.
Nothing here builds modules or knows file formats.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from formary.errors import RecipeError

Norm = Literal["layer", "rms"]
NormPosition = Literal["pre", "post"]
Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "relu", "relu2", "silu"]
Position = Literal["learned", "sinusoidal", "rope", "relative_bias", "none"]
Topology = Literal["decoder", "encoder", "encoder_decoder", "two_towers"]
Embedder = Literal["tokens", "patches", "series", "columns"]
Head = Literal["linear", "masked", "none", "classify", "tag", "span", "choice", "forecast", "detect"]
Initialisation = Literal["gpt2", "llama", "bert", "bart", "t5", "vit", "zero_outputs"]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary wavelengths beyond the context of pretraining."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int


@dataclass(frozen=True)
class TransformerConfig:
    """One stack of Transformer blocks.

    Fields left at None follow the others: kv_heads = heads, head_width = width / heads, ffn_width = 4 x width,
    qkv_bias = bias, final_norm = (norm_position is "pre"), attention_scale = head_width ** -0.5.

    Raises:
        RecipeError: the sizes do not fit together; the message names the fields.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    head_width: int | None = None
    ffn_width: int | None = None
    norm: Norm = "layer"
    norm_eps: float = 1e-5
    norm_position: NormPosition = "pre"
    final_norm: bool | None = None
    activation: Activation = "gelu"
    gated: bool = False
    position: Position = "learned"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    causal: bool = True
    cross_attention: bool = False
    qk_norm: bool = False
    bias: bool = True
    qkv_bias: bool | None = None
    attention_scale: float | None = None
    layer_positions: bool = False  # position vectors are added again after each block but the last (YOLOS)
    value_embeddings: int = 0  # tables of token vectors that are added to the values of so many first and last layers
    dropout: float = 0.0
    context: int = 1024

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.context) < 1:
            raise RecipeError(
                f"layers ({self.layers}), width ({self.width}), heads ({self.heads}) and context ({self.context}) must be at least 1"
            )
        if self.head_width is None and self.width % self.heads:
            raise RecipeError(
                f"width {self.width} is not divisible by heads {self.heads}; choose another or set head_width"
            )
        defaults = {
            "kv_heads": self.heads,
            "head_width": self.width // self.heads,
            "ffn_width": 4 * self.width,
            "qkv_bias": self.bias,
            "final_norm": self.norm_position == "pre",
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.attention_scale is None:
            object.__setattr__(self, "attention_scale", self.q_head_width**-0.5)
        if self.heads % self.kv_head_count:
            raise RecipeError(
                f"heads {self.heads} do not divide evenly into kv_heads {self.kv_heads}: each key-value head serves the same number of heads"
            )
        if self.position == "rope" and self.q_head_width % 2:
            raise RecipeError(f"rotary positions turn pairs of numbers, so head_width {self.head_width} must be even")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout {self.dropout} must be at least 0 and below 1")
        if not 0 <= 2 * self.value_embeddings <= self.layers:
            raise RecipeError(
                f"value_embeddings {self.value_embeddings}: each table serves one of the first and one of the last layers, so "
                f"with layers {self.layers} there can be 0 to {self.layers // 2}"
            )

    # The optional fields after __post_init__ has filled them, typed for the code that builds modules.
    @property
    def kv_head_count(self) -> int:
        assert self.kv_heads is not None
        return self.kv_heads

    @property
    def q_head_width(self) -> int:
        assert self.head_width is not None
        return self.head_width

    @property
    def ffn_inner(self) -> int:
        assert self.ffn_width is not None
        return self.ffn_width

    def value_table(self, layer: int) -> int | None:
        """Which table of value embeddings a layer takes: the first layers and the last share them; None in between."""
        first_of_last = self.layers - self.value_embeddings
        if layer < self.value_embeddings:
            return layer
        return layer - first_of_last if layer >= first_of_last else None


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: embedders, one stack (or an encoder and a decoder), and a head.

    `transformer` is the stack that the head reads: the only one, the decoder of an encoder-decoder, or the texts' tower of
    two, where `encoder` is that of what the embedder reads.
    """

    topology: Topology
    transformer: TransformerConfig
    vocab_size: int
    encoder: TransformerConfig | None = None
    head: Head = "linear"
    tied_embeddings: bool = True
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None  # logits are bent to stay within plus and minus this
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    position_offset: int = 0
    token_types: int = 0
    pooler: bool = False
    next_sentence: bool = False
    labels: tuple[
        str, ...
    ] = ()  # of classify, tag and detect; of span start and end, of choice itself, of forecast what is said of each step
    problem: Literal["single", "multi", "regression"] = "single"
    pooling: Literal["first", "mean", "last"] = "first"  # what stands for a sequence
    pooler_activation: Literal["tanh", "relu"] = "tanh"
    embedder: Embedder = "tokens"  # what turns the input into vectors; of an encoder-decoder, its encoder's
    image_size: int | None = None  # side of a square picture in pixels, as are those of its patches
    patch_size: int | None = None
    patch_bias: bool = True
    conv_stem: bool = False  # a patch is what a few small convolutions make of it, each at half the resolution
    patch_norm: bool = False  # patches and class tokens are normed with their positions, before the blocks (CLIP)
    channels: int = 3  # of a picture; of a series the values of each step: its own, then those known of the future
    horizon: int | None = None  # steps of a series that are forecast; patch_size is in steps too
    instance_norm: Literal["mean", "last"] = "mean"  # what a series is measured from
    column_sizes: tuple[int, ...] = ()  # of a table's columns: how many categories, 0 for a column of numbers
    features: int = 0  # numbers that are known of each token (vectors of items' texts), beside what is learned
    features_alone: float = (
        0.0  # share of the tokens for which a training step has nothing else; 1: nothing else exists
    )
    class_tokens: int = 1  # learned vectors before the patches: ViT 1, DeiT 2 (the second was distilled into)
    detection_tokens: int = 0  # learned vectors after the patches, each of which may find one thing (YOLOS)
    image_cut: bool = False  # of a picture that is no square the middle is read; else it is stretched
    shared_width: int | None = None  # of the vectors in which the two towers meet
    image_mean: tuple[float, ...] = ()  # by channel, of pixels from 0 to 1: taken off, then the spread divides
    image_std: tuple[float, ...] = ()
    initialisation: Initialisation = "gpt2"
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    decoder_start_id: int | None = None

    def __post_init__(self) -> None:
        if (self.topology in ("encoder_decoder", "two_towers")) != (self.encoder is not None):
            raise RecipeError(
                "an encoder_decoder and two_towers need both an encoder and a transformer; others only a transformer"
            )
        if (self.topology == "two_towers") != (self.shared_width is not None):
            raise RecipeError("two_towers need a shared_width, in which their vectors meet, and others have none")
        if self.topology == "encoder_decoder" and not self.transformer.cross_attention:
            raise RecipeError("the decoder of an encoder_decoder needs cross_attention: true")
        if self.image_size is not None:
            object.__setattr__(self, "embedder", "patches")
        if self.conv_stem and (self.patch_size is None or self.patch_size.bit_count() != 1 or self.patch_size < 2):
            raise RecipeError(
                f"patch_size {self.patch_size}: with conv_stem it must be 2, 4, 8, 16, ..., as each convolution halves a picture"
            )
        if self.logit_cap is not None and not self.logit_cap > 0:
            raise RecipeError(f"logit_cap {self.logit_cap} must be above 0; null leaves logits as they are")
        if self.transformer.value_embeddings and not (self.topology == "decoder" and self.reads_text):
            raise RecipeError(f"value_embeddings are for decoders that read tokens, and this is an {self.topology}")
        if self.vocab_size < 1 and self.reads_text:
            raise RecipeError(f"vocab_size {self.vocab_size} must be at least 1")
        for name in ("labels", "image_mean", "image_std", "column_sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        unfit = self.topology == "encoder_decoder" or not self.labels or len(set(self.labels)) < len(self.labels)
        if self.labelled and unfit:
            raise RecipeError(f"a {self.head} head needs an encoder or decoder, and labels, each once: {self.labels}")
        first_sees_itself = self.topology == "decoder" or (self.topology == "two_towers" and self.transformer.causal)
        if first_sees_itself and self.pooling == "first":  # and nothing else
            object.__setattr__(self, "pooling", "last")

    @property
    def reads_text(self) -> bool:
        """Whether it reads token ids (of words, items, colours), so that it has a vocabulary and a tokenizer."""
        return self.embedder == "tokens"

    @property
    def labelled(self) -> bool:
        """Whether the head scores labels (of the sequence, of each token, of start and end, of a choice), not words."""
        return self.head in ("classify", "tag", "span", "choice")

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.transformer.context

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; `from_dict` reverses it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`."""

        def stack(fields: dict[str, Any] | None) -> TransformerConfig | None:
            if fields is None:
                return None
            scaling = fields.get("rope_scaling")
            return TransformerConfig(**{**fields, "rope_scaling": RopeScaling(**scaling) if scaling else None})

        transformer = stack(values["transformer"])
        assert transformer is not None
        return ModelConfig(**{**values, "transformer": transformer, "encoder": stack(values.get("encoder"))})

"""What a family of models is to the hub: how its config.json and its weight names map to ours, and back.

One table of weight names serves both directions: reading joins and transposes, writing splits and transposes back.
Nothing here touches files; `hub.checkpoint` feeds it names and tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from formary.errors import CheckpointError, RecipeError, nearest
from formary.hub.families.labels import LabelHeads
from formary.model.config import Activation, ModelConfig, TransformerConfig

HfConfig = dict[str, Any]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
HF_ACTIVATIONS: dict[Activation, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "gelu_quick": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}
# Buffers that older checkpoints carry and nobody needs: masks, position numbers, rotary frequencies.
BUFFERS = re.compile(
    r"(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq|position_ids|"
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight)$"
)


@dataclass(frozen=True)
class Rule:
    """Where one of our weights comes from.

    Args:
        names: theirs; several are joined along the rows in this order (query, key, value; gate, input).
        transposed: their matrix is stored (in, out), as GPT-2's.
        row: their vector is stored (1, n), as BART's final_logits_bias.
        squeezed: dimensions of 1 are left out in theirs, as in CLIP's class vector.
        flipped: their rows are in the opposite order, as BERT's "is next" and "is random".
    """

    names: tuple[str, ...]
    transposed: bool = False
    row: bool = False
    squeezed: bool = False
    flipped: bool = False


Table = Mapping[str, Rule]


def table(**groups: Mapping[str, str | tuple[str, ...] | Rule]) -> dict[str, Rule]:
    """One table from groups {our name: their name, names, or rule}; group names only serve the reader.

    A name without .weight or .bias at its end stands for both. `{i}` is the number of a block.
    """
    rules: dict[str, Rule] = {}
    for group in groups.values():
        for ours, theirs in group.items():
            if isinstance(theirs, str):
                theirs = Rule((theirs,))
            rules[ours] = theirs if isinstance(theirs, Rule) else Rule(theirs)
    return rules


@dataclass(frozen=True)
class Family:
    """A family of the Hugging Face world.

    Args:
        name: ours for it.
        model_types: the values of config.json's model_type that it reads; the first is written.
        config: config.json and the names of the weights -> our config; `read` adds a head over labels.
        hf_config: our config -> config.json, with architectures; `write` adds what every family needs.
        rules: the weight table for a config.
        prefix: of the backbone's names in checkpoints with a head; checkpoints of a bare backbone leave it out.
        outside: how the names that never carry the prefix begin.
        labels: where heads over labels are; a family without them has none that Formary builds.
        task_heads: the beginnings of names that belong to heads; those that Formary does not build are left out on
            reading.
        copies: {their name: their original}, names under which a tied weight may be stored again, or instead.
        may_lack: config.json -> patterns of names that stand for zeros when absent.
    """

    name: str
    model_types: tuple[str, ...]
    config: Callable[[HfConfig, frozenset[str]], ModelConfig]
    hf_config: Callable[[ModelConfig], HfConfig]
    rules: Callable[[ModelConfig], Table | None]
    prefix: str = ""
    outside: tuple[str, ...] = ()
    labels: LabelHeads | None = None
    task_heads: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    may_lack: Callable[[HfConfig], tuple[str, ...]] = lambda hf: ()

    def canonical(self, name: str) -> str:
        """Their name as a checkpoint with a head of this transformers generation spells it."""
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        bare = self.prefix and not name.startswith((self.prefix, *self.outside, *self.task_heads))
        return self.prefix + name if bare else name

    def rule(self, ours: str, config: ModelConfig) -> Rule | None:
        """The rule for one of our weights, with block number and ending filled in; None when there is none."""
        rules = self.rules(config)
        if rules is None:  # our own layout
            return Rule((ours,))
        if self.labels is not None and (place := self.labels.place(ours, config)) is not None:
            return Rule((place,))
        number = re.search(r"\.blocks\.(\d+)\.", ours)
        pattern = ours.replace(number[0], ".blocks.{i}.", 1) if number else ours
        found, ending = rules.get(pattern), ""
        if found is None:
            module, _, last = pattern.rpartition(".")
            found, ending = rules.get(module), f".{last}"
        if found is None:
            return None
        names = tuple(name.replace("{i}", number[1] if number else "") + ending for name in found.names)
        return dataclasses.replace(found, names=names)

    def read(self, hf: HfConfig, names: frozenset[str]) -> ModelConfig:
        """The config of a checkpoint, from its config.json and the (canonical) names of its weights."""
        config = self.config(hf, names)
        return config if self.labels is None else self.labels.read(config, hf, names)

    def write(self, config: ModelConfig) -> HfConfig:
        """The whole config.json for a config: what the family says, and what every family needs."""
        return {
            "model_type": self.model_types[0],
            **self.hf_config(config),
            **(self.labels.write(config) if self.labels is not None else {}),
            "bos_token_id": config.bos_id,
            "eos_token_id": config.eos_id,
            "pad_token_id": config.pad_id,
        }

    def represents(self, config: ModelConfig, names: frozenset[str]) -> bool:
        """Whether reading back what this family writes gives the same model (its names are `names` on our side)."""
        try:
            theirs: set[str] = set()
            for ours in names:
                rule = self.rule(ours, config)
                if rule is None:
                    return False
                theirs.update(rule.names)
            again = self.read(self.write(config), frozenset(theirs))
        except (CheckpointError, RecipeError, KeyError, AttributeError, AssertionError):
            return False
        return _essence(again) == _essence(config)


def _essence(config: ModelConfig) -> ModelConfig:
    """The config without what has no effect on its answers: dropout, initialisation, switches that nothing reads."""

    def stack(fields: TransformerConfig) -> TransformerConfig:
        fields = dataclasses.replace(fields, dropout=0.0)
        if fields.position != "rope":
            fields = dataclasses.replace(fields, rope_theta=10000.0, rope_scaling=None)
        if fields.position != "relative_bias":
            fields = dataclasses.replace(fields, relative_buckets=32, relative_max_distance=128)
        return fields

    changes: dict[str, Any] = {"initialisation": "gpt2", "transformer": stack(config.transformer)}
    if config.encoder is not None:
        changes["encoder"] = stack(config.encoder)
    if config.encoder is None:
        changes["decoder_start_id"] = None
    if config.image_size is not None and not config.labelled and config.head != "detect":
        changes["head"] = "none"
    head = changes.get("head", config.head)
    if head in ("none", "detect"):
        changes.update(head_bias=False)
    if head in ("none", "detect") or config.labelled:
        changes.update(tied_embeddings=True, logit_scale=1.0, logit_cap=None)
    if not config.labelled and config.head != "detect":
        changes.update(labels=())
    if head != "classify":
        changes.update(problem="single")
    if head != "classify" and config.topology != "two_towers":
        changes.update(pooling="first")
    if not config.pooler:
        changes.update(pooler_activation="tanh")
    return dataclasses.replace(config, **changes)


def join(ours: str, rule: Rule, pieces: list[Tensor], like: Tensor, stack: TransformerConfig) -> Tensor:
    """Our weight from theirs, in float32 and in memory of its own.

    Raises:
        CheckpointError: a piece has another shape than the config asks for; the message names it.
    """
    for name, piece, rows in zip(rule.names, pieces, _rows(rule, like.shape[0], stack)):
        expected = (rows, *like.shape[1:])
        if rule.transposed and len(expected) == 2:
            expected = (expected[1], expected[0])
        if rule.row:
            expected = (1, *expected)
        if rule.squeezed:
            expected = tuple(size for size in expected if size != 1)
        if tuple(piece.shape) != expected:
            raise CheckpointError(
                f"weight {name} has shape {tuple(piece.shape)}, config.json asks for {expected} (our {ours})"
            )
    turned = [piece.T if rule.transposed and piece.ndim == 2 else piece for piece in pieces]
    if len(turned) == 1:
        whole = turned[0].to(torch.float32).contiguous()
        if whole.data_ptr() == pieces[0].data_ptr():  # still the file, which may be replaced under us
            whole = whole.clone()
    else:
        whole = torch.cat([piece.to(torch.float32) for piece in turned])
    if rule.flipped:
        whole = whole.flip(0)
    return whole.reshape(like.shape)


def split(rule: Rule, whole: Tensor, stack: TransformerConfig) -> dict[str, Tensor]:
    """Their weights {name: tensor} from ours; the reverse of `join`."""
    if rule.flipped:
        whole = whole.flip(0)
    pieces = torch.split(whole, _rows(rule, whole.shape[0], stack))
    if rule.transposed and whole.ndim == 2:
        pieces = tuple(piece.T for piece in pieces)
    if rule.row:
        pieces = tuple(piece[None] for piece in pieces)
    if rule.squeezed:
        pieces = tuple(piece.squeeze() for piece in pieces)
    return {name: piece.contiguous() for name, piece in zip(rule.names, pieces)}


def _rows(rule: Rule, rows: int, stack: TransformerConfig) -> list[int]:
    """How many of our rows each of their pieces holds: one, equal parts, or query, key and value."""
    if len(rule.names) == 3:
        kv = stack.kv_head_count * stack.q_head_width
        return [stack.heads * stack.q_head_width, kv, kv]
    return [rows // len(rule.names)] * len(rule.names)


# What the families' `config` and `hf_config` are written with.


def activation(hf: HfConfig, key: str, default: str) -> Activation:
    """Our activation for theirs.

    Raises:
        CheckpointError: Formary does not have it.
    """
    name = hf.get(key) or default
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(
            f"{key} '{name}' is not an activation Formary knows ({known}) {nearest(name, ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


class Ids(TypedDict):
    """The ids of special tokens that a model's config knows."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


def ids(hf: HfConfig, *, bos: int | None = None, eos: int | None = None, pad: int | None = None) -> Ids:
    """The ids in config.json, or these defaults of the family; of several ends the first."""

    def first(key: str, default: int | None) -> int | None:
        value = hf.get(key, default)
        return next(iter(value), None) if isinstance(value, list) else value

    return Ids(bos_id=first("bos_token_id", bos), eos_id=first("eos_token_id", eos), pad_id=first("pad_token_id", pad))


def refuse(hf: HfConfig, key: str, *allowed: Any) -> None:
    """Raise CheckpointError when `key` is set to something whose numbers Formary would get wrong."""
    if key in hf and hf[key] not in allowed and hf[key] is not None:
        raise CheckpointError(f"{key} = {hf[key]!r} is not supported; Formary reads {' or '.join(map(repr, allowed))}")

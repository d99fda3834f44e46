"""Low-rank updates of frozen matrices: W x + (alpha / rank) B A x (Hu et al. 2021, section 4.1), and peft's folders.

Our joined matrices (query, key, value; gate and input) get an A and a B for each of the matrices a family of models
has in their place, so that an adapter can be written in peft's format and read from it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from formary import durable
from formary.errors import CheckpointError, RecipeError, StorageError
from formary.hub.checkpoint import representing
from formary.hub.families.family import Family, Rule, join, split
from formary.hub.weights import stack_of
from formary.model.config import ModelConfig
from formary.model.dropout import Dropout
from formary.model.topologies import Network, build
from formary.recipe.schema import Tune

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "span": "QUESTION_ANS", "none": "FEATURE_EXTRACTION"}
# Settings of peft that change what the stored matrices mean, where they are anything but empty.
_UNREAD = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "megatron_config"),
    *("kasa_config", "velora_config", "monteclora_config"),
)
# Settings that may have these values only; other ways to begin (PiSSA, OLoRA ...) change W itself too.
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}


class LoraLinear(nn.Module):
    """A frozen linear layer with trainable updates.

    Args:
        linear: the layer; its weight and bias keep their names.
        rows: how many of its output rows each update is for, in order.
        generator: of A's first values (Kaiming uniform as a linear layer's); B begins at 0, so nothing changes at first.
    """

    def __init__(self, linear: nn.Linear, rows: list[int], tune: Tune, generator: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rows = linear.in_features, linear.out_features, rows
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = tune.alpha / tune.rank, Dropout(tune.lora_dropout)
        bound, device = 1 / math.sqrt(linear.in_features), linear.weight.device  # Kaiming uniform with a = sqrt(5)
        self.lora_a = nn.ParameterList(
            torch.empty(tune.rank, linear.in_features).uniform_(-bound, bound, generator=generator).to(device)
            for _ in rows
        )
        self.lora_b = nn.ParameterList(torch.zeros(count, tune.rank, device=device) for count in rows)
        self.train(linear.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        # One narrow product for all A, and one for all B as a block-diagonal matrix, added where the frozen one ends.
        low = self.scale * F.linear(self.dropout(inputs), torch.cat(list(self.lora_a)))  # (..., pieces x rank)
        frozen = F.linear(inputs, self.weight, self.bias)
        joined = torch.block_diag(*self.lora_b)  # type: ignore[no-untyped-call]
        updated = torch.addmm(frozen.flatten(0, -2), low.flatten(0, -2), joined.T)
        return updated.view(frozen.shape)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with its updates added to the weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        delta = torch.cat([b @ a for a, b in zip(self.lora_a, self.lora_b)])
        linear.weight = nn.Parameter(self.weight + self.scale * delta)
        linear.bias = self.bias
        return linear.train(self.training)


def insert(network: Network, tune: Tune, *, seed: int) -> None:
    """Put updates beside the matrices of every block that `tune.targets` names."""
    generator, family = torch.Generator().manual_seed(seed), _family(network.config)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and _is_target(name, tune.targets):
            rows = _rows(_rule(family, name, network.config), name, module, network.config)
            _replace(network, name, LoraLinear(module, rows, tune, generator))


def merge(network: nn.Module) -> None:
    """Add every update to its weight and leave a plain network."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLinear):
            _replace(network, name, module.merged())


def save_adapter(folder: Path, network: Network, tune: Tune, *, base: str) -> None:
    """Write the updates of a network, and what else of it trains, as a folder that peft opens on the base model.

    Args:
        base: the path or hub id of the model that the updates belong to.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    config, family = network.config, _family(network.config)
    # A bare backbone's names have no prefix, as in `hub.checkpoint.save`.
    prefix = family.prefix if config.head == "none" else ""
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    trained: set[str] = set()  # modules whose weights are kept whole
    fan_in_fan_out = False
    for name, module in network.named_modules():
        if isinstance(module, LoraLinear):
            rule = _rule(family, name, config)
            fan_in_fan_out |= rule.transposed
            for theirs, a, b in zip(_layers(rule), module.lora_a, module.lora_b, strict=True):
                layer = theirs.removeprefix(prefix)
                targets.add(layer)
                tensors[f"{_PREFIX}{layer}.lora_A.weight"] = a.detach().cpu().contiguous()
                tensors[f"{_PREFIX}{layer}.lora_B.weight"] = b.detach().cpu().contiguous()
    known = _names(config)
    for name, parameter in network.named_parameters():
        whole = family.rule(name, config) if parameter.requires_grad and name in known else None
        if whole is None:
            continue
        for theirs, piece in split(whole, parameter.detach().cpu(), stack_of(name, config)).items():
            place, bare = theirs.removeprefix(family.prefix), theirs.removeprefix(prefix)
            of_head = name.startswith(("head.", "pooler."))  # which peft keeps as one module, whatever is in it
            trained.add(place.partition(".")[0] if of_head else bare.rpartition(".")[0])
            tensors[_PREFIX + bare] = piece
    decoding = "CAUSAL_LM" if config.topology == "decoder" else None
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if config.topology == "encoder_decoder" else _TASKS.get(config.head, decoding),
        "base_model_name_or_path": base,
        "r": tune.rank,
        "lora_alpha": tune.alpha,
        "lora_dropout": tune.lora_dropout,
        # In full: a last name such as "dense" also stands for layers that have no update.
        "target_modules": sorted(targets),
        "modules_to_save": sorted(trained) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "inference_mode": True,
    }
    with durable.new_folder(folder) as temporary:
        try:
            save_file(tensors, str(temporary / WEIGHTS), metadata={"format": "pt"})
        except SafetensorError as error:
            raise StorageError(f"{folder / WEIGHTS}: could not be written ({error})") from error
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: Path, network: Network) -> None:
    """Put the updates of an adapter folder (ours or peft's) into a network; `merge` makes it plain again.

    What the folder holds may train on, everything else is frozen. On an error the network is as it was.

    Raises:
        CheckpointError: it is not a LoRA folder, holds a pickle, or does not fit the network.
    """
    folder = Path(folder)
    tune, stored = _read(folder)
    config, family = network.config, _family(network.config)
    if any(isinstance(module, LoraLinear) for module in network.modules()):
        raise CheckpointError(f"{folder}: the network has low-rank updates already; merge them before it takes others")
    stored = {family.canonical(name.removeprefix(_PREFIX)): tensor for name, tensor in stored.items()}
    try:
        layers, used = _updates(network, family, stored, tune)
        weights: list[tuple[nn.Parameter, Tensor]] = []
        for name, parameter in network.named_parameters():
            rule = family.rule(name, config)
            if rule is not None and stored.keys() >= set(rule.names):
                pieces = [stored[theirs] for theirs in rule.names]
                weights.append((parameter, join(name, rule, pieces, parameter, stack_of(name, config))))
                used.update(rule.names)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if unused := sorted(set(stored) - used):
        raise CheckpointError(f"{folder}: belongs to another model; this one has no place for {unused[0]}")
    network.requires_grad_(False)
    for name, layer in layers.items():
        _replace(network, name, layer)
    for parameter, value in weights:
        parameter.data.copy_(value)
        parameter.requires_grad_(True)


def _family(config: ModelConfig) -> Family:
    """The family whose names an adapter of such a network has: the one that `hub.checkpoint.save` writes."""
    return representing(config, _names(config))


def _names(config: ModelConfig) -> frozenset[str]:
    """The weights of a plain network, without updates and without what a task has added."""
    return frozenset(name for name, _ in build(config, empty=True).named_parameters())


def _read(folder: Path) -> tuple[Tune, dict[str, Tensor]]:
    """The settings of an adapter folder and its tensors by peft's names."""
    if not (folder / WEIGHTS).is_file():
        pickled = (
            "; adapter_model.bin is a pickle, which is never opened" if (folder / "adapter_model.bin").exists() else ""
        )
        raise CheckpointError(f"{folder}: holds no {WEIGHTS}{pickled}")
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / WEIGHTS))
        if settings.get("peft_type") != "LORA":
            raise CheckpointError(f"{folder}: peft_type {settings.get('peft_type')} cannot be read, only LORA")
        unread = [f"{key} = {settings[key]!r}" for key in _UNREAD if settings.get(key)]
        for key, plain in _PLAIN.items():
            if key in settings and settings[key] not in plain:
                unread.append(f"{key} = {settings[key]!r}")
        if unread:
            raise CheckpointError(f"{folder}: only plain LoRA can be read, and {CONFIG} says {', '.join(unread)}")
        rank = settings["r"]
        scale = math.sqrt(rank) if settings.get("use_rslora") else 1.0  # rsLoRA scales by alpha / sqrt(rank)
        dropout = settings.get("lora_dropout") or 0.0
        return Tune(method="lora", rank=rank, alpha=settings["lora_alpha"] * scale, lora_dropout=dropout), tensors
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is not a whole safetensors file ({error})") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read as the settings of an adapter ({error})") from error


def _updates(
    network: Network, family: Family, stored: dict[str, Tensor], tune: Tune
) -> tuple[dict[str, LoraLinear], set[str]]:
    """A layer with the stored updates for every layer of ours that has some, and the names that were used."""
    layers: dict[str, LoraLinear] = {}
    used: set[str] = set()
    generator = torch.Generator().manual_seed(0)
    for name, module in network.named_modules():
        rule = family.rule(f"{name}.weight", network.config) if isinstance(module, nn.Linear) else None
        if rule is None or rule.flipped or not any(f"{key}.lora_A.weight" in stored for key in _layers(rule)):
            continue
        assert isinstance(module, nn.Linear)
        layer = LoraLinear(module, _rows(rule, name, module, network.config), tune, generator)
        for key, a, b in zip(_layers(rule), layer.lora_a, layer.lora_b, strict=True):
            names = [f"{key}.lora_A.weight", f"{key}.lora_B.weight"]
            if not any(theirs in stored for theirs in names):  # this one of the joined matrices has no update
                continue
            for theirs, parameter in zip(names, (a, b)):
                found = tuple(stored[theirs].shape) if theirs in stored else "nothing"
                if found != tuple(parameter.shape):
                    raise CheckpointError(f"{theirs} should have shape {tuple(parameter.shape)}, there is {found}")
                parameter.data.copy_(stored[theirs])
                used.add(theirs)
        layers[name] = layer
    return layers, used


def _is_target(name: str, targets: str) -> bool:
    if ".blocks." not in name:
        return False
    return ".attention." in name or ".cross." in name or (targets == "all" and ".ffn." in name)


def _rule(family: Family, name: str, config: ModelConfig) -> Rule:
    """Which of their matrices a layer stands for."""
    rule = family.rule(f"{name}.weight", config)
    if rule is None:
        raise RecipeError(f"train.tune: {name} has no place in the layout of the model's family, {family.name}")
    return rule


def _layers(rule: Rule) -> list[str]:
    """Their layers, whose weights the rule names."""
    return [name.removesuffix(".weight") for name in rule.names]


def _rows(rule: Rule, name: str, linear: nn.Linear, config: ModelConfig) -> list[int]:
    """Output rows of each of their matrices in ours."""
    pieces = split(rule, torch.empty(linear.weight.shape, device="meta"), stack_of(name, config))
    return [piece.shape[1 if rule.transposed else 0] for piece in pieces.values()]


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)

"""Low-rank updates of frozen matrices: W x + (alpha / rank) B A x (Hu et al. 2021, section 4.1), and peft's folders.

Our joined matrices (query, key, value; gate and input) get an A and a B for each of the matrices a family of models
has in their place, so that an adapter can be written in peft's format and read from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from formary import durable
from formary.errors import CheckpointError, RecipeError
from formary.hub.checkpoint import representing
from formary.hub.families.family import Rule
from formary.model.topologies import Network
from formary.recipe.schema import Tune

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


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
        self.scale, self.dropout = tune.alpha / tune.rank, tune.lora_dropout
        bound = 1 / math.sqrt(linear.in_features)  # Kaiming uniform with a = sqrt(5)
        self.lora_a = nn.ParameterList(
            torch.empty(tune.rank, linear.in_features).uniform_(-bound, bound, generator=generator) for _ in rows
        )
        self.lora_b = nn.ParameterList(torch.zeros(count, tune.rank) for count in rows)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        dropped = F.dropout(inputs, self.dropout, self.training) if self.dropout else inputs
        updates = [F.linear(F.linear(dropped, a), b) for a, b in zip(self.lora_a, self.lora_b)]
        return F.linear(inputs, self.weight, self.bias) + self.scale * torch.cat(updates, dim=-1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with its updates added to the weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        delta = torch.cat([b @ a for a, b in zip(self.lora_a, self.lora_b)])
        linear.weight = nn.Parameter(self.weight + self.scale * delta)
        linear.bias = self.bias
        return linear


def insert(network: Network, tune: Tune, *, seed: int) -> None:
    """Put updates beside the matrices of every block that `tune.targets` names."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and _is_target(name, tune.targets):
            rows = _piece_rows(_rule(network, name), module)
            _replace(network, name, LoraLinear(module, rows, tune, generator))


def merge(network: nn.Module) -> None:
    """Add every update to its weight and leave a plain network."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLinear):
            _replace(network, name, module.merged())


def save_adapter(folder: Path, network: Network, tune: Tune, *, base: str) -> None:
    """Write the updates of a network as a folder that peft opens on the base model.

    Args:
        base: the path or hub id of the model that the updates belong to.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    fan_in_fan_out = False
    for name, module in _lora_layers(network):
        rule = _rule(network, name)
        fan_in_fan_out |= rule.transposed
        for theirs, a, b in zip(rule.names, module.lora_a, module.lora_b, strict=True):
            layer = theirs.removesuffix(".weight")
            modules.add(layer.rpartition(".")[2])
            tensors[f"{_PREFIX}{layer}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"{_PREFIX}{layer}.lora_B.weight"] = b.detach().cpu().contiguous()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": tune.rank,
        "lora_alpha": tune.alpha,
        "lora_dropout": tune.lora_dropout,
        "target_modules": sorted(_exact(tensors) if _ambiguous(network, modules) else modules),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }
    with durable.new_folder(folder) as temporary:
        save_file(tensors, str(temporary / WEIGHTS), metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: Path, network: Network) -> None:
    """Put the updates of an adapter folder (ours or peft's) into a network; `merge` makes it plain again.

    Raises:
        CheckpointError: it is not a LoRA folder, holds a pickle, or does not fit the network.
    """
    if not (folder / WEIGHTS).is_file():
        pickled = (
            "; adapter_model.bin is a pickle, which is never opened" if (folder / "adapter_model.bin").exists() else ""
        )
        raise CheckpointError(f"{folder}: holds no {WEIGHTS}{pickled}")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if (
        config.get("peft_type") != "LORA"
        or config.get("use_dora")
        or config.get("rank_pattern")
        or config.get("bias", "none") != "none"
    ):
        raise CheckpointError(f"{folder}: only plain LoRA without biases, patterns or DoRA can be read")
    scale = math.sqrt(config["r"]) if config.get("use_rslora") else 1.0
    tune = Tune(method="lora", rank=config["r"], alpha=config["lora_alpha"] * scale)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(str(folder / WEIGHTS)).items()}
    used: set[str] = set()
    generator = torch.Generator().manual_seed(0)
    for name, module in list(network.named_modules()):
        rule = _rule(network, name) if isinstance(module, nn.Linear) and ".blocks." in name else None
        keys = [theirs.removesuffix(".weight") for theirs in rule.names] if rule else []
        if rule is None or not any(f"{key}.lora_A.weight" in tensors for key in keys):
            continue
        layer = LoraLinear(module, _piece_rows(rule, module), tune, generator)
        for key, a, b in zip(keys, layer.lora_a, layer.lora_b, strict=True):
            for letter, parameter in (("A", a), ("B", b)):
                stored = tensors.get(f"{key}.lora_{letter}.weight")
                used.add(f"{key}.lora_{letter}.weight")
                if stored is None:  # this one of the joined matrices has no update
                    parameter.data.zero_()
                elif stored.shape != parameter.shape:
                    raise CheckpointError(
                        f"{folder}: {key} has shape {tuple(stored.shape)}, not {tuple(parameter.shape)}"
                    )
                else:
                    parameter.data.copy_(stored)
        _replace(network, name, layer)
    if unused := sorted(set(tensors) - used):
        raise CheckpointError(f"{folder}: belongs to another model; it has updates for {unused[0]}")


def _lora_layers(network: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    for name, module in network.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def _is_target(name: str, targets: str) -> bool:
    if ".blocks." not in name:
        return False
    return "attention." in name or (targets == "all" and ".ffn." in name)


def _rule(network: Network, name: str) -> Rule:
    """Which of their matrices a layer stands for, by the family that represents the network."""
    parameters = frozenset(n.replace(".lora_a", "").replace(".lora_b", "") for n, _ in network.named_parameters())
    plain = frozenset(n for n in parameters if not n.rpartition(".")[2].isdigit())
    rule = representing(network.config, plain).rule(f"{name}.weight", network.config)
    if rule is None:
        raise RecipeError(f"train.tune: {name} has no place in the layout of the model's family")
    return rule


def _piece_rows(rule: Rule, linear: nn.Linear) -> list[int]:
    """Output rows of each of their matrices: query, key and value may differ, others share evenly."""
    count = len(rule.names)
    if count == 3 and linear.out_features != 3 * linear.in_features:
        kv = (linear.out_features - linear.in_features) // 2
        return [linear.out_features - 2 * kv, kv, kv]
    return [linear.out_features // count] * count


def _ambiguous(network: Network, modules: set[str]) -> bool:
    """Whether names alone would make peft update layers that have no update here (attention.output and ffn.output)."""
    counts: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".blocks." in name:
            for theirs in _rule(network, name).names:
                counts[theirs.removesuffix(".weight").rpartition(".")[2]] = 1
    return bool(modules & counts.keys()) or "dense" in modules


def _exact(tensors: dict[str, Tensor]) -> set[str]:
    return {name.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name}


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)

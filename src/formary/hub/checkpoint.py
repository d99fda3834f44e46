"""A checkpoint: a network with everything that a folder says about it, read and written in Hugging Face layout.

`transformers` opens what is written here, without custom code; families are tables in `hub.families`.
Tokenizers of folders belong to `data.tokenizer`, model cards to `pipeline`; training state to `train`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from formary.durable import new_file, write_json
from formary.errors import CheckpointError, RecipeError, StorageError, nearest
from formary.hub.families import FAMILIES
from formary.hub.families.family import Family, split
from formary.hub.resolve import resolve
from formary.hub.weights import Safetensors, assemble, config_in, stack_of
from formary.model.config import ModelConfig
from formary.model.topologies import Network

_PIXELS = "preprocessor_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a folder (or a GGUF file) holds.

    Attributes:
        network: with its weights in float32, in evaluation mode.
        config: of the network.
        folder: where it was read from: the folder with config.json, or the GGUF file.
        family: the name of its layout, a key of `hub.families.FAMILIES`.
        generation: generation_config.json, or {}.
        chat_template: the Jinja template that turns messages into a prompt, where there is one.
        formary: formary.json, or {}: what Formary noted about a model of its own (task, labels, recipe).
        tokenizer: of a GGUF file, which has its tokenizer inside; None for folders, see `data.tokenizer.load`.
        left_out: names of weights that belong to heads which Formary does not build, such as for multiple choice.
    """

    network: Network
    config: ModelConfig
    folder: Path
    family: str
    generation: dict[str, Any]
    chat_template: str | None
    formary: dict[str, Any]
    tokenizer: Tokenizer | None = None
    left_out: tuple[str, ...] = ()


def load(reference: str | Path) -> Checkpoint:
    """Read a checkpoint.

    Args:
        reference: a folder in Hugging Face layout (also of sentence-transformers), a .gguf file, or a hub id.

    Raises:
        CheckpointError: not found, not a family Formary has, weights missing, unexpected or of the wrong shape, or
            only a pickle there. The message says which and what to do.
        MissingExtra: a GGUF file, and the library that reads it is not installed.
    """
    path = resolve(reference)
    if path.suffix == ".gguf" and path.is_file():
        return _load_gguf(path)
    folder = _transformer_folder(path)
    hf = _settings(folder)
    try:
        family = family_of(hf)
        network, config, left_out = assemble(family, hf, Safetensors(folder))
    except (CheckpointError, RecipeError) as error:
        message = str(error)
        where = "" if str(folder) in message else f"{folder}: "
        raise CheckpointError(where + message) from error
    return Checkpoint(
        network=network,
        config=config,
        folder=folder,
        family=family.name,
        generation=_read_json(folder / "generation_config.json"),
        chat_template=_chat_template(folder),
        formary=_read_json(folder / "formary.json"),
        left_out=left_out,
    )


def config_of(reference: str | Path) -> ModelConfig:
    """The config of a checkpoint, without its weights.

    Raises:
        CheckpointError: not found, or not one that can be read. MissingExtra: of a GGUF file.
    """
    path = resolve(reference)
    if path.suffix == ".gguf" and path.is_file():
        from formary.hub.gguf import GgufFile  # its library is an extra

        file = GgufFile(path)
        return config_in(family_of(file.hf), file.hf, file)
    folder = _transformer_folder(path)
    hf = _settings(folder)
    try:
        return config_in(family_of(hf), hf, Safetensors(folder))
    except (CheckpointError, RecipeError) as error:
        message = str(error)
        raise CheckpointError(message if str(folder) in message else f"{folder}: {message}") from error


def _settings(folder: Path) -> dict[str, Any]:
    hf = _read_json(folder / "config.json", needed=True)
    if not isinstance(hf, dict):
        raise CheckpointError(f"{folder / 'config.json'} does not hold the settings of a model")
    pixels = _read_json(folder / _PIXELS)
    scaled = isinstance(pixels, dict) and pixels.get("do_normalize", True)
    said = {name: pixels[name] for name in ("image_mean", "image_std") if scaled and pixels.get(name)}
    return hf | said | ({"do_center_crop": True} if isinstance(pixels, dict) and pixels.get("do_center_crop") else {})


def _load_gguf(path: Path) -> Checkpoint:
    from formary.hub.gguf import GgufFile  # its library is an extra

    file = GgufFile(path)
    try:
        network, config, _ = assemble(family_of(file.hf), file.hf, file)
    except (CheckpointError, RecipeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(
        network=network,
        config=config,
        folder=path,
        family=file.hf["model_type"],
        generation=file.generation,
        chat_template=file.chat_template,
        formary={},
        tokenizer=file.tokenizer(),
    )


def save(
    folder: Path, network: Network, *, generation: dict[str, Any] | None = None, formary: dict[str, Any] | None = None
) -> None:
    """Write config.json, model.safetensors, generation_config.json and formary.json into an existing folder.

    The layout is the Hugging Face family that represents the network's config, or our own when none does.

    Args:
        generation: defaults for generation; the ids of the config are added where it does not name them.
        formary: what formary.json shall say; no such file when left out.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    folder, config = Path(folder), network.config
    named = dict(network.named_parameters())
    family = representing(config, frozenset(named))
    tensors: dict[str, Tensor] = {}
    for ours, parameter in named.items():
        rule = family.rule(ours, config)
        assert rule is not None, f"{family.name} represents the config, so it has a place for {ours}"
        tensors.update(split(rule, parameter.detach().cpu(), stack_of(ours, config)))
    if config.head == "none" and family.prefix:  # a bare backbone's names have no prefix
        tensors = {name.removeprefix(family.prefix): tensor for name, tensor in tensors.items()}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with new_file(folder / "model.safetensors") as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise StorageError(f"{folder / 'model.safetensors'}: could not be written ({error})") from error
    write_json(folder / "config.json", {**family.write(config), "torch_dtype": dtype})
    if config.image_size is not None and config.image_mean and config.image_std:
        write_json(folder / _PIXELS, _preprocessor(config))
    if config.topology not in ("encoder", "two_towers") and not config.labelled:
        write_json(folder / "generation_config.json", {**_generation_ids(config), **(generation or {})})
    if formary is not None:
        write_json(folder / "formary.json", formary)


def representing(config: ModelConfig, names: frozenset[str]) -> Family:
    """The first family whose layout holds this config and our weights' names without loss; in the end our own."""
    return next(family for family in FAMILIES.values() if family.represents(config, names))


def family_of(hf: dict[str, Any]) -> Family:
    """The family that reads a config.json.

    Raises:
        CheckpointError: none does; the message lists the model types that can be read.
    """
    model_type = hf.get("model_type")
    known = {kind: family for family in FAMILIES.values() for kind in family.model_types}
    if model_type in known:
        return known[model_type]
    hint = nearest(str(model_type), known)
    raise CheckpointError(f"model_type '{model_type}' is not one Formary reads ({', '.join(known)}) {hint}".rstrip())


def _preprocessor(config: ModelConfig) -> dict[str, Any]:
    """How pictures become pixels, as transformers reads it."""
    kind, square = "YolosImageProcessor" if config.detection_tokens else "ViTImageProcessor", config.image_size
    size: dict[str, Any] = {"size": {"height": square, "width": square}}
    if config.image_cut:
        kind, size = "CLIPImageProcessor", {"size": {"shortest_edge": square}, "do_center_crop": True}
        size["crop_size"] = {"height": square, "width": square}
    return {
        "image_processor_type": kind,
        "do_resize": True,
        **size,
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def _generation_ids(config: ModelConfig) -> dict[str, int]:
    ids = {
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        "decoder_start_token_id": config.decoder_start_id,
    }
    return {key: value for key, value in ids.items() if value is not None}


def _transformer_folder(folder: Path) -> Path:
    """The folder itself, or the one inside it where sentence-transformers keeps the Transformer."""
    modules = _read_json(folder / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        inner = module.get("path", "") if isinstance(module, dict) else ""
        plain = inner not in ("", "..") and Path(inner).name == inner  # stays inside of the folder
        if plain and "model_type" in _read_json(folder / inner / "config.json"):
            return folder / inner
    return folder


def _chat_template(folder: Path) -> str | None:
    """From chat_template.jinja, else from tokenizer_config.json; of several templates the one named default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) else None


def _read_json(path: Path, *, needed: bool = False) -> Any:
    if not path.is_file() and not needed:
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not a model folder: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error})") from error

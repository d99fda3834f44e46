"""Where weights come from: named tensors, read one at a time, and the network they are assembled into.

A source lists names and reads tensors in the Hugging Face layout; safetensors here, GGUF in `hub.gguf`.
The memory needed is the network and one tensor: it is built empty and filled weight by weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from formary.errors import CheckpointError
from formary.hub.families.family import BUFFERS, Family, join
from formary.model.config import ModelConfig, TransformerConfig
from formary.model.embedders import TextEmbedder
from formary.model.heads import LanguageHead
from formary.model.topologies import EncoderDecoder, Network, build

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Source(Protocol):
    """Named tensors of a checkpoint, in the Hugging Face layout."""

    @property
    def names(self) -> Iterable[str]:
        """All names, as the checkpoint spells them."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, in the precision it is stored in."""
        ...


class Safetensors:
    """The safetensors files of a folder: one, or several with an index.

    Raises:
        CheckpointError: there are none (a pickle instead is refused), one is damaged, or the index names files that
            are missing or outside of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                file = safe_open(path, framework="pt")
                names: list[str] = file.keys()  # type: ignore[no-untyped-call]
                self._files.update(dict.fromkeys(names, file))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a whole safetensors file ({error}); copy or download it again"
                ) from error

    @property
    def names(self) -> Iterable[str]:
        """All names, as the files spell them."""
        return self._files

    def read(self, name: str) -> Tensor:
        """One tensor, in the precision it is stored in."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        return _indexed(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = [path for path in files if path.suffix == ".safetensors" and not path.name.startswith("adapter_")]
    if len(found) == 1:
        return found
    if found:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{folder} has several safetensors files ({names}) and no {INDEX} that joins them")
    pickles = [path.name for path in files if path.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{folder}: the weights are in {', '.join(pickles)}, a pickle, and opening a pickle can run any code "
            f"hidden in it; Formary never does. Convert it once on a machine you can lose, for example with "
            f"transformers: AutoModel.from_pretrained(folder).save_pretrained(new_folder) (take the AutoModelFor... "
            f"class of its head), and use the new folder with its model.safetensors"
        )
    raise CheckpointError(f"{folder}: there is no model.safetensors; the folder holds {_some(p.name for p in files)}")


def _indexed(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files ({error})") from error
    if outside or not files:
        raise CheckpointError(
            f"{index} names files that are not safetensors files of the same folder: {_some(outside)}"
        )
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {INDEX} names files that are not there: {_some(missing)}")
    return [folder / name for name in files]


def assemble(family: Family, hf: dict[str, Any], source: Source) -> tuple[Network, ModelConfig, tuple[str, ...]]:
    """The network of a checkpoint in float32, its config, and the names of task heads' weights left out.

    Raises:
        CheckpointError: a weight is missing, unexpected or of the wrong shape; the message names it.
    """
    spelled = _spelled(family, source)
    config = config_in(family, hf, source)
    layers = config.transformer.layers + (config.encoder.layers if config.encoder else 0)
    if layers > len(spelled):
        raise CheckpointError(f"config.json asks for {layers} layers, but there are only {len(spelled)} weights")
    network = build(config, empty=True)
    lacking = family.may_lack(hf)
    taken: dict[str, str] = {}  # canonical name: the name it was read under
    missing: list[str] = []
    for ours, like in list(network.named_parameters()):
        rule = family.rule(ours, config)
        if rule is None:
            raise CheckpointError(f"our weight {ours} has no place in the layout of {family.name}")
        found = {name: where for name in rule.names if (where := _find(name, family, spelled)) is not None}
        absent = [name for name in rule.names if name not in found]
        if absent and not found and all(_matches(name, lacking) for name in absent):
            _put(network, ours, torch.zeros(like.shape))
            continue
        missing += absent
        if not absent:
            taken.update(found)
            pieces = [source.read(spelled[found[name]]) for name in rule.names]
            _put(network, ours, join(ours, rule, pieces, like, stack_of(ours, config)))
    if missing:
        raise CheckpointError(f"weights are missing: {_some(missing)} (config.json asks for a {family.name} model)")
    unread = set(spelled) - set(taken.values())
    _check_copies(family, source, spelled, taken, unread)
    left_out = {name for name in unread if name.startswith(family.task_heads)} if family.task_heads else set()
    unread -= left_out | set(family.copies)
    if unread:
        raise CheckpointError(
            f"weights that {family.name} does not have: {_some(sorted(spelled[name] for name in unread))}; "
            f"is config.json the one that belongs to them?"
        )
    _tie(network)
    return network.eval(), config, tuple(sorted(spelled[name] for name in left_out))


def config_in(family: Family, hf: dict[str, Any], source: Source) -> ModelConfig:
    """The config of a checkpoint, by its config.json and the names of its weights; none of these is read.

    Raises:
        CheckpointError: the config cannot be understood.
    """
    try:
        return family.read(hf, frozenset(_spelled(family, source)))
    except KeyError as error:
        raise CheckpointError(f"config.json: {error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json holds a value of the wrong kind ({error})") from error


def _spelled(family: Family, source: Source) -> dict[str, str]:
    """The names of weights as the layout has them, with those in the files."""
    return {family.canonical(name): name for name in source.names if not BUFFERS.search(name)}


def stack_of(ours: str, config: ModelConfig) -> TransformerConfig:
    """The stack that one of our weights belongs to, whose heads say how query, key and value share its rows."""
    return config.encoder if ours.startswith("encoder.") and config.encoder is not None else config.transformer


def _find(name: str, family: Family, spelled: dict[str, str]) -> str | None:
    """The name itself, or that of a copy of it, whichever the checkpoint has."""
    candidates = [name, *(copy for copy, original in family.copies.items() if original == name)]
    return next((candidate for candidate in candidates if candidate in spelled), None)


def _check_copies(
    family: Family, source: Source, spelled: dict[str, str], taken: dict[str, str], unread: set[str]
) -> None:
    for copy, original in family.copies.items():
        if copy in unread and original in taken:
            kept = source.read(spelled[taken[original]])
            if not torch.equal(source.read(spelled[copy]), kept):
                hint = "Formary has one weight for both"
                if "head" in copy or "decoder.weight" in copy or "projector" in copy:
                    hint = "if the weights are right, set tie_word_embeddings to false in config.json"
                raise CheckpointError(f"{copy} should be the same as {original} (tied weights) but differs; {hint}")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _put(network: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, last = name.rpartition(".")
    setattr(network.get_submodule(module), last, nn.Parameter(tensor))


def _tie(network: Network) -> None:
    embedder = network.decoder_embedder if isinstance(network, EncoderDecoder) else network.embedder
    head = network.head
    if isinstance(head, LanguageHead) and network.config.tied_embeddings and isinstance(embedder, TextEmbedder):
        head.weight = embedder.tokens.weight


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    rest = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
    return (", ".join(listed[:6]) or "nothing") + rest

"""From what a user types to a place on disk: a folder, a GGUF file, or a hub id fetched through huggingface_hub.

What is local wins. Without a network the answer comes within seconds and says where to put the files.
Only configs, tokenizers and safetensors are ever fetched.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

from formary.errors import CheckpointError
from formary.recipe.bundled import PACKAGE, located

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_FETCHED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
_PATIENCE = 4.0  # seconds to reach the hub


def resolve(reference: str | Path) -> Path:
    """The folder or .gguf file behind a reference.

    Args:
        reference: a folder, a .gguf file, a file of a model folder, package:NAME/path inside an installed package, or
            a hub id such as "gpt2" or "owner/name".

    Raises:
        CheckpointError: nothing is there, and it cannot be fetched; the message says where to put the files.
        RecipeError: the package is not installed, or the path leaves it.
    """
    path = Path(reference).expanduser()
    if str(reference).startswith(PACKAGE):
        path = located(str(reference), Path())
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        if path.suffix == ".safetensors" or path.name == "config.json":
            return path.parent
        raise CheckpointError(f"{path} is neither a model folder nor a .gguf file")
    if path.suffix in (".gguf", ".safetensors") or not _HUB_ID.match(str(reference)):
        raise CheckpointError(f"{path.absolute()} does not exist; a model is a folder, a .gguf file or a hub id")
    return _fetch(str(reference), path)


def _fetch(hub_id: str, local: Path) -> Path:
    """The snapshot of a hub id: the newest when the hub answers, else the one fetched earlier."""
    from huggingface_hub import snapshot_download

    answer = _ask(hub_id)
    if isinstance(answer, list):
        if not any(name.endswith(".safetensors") for name in answer):
            raise CheckpointError(
                f"'{hub_id}' has no safetensors weights on the hub, and Formary opens nothing else from there"
            )
        try:
            return Path(snapshot_download(hub_id, allow_patterns=_FETCHED))
        except Exception as error:  # many kinds, from network, disk and hub alike
            raise CheckpointError(f"'{hub_id}' could not be fetched from the hub: {error}") from error
    try:
        cached = Path(snapshot_download(hub_id, local_files_only=True))
        if (cached / "config.json").is_file():
            return cached
    except Exception:  # not fetched before
        pass
    raise CheckpointError(
        f"'{hub_id}' is neither a local folder nor could it be fetched as a hub id ({answer}). Put its files "
        f"(config.json, model.safetensors, tokenizer.json and, where there are any, generation_config.json and "
        f"tokenizer_config.json) into {local.absolute()}, or name the folder or .gguf file that has them"
    )


def _ask(hub_id: str) -> list[str] | str:
    """The names of the files of a hub id, or why there is no answer; within `_PATIENCE` seconds.

    In a thread of its own, because looking up a host name has no time limit of its own.
    """
    if _offline():
        return "HF_HUB_OFFLINE is set"
    answers: list[list[str] | str] = []

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(hub_id, timeout=_PATIENCE)
            answers.append([file.rfilename for file in info.siblings or []])
        except Exception as error:  # network, name, permission: the message says which
            answers.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answers[0] if answers else f"the hub did not answer within {_PATIENCE:.0f} seconds"


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")

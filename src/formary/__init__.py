"""Formary: own a Transformer from raw data to a served model, on the machine you already have.

The public API is small: `load` a model (a `Model`: generate, stream, chat, score, fill), `run` a `Recipe`.
Names are imported when they are first used, so that `import formary` is instant and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from formary.infer.loaded import Model as Model
    from formary.infer.loaded import load as load
    from formary.pipeline.run import run as run
    from formary.recipe import Recipe as Recipe
    from formary.version import __version__ as __version__

_HOMES = {
    "Model": "formary.infer.loaded",
    "load": "formary.infer.loaded",
    "__version__": "formary.version",
    "Recipe": "formary.recipe",
    "run": "formary.pipeline.run",
}

__all__ = ["Model", "Recipe", "__version__", "load", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'formary' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

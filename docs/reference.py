"""Writes the API reference: one Markdown page per room, from the docstrings, and the recipe tables of docs/guide.md.

Source files are parsed, not imported, so what is written is what is there. `python docs/reference.py FOLDER`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "formary"
GUIDE = ROOT / "docs" / "guide.md"

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def write_reference(folder: Path) -> list[Path]:
    """Write index.md and a page for each room (package) into `folder`; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    alone = [path for path in sorted(SOURCE.glob("*.py")) if not path.name.startswith("__")]
    pages = {"formary": [SOURCE / "__init__.py", *alone]}
    for room in sorted(path.parent for path in SOURCE.glob("*/__init__.py")):
        pages[room.name] = sorted(room.rglob("*.py"))
    index = ["# API reference", "", _docstring(SOURCE / "__init__.py"), ""]
    written = []
    for name, files in pages.items():
        index.append(f"- [{name}]({name}.md): {_docstring(files[0]).splitlines()[0]}")
        path = folder / f"{name}.md"
        path.write_text("\n".join([f"# {name}", "", *(line for file in files for line in _module(file))]), "utf-8")
        written.append(path)
    (folder / "index.md").write_text("\n".join(index) + "\n", "utf-8")
    return [folder / "index.md", *written]


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def _module(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text("utf-8"))
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    yield from (f"## {'.'.join(part for part in parts if part != '__init__')}", "", ast.get_docstring(tree) or "", "")
    for node in tree.body:
        if isinstance(node, Documented) and _public(node):
            yield from _entry(node, "###")


def _entry(node: Documented, heading: str, owner: str = "") -> Iterator[str]:
    text = ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        lines = [f"class {node.name}" + (f"({bases})" if bases else "")]
        lines += [f"    {ast.unparse(part)}" for part in node.body if isinstance(part, ast.AnnAssign) and _named(part)]
    else:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        lines = [f"{owner}{node.name}({ast.unparse(node.args)}){returns}"]
    yield from (f"{heading} {owner}{node.name}", "", "```text", *lines, "```", "", text, "")
    for part in node.body if isinstance(node, ast.ClassDef) else []:
        method = isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
        if method and _public(part) and ast.get_docstring(part):
            yield from _entry(part, heading + "#", f"{node.name}.")


def _public(node: Documented) -> bool:
    return not node.name.startswith("_")


def _named(field: ast.AnnAssign) -> bool:
    return isinstance(field.target, ast.Name) and not field.target.id.startswith("_")


# The tables of recipe fields in the guide ---------------------------------------------------------------------------


def with_recipe_tables(guide: str) -> str:
    """`guide` with the table between `<!-- fields: SECTION -->` and `<!-- end -->` made anew from the schema."""
    pattern = re.compile(r"(<!-- fields: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda found: found[1] + _table(found[2]) + found[3], guide)


def _table(dotted: str) -> str:
    from formary.recipe.schema import Recipe, Section

    section: type[Section] = Recipe
    for name in dotted.split(".") if dotted != "recipe" else []:
        section = _sections(section.model_fields[name].annotation)[0]
    rows = ["| field | default | what it is |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        if _sections(field.annotation):
            continue
        default = "*needed*" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
        about = (field.description or "").replace("<", "&lt;")
        if choices := _choices(field.annotation):
            listed = "one of " + ", ".join(f"`{choice}`" for choice in choices)
            about = f"{listed}; {about}" if about else listed
        rows.append(f"| `{name}` | {default} | {about} |")
    return "\n".join(rows) + "\n"


def _sections(annotation: Any) -> list[Any]:
    """The sections that a field may hold: one, also where it may be left out (`Privacy | None`)."""
    from formary.recipe.schema import Section

    return [
        kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, Section)
    ]


def _choices(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _yaml(value: Any) -> str:
    import yaml

    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    made = write_reference(target)
    GUIDE.write_text(with_recipe_tables(GUIDE.read_text("utf-8")), "utf-8")
    print(f"{len(made)} pages in {target}; begin with {made[0]}")

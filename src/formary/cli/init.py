"""`formary init DATA`: look at some data, guess a recipe for it, and write it with a reason beside every value.

Takes the sample (a few megabytes, never all of a large file) and the machine's speed; the guesses are `recipe.guess`'s.
It changes nothing but the recipe file it writes.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
import os
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from formary.errors import DataError, RecipeError

if TYPE_CHECKING:
    from formary.data.source import Source
    from formary.recipe.sample import Sample

SAMPLE_CHARS = 4_000_000
"""How much text is looked at, of all files together."""

_MOST_FILES = 8
_MOST_ROWS = 5000
# Tried in this order where a file is not UTF-8. The last one accepts nearly anything, so it comes last.
_OTHER_ENCODINGS = ("utf-16", "gb18030", "cp1252")
# File names that say what the file is for: x_train.txt, valid.jsonl, x.test.csv.gz.
_PART = re.compile(r"(?:^|(?<=[_.-]))(train|training|valid|validation|val|dev|test|t10k)(?=[_.-]|$)")
_PART_NAMES = {"train": "train", "training": "train", "test": "test", "t10k": "test"} | dict.fromkeys(
    ("valid", "validation", "val", "dev"), "validation"
)


def init(
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help="Files, folders or globs.")],
    out: Annotated[Path, typer.Option(help="Where to write the recipe.")] = Path("recipe.yaml"),
    task: Annotated[
        str | None, typer.Option(help="The task, e.g. classify or causal_lm; guessed when left out.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the recipe that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was seen as JSON.")] = False,
) -> None:
    """Look at data and write a commented recipe for it, ready to run."""
    if out.exists() and not force:
        raise RecipeError(f"{out} is already there; name another file with --out, or overwrite it with --force")
    from formary import durable
    from formary.recipe.guess import guess
    from formary.recipe.guess_pictures import guess_pictures
    from formary.recipe.guess_rows import guess_rows
    from formary.recipe.reading import parse

    sample = take_sample(data, relative_to=out.parent)
    name, gflops = _recipe_name(data[0]), _speed()
    found = (
        guess_pictures(sample, name=name, task=task, gflops=gflops)
        or guess_rows(sample, name=name, task=task, gflops=gflops)
        or guess(
            sample,
            name=name,
            task=task,
            gflops=gflops,
            chinese_words=importlib.util.find_spec("jieba") is not None,
        )
    )
    texts = {out.with_name(file): recipe for file, recipe in found.before} | {out: found.recipe}
    for path, recipe in texts.items():
        if path.exists() and not force:
            raise RecipeError(f"{path} is already there; move it away, or overwrite it with --force")
        parse(recipe, name=str(path))  # what is written must be accepted by `formary run`
    for path, recipe in texts.items():
        durable.write_text(path, recipe)
    if as_json:
        facts: dict[str, Any] = {"recipe": str(out), "task": found.task, "saw": list(found.saw)}
        print(json.dumps(facts | {"parameters": found.parameters, "seconds": round(found.seconds)}, ensure_ascii=False))
        return
    print("saw:")
    for sentence in found.saw:
        print(f"  {sentence}")
    for file, _ in found.before:
        print(f"\nwrote {out.with_name(file)}, which is run first", end="")
    minutes = f"{found.seconds / 60:.0f} minutes" if found.seconds >= 90 else f"{found.seconds:.0f} seconds"
    print(
        f"\nwrote {out}: {found.task}, about {found.parameters / 1e6:.1f} million parameters, roughly {minutes} of training"
    )
    print(f"next: look at its comments, then\n  formary run {out}")


def take_sample(data: list[str], *, relative_to: Path) -> Sample:
    """Look at the beginning of some of the files in `data`.

    Args:
        data: files, folders or globs, from the current folder.
        relative_to: the folder of the recipe, from which its paths will count.

    Raises:
        DataError: nothing is there, it cannot be read, or the files are of several kinds.
    """
    from formary.cli.init_pictures import pictures_in, with_parts
    from formary.data.source import expand
    from formary.recipe.sample import Sample

    parts = _folder_parts(data) or _parts(with_parts(expand(data)))
    sources = parts["sources"]
    looked = expand(list(map(str, sources)))
    encoding, kind, rows, share = _look(looked)
    given = data if not parts["validation"] and not parts["test"] else list(map(str, sources))
    return Sample(
        sources=tuple(_from(relative_to, source) for source in given),
        kind=kind,
        files=len(looked),
        rows=rows,
        share=share,
        validation=tuple(_from(relative_to, str(path)) for path in parts["validation"]),
        test=tuple(_from(relative_to, str(path)) for path in parts["test"]),
        encoding=encoding,
        pictures=pictures_in(rows, looked, max(1, round(len(rows) / share))),
    )


def _folder_parts(data: list[str]) -> dict[str, list[Path]] | None:
    """Folders of pictures by what they are for, where a folder has one called train and others beside it."""
    from formary.data.files import expand, kind_of

    folder = Path(data[0]).expanduser()
    if len(data) > 1 or not folder.is_dir():
        return None
    parent = folder.parent if _part_of(folder) == "train" else folder
    parts: dict[str, list[Path]] = {"sources": [], "validation": [], "test": []}
    for inner in sorted(path for path in parent.iterdir() if path.is_dir() and _PART.fullmatch(path.name.lower())):
        parts[_part_of(inner).replace("train", "sources")].append(inner)
    if not parts["sources"] or not (parts["validation"] or parts["test"]):
        return None
    return parts if all(kind_of(path)[0] == "picture" for path in expand([str(parts["sources"][0])])) else None


def _parts(paths: list[Path]) -> dict[str, list[Path]]:
    """The files by what they are for, where their names or those of their neighbours say so beside one for training."""
    from formary.cli.init_pictures import with_parts
    from formary.data.files import file_of

    if len(paths) == 1 and _part_of(paths[0]) == "train":
        only = paths[0]
        inside = file_of(only) != only
        paths = (
            with_parts([file_of(only)]) if inside else sorted(path for path in only.parent.iterdir() if path.is_file())
        )
        paths = [path for path in paths if inside or _without_part(path) == _without_part(only)]
    parts: dict[str, list[Path]] = {"sources": [], "validation": [], "test": []}
    if "train" not in map(_part_of, paths):
        return parts | {"sources": paths}
    for path in paths:
        parts[{"train": "sources", "": "sources"}.get(_part_of(path), _part_of(path))].append(path)
    return parts


def _part_of(path: Path) -> str:
    """train, validation, test, or nothing."""
    found = _PART.search(path.name.lower())
    return _PART_NAMES[found[1]] if found else ""


def _without_part(path: Path) -> str:
    return _PART.sub("*", path.name.lower())


def _look(paths: list[Path]) -> tuple[str, str, list[dict[str, Any]], float]:
    """(encoding, kind, rows, share of the data that they are), from the first encoding that makes sense."""
    from formary.cli.init_pictures import folder_rows
    from formary.data.files import kind_of, size_of

    if {kind_of(path)[0] for path in paths} == {"picture"}:
        return "utf-8", "picture", folder_rows(paths), 1.0
    files = min(len(paths), _MOST_FILES)
    looked = [paths[i * len(paths) // files] for i in range(files)]
    first_error: DataError | None = None
    for encoding in ("utf-8", *_OTHER_ENCODINGS):
        if encoding == "utf-16" and not _begins_utf16(looked[0]):
            continue
        try:
            kind, rows, share = _rows(looked, encoding)
        except DataError as error:
            first_error = first_error or error
            continue
        if encoding != "gb18030" or _looks_chinese(rows):
            size = sum(map(size_of, looked)) / max(1, sum(map(size_of, paths)))
            return encoding, kind, rows, share * size
    assert first_error is not None
    raise first_error


def _rows(paths: list[Path], encoding: str) -> tuple[str, list[dict[str, Any]], float]:
    """(kind, first rows of each file, share of the files' bytes that were read for them)."""
    from formary.data.source import Source

    rows: list[dict[str, Any]] = []
    kinds: set[str] = set()
    done = total = 0.0
    for path in paths:
        source = Source([str(path)], encoding=encoding, required=())
        kinds.add(source.kind(path))
        read = _text_head if source.kind(path) == "text" else _table_head
        head, share = read(source, 1 / len(paths))
        rows += head
        done += share * source.bytes_total
        total += source.bytes_total
    if len(kinds) > 1:
        raise DataError(
            f"files of several kinds ({', '.join(sorted(kinds))}): name those of one kind, e.g. with a glob"
        )
    return kinds.pop(), rows, min(1.0, done / max(1.0, total))


def _text_head(source: Source, part: float) -> tuple[list[dict[str, Any]], float]:
    """The beginning of a plain text, as one row."""
    values = next(iter(source)).values
    text = values["text"]
    kept = text[: max(1000, int(SAMPLE_CHARS * part))]
    read = source.bytes_done / max(1, source.bytes_total)  # longer texts come in pieces: then this is not all
    return [{"text": kept}], read * len(kept) / len(text)


def _table_head(source: Source, part: float) -> tuple[list[dict[str, Any]], float]:
    """The first rows of a table."""
    from formary.data.arrays import row_count

    rows: list[dict[str, Any]] = []
    chars, passed = 0, 0
    if source.kind(path := source.paths[0]) in ("npz", "idx"):
        rows = [row.values for row in islice(source, max(1, int(_MOST_ROWS * part)))]
        return rows, len(rows) / row_count(path, source.name(path))
    before = source.bytes_done
    for row in source:
        if source.bytes_done != before:
            # All rows of the bytes read before have come by: only here is it known which share the rows are.
            passed, before = before, source.bytes_done
            if passed and (chars > SAMPLE_CHARS * part or len(rows) >= _MOST_ROWS * part):
                return rows, passed / source.bytes_total
        rows.append(row.values)
        chars += sum(map(_length, row.values.values()))
        if len(rows) >= 10 * _MOST_ROWS:  # a kind of file that does not tell how far it has been read
            return rows, min(1.0, len(json.dumps(rows, default=str)) / source.bytes_total)
    return rows, 1.0


def _length(value: Any) -> int:
    """Of a text or of the bytes of a picture."""
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    return len(value) if isinstance(value, str | bytes) else 0


def _begins_utf16(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        return stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _looks_chinese(rows: list[dict[str, Any]]) -> bool:
    """Whether text read as gb18030 is Chinese, and not accented letters of cp1252 each taken with the letter after it.

    Those give characters whose second byte is an ASCII letter; half of any Chinese text is in GB 2312, which has none.
    """
    text = "".join(value for row in rows[:200] for value in row.values() if isinstance(value, str))[:200_000]
    beyond = "".join(character for character in text if not character.isascii())
    return len(beyond.encode("gb2312", "ignore")) > len(beyond)  # two bytes each


def _from(folder: Path, source: str) -> str:
    """A path as the recipe in `folder` names it: relative where it was given so and is not far away."""
    path = Path(source).expanduser()
    if path.is_absolute():
        return str(path)
    relative = Path(os.path.relpath(path, folder))
    return str(path.absolute()) if relative.parts[:3] == ("..",) * 3 else relative.as_posix()


def _recipe_name(source: str) -> str:
    """A name for the run: the file's, without what it is for; only letters, digits, dots and dashes are allowed."""
    stem = Path(source).absolute().name.split(".")[0]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", _PART.sub("", stem)).strip("-_")
    return stem.lower() or "my-data"


def _speed() -> float:
    """GFLOP/s of matrix products as a run would compute them on this machine, measured in a moment."""
    try:
        from formary.cli.doctor import measure
        from formary.recipe.schema import Machine
        from formary.train.machine import runtime
    except ImportError:
        return 50.0
    settled = runtime(Machine())
    if settled.device.type == "cuda":
        return 10_000.0  # not measured: any graphics card is so much faster that minutes stop mattering
    found = measure(0.2, read_bytes=2**20)
    return max(1.0, found["bf16_gflops" if settled.precision == "bfloat16" else "fp32_gflops"])

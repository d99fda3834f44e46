"""From rows with pictures to a commented recipe: a label for each (a ViT), or a text (an encoder-decoder).

Which column holds pictures and how large they are was seen before (`sample.Pictures`); the rest follows from the other columns'
names and values. A guess is a start, to be edited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from formary.errors import DataError
from formary.recipe.commented import Choice, Lines, duration, percent, rounded
from formary.recipe.guess import Guess
from formary.recipe.sample import Pictures, Sample, files_of, look, names_of, text_length
from formary.recipe.sizes import token_counts, tokenizer_for

Rows = Sequence[Mapping[str, Any]]

_LABELS = ("label", "labels", "class", "classes", "category", "target", "y", "species", "tag", "标签", "类别", "分类")
_CAPTIONS = ("caption", "captions", "text", "description", "sentence", "alt", "title", "说明", "描述", "标题")
_TEXTED = ("caption", "match_image_text")  # tasks with a text for each picture
_FOLDER = "@folder"
_NO_LABEL = (-1, None)  # fills up lists of boxes
_LARGEST = 64  # pixels of a picture's side that a small model reads
_LARGEST_SCENE = 128  # where small things in it are looked for
_ALONG = 8  # patches along a side of a picture of this size
_EPOCHS = ((500, 100), (2_000, 60), (20_000, 30), (100_000, 12), (None, 4))  # passes over so many pictures
_LONGEST = 1800.0  # seconds that a first run may take
_REACHED = 0.35  # share of the measured matrix speed: the matrices of small models are small
_BATCHES = ((1_000, 32), (20_000, 64), (None, 128))
_SIZES = ((2_000, "4x64"), (None, "6x96"))


@dataclass(frozen=True)
class _Size:
    """How a picture is read."""

    side: int
    patch: int
    why: str

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2


@dataclass(frozen=True)
class _Found:
    """Columns of boxes and of what is in each."""

    boxes: str
    labels: str
    corners: bool  # left, top, right, bottom; else x, y, width, height
    most: int  # things in a picture
    names: tuple[str, ...]


def guess_pictures(sample: Sample, *, name: str, task: str | None = None, gflops: float = 50.0) -> Guess | None:
    """Guess a recipe for rows with pictures; None where they have none.

    Args:
        task: classify_image, caption, match_image_text or detect; when left out by the columns, and never the third.
        gflops: matrix speed of the machine, for the estimate of time (1e9 operations / s).

    Raises:
        DataError: nothing beside the pictures can be learned.
    """
    pictures = sample.pictures
    if pictures is None or task not in (None, "classify_image", "detect", *_TEXTED):
        return None
    if task in (None, "detect") and (found := _boxes(sample, pictures)):
        return _detecting(sample, pictures, found, name, gflops)
    if task == "detect":
        raise DataError(_nothing(sample, "no columns hold lists of boxes (four numbers each) and of what is in them"))
    label, caption = _label(sample, pictures), _caption(sample, pictures)
    if task in _TEXTED or (task is None and caption and (label is None or caption.lower() in _CAPTIONS[:2])):
        if caption is None:
            raise DataError(_nothing(sample, "no column holds a text for each picture, such as `caption`"))
        return _texted(sample, pictures, caption, name, gflops, task or "caption")
    if label is None:
        raise DataError(_nothing(sample, "nothing says what is on the pictures"))
    return _classifying(sample, pictures, label, name, gflops)


# Looking --------------------------------------------------------------------------------------------------------------


def _label(sample: Sample, pictures: Pictures) -> str | None:
    """The column to tell: one with a usual name, else the only one with few values; of folders the folder."""
    others = [name for name in names_of(sample.rows[:100]) if name != pictures.column]
    named = [name for wanted in _LABELS for name in others if name.lower() == wanted]
    most = max(2, min(200, len(sample.rows) // 3))
    few = [name for name in others if 2 <= _values(sample.rows, name) <= most]
    found = next(iter(named), few[0] if len(few) == 1 else None)
    if found is None or (_values(sample.rows, found) < 2 and sample.share > 0.999):
        return None
    return found


def _caption(sample: Sample, pictures: Pictures) -> str | None:
    """The column that holds a text for each picture."""
    others = [name for name in names_of(sample.rows[:100]) if name != pictures.column]
    named = [name for wanted in _CAPTIONS for name in others if name.lower() == wanted and _worded(sample.rows, name)]
    lengths = {name: length for name in others if (length := text_length(sample.rows, name))}
    return next(iter(named), max(lengths, key=lengths.__getitem__, default=None))


def _boxes(sample: Sample, pictures: Pictures) -> _Found | None:
    """The columns of boxes and of what is in each: lists of one length, of four numbers each and of names or numbers."""
    others = [name for name in names_of(sample.rows[:100]) if name != pictures.column]
    rows = [row for row in sample.rows[:2000] if any(row.get(name) is not None for name in others)]
    for name in others:
        lists = [row.get(name) for row in rows]
        if not all(isinstance(one, list) for one in lists) or not any(lists):
            continue
        given = [box for one in lists for box in one]  # type: ignore[union-attr]
        if not all(isinstance(box, list) and len(box) == 4 and _numbers(box) for box in given):
            continue
        lengths = [len(one) for one in lists]  # type: ignore[arg-type]
        named = [other for other in others if other != name and _lengths(rows, other) == lengths]
        if not named:
            continue
        labels = next((other for other in named if other.lower() in _LABELS), named[0])
        things = [[one for one in zip(row[name], row[labels]) if one[1] not in _NO_LABEL] for row in rows]
        corners = name.lower() != "bbox" and all(b[2] > b[0] and b[3] > b[1] for row in things for b, _ in row)
        values = sorted({str(label) for row in things for _, label in row})
        return _Found(name, labels, corners, max(map(len, things), default=1), tuple(values))
    return None


def _numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _lengths(rows: Rows, name: str) -> list[int]:
    """How long each row's list of names or numbers is; [] where not all have one."""
    lists = [row.get(name) for row in rows]
    flat = all(isinstance(one, list) and all(isinstance(x, str | int | None) for x in one) for one in lists)
    return [len(one) for one in lists] if flat else []  # type: ignore[arg-type]


def _worded(rows: Rows, name: str) -> bool:
    """Whether most values are texts of several words, or in Chinese of several characters."""
    values = [row.get(name) for row in rows[:200]]
    texts = [value for value in values if isinstance(value, str)]
    return sum(" " in text.strip() or not text.isascii() for text in texts) > 0.5 * len(values)


def _values(rows: Rows, name: str) -> int:
    return len({str(row.get(name)) for row in rows if row.get(name) not in (None, "")})


def _nothing(sample: Sample, why: str) -> str:
    columns = ", ".join(names_of(sample.rows[:100]))
    found = "all lie in one folder" if sample.kind == "picture" else f"columns: {columns}"
    return (
        f"{', '.join(sample.sources)}: pictures, and {why} ({found}). Sort them into a folder for each class, or name each "
        "in a CSV or JSONL file with a second column: label, or caption for a text"
    )


def _size(pictures: Pictures, *, largest: int = _LARGEST) -> _Size:
    """The square that is read, and its patches: small pictures as they are, larger ones shrunk to `largest` pixels."""
    side = round(median(pictures.sides))
    if side > largest:
        return _Size(
            largest,
            largest // _ALONG,
            f"{side} pixels in a typical one are shrunk; more shows more and takes longer",
        )
    patch = 2 if side <= 16 else 4 if side <= 40 else 8 if side <= _LARGEST else 16
    whole = max(patch, -(-side // patch) * patch)
    return _Size(whole, patch, f"{side} pixels in a typical one" + ("" if whole == side else ", stretched a little"))


# Writing --------------------------------------------------------------------------------------------------------------


def _classifying(sample: Sample, pictures: Pictures, label: str, name: str, gflops: float) -> Guess:
    folders = sample.kind == "picture"
    why = f"{'the folder' if folders else label} of a picture is what to tell from it"
    lines = _begun(sample, pictures, name, "classify_image", why)
    mapped = {"image": pictures.column, "label": _FOLDER if folders else label}
    _columns(lines, mapped, "a label is the name of the folder" if folders else "our names: yours")
    values = sorted({str(row.get(label)) for row in sample.rows})
    if all(value.isdecimal() for value in values):
        lines.comment("names: [...]  what the labels 0, 1, 2, ... are called", 1)
    _split(lines, sample, pictures)
    read, size = _size(pictures), _under(_SIZES, pictures.count)
    layers, width = (int(number) for number in size.split("x"))
    _model(lines, "vit-mini", size, read, pictures, dropout=0.1)
    parameters = layers * 12 * width**2 + width * (read.patch**2 * (1 if pictures.grey else 3) + read.patches)
    epochs, seconds = _epochs(pictures.count, parameters, read.patches, gflops)
    lines.section("train")
    lines.add(1, "epochs", epochs, f"passes over the pictures; roughly {duration(seconds)} here")
    lines.add(1, "batch", _under(_BATCHES, pictures.count), "pictures per step")
    lines.section("augment", 1)
    lines.add(2, "crop", max(1, read.side // 14), "pixels by which a picture may move")
    signs = all(len(value) < 2 or value.isdecimal() for value in values)
    mirrored = "the labels may be digits or letters, which have no mirror image" if signs else ""
    lines.add(2, "flip", not signs, mirrored or "false where left and right differ")
    lines.add(1, "label_smoothing", 0.1, "a model from scratch soon knows its pictures by heart")
    _training(lines, pictures.count, epochs)
    lines.add(1, "best", "metric", "the weights that are best on the validation pictures are kept")
    shown = ", ".join(values[:10]) + (" ..." if len(values) > 10 else "")
    told = [f"{len(values):,} labels: {shown}", f"task classify_image: {why}"]
    return Guess(lines.text(), "classify_image", (*_seen(sample, pictures), *told), parameters, seconds)


def _detecting(sample: Sample, pictures: Pictures, found: _Found, name: str, gflops: float) -> Guess:
    why = f"{found.boxes} and {found.labels} say where things are on the pictures, and what"
    lines = _begun(sample, pictures, name, "detect", why)
    form = "corners" if found.corners else "boxes"
    said = "left, top, right, bottom" if found.corners else "x, y, width, height"
    mapped = {"image": pictures.column, form: found.boxes, "labels": found.labels}
    _columns(lines, mapped, f"our names: yours; four numbers are taken for {said}")
    _split(lines, sample, pictures)
    read, size = _size(pictures, largest=_LARGEST_SCENE), "4x128"
    layers, width = (int(number) for number in size.split("x"))
    _model(lines, "yolos-mini", size, read, pictures, dropout=0.0)
    tokens = max(16, 3 * found.most)
    lines.add(2, "detection_tokens", tokens, f"each finds one thing; a picture has up to {found.most} of them")
    parameters = layers * 12 * width**2 + width * (read.patch**2 * (1 if pictures.grey else 3) + read.patches + tokens)
    epochs, seconds = _epochs(pictures.count, parameters, read.patches + tokens, gflops)
    lines.section("train")
    lines.add(1, "epochs", epochs, f"passes over the pictures; roughly {duration(seconds)} here")
    lines.add(1, "batch", _under(_BATCHES, pictures.count), "pictures per step")
    lines.section("augment", 1)
    lines.add(2, "mosaic", 0.5, "half of the pictures become four parts of four")
    lines.add(2, "crop", max(1, read.side // 14), "pixels by which a picture may move")
    lines.add(2, "flip", True, "false where left and right differ")
    _training(lines, pictures.count, epochs)
    lines.add(1, "best", "metric", "the weights that are best on the validation pictures are kept")
    shown = ", ".join(found.names[:10]) + (" ..." if len(found.names) > 10 else "")
    told = [f"up to {found.most} things in a picture, of {len(found.names):,} kinds: {shown}", f"task detect: {why}"]
    return Guess(lines.text(), "detect", (*_seen(sample, pictures), *told), parameters, seconds)


def _texted(sample: Sample, pictures: Pictures, caption: str, name: str, gflops: float, task: str) -> Guess:
    """For a text with each picture, which is written or matched."""
    why, writes = f"{caption} is a text for each picture", task == "caption"
    texts = [text for row in sample.rows if isinstance(text := row.get(caption), str) and text.strip()]
    seen = look(texts, sample.share, files=sample.files, cut="row")
    tokenizer = tokenizer_for(seen, "denoise" if writes else "masked_lm")
    vocab_size, tokens = token_counts(seen, tokenizer)
    lines = _begun(sample, pictures, name, task, why)
    _columns(lines, {"image": pictures.column, "caption" if writes else "text": caption}, "our names: yours")
    _split(lines, sample, pictures)
    lines.section("tokenizer", 1)
    for place, (setting, value) in enumerate(tokenizer.value.items()):
        lines.add(2, setting, value, "" if place else tokenizer.why + ", of the texts")
    read, size = _size(pictures), "3x128" if pictures.count < 2_000 else "3x192"
    layers, width = (int(number) for number in size.split("x"))
    _model(lines, "caption-mini" if writes else "clip-mini", size, read, pictures, dropout=0.1)
    parameters = layers * 28 * width**2 + vocab_size * width
    longest = _longest(texts, tokens / max(1, seen.count))
    epochs, seconds = _epochs(pictures.count, parameters, read.patches + longest.value // 2, gflops)
    lines.section("train")
    lines.add(1, "epochs", epochs, f"passes over the pictures; roughly {duration(seconds)} here")
    if writes:
        lines.add(1, "batch", _under(_BATCHES, pictures.count), "pictures per step")
    else:
        lines.add(
            1, "batch", max(64, _under(_BATCHES, pictures.count)), "pictures that compete for one another's texts"
        )
    lines.add(1, "context", *longest)
    if writes:
        lines.add(1, "objective", {"longest_target": longest.value}, "tokens that a caption may have")
    _training(lines, pictures.count, epochs)
    other = " (--task match_image_text finds pictures and texts by one another instead)" if writes else ""
    told = [f"a text, for example: {texts[0]:.80}", f"task {task}: {why}{other}"]
    return Guess(lines.text(), task, (*_seen(sample, pictures), *told), parameters, seconds)


def _longest(texts: Sequence[str], mean_tokens: float) -> Choice:
    """Tokens of nearly all texts, in steps of 16."""
    lengths = sorted(map(len, texts))
    share = mean_tokens / max(1.0, sum(lengths) / len(lengths))
    needed = int(lengths[int(0.98 * (len(lengths) - 1))] * share * 1.2) + 4
    return Choice(min(256, max(16, -(-needed // 16) * 16)), "tokens of a text, enough for nearly all")


def _begun(sample: Sample, pictures: Pictures, name: str, task: str, why: str) -> Lines:
    lines = Lines()
    lines.comment(f"{name}: written by `formary init` after a look at {percent(sample.share)} of the data.")
    lines.comment("Every value is a guess with its reason beside it. `formary run` executes it as it stands.")
    lines.add(0, "name", name, "names the run folder, runs/" + name)
    lines.add(0, "task", task, why)
    lines.section("data")
    lines.add(1, "sources", list(sample.sources), f"{files_of(sample)}, about {rounded(pictures.count)} pictures")
    for part in ("validation", "test"):
        if getattr(sample, part):
            lines.add(1, part, list(getattr(sample, part)), "lies beside it under a name that says so")
    if sample.encoding != "utf-8":
        lines.add(1, "encoding", sample.encoding, "the file is not UTF-8")
    return lines


def _columns(lines: Lines, mapped: Mapping[str, str], why: str) -> None:
    if changed := {ours: theirs for ours, theirs in mapped.items() if ours != theirs}:
        lines.add(1, "columns", changed, why)


def _split(lines: Lines, sample: Sample, pictures: Pictures) -> None:
    shares = {"validation": 0.1, "test": 0.15} if pictures.count < 20_000 else {"validation": 0.05, "test": 0.1}
    lines.section("split", 1)
    for part, share in shares.items():
        given = getattr(sample, part)
        lines.add(
            2,
            part,
            0.0 if given else share,
            "there are such pictures already"
            if given
            else "share of the pictures; each stays where it is as data grows",
        )


def _model(lines: Lines, preset: str, size: str, read: _Size, pictures: Pictures, *, dropout: float) -> None:
    lines.section("model")
    if preset == "vit-mini":
        lines.comment(
            "A pretrained ViT learns far more from few pictures: give its folder as model.start and leave out", 1
        )
        lines.comment(
            "model.preset, model.size and model.switches, with train.optimiser: {name: adamw, lr: 1.0e-4}.", 1
        )
    lines.add(1, "preset", preset, "from scratch")
    lines.add(1, "size", size, f"layers x width, for about {rounded(pictures.count)} pictures")
    lines.section("switches", 1)
    lines.add(2, "image_size", read.side, read.why)
    lines.add(2, "patch_size", read.patch, f"pixels of a patch's side: {read.patches} patches are read")
    lines.add(
        2,
        "channels",
        1 if pictures.grey else 3,
        "all pictures looked at are grey" if pictures.grey else "colours",
    )
    if preset in ("vit-mini", "yolos-mini"):
        lines.add(2, "qk_norm", True, "learns faster; transformers opens only models without it")
    if preset == "vit-mini":
        lines.add(2, "conv_stem", True, "patches by small convolutions, likewise")
    if dropout:
        lines.add(2, "dropout", dropout, "pictures are few, so some forgetting helps")


def _training(lines: Lines, count: int, epochs: int) -> None:
    lines.section("optimiser", 1)
    lines.add(2, "name", "muon", "hidden matrices by Muon, the rest by AdamW")
    lines.add(2, "lr", 0.002, "peak rate of AdamW's part")
    lines.add(2, "weight_decay", 0.05, "a little, from scratch")
    lines.section("schedule", 1)
    lines.add(2, "name", "wsd", "warm-up, stable, decay")
    lines.add(2, "decay", 0.5, "share of the run that decays")
    lines.add(2, "final", 0.0, "to nothing")
    steps = max(1, round(0.75 * count * epochs / _under(_BATCHES, count)))
    lines.add(1, "validate_every", max(10, steps // 15), "steps between looks at the validation pictures")


def _epochs(count: int, parameters: float, positions: int, gflops: float) -> tuple[int, float]:
    """Passes over the pictures, as many as half an hour allows, and the seconds they take, roughly."""
    each = 6 * parameters * positions * 0.8 * count / (gflops * 1e9 * _REACHED)
    epochs = max(1, min(_under(_EPOCHS, count), int(_LONGEST / each)))
    return epochs, epochs * each + 5


def _under(table: Sequence[tuple[int | None, Any]], count: int) -> Any:
    return next(value for limit, value in table if limit is None or count < limit)


def _seen(sample: Sample, pictures: Pictures) -> list[str]:
    """Sentences about the pictures."""
    smallest, largest = pictures.sides[0], pictures.sides[-1]
    sides = f"{smallest} pixels" if smallest == largest else f"{smallest} to {largest} pixels"
    saw = [f"{files_of(sample)}, about {rounded(pictures.count)} pictures"]
    looked = len(pictures.sides) + pictures.unreadable
    saw.append(f"{looked} were opened: the longer side has {sides}, {'all are grey' if pictures.grey else 'in colour'}")
    if pictures.unreadable:
        saw.append(
            f"{pictures.unreadable} of the {looked} cannot be read; a run leaves such out, names and counts them"
        )
    for part in ("validation", "test"):
        if getattr(sample, part):
            saw.append(f"for {part}: {', '.join(getattr(sample, part))}")
    return saw

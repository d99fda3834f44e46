"""Boxes in rows: what each says is read and checked, and COCO's JSON becomes rows with boxes and results become COCO's JSON.

In a row a box is four numbers in pixels from the upper left: `boxes` x, y, width, height as in COCO, or `corners` left,
top, right, bottom. Inside Formary it is its corners as shares of the picture's width and height.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.data.records import label_names
from formary.errors import DataError

Floats = NDArray[np.float64]
Row = Mapping[str, Any]

COLUMNS = ("boxes", "corners")
"""The columns that may hold boxes, a row has one of them."""

_BEYOND = 1.0  # pixels that a box may stick out of its picture, as rounded ones do
_NO_LABEL = (-1, None)  # fills up rows of arrays, in which all have as many boxes


@dataclass(frozen=True)
class Boxes:
    """What is in a picture.

    Args:
        corners: (boxes, 4) left, top, right, bottom in pixels.
        labels: of each.
        crowd: whether a box is around many things of one kind, which are not told apart: nothing is learned of it, and
            what is found in it counts neither as right nor as wrong.
        categories: their numbers in a COCO file, where the row has them.
    """

    corners: Floats
    labels: tuple[str, ...]
    crowd: NDArray[np.bool_]
    categories: tuple[int, ...] = ()


def boxes_of(row: Row, where: str, *, size: tuple[int, int] | None = None) -> Boxes:
    """The boxes of a row, and what is in each; what is labelled -1 or null is left out.

    Args:
        size: width and height of the picture, where they are known.

    Raises:
        DataError: they are missing, are not four numbers each with an area, are not as many as the labels, or lie outside
            of the picture. The row is called `where`.
    """
    column = next((name for name in COLUMNS if name in row), None)
    if column is None or row[column] is None:
        raise DataError(
            f"{where}: there is neither a field 'boxes' (x, y, width, height in pixels) nor 'corners' (left, top, right, "
            "bottom); map another column with data.columns.boxes or data.columns.corners"
        )
    given, labels = row[column], row.get("labels")
    if not isinstance(given, list | tuple) or not isinstance(labels, list | tuple) or len(given) != len(labels):
        raise DataError(
            f"{where}: '{column}' and 'labels' are two lists of the same length, not {_counted(given)} and {_counted(labels)}"
        )
    kept = [place for place, label in enumerate(labels) if label not in _NO_LABEL]
    corners = np.array([_corners(given[place], column, f"{where}, box {place + 1}", size) for place in kept])
    named = [labels[place] for place in kept]
    wrong = [label for label in named if not isinstance(label, str | int | float)]
    if wrong:
        raise DataError(f"{where}: a label is a name or a number, not {wrong[0]!r:.40}")
    crowd, numbers = (value if isinstance(value := row.get(name), list) else [] for name in ("crowd", "category_ids"))
    return Boxes(
        corners.reshape(-1, 4),
        tuple(label_names(label)[0] for label in named),
        np.array([bool(crowd[place]) if place < len(crowd) else False for place in kept], dtype=bool),
        tuple(numbers[place] for place in kept if place < len(numbers)),
    )


def _corners(box: Any, column: str, where: str, size: tuple[int, int] | None) -> list[float]:
    try:
        a, b, c, d = (float(number) for number in box)
    except (TypeError, ValueError):
        raise DataError(f"{where}: a box is four numbers, not {box!r:.60}") from None
    left, top, right, bottom = (a, b, c, d) if column == "corners" else (a, b, a + c, b + d)
    if not np.isfinite([left, top, right, bottom]).all() or right <= left or bottom <= top:
        form = "left, top, right, bottom" if column == "corners" else "x, y, width, height"
        raise DataError(f"{where}: {_said(box)} has no area ({form}); correct it or take it out")
    width, height = size or (np.inf, np.inf)
    if min(left, top) < -_BEYOND or right > width + _BEYOND or bottom > height + _BEYOND:
        whole = f" of {width} x {height} pixels" if size else ""
        hint = "; if its numbers are left, top, right, bottom, call the column 'corners'" if column == "boxes" else ""
        raise DataError(f"{where}: {_said(box)} lies outside of the picture{whole}{hint}")
    return [max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)]


def _said(box: Any) -> str:
    return f"[{', '.join(f'{float(number):g}' for number in box)}]"


def _counted(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value):,}"
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"


# COCO ------------------------------------------------------------------------------------------------------------------


def is_coco(value: Any) -> bool:
    """Whether a JSON document is COCO's of pictures with boxes."""
    return isinstance(value, dict) and isinstance(value.get("images"), list) and "categories" in value


def coco_rows(document: Mapping[str, Any], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """One row a picture: id, image (the name of its file), boxes, labels, category_ids, crowd; and its place.

    Without a list of annotations, as in COCO's test sets, rows have no boxes.

    Raises:
        DataError: a part of it is not as COCO has it; it is named.
    """
    names = {_field(one, "id", f"{name} category {n}"): str(_field(one, "name", f"{name} category {n}"))
             for n, one in enumerate(document["categories"], 1)}  # fmt: skip
    images = {_field(one, "id", f"{name} image {n}"): one for n, one in enumerate(document["images"], 1)}
    found: dict[Any, dict[str, list[Any]]] = {
        number: {"boxes": [], "labels": [], "category_ids": [], "crowd": []} for number in images
    }
    for n, one in enumerate(document.get("annotations") or (), 1):
        where = f"{name} annotation {one['id'] if isinstance(one, Mapping) and 'id' in one else n}"
        image, category = _field(one, "image_id", where), _field(one, "category_id", where)
        for kind, number, known in (("images", image, images), ("categories", category, names)):
            if number not in known:
                raise DataError(f"{where}: there is no {number} among the file's {kind}")
        held = found[image]
        held["boxes"].append(_field(one, "bbox", where))
        held["labels"].append(names[category])
        held["category_ids"].append(category)
        held["crowd"].append(bool(one.get("iscrowd")))
    for number, image in images.items():
        where = f"{name} image {number}"
        row = {"id": number, "image": _field(image, "file_name", where)}
        yield row | (found[number] if "annotations" in document else {}), where


def _field(values: Any, name: str, where: str) -> Any:
    if not isinstance(values, Mapping) or name not in values:
        raise DataError(f"{where}: has no '{name}'; COCO's form is described at cocodataset.org, under data format")
    return values[name]


def coco_results(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]], numbers: Mapping[str, int]) -> list[Any]:
    """Boxes that were found as COCO's results: image_id, category_id, bbox, score.

    Args:
        rows: with their `id`; without, pictures are numbered from 1.
        answers: of each row {"boxes": [{"label", "score", "box"}]}.
        numbers: of the labels.
    """
    return [
        {
            "image_id": row.get("id", place),
            "category_id": numbers[box["label"]],
            "bbox": box["box"],
            "score": box["score"],
        }
        for place, (row, answer) in enumerate(zip(rows, answers, strict=True), 1)
        for box in answer["boxes"]
    ]

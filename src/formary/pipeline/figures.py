"""The report's figures as SVG text: curves, intervals, the flow of the data, bars of time.

The one idea: a figure is a pure function from numbers to an SVG string, drawn for a given width, coloured by CSS classes
so that light, dark and print share it. It loads nothing, runs no script, and escapes every word it is given. Curves over
the steps of a training carry their points, from which `zoom`'s script draws them anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from formary.evaluate.interval import Interval

Point = tuple[float, float]
Box = tuple[str, tuple[float, float, float, float]]
"""What it is called, and x, y, width and height."""

_LETTER = 6.6  # average advance of a 12-unit sans letter; wide enough for most fonts
_WIDE_LETTER = 12.0  # of a Chinese, Japanese or Korean one
_HELD = 1000  # points that it carries for looking closer
_BUCKETS = 240  # a curve is drawn through at most this many points; the band shows what they average

CSS = """
svg { display: block; width: 100%; height: auto; overflow: visible; font: 12px var(--sans); }
svg text { fill: var(--soft); stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; paint-order: stroke; font-variant-numeric: tabular-nums; }
svg text.strong { fill: var(--ink); }
svg text.model { fill: var(--model); font-weight: 600; }
svg text.warm { fill: var(--warm); }
svg[data-curves] { touch-action: pan-y pinch-zoom; cursor: default; border-radius: 2px; }
svg[data-curves]:focus-visible { outline: 2px solid var(--model); outline-offset: 4px; }
.zoomed svg[data-curves] { cursor: grab; touch-action: pan-y; user-select: none; }
.zoom { display: flex; flex-wrap: wrap; align-items: center; gap: .35rem .5rem; margin-top: .75rem; }
.zoom button { font: inherit; color: var(--ink); background: var(--tint); border: 1px solid var(--line); border-radius: 4px;
  min-width: 2.25rem; min-height: 2.25rem; padding: .2rem .6rem; cursor: pointer; }
.zoom button:disabled { color: var(--other); cursor: default; }
.zoom button:focus-visible { outline: 2px solid var(--model); outline-offset: 1px; }
.zoom .hint { flex-basis: 100%; }
@media print { .zoom { display: none; } }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
svg .line.main { stroke: var(--model); stroke-width: 2; }
svg .line.quiet { stroke: var(--other); }
svg .band { fill: var(--other); opacity: .22; }
svg .interval { fill: var(--model); opacity: .16; }
svg .mark.main, svg .block.model { fill: var(--model); }
svg .mark.quiet, svg .block.other { fill: var(--other); }
svg .block.second { fill: var(--model); opacity: .62; }
svg .block.third { fill: var(--model); opacity: .36; }
svg .block.kept { fill: var(--other); opacity: .38; }
svg .block.dropped { fill: var(--warm); }
svg .box { fill: none; stroke-width: 1.75; }
svg .box.true { stroke: #ffd257; stroke-dasharray: 4 3; }
svg .box.found { stroke: #4fd1d9; }
svg text.true, svg text.found { stroke: #000; fill: #ffd257; }
svg text.found { fill: #4fd1d9; }
svg .whisker { stroke-width: 6; stroke-linecap: butt; opacity: .45; }
svg .whisker.model { stroke: var(--model); }
svg .whisker.other { stroke: var(--other); }
"""


@dataclass(frozen=True)
class Line:
    """A curve: its name in the legend, its points, and whether it is the one to look at."""

    name: str
    points: Sequence[Point]
    main: bool = True
    marks: bool = False  # a dot on every point, with its numbers on hovering


@dataclass(frozen=True)
class Row:
    """A value with its interval, beside others of the same metric."""

    name: str
    interval: Interval
    model: bool = False


def curves(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    width: int = 720,
    height: int = 280,
    band: Sequence[tuple[float, float, float]] = (),
) -> str:
    """Curves over a shared x axis, or an empty string where there is no finite point.

    Crowded curves are averaged within buckets of x, under a band from the least to the greatest value. A quantity that
    falls by more than 2.5 times is drawn on a logarithmic axis, which the label says. `band` is shaded: (x, low, high).
    """
    lines = [Line(line.name, _finite(line.points), line.main, line.marks) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    ys = [y for line in lines for _, y in line.points] + [bound for _, *bounds in band for bound in bounds]
    logarithmic = min(ys) > 0 and max(ys) > 2.5 * min(ys) and y_label.startswith("loss")
    y_label = f"{y_label}, log scale" if logarithmic else y_label
    x_low, x_high = _padded([x for line in lines for x, _ in line.points], share=0.0)
    x_low = 0.0 if 0 < x_low < 0.3 * x_high else x_low
    y_low, y_high = (min(ys) * 0.97, max(ys) * 1.03) if logarithmic else _from_zero(ys)
    y_ticks = _log_ticks(y_low, y_high) if logarithmic else _ticks(y_low, y_high, 4)
    x_ticks = _ticks(x_low, x_high, 6 if width > 500 else 4)
    names = [line.name for line in lines]
    two_rows = len(lines) > 1 and _width(y_label) + sum(_width(n) + 40 for n in names) > width
    left = 10 + max(map(_width, tick_texts(y_ticks)))
    right, top, bottom = width - 18, 44 if two_rows else 26, height - 38

    def x_at(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def y_at(y: float) -> float:
        share = math.log(y / y_low) / math.log(y_high / y_low) if logarithmic else (y - y_low) / (y_high - y_low)
        return bottom - share * (bottom - top)

    fixed, parts = [_text(0, 12, y_label), _text(right, height - 4, x_label, anchor="end")], list[str]()
    if len(lines) > 1:
        fixed += _legend(lines, width, 30 if two_rows else 12, from_left=two_rows)
    for tick, told in zip(y_ticks, tick_texts(y_ticks), strict=True):
        parts += [f'<line class="grid" x1="{left:.1f}" x2="{right}" y1="{y_at(tick):.1f}" y2="{y_at(tick):.1f}"/>']
        parts += [_text(left - 8, y_at(tick) + 4, told, anchor="end")]
    parts += [f'<line class="axis" x1="{left:.1f}" x2="{right}" y1="{bottom}" y2="{bottom}"/>']
    for tick, told in zip(x_ticks, tick_texts(x_ticks), strict=True):
        parts += [f'<line class="axis" x1="{x_at(tick):.1f}" x2="{x_at(tick):.1f}" y1="{bottom}" y2="{bottom + 4}"/>']
        parts += [_text(x_at(tick), bottom + 18, told, anchor="middle")]
    if band:
        edges = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        parts += [f'<polygon class="interval" points="{" ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in edges)}"/>']
    for line in sorted(lines, key=lambda line: line.main):
        look = "main" if line.main else "quiet"
        buckets = _buckets(line.points)
        if len(buckets) < len(line.points):
            upper = [f"{x_at(x):.1f},{y_at(high):.1f}" for x, _, _, high in buckets]
            lower = [f"{x_at(x):.1f},{y_at(low):.1f}" for x, _, low, _ in reversed(buckets)]
            parts += [f'<polygon class="band" points="{" ".join(upper + lower)}"/>']
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y, _, _ in buckets)
        parts += [f'<polyline class="line {look}" points="{path}"/>']
        if line.marks or len(buckets) == 1:
            radius = 3.5 if len(line.points) <= 40 else 2
            for x, y in line.points if line.marks else [(x, y) for x, y, _, _ in buckets]:
                told = escape(f"{line.name}: {y:.4g} at {x_label} {x:,.0f}")
                dot = f'<circle class="mark {look}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="{radius}">'
                parts += [f"{dot}<title>{told}</title></circle>"]
    label = f"Curves of {', '.join(names)} over {x_label}"
    held = ""
    if x_label == "step" and max(len(line.points) for line in lines) > 2:
        held = _held(lines, x=(x_low, x_high), box=(left, top, right, bottom), logarithmic=logarithmic, over=x_label)
    return _svg(width, height, label, [*fixed, '<g class="moves">', *parts, "</g>"], held)


def range_test(rates: Sequence[float], losses: Sequence[float], lr: float, *, width: int = 340) -> str:
    """The loss over rising learning rates, as long as it is not far above where it began, and the rate that was taken."""
    tested = [(math.log10(rate), loss) for rate, loss in zip(rates, losses) if loss <= 1.2 * losses[0]]
    taken = min(tested, key=lambda point: abs(point[0] - math.log10(lr)))
    lines = [Line("tested", tested, main=False), Line("taken", [taken])]
    return curves(lines, x_label="learning rate, power of 10", y_label="range test", width=width, height=190)


def intervals(rows: Sequence[Row], *, unit: str, decimals: int = 2, width: int = 720) -> str:
    """One line per row: a dot at the value, a bar over its 95 % interval, on a shared axis that need not begin at 0."""
    rows = [row for row in rows if math.isfinite(row.interval.value)]
    if not rows:
        return ""
    wide = width > 500
    bounds = [b for r in rows for b in (r.interval.value, r.interval.low, r.interval.high) if math.isfinite(b)]
    low, high = _padded(bounds, share=0.06)
    ticks = _ticks(low, high, 6 if wide else 4)
    numbers = [_interval_text(row.interval, decimals) for row in rows]
    left = min(14 + max(_width(row.name) for row in rows), width * 0.4) if wide else 4
    right = width - (16 + max(map(_width, numbers))) if wide else width - 8
    step = 34 if wide else 50
    bottom = 12 + step * len(rows)
    height = bottom + 42

    def x_at(x: float) -> float:
        return left + (x - low) / (high - low) * (right - left)

    parts = []
    for tick, told in zip(ticks, tick_texts(ticks), strict=True):
        parts += [f'<line class="grid" x1="{x_at(tick):.1f}" x2="{x_at(tick):.1f}" y1="6" y2="{bottom}"/>']
        parts += [_text(x_at(tick), bottom + 16, told, anchor="middle")]
    parts += [f'<line class="axis" x1="{left:.1f}" x2="{right:.1f}" y1="{bottom}" y2="{bottom}"/>']
    parts += [_text(right, bottom + 36, unit, anchor="end")]
    for place, (row, numbers_) in enumerate(zip(rows, numbers, strict=True)):
        look = "model" if row.model else "other"
        tone = "model" if row.model else "strong"
        y = 12 + step * place + (step / 2 if wide else step - 14)
        if wide:
            parts += [_text(0, y + 4, row.name, tone), _text(width, y + 4, numbers_, tone, anchor="end")]
        else:
            parts += [_text(0, y - 14, row.name, tone), _text(width, y - 14, numbers_, tone, anchor="end")]
        if row.interval.known:
            a, b = x_at(row.interval.low), x_at(row.interval.high)
            parts += [f'<line class="whisker {look}" x1="{a:.1f}" x2="{max(b, a + 1):.1f}" y1="{y}" y2="{y}"/>']
        dot = f'<circle class="block {look}" cx="{x_at(row.interval.value):.1f}" cy="{y}" r="5">'
        parts += [f"{dot}<title>{escape(f'{row.name}: {numbers_} {unit}')}</title></circle>"]
    spoken = "; ".join(f"{row.name} {text}" for row, text in zip(rows, numbers, strict=True))
    return _svg(width, height, f"{unit}: {spoken}", parts)


def flow(
    read: float, drops: Sequence[tuple[str, float]], splits: Sequence[tuple[str, float]], *, unit: str, width: int = 720
) -> str:
    """From what was read, through what each step dropped, to the sizes of the splits; bars share one scale."""
    whole = max(read, sum(size for _, size in splits), 1)
    wide = width > 500
    told = [f"−{dropped:,.0f} ({percent(dropped / read if read else 0.0)})" for _, dropped in drops]
    counts = [f"{read:,.0f} {unit}", *told]
    left = min(16 + max(_width(name) for name, _ in [*drops, ("split", 0.0)]), width * 0.4) if wide else 0.0
    right = width - (14 + max(map(_width, counts)) if wide else 0)
    scale = (right - left) / whole
    thick, step = 18, 34 if wide else 46
    parts: list[str] = []
    y = 0.0 if wide else 18.0

    def row(name: str, count: str, tone: str) -> None:
        level = y + 13 if wide else y - 5
        parts.append(_text(0, level, name, "strong"))
        parts.append(_text(width, level, count, tone, anchor="end"))

    def bar(start: float, size: float, look: str) -> None:
        if size > 0:
            at = f'x="{left + start * scale:.1f}" y="{y}" width="{max(size * scale, 1.5):.1f}" height="{thick}"'
            parts.append(f'<rect class="block {look}" {at}/>')

    bar(0, read, "kept")
    row("read", counts[0], "strong")
    kept = read
    for (name, dropped), count in zip(drops, told, strict=True):
        y += step
        kept -= dropped
        bar(0, kept, "kept")
        bar(kept, dropped, "dropped")
        row(name, count, "warm")
    y += step
    row("split", "", "strong")
    start = 0.0
    for (_, size), look in zip(splits, ("model", "second", "third"), strict=False):
        bar(start, size * 0.997, look)
        start += size
    y += thick
    x = left
    for (name, size), look in zip(splits, ("model", "second", "third"), strict=False):
        text = f"{name} {size:,.0f}"
        if x > left and x + 16 + _width(text) > width:
            x, y = left, y + 18
        parts.append(f'<rect class="block {look}" x="{x:.1f}" y="{y + 9}" width="9" height="9"/>')
        parts.append(_text(x + 14, y + 18, text, "strong"))
        x += 14 + _width(text) + 20
    steps = "; ".join(f"{name} drops {size:,.0f}" for name, size in drops) or "nothing dropped"
    parts_of = ", ".join(f"{name} {size:,.0f}" for name, size in splits)
    return _svg(width, y + 26, f"{read:,.0f} {unit} read; {steps}; {parts_of}", parts)


def bars(rows: Sequence[tuple[str, float, str]], *, label: str, width: int = 720) -> str:
    """Horizontal bars from 0: (name, size, what to write at the end)."""
    rows = [row for row in rows if math.isfinite(row[1]) and row[1] >= 0]
    if not rows:
        return ""
    largest = max(size for _, size, _ in rows) or 1.0
    left = 14 + max(_width(name) for name, _, _ in rows)
    room = width - left - 12 - max(_width(text) for _, _, text in rows)
    parts = []
    for place, (name, size, text) in enumerate(rows):
        y = place * 26
        length = max(size / largest * room, 1.5)
        parts += [_text(0, y + 13, name, "strong")]
        parts += [f'<rect class="block second" x="{left:.1f}" y="{y + 2}" width="{length:.1f}" height="14"/>']
        parts += [_text(left + length + 8, y + 13, text)]
    told = ", ".join(f"{name} {text}" for name, _, text in rows)
    return _svg(width, len(rows) * 26, f"{label}: {told}", parts)


def scene(
    image: str,
    size: tuple[float, float],
    true: Sequence[Box],
    found: Sequence[Box],
    *,
    label: str,
    width: int = 240,
) -> str:
    """A picture with the boxes that are in it, dashed, and those that were found in it.

    Args:
        image: as a data URI.
        size: of the picture, in the pixels that boxes are in.
    """
    scale = width / size[0]
    parts = [f'<image href="{escape(image)}" width="{width}" height="{size[1] * scale:.1f}"/>']
    for boxes, tone in ((true, "true"), (found, "found")):
        for name, (x, y, wide, high) in boxes:
            left, top = x * scale, y * scale
            parts.append(
                f'<rect class="box {tone}" x="{left:.1f}" y="{top:.1f}" width="{wide * scale:.1f}" '
                f'height="{high * scale:.1f}"/>'
            )
            below = min(top + high * scale + 12, size[1] * scale - 3) if tone == "true" else max(top - 3, 11.0)
            parts.append(_text(left, below, name, tone))
    return _svg(width, size[1] * scale, label, parts)


def tick_texts(values: Sequence[float]) -> list[str]:
    """Short forms of the values of one axis, all in the same unit: 0.5, 2,000, 12k, 3e-4."""
    largest = max(map(abs, values))
    if largest >= 1e6:
        texts = [f"{value / 1e6:.4g}M" for value in values]
    elif largest >= 2e4:
        texts = [f"{value / 1e3:.4g}k" for value in values]
    elif largest > 2e-3:
        texts = [f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" for value in values]
    else:
        power = math.floor(math.log10(largest)) if largest else 0
        texts = [f"{value / 10.0**power:.3g}e{power}".replace("-", "−") for value in values]
    return ["0" if value == 0 else text for value, text in zip(values, texts, strict=True)]


def percent(share: float) -> str:
    """A share as a percentage with two significant digits, small ones not rounded to nothing."""
    hundredths = share * 100
    if hundredths == 0 or hundredths >= 10:
        return f"{hundredths:.0f} %"
    return f"{hundredths:.1f} %" if hundredths >= 0.1 else "< 0.1 %"


def _interval_text(interval: Interval, decimals: int) -> str:
    if not interval.known:
        return f"{interval.value:,.{decimals}f}"
    return f"{interval.value:,.{decimals}f} [{interval.low:,.{decimals}f}, {interval.high:,.{decimals}f}]"


def _legend(lines: Sequence[Line], width: int, y: int, *, from_left: bool) -> list[str]:
    sizes = [_width(line.name) + 40 for line in lines]
    x = 0.0 if from_left else width - sum(sizes) + 16
    parts = []
    for line, size in zip(lines, sizes, strict=True):
        look = "main" if line.main else "quiet"
        parts += [f'<line class="line {look}" x1="{x:.1f}" x2="{x + 18:.1f}" y1="{y - 4}" y2="{y - 4}"/>']
        if line.marks:
            parts += [f'<circle class="mark {look}" cx="{x + 9:.1f}" cy="{y - 4}" r="3.5"/>']
        parts += [_text(x + 24, y, line.name, "strong")]
        x += size
    return parts


def _held(lines: Sequence[Line], *, x: Point, box: Sequence[float], logarithmic: bool, over: str) -> str:
    """The attribute that carries a figure's points and where they are drawn, for the page's script."""
    series = [
        {
            "name": line.name,
            "look": "main" if line.main else "quiet",
            "marks": line.marks,
            "points": [[_short(x), _short(y)] for x, y, _, _ in _buckets(line.points, most=_HELD)],
        }
        for line in sorted(lines, key=lambda line: line.main)
    ]
    values = {"x": x, "box": [round(edge, 1) for edge in box], "log": logarithmic, "over": over, "lines": series}
    return f' data-curves="{escape(json.dumps(values, separators=(",", ":")))}"'


def _short(value: float) -> float | int:
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() else rounded


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _buckets(points: Sequence[Point], most: int = _BUCKETS) -> list[tuple[float, float, float, float]]:
    """(x, mean, least, greatest) of consecutive points, at most `most` of them."""
    size = math.ceil(len(points) / most)
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in c) / len(c), [y for _, y in c]) for c in chunks]
    return [(x, sum(ys) / len(ys), min(ys), max(ys)) for x, ys in means]


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low - share * (high - low), high + share * (high - low)


def _from_zero(values: Sequence[float]) -> tuple[float, float]:
    """The range of a linear axis: from 0 where the values come near it, so that small changes do not look large."""
    low, high = _padded(values, share=0.08)
    return (0.0, high) if min(values) >= 0 and min(values) < 0.7 * max(values) else (low, high)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)] or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [f * 10.0**p for p in powers for f in (1, 1.5, 2, 3, 4, 6, 8)]
    inside = [t for t in ticks if low <= t <= high]
    return inside if 2 <= len(inside) <= 9 else _ticks(low, high, 4)


def _width(text: str) -> float:
    return sum(_WIDE_LETTER if ord(letter) > 0x2E7F else _LETTER for letter in text)


def _text(x: float, y: float, text: str, tone: str = "", anchor: str = "start") -> str:
    look = f' class="{tone}"' if tone else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{look} text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, label: str, parts: Sequence[str], held: str = "") -> str:
    box = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return f'<svg {box}{held} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'

"""The report of a run: one self-contained HTML page.

The one idea: headings say what was found, figures show why, and everything on the page is a number of this run; parts
that were not measured are left out. It measures nothing itself: `ReportData` is all it knows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from formary import durable
from formary.evaluate.interval import Interval
from formary.pipeline import figures
from formary.pipeline.findings import Metric, ReportData, Sample
from formary.pipeline.incidents import post_mortem
from formary.pipeline.page import PAGE, STYLE, framed
from formary.pipeline.tables import is_figure, is_picture, tables_of
from formary.pipeline.zoom import SCRIPT
from formary.recipe.schema import unit_of

NAMES = {
    "bits_per_byte": "bits per byte",
    "loss": "loss (nats per token)",
    "masked_accuracy": "accuracy on masked tokens",
    "map@50:95": "mAP@50:95",
    "map@50": "mAP@50",
    "map@75": "mAP@75",
    "ar@100": "AR@100",
}
TASKS = {  # task: (Hugging Face pipeline tag, transformers class, what the model does)
    "causal_lm": ("text-generation", "AutoModelForCausalLM", "writes on from a text"),
    "masked_lm": ("fill-mask", "AutoModelForMaskedLM", "fills in masked words"),
    "denoise": ("text2text-generation", "AutoModelForSeq2SeqLM", "restores removed spans of a text"),
    "classify": ("text-classification", "AutoModelForSequenceClassification", "labels texts"),
    "tag": ("token-classification", "AutoModelForTokenClassification", "tags the words of a text"),
    "answer_span": ("question-answering", "AutoModelForQuestionAnswering", "finds answers in a text"),
    "classify_image": ("image-classification", "AutoModelForImageClassification", "labels pictures"),
    "generate_image": ("unconditional-image-generation", "AutoModelForCausalLM", "paints pictures"),
    "caption": ("image-to-text", "AutoModel", "describes pictures"),
    "match_image_text": ("zero-shot-image-classification", "AutoModel", "matches pictures and texts"),
    "detect": ("object-detection", "AutoModelForObjectDetection", "finds things in pictures"),
    "translate": ("text2text-generation", "AutoModelForSeq2SeqLM", "writes a text for a text"),
    "chat": ("text-generation", "AutoModelForCausalLM", "answers in a conversation"),
    "preference": ("text-generation", "AutoModelForCausalLM", "answers as people prefer"),
    "multiple_choice": ("multiple-choice", "AutoModelForMultipleChoice", "chooses an answer"),
    "next_item": ("other", "AutoModel", "recommends what a user takes next"),
    "classify_row": ("tabular-classification", "AutoModel", "labels rows of a table"),
    "forecast": ("time-series-forecasting", "AutoModel", "forecasts series"),
    "embed": ("sentence-similarity", "AutoModel", "turns texts into vectors"),
}
WRITES = ("causal_lm", "masked_lm", "denoise", "translate", "chat")  # tasks whose answer goes on from, or is, text
_FIGURES = ("forecasts", "scenes")  # details that are drawn
_SPLITS = ("train", "validation", "test")
_WIDE, _NARROW = 720, 340  # every figure is drawn for a page and for a phone; CSS shows one


def write_report(path: Path, report: ReportData) -> None:
    """Write the page; it needs no other file and no network. Its script moves and zooms curves; it can be read without.

    Raises:
        StorageError: the file cannot be written.
    """
    durable.write_text(Path(path), render_report(report))


def headline(report: ReportData) -> str:
    """The finding in one sentence: "2.05 bits per byte [2.01, 2.09]; better than the 5-gram at 2.31"."""
    metric = _main_metric(report)
    if metric is None:
        return f"{report.name}: nothing was measured"
    measured = interval_text(metric.model, unit=measure_name(metric.metric))
    baseline = metric.strongest
    if baseline is None:
        return f"{measured}; no baseline was measured"
    at = number(metric.baselines[baseline].value, decimals_for(metric.model))
    verdict = metric.verdict(baseline)
    if verdict == "cannot tell":
        return f"{measured}; no clear difference from {_the(baseline)} at {at}"
    return f"{measured}; {verdict} than {_the(baseline)} at {at}"


def measure_name(metric: str) -> str:
    """A metric as the field writes it."""
    return NAMES.get(metric, metric.replace("_", " "))


def _the(baseline: str) -> str:
    """A baseline in a sentence; the names of some have their article."""
    return baseline if baseline.startswith("the ") else f"the {baseline}"


def interval_text(interval: Interval, *, unit: str = "") -> str:
    """ "2.05 bits per byte [2.01, 2.09]", without brackets where there is no interval."""
    decimals = decimals_for(interval)
    value = " ".join(filter(None, [number(interval.value, decimals), unit]))
    if not interval.known:
        return value
    return f"{value} [{number(interval.low, decimals)}, {number(interval.high, decimals)}]"


def decimals_for(interval: Interval) -> int:
    """As many decimals as the interval supports: the first digit in which its bounds differ."""
    width, size = interval.high - interval.low, abs(interval.value)
    supported = -math.floor(math.log10(width)) if interval.known and width > 0 else 2
    return min(max(supported, 2 if size < 10 else 1 if size < 100 else 0), 4)


def number(value: float, decimals: int = 2) -> str:
    """With thousands separators; a dash for what is not a number."""
    if math.isnan(value):
        return "–"
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "∞"


def render_report(report: ReportData) -> str:
    """The page as text; all content is escaped by the template engine."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Callable[..., Any]] = {
        "lang": lambda text: language_of(text, report.language),
        "label": lambda key: str(key).replace("_", " "),
        "plain": plain,
        "measure": measure_name,
        "interval": interval_text,
        "capitalise": _capital,
        "unbroken": _unbroken,
    }
    environment.filters.update(filters)
    environment.tests |= {"picture": is_picture, "figure": is_figure}
    learning = _learning(report)
    data = data_story(report)
    body = environment.from_string(PAGE).render(
        report=report,
        headline=headline(report),
        metric=_main_metric(report),
        baselines=list(dict.fromkeys(name for m in report.metrics for name in m.baselines)),
        facts=_facts(report),
        verdict=_verdict_sentence(report),
        interval_figure=_interval_figure(_main_metric(report)),
        errors=tables_of({name: value for name, value in report.details.items() if name not in _FIGURES}),
        drawings=[*map(_forecast, report.details.get("forecasts", ())), *_scenes(report.details.get("scenes", ()))],
        reliability=_reliability(report.details.get("calibration")),
        writes=report.task in WRITES,
        learning=learning,
        incidents=post_mortem(report.incidents),
        data=data,
        model=model_sentence(report),
        cost=_cost(report),
        profile=_profile(report),
        last_samples=[s for s in report.samples if s.step is None] or list(report.samples[-1:]),
        early_samples=[s for s in report.samples if s.step is not None],
        continuation=continuation,
        settings=settings_of,
    )
    script = SCRIPT if "data-curves=" in body else ""
    return framed(
        escape(f"{report.name}: {headline(report)}"),
        body,
        style=STYLE + figures.CSS,
        script=script,
        pictures="<img" in body or "<image" in body,
    )


def language_of(text: str, otherwise: str = "") -> str:
    """The lang attribute for a text: zh, ja or ko where the script says so, else what is known of the data."""
    if re.search("[\u3040-\u30ff]", text):
        return "ja"
    if re.search("[\uac00-\ud7af]", text):
        return "ko"
    letters = sum(letter.isalpha() for letter in text)
    han = len(re.findall("[\u3400-\u4dbf\u4e00-\u9fff]", text))
    if letters and han > 0.3 * letters:
        return otherwise if otherwise.startswith("zh") else "zh"
    return otherwise


# What the page says, in words and figures


def _main_metric(report: ReportData) -> Metric | None:
    by_name = {m.metric: m for m in reversed(report.metrics) if not math.isnan(m.model.value)}
    return by_name.get("bits_per_byte") or by_name.get("loss") or next(iter(reversed(by_name.values())), None)


def _verdict_sentence(report: ReportData) -> str:
    metric = _main_metric(report)
    if metric is None:
        return ""
    groups: dict[str, list[str]] = {}
    for name in metric.baselines:
        groups.setdefault(metric.verdict(name), []).append(_the(name))
    words = {"better": "Better than {}", "worse": "worse than {}", "cannot tell": "no clear difference from {}"}
    said = [words[v].format(_listed(groups[v])) for v in words if v in groups]
    return _capital("; ".join(said)) if said else "How good the model is"


def _facts(report: ReportData) -> list[tuple[str, str]]:
    """The few numbers under the title."""
    first = _main_metric(report)
    others = [metric for metric in report.metrics if first and metric.metric != first.metric]
    facts = [
        (
            measure_name(metric.metric),
            number(metric.model.value, decimals_for(metric.model)),
        )
        for metric in [first, *others[:1]]
        if metric
    ]
    if "parameters" in report.model:
        facts.append(("parameters", _count(report.model["parameters"])))
    size = _text_bytes(report.story)
    if size:
        facts.append(("of text", _bytes(size)))
    if report.times:
        facts.append(("from data to report", clock(sum(report.times.values()))))
    if report.energy:
        facts.append(("estimated energy", energy_of(report.energy.kwh)))
    return facts


def _interval_figure(metric: Metric | None) -> Markup:
    if metric is None:
        return Markup("")
    baselines = sorted(metric.baselines.items(), key=lambda item: item[1].value, reverse=metric.upward)
    rows = [figures.Row("this model", metric.model, model=True), *(figures.Row(n, i) for n, i in baselines)]
    direction = "higher is better" if metric.upward else "lower is better"
    unit = f"{measure_name(metric.metric)}, {direction}"
    decimals = decimals_for(metric.model)
    return _both(lambda width: figures.intervals(rows, unit=unit, decimals=decimals, width=width))


def _reliability(calibration: Mapping[str, Any] | None) -> Markup:
    """How often the model is right at each confidence, beside what its confidence promises."""
    bins = [b for b in (calibration or {}).get("bins", ()) if b["confidence"] is not None]
    if len(bins) < 2:
        return Markup("")
    line = figures.Line("this model", [(b["confidence"], b["accuracy"]) for b in bins], marks=True)
    promised = figures.Line("as promised", [(b["confidence"], b["confidence"]) for b in bins], main=False)
    return _both(lambda width: figures.curves([line, promised], x_label="confidence", y_label="right", width=width))


def _forecast(drawn: Mapping[str, Any]) -> tuple[str, Markup]:
    """A forecast beside what came: its title and its figure."""
    before, point = int(drawn["before"]), drawn["point"]
    truth = [(n - before, value) for n, value in enumerate(drawn["truth"]) if value is not None]
    ahead = list(enumerate(point))
    lines = [figures.Line("what came", truth, main=False), figures.Line("forecast", ahead)]
    band = [] if drawn["low"] is None else list(zip(range(len(point)), drawn["low"], drawn["high"]))
    said = f", with its {100 * drawn['level']:.0f} % interval" if band else ""
    title = f"{_capital(drawn['title'])}, forecast from {drawn['from']}{said}"
    return title, _both(
        lambda width: figures.curves(lines, x_label="steps ahead", y_label=drawn["title"], width=width, band=band)
    )


def _scenes(worst: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """Pictures with their boxes side by side, the worst first: one title and one figure."""
    if not worst:
        return []
    shown = []
    for one in worst:
        true = [(box["label"], box["box"]) for box in one["true"]]
        found = [(f"{box['label']} {box['score']:.2f}", box["box"]) for box in one["found"]]
        title = f"Row {one['row']}: {one['errors']} {'error' if one['errors'] == 1 else 'errors'}"
        drawn = figures.scene(one["image"], one["size"], true, found, label=title)
        shown.append(Markup("<div>{}<p class='small'>{}</p></div>").format(Markup(drawn), title))
    title = "Pictures, the worst first: what is in them (dashed) and what was found"
    return [(title, Markup('<div class="scenes">{}</div>').format(Markup("").join(shown)))]


def _learning(report: ReportData) -> dict[str, Any] | None:
    train = _series(report.training, "loss")
    valid = _series(report.validation, "validation_loss")
    if not train and not valid:
        return None
    loss = [figures.Line("training", train, main=not valid)] if train else []
    if valid:
        loss.append(figures.Line("validation", valid, marks=len(valid) <= 60))
    small = []
    for key, title in (
        ("lr", "learning rate"),
        ("tokens_per_second", f"{unit_of(report.task)} per second"),
        ("grad_norm", "gradient norm"),
        ("validation_bits_per_byte", "validation bits per byte"),
    ):
        records = report.validation if key.startswith("validation") else report.training
        points = _series(records, key)
        if len(points) > 1:
            line = figures.Line(title, points, marks=key.startswith("validation") and len(points) <= 60)
            small.append(Markup(figures.curves([line], x_label="step", y_label=title, width=_NARROW, height=190)))
    if found := report.lr_finder:
        small.append(Markup(figures.range_test(found["rates"], found["smoothed"], found["lr"], width=_NARROW)))
    unit = "loss, nats per token" if report.task in WRITES else "loss"
    figure = _both(lambda width: figures.curves(loss, x_label="step", y_label=unit, width=width))
    return {
        "heading": _learning_heading(train, valid),
        "text": _learning_text(report, train, valid),
        "figure": figure,
        "small": small,
    }


def _learning_heading(train: list[figures.Point], valid: list[figures.Point]) -> str:
    if not valid:
        (first, start), (last, end) = train[0], train[-1]
        if first == last:
            return f"Training loss {end:.2f} at step {last:,.0f}"
        return f"Training loss went from {start:.2f} to {end:.2f} in {last:,.0f} steps"
    best_step, best = min(valid, key=lambda point: point[1])
    last_loss = valid[-1][1]
    if len(valid) == 1:
        return f"Validation loss {best:.2f} after {best_step:,.0f} steps"
    start = valid[0][1]
    if best_step == valid[0][0] or start <= best:
        return f"Validation loss did not improve on the first {best:.2f}"
    fell = f"Validation loss fell from {start:.2f} to {best:.2f} in {best_step:,.0f} steps"
    return f"{fell}, then rose to {last_loss:.2f}" if last_loss > best * 1.005 else fell


def _learning_text(report: ReportData, train: list[figures.Point], valid: list[figures.Point]) -> str:
    sentences = []
    if len(valid) > 3:
        (_, before), (_, last) = valid[-1 - max(1, len(valid) // 4)], valid[-1]
        best_step, best = min(valid, key=lambda point: point[1])
        if last > best * 1.005:
            sentences.append(
                f"After step {best_step:,.0f} the model fitted its training text at the cost of unseen text: "
                "more data, fewer steps or more dropout may help."
            )
        elif before - last > 0.01 * before:
            sentences.append("It was still falling at the end: more steps may help.")
        else:
            sentences.append("It had levelled off at the end.")
    if train and valid and train[-1][0] >= 0.9 * valid[-1][0]:
        tail = [y for x, y in train if x >= 0.95 * train[-1][0]]
        gap = valid[-1][1] - sum(tail) / len(tail)
        sentences.append(
            f"At the end validation loss lay {abs(gap):.2f} {'above' if gap > 0 else 'below'} training loss."
        )
    speeds = [y for _, y in _series(report.training, "tokens_per_second")]
    if speeds:
        sentences.append(f"Training read {_rounded(median(speeds))} {unit_of(report.task)} per second (median).")
    sentences += [f"{_capital(found['why'])}." for found in (report.lr_finder, report.batch_finder) if found]
    return " ".join(sentences)


def _text_bytes(story: Mapping[str, Any]) -> int:
    """UTF-8 bytes of text in all splits."""
    return sum(int(split.get("bytes") or 0) for split in story.get("splits", {}).values())


def data_story(report: ReportData) -> dict[str, Any] | None:
    """What the page and the card tell of the story."""
    story = report.story
    splits = {name: story["splits"][name] for name in _SPLITS if name in story.get("splits", {})}
    rows = int(story.get("rows_read") or 0)
    if not splits and not rows:
        return None
    files = [file if isinstance(file, Mapping) else {"file": file} for file in story.get("files", ())]
    one_text = rows <= 1 or any(file.get("cut_into_pieces") for file in files)
    key, unit = ("chars", "characters") if one_text else ("rows", "rows")
    steps = story.get("steps", ())
    across = story.get("duplicates_across_splits", {})
    removed = int(across.get("removed") or 0)
    drops = [] if one_text else [(step_name(step), float(step["dropped"])) for step in steps if step.get("dropped")]
    if removed and not one_text:
        drops.append(("also in validation or test", float(removed)))
    sizes = [(_split_name(name), float(split.get(key) or 0)) for name, split in splits.items()]
    whole = sum(size for _, size in sizes) if one_text else float(rows)
    gone = sum(size for _, size in drops)
    read = story.get("bytes_read") or _text_bytes(story)
    columns = [c for c in ("rows", "chars", "bytes", "tokens") if any(c in split for split in splits.values())]
    return {
        "heading": ", ".join(
            filter(
                None,
                [
                    f"{_bytes(read)} read" if read else "",
                    "" if one_text else f"{rows:,} documents",
                    f"{figures.percent(gone / whole)} dropped" if gone and whole else "nothing dropped",
                ],
            )
        ),
        "figure": _both(lambda width: figures.flow(whole, drops, sizes, unit=unit, width=width))
        if whole
        else Markup(""),
        "changed": _listed([f"{step_name(step)} {step['changed']:,}" for step in steps if step.get("changed")]),
        "idle": _listed([step_name(step) for step in steps if not step.get("dropped") and not step.get("changed")]),
        "notes": _data_notes(story),
        "examples": [(step_name(step), step["examples"]) for step in steps if step.get("examples")]
        + ([("also in validation or test", across["examples"])] if across.get("examples") else []),
        "columns": ["characters" if column == "chars" else column for column in columns],
        "splits": [(_split_name(n), [_counted(split.get(c), c) for c in columns]) for n, split in splits.items()],
        "files": [str(file.get("file")) for file in files],
    }


def _data_notes(story: Mapping[str, Any]) -> list[str]:
    """Sentences on what could mislead a reader of the numbers."""
    across = story.get("duplicates_across_splits", {})
    found = int(across.get("exact") or 0) + int(across.get("near") or 0)
    notes = []
    if found > int(across.get("removed") or 0):
        notes.append(
            f"Of the training rows, {found:,} also occur in validation or test and were kept: the measured values flatter the model."
        )
    if across.get("validation_in_test"):
        notes.append(f"Of the validation rows, {across['validation_in_test']:,} also occur in test.")
    if story.get("augmented"):
        notes.append(f"{story['augmented']:,} changed copies of training rows were added (augmentation).")
    return notes + [f"{_capital(warning)}." for warning in story.get("warnings", ())]


def model_sentence(report: ReportData) -> str:
    model = report.model
    parts = [f"{model['layers']} layers"] if "layers" in model else []
    parts += [f"{model['width']} wide"] if "width" in model else []
    parts += [f"{_count(model['parameters'])} parameters"] if "parameters" in model else []
    return f"A Transformer of {', '.join(parts)}" if parts else "The model"


def _cost(report: ReportData) -> dict[str, Any] | None:
    if not report.times and not report.machine and not report.energy:
        return None
    total = sum(report.times.values())
    heading = f"{clock(total)} of work" if report.times else "The machine"
    if report.times and report.machine.get("cores"):
        cores = report.machine["cores"]
        heading += f" on {cores} {'core' if cores == 1 else 'cores'}"
    if report.energy:
        heading += f", about {energy_of(report.energy.kwh)}"
    rows = [(stage.replace("_", " "), seconds, clock(seconds)) for stage, seconds in report.times.items()]
    return {"heading": heading, "figure": _both(lambda width: figures.bars(rows, label="time per stage", width=width))}


def _profile(report: ReportData) -> dict[str, Any] | None:
    """Where the time of the profiled steps went."""
    found = report.profile
    if not found:
        return None
    rows = [(entry["kind"], float(entry["share"]), figures.percent(entry["share"])) for entry in found["kinds"]]
    longest = [
        [
            entry["name"],
            entry["kind"],
            f"{entry['calls'] / found['steps']:,.0f}",
            _each_step(entry["seconds"], found),
        ]
        for entry in found["operations"][:10]
    ]
    return {
        "heading": f"{_each_step(found['seconds'], found)} a step while it was watched",
        "figure": _both(lambda width: figures.bars(rows, label="share of the time", width=width)),
        "operations": longest,
        "steps": found["steps"],
    }


def _each_step(seconds: float, profile: Mapping[str, Any]) -> str:
    each = seconds / profile["steps"]
    return f"{each:,.1f} s" if each >= 10 else f"{1000 * each:,.1f} ms"


def _both(draw: Callable[[int], str]) -> Markup:
    """A figure for a page and one for a phone; only one is shown."""
    wide, narrow = draw(_WIDE), draw(_NARROW)
    return Markup(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>') if wide else Markup("")


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[figures.Point]:
    points = ((r.get("step"), r.get(key)) for r in records)
    numeric = ((float(x), float(y)) for x, y in points if isinstance(x, (int, float)) and isinstance(y, (int, float)))
    return [(x, y) for x, y in numeric if math.isfinite(y)]


def continuation(sample: Sample) -> str:
    """The text without the prompt, whether or not it was repeated at its start."""
    return sample.text.removeprefix(sample.prompt)


def settings_of(sample: Sample) -> str:
    return ", ".join(f"{str(k).replace('_', ' ')} {v}" for k, v in sample.settings.items() if v is not None)


# Words for numbers


def plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return "–" if value is None else str(value)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _capital(text: str) -> str:
    """With a capital letter at the beginning, but for words that have capitals of their own, such as mAP."""
    own = any(letter.isupper() for letter in text.partition(" ")[0])
    return text if own else text[:1].upper() + text[1:]


def _unbroken(text: str) -> str:
    """For headings: no line ends inside brackets, within "5-gram", or between a number and its unit."""
    brackets = re.sub(r"\[[^\]]*\]", lambda m: m[0].replace(" ", "\u00a0"), text)
    return re.sub(r"(?<=\d) (?=%|[a-zA-Z]{1,3}\b)", "\u00a0", re.sub(r"(?<=\d)-(?=gram)", "\u2060-\u2060", brackets))


def step_name(step: Mapping[str, Any]) -> str:
    return str(step["step"]).replace("_", " ")


def _split_name(name: str) -> str:
    return {"train": "training"}.get(name, name)


def _counted(value: Any, column: str) -> str:
    if not isinstance(value, (int, float)):
        return "–"
    return _bytes(value) if column == "bytes" else f"{value:,.0f}"


def _count(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def _rounded(value: float) -> str:
    """Three significant digits: a rate is not known better."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, digits):,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: float) -> str:
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.0f} bytes"


def clock(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def energy_of(kwh: float) -> str:
    return f"{kwh:.2g} kWh" if kwh >= 0.1 else f"{kwh * 1000:.2g} Wh"

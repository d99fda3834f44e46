"""The report of a run: one self-contained HTML page, and the model card (README.md) beside the weights.

The one idea: headings say what was found, figures show why, and everything on the page is a number of this run; parts
that were not measured are left out. It measures nothing itself: `ReportData` is all it knows.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from formary import durable
from formary.evaluate.interval import Interval
from formary.pipeline import figures

LOWER_IS_BETTER = ("bits_per_byte", "loss", "perplexity")
_NAMES = {
    "bits_per_byte": "bits per byte",
    "loss": "loss (nats per token)",
    "masked_accuracy": "accuracy on masked tokens",
}
_TASKS = {  # task: (Hugging Face pipeline tag, transformers class, what the model does)
    "causal_lm": ("text-generation", "AutoModelForCausalLM", "writes on from a text"),
    "masked_lm": ("fill-mask", "AutoModelForMaskedLM", "fills in masked words"),
    "denoise": ("text2text-generation", "AutoModelForSeq2SeqLM", "restores removed spans of a text"),
}
_SPLITS = ("train", "validation", "test")
_WIDE, _NARROW = 720, 340  # every figure is drawn for a page and for a phone; CSS shows one


@dataclass(frozen=True)
class Metric:
    """One measured number with its interval, beside the same number of the baselines on the same split."""

    metric: str  # bits_per_byte, loss, perplexity, accuracy, ...
    protocol: str  # what was measured on what: "test split, 48 documents, stride 128"
    model: Interval
    baselines: Mapping[str, Interval] = field(default_factory=dict)
    verdicts: Mapping[str, str] = field(default_factory=dict)  # baseline: better, worse or cannot tell
    higher_is_better: bool | None = None  # None: known from the metric's name

    @property
    def upward(self) -> bool:
        """Whether more is better."""
        return self.metric not in LOWER_IS_BETTER if self.higher_is_better is None else self.higher_is_better

    @property
    def strongest(self) -> str | None:
        """The baseline that is hardest to beat."""
        values = {name: i.value for name, i in self.baselines.items() if math.isfinite(i.value)}
        pick = max if self.upward else min
        return pick(values, key=lambda name: values[name]) if values else None

    def verdict(self, baseline: str) -> str:
        """What may be said of the model against a baseline: from `verdicts`, else only if the intervals are apart."""
        if baseline in self.verdicts:
            return self.verdicts[baseline]
        model, other = self.model, self.baselines[baseline]
        if model.high < other.low:
            return "worse" if self.upward else "better"
        if model.low > other.high:
            return "better" if self.upward else "worse"
        return "cannot tell"


@dataclass(frozen=True)
class Sample:
    """A text the model wrote: after `prompt`, with these settings, at the end or at a training step."""

    prompt: str
    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None


@dataclass(frozen=True)
class Energy:
    """An estimate of what the run consumed, and what was assumed to make it."""

    kwh: float
    assumption: str


@dataclass(frozen=True)
class ReportData:
    """All that the page and the card tell; every part but the name may be empty.

    `story` is data/story.json as `data.documents.write_documents` returns it; a `tokens` count may be added to each split.
    `training` and `validation` are records of metrics.jsonl: {step, loss, lr, tokens_per_second, seconds, grad_norm} and
    {step, validation_loss, validation_bits_per_byte}.
    """

    name: str
    description: str = ""
    task: str = "causal_lm"
    created: str = ""  # ISO 8601
    formary_version: str = ""
    recipe: str = ""  # YAML as resolved
    story: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)  # kind, vocab_size, bytes_per_token, ...
    model: Mapping[str, Any] = field(default_factory=dict)  # parameters, layers, width, heads, context, ...
    training: Sequence[Mapping[str, Any]] = ()
    validation: Sequence[Mapping[str, Any]] = ()
    metrics: Sequence[Metric] = ()
    samples: Sequence[Sample] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)  # cpu, cores, threads, memory, torch, precision
    times: Mapping[str, float] = field(default_factory=dict)  # stage: seconds
    energy: Energy | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)  # data, recipe, model
    next_commands: Sequence[str] = ()
    language: str = ""  # BCP 47, of the data; empty: unknown
    license: str = ""  # SPDX, of the weights; empty: not stated

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; infinite bounds become None."""
        metrics = [
            asdict(m)
            | {"model": m.model.to_json(), "baselines": {name: i.to_json() for name, i in m.baselines.items()}}
            for m in self.metrics
        ]
        return asdict(self) | {"metrics": metrics}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ReportData:
        """The inverse of `to_json`."""
        metrics = [
            Metric(
                **dict(m)
                | {
                    "model": Interval.from_json(m["model"]),
                    "baselines": {name: Interval.from_json(i) for name, i in m.get("baselines", {}).items()},
                }
            )
            for m in fields.get("metrics", ())
        ]
        samples = [Sample(**s) for s in fields.get("samples", ())]
        energy = Energy(**fields["energy"]) if fields.get("energy") else None
        return cls(**dict(fields) | {"metrics": metrics, "samples": samples, "energy": energy})


def write_report(path: Path, report: ReportData) -> None:
    """Write the page; it needs no other file, no network and no script.

    Raises:
        StorageError: the file cannot be written.
    """
    durable.write_text(Path(path), render_report(report))


def write_model_card(path: Path, report: ReportData) -> None:
    """Write README.md for the model folder: YAML front matter that Hugging Face reads, then prose for people.

    Raises:
        StorageError: the file cannot be written.
    """
    durable.write_text(Path(path), render_model_card(report))


def headline(report: ReportData) -> str:
    """The finding in one sentence: "2.05 bits per byte [2.01, 2.09]; better than the 5-gram at 2.31"."""
    metric = _main_metric(report)
    if metric is None:
        return f"{report.name}: nothing was measured"
    measured = interval_text(metric.model, unit=_NAMES.get(metric.metric, metric.metric.replace("_", " ")))
    baseline = metric.strongest
    if baseline is None:
        return f"{measured}; no baseline was measured"
    at = number(metric.baselines[baseline].value, decimals_for(metric.model))
    verdict = metric.verdict(baseline)
    if verdict == "cannot tell":
        return f"{measured}; no clear difference from the {baseline} at {at}"
    return f"{measured}; {verdict} than the {baseline} at {at}"


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
        "plain": _plain,
        "measure": lambda name: _NAMES.get(name, name.replace("_", " ")),
        "interval": interval_text,
        "capitalise": _capital,
        "unbroken": _unbroken,
    }
    environment.filters.update(filters)
    style = _STYLE + figures.CSS
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    learning = _learning(report)
    data = _data(report)
    page = environment.from_string(_PAGE).render(
        report=report,
        style=Markup(style),
        style_hash=digest,
        headline=headline(report),
        metric=_main_metric(report),
        baselines=list(dict.fromkeys(name for m in report.metrics for name in m.baselines)),
        facts=_facts(report),
        verdict=_verdict_sentence(report),
        interval_figure=_interval_figure(_main_metric(report)),
        learning=learning,
        data=data,
        model=_model_sentence(report),
        cost=_cost(report),
        last_samples=[s for s in report.samples if s.step is None] or list(report.samples[-1:]),
        early_samples=[s for s in report.samples if s.step is not None],
        continuation=_continuation,
        settings=_settings,
    )
    return page + "\n"


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
        groups.setdefault(metric.verdict(name), []).append(f"the {name}")
    words = {"better": "Better than {}", "worse": "worse than {}", "cannot tell": "no clear difference from {}"}
    said = [words[v].format(_listed(groups[v])) for v in words if v in groups]
    return _capital("; ".join(said)) if said else "How good the model is"


def _facts(report: ReportData) -> list[tuple[str, str]]:
    """The few numbers under the title."""
    facts: list[tuple[str, str]] = []
    for metric in report.metrics:
        if metric is not _main_metric(report) and len(facts) < 1:
            facts.append((metric.metric.replace("_", " "), number(metric.model.value, decimals_for(metric.model))))
    if "parameters" in report.model:
        facts.append(("parameters", _count(report.model["parameters"])))
    size = _text_bytes(report.story)
    if size:
        facts.append(("of text", _bytes(size)))
    if report.times:
        facts.append(("from data to report", _clock(sum(report.times.values()))))
    if report.energy:
        facts.append(("estimated energy", _energy(report.energy.kwh)))
    return facts


def _interval_figure(metric: Metric | None) -> Markup:
    if metric is None:
        return Markup("")
    baselines = sorted(metric.baselines.items(), key=lambda item: item[1].value, reverse=metric.upward)
    rows = [figures.Row("this model", metric.model, model=True), *(figures.Row(n, i) for n, i in baselines)]
    direction = "higher is better" if metric.upward else "lower is better"
    unit = f"{_NAMES.get(metric.metric, metric.metric.replace('_', ' '))}, {direction}"
    decimals = decimals_for(metric.model)
    return _both(lambda width: figures.intervals(rows, unit=unit, decimals=decimals, width=width))


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
        ("tokens_per_second", "tokens per second"),
        ("grad_norm", "gradient norm"),
        ("validation_bits_per_byte", "validation bits per byte"),
    ):
        records = report.validation if key.startswith("validation") else report.training
        points = _series(records, key)
        if len(points) > 1:
            line = figures.Line(title, points, marks=key.startswith("validation") and len(points) <= 60)
            small.append(Markup(figures.curves([line], x_label="step", y_label=title, width=_NARROW, height=190)))
    figure = _both(lambda width: figures.curves(loss, x_label="step", y_label="loss, nats per token", width=width))
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
        sentences.append(f"Training read {_rounded(median(speeds))} tokens per second (median).")
    return " ".join(sentences)


def _text_bytes(story: Mapping[str, Any]) -> int:
    """UTF-8 bytes of text in all splits."""
    return sum(int(split.get("bytes") or 0) for split in story.get("splits", {}).values())


def _data(report: ReportData) -> dict[str, Any] | None:
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
    drops = [] if one_text else [(_step_name(step), float(step["dropped"])) for step in steps if step.get("dropped")]
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
        "changed": _listed([f"{_step_name(step)} {step['changed']:,}" for step in steps if step.get("changed")]),
        "idle": _listed([_step_name(step) for step in steps if not step.get("dropped") and not step.get("changed")]),
        "notes": _data_notes(story),
        "examples": [(_step_name(step), step["examples"]) for step in steps if step.get("examples")]
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


def _model_sentence(report: ReportData) -> str:
    model = report.model
    parts = [f"{model['layers']} layers"] if "layers" in model else []
    parts += [f"{model['width']} wide"] if "width" in model else []
    parts += [f"{_count(model['parameters'])} parameters"] if "parameters" in model else []
    return f"A Transformer of {', '.join(parts)}" if parts else "The model"


def _cost(report: ReportData) -> dict[str, Any] | None:
    if not report.times and not report.machine and not report.energy:
        return None
    total = sum(report.times.values())
    heading = f"{_clock(total)} of work" if report.times else "The machine"
    if report.times and report.machine.get("cores"):
        cores = report.machine["cores"]
        heading += f" on {cores} {'core' if cores == 1 else 'cores'}"
    if report.energy:
        heading += f", about {_energy(report.energy.kwh)}"
    rows = [(stage.replace("_", " "), seconds, _clock(seconds)) for stage, seconds in report.times.items()]
    return {"heading": heading, "figure": _both(lambda width: figures.bars(rows, label="time per stage", width=width))}


def _both(draw: Callable[[int], str]) -> Markup:
    """A figure for a page and one for a phone; only one is shown."""
    wide, narrow = draw(_WIDE), draw(_NARROW)
    return Markup(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>') if wide else Markup("")


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[figures.Point]:
    points = ((r.get("step"), r.get(key)) for r in records)
    numeric = ((float(x), float(y)) for x, y in points if isinstance(x, (int, float)) and isinstance(y, (int, float)))
    return [(x, y) for x, y in numeric if math.isfinite(y)]


def _continuation(sample: Sample) -> str:
    """The text without the prompt, whether or not it was repeated at its start."""
    return sample.text.removeprefix(sample.prompt)


def _settings(sample: Sample) -> str:
    return ", ".join(f"{str(k).replace('_', ' ')} {v}" for k, v in sample.settings.items() if v is not None)


# Words for numbers


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return "–" if value is None else str(value)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _unbroken(text: str) -> str:
    """For headings: no line ends inside brackets, within "5-gram", or between a number and its unit."""
    brackets = re.sub(r"\[[^\]]*\]", lambda m: m[0].replace(" ", "\u00a0"), text)
    return re.sub(r"(?<=\d) (?=%|[a-zA-Z]{1,3}\b)", "\u00a0", re.sub(r"(?<=\d)-(?=gram)", "\u2060-\u2060", brackets))


def _step_name(step: Mapping[str, Any]) -> str:
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


def _clock(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _energy(kwh: float) -> str:
    return f"{kwh:.2g} kWh" if kwh >= 0.1 else f"{kwh * 1000:.2g} Wh"


# The model card


def render_model_card(report: ReportData) -> str:
    """The card as Markdown text."""
    front = yaml.safe_dump(_front_matter(report), sort_keys=False, allow_unicode=True, width=100)
    blocks = [f"---\n{front}---", f"# {_inline(report.name)}"]
    if report.description:
        blocks.append(_inline(report.description))
    does = _TASKS.get(report.task, ("", "", ""))[2]
    blocks.append(f"{_inline(_model_sentence(report))}{f'; it {does}' if does else ''}. Made with Formary.")
    blocks += ["## What was measured", f"**{_inline(headline(report))}**"]
    if report.metrics:
        blocks += [
            _metric_table(report),
            'Brackets hold the 95 % bootstrap interval. A verdict other than "cannot tell" means that the whole interval of '
            "the difference to that baseline, on the same text, lies on one side of zero. Bits per byte can be compared "
            "between tokenizers, loss and perplexity per token cannot.",
        ]
    blocks += ["## How to use it", _usage(report)]
    blocks += ["## The data", _card_data(report)]
    if report.tokenizer or report.model:
        blocks += [
            "## Model and tokenizer",
            _card_table({**report.model, **{f"tokenizer {k}": v for k, v in report.tokenizer.items()}}),
        ]
    if report.samples:
        last = ([s for s in report.samples if s.step is None] or list(report.samples[-1:]))[0]
        blocks += ["## A sample", _fenced(last.prompt + _continuation(last)), _inline(_settings(last))]
    blocks += ["## Limits", _limits(report)]
    made = dict(report.machine) | {f"time, {stage}": _clock(seconds) for stage, seconds in report.times.items()}
    if report.energy:
        made["energy, estimated"] = f"{_energy(report.energy.kwh)} ({report.energy.assumption})"
    if made:
        blocks += ["## How it was made", _card_table(made)]
    if report.hashes:
        blocks += ["## Hashes", _card_table(report.hashes)]
    if report.recipe:
        blocks += ["## Recipe", _fenced(report.recipe, "yaml")]
    return "\n\n".join(blocks) + "\n"


def _front_matter(report: ReportData) -> dict[str, Any]:
    tag = _TASKS.get(report.task, ("", "", ""))[0]
    front: dict[str, Any] = {"license": report.license or "other"}
    if report.language:
        front["language"] = report.language
    front["library_name"] = "transformers"
    if tag:
        front["pipeline_tag"] = tag
    front["tags"] = ["formary", report.task.replace("_", "-")]
    measured = [m for m in report.metrics if math.isfinite(m.model.value)]
    if measured:
        task = {"type": tag or report.task, "name": report.task.replace("_", " ")}
        dataset = {"type": "custom", "name": "held-out split of the run's own data", "split": "test"}
        metrics = [
            {"type": m.metric, "name": f"{m.metric.replace('_', ' ')} ({m.protocol})", "value": round(m.model.value, 6)}
            for m in measured
        ]
        front["model-index"] = [
            {"name": report.name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}
        ]
    return front


def _metric_table(report: ReportData) -> str:
    names = list(dict.fromkeys(name for m in report.metrics for name in m.baselines))
    lines = ["| metric | protocol | this model | " + "".join(f"{_cell(n)} | " for n in names)]
    lines.append("|---|---|---|" + "---|" * len(names))
    for m in report.metrics:
        others = [f"{interval_text(m.baselines[n])}: {m.verdict(n)}" if n in m.baselines else "–" for n in names]
        name = _NAMES.get(m.metric, m.metric.replace("_", " "))
        lines.append("| " + " | ".join(map(_cell, [name, m.protocol, interval_text(m.model), *others])) + " |")
    return "\n".join(line.rstrip() for line in lines)


def _usage(report: ReportData) -> str:
    loader = _TASKS.get(report.task, ("", "AutoModel", ""))[1]
    prompt = next((s.prompt for s in report.samples if s.prompt), "Once upon a time")
    quoted = _python_string(prompt)
    formary = ["import formary", "", 'model = formary.load("path/to/this/folder")']
    hugging = [
        f"from transformers import AutoTokenizer, {loader}",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        f'model = {loader}.from_pretrained("path/to/this/folder")',
    ]
    if report.task == "causal_lm":
        formary.append(f"print(model.generate({quoted}, max_tokens=100))")
        hugging += [
            f'inputs = tokenizer({quoted}, return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0]))",
        ]
    return f"With Formary:\n\n{_fenced(chr(10).join(formary), 'python')}\n\nWith transformers:\n\n{_fenced(chr(10).join(hugging), 'python')}"


def _card_data(report: ReportData) -> str:
    data = _data(report)
    if data is None:
        return "No account of the data was given."
    steps = [
        f"- {_inline(_step_name(step))}: {step.get('dropped') or 0:,} dropped, {step.get('changed') or 0:,} changed"
        for step in report.story.get("steps", ())
        if step.get("dropped") or step.get("changed")
    ]
    steps += [f"- {_inline(note)}" for note in data["notes"]]
    table = ["| split | " + " | ".join(data["columns"]) + " |", "|---|" + "---|" * len(data["columns"])]
    table += ["| " + " | ".join([name, *cells]) + " |" for name, cells in data["splits"]]
    parts = [f"{_inline(data['heading'])}.", "\n".join(steps), "\n".join(table) if data["splits"] else ""]
    return "\n\n".join(filter(None, parts))


def _limits(report: ReportData) -> str:
    limits = [
        "It was measured on held-out text of the same source as its training data; how it does on other text is unknown.",
        "It was not tested for truth, bias, or harmful content, and can repeat passages of its training data.",
    ]
    if "context" in report.model:
        limits.append(f"It sees at most {report.model['context']:,} tokens at a time.")
    if not report.license:
        limits.append("No licence was stated: what the training data allows decides what may be done with the weights.")
    if not report.language:
        limits.append("The language of the data was not stated.")
    return "\n".join(f"- {limit}" for limit in limits)


def _card_table(facts: Mapping[str, Any]) -> str:
    rows = [
        f"| {_cell(str(key).replace('_', ' '))} | {_cell(_plain(value))} |"
        for key, value in facts.items()
        if value is not None
    ]
    return "\n".join(["| | |", "|---|---|", *rows])


def _inline(text: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _cell(text: str) -> str:
    return _inline(text).replace("\\_", "_")


def _fenced(text: str, kind: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"


def _python_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r") + '"'


# The page

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf6; --ink: #23211d; --soft: #6b665c; --line: #e5e0d4; --tint: #f3f0e8;
  --model: #0d5f66; --other: #a79d8c; --warm: #a8481f; --good: #2c6a3c;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", "Source Serif 4", "Noto Serif", Georgia,
    "Songti SC", "Noto Serif CJK SC", "Source Han Serif SC", SimSun, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Noto Sans CJK SC",
    "Microsoft YaHei", sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Noto Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15161a; --ink: #e6e2d9; --soft: #a09a8e; --line: #303239; --tint: #1d1f24;
    --model: #74c4c8; --other: #857f73; --warm: #e2916a; --good: #8bc795;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 var(--sans); overflow-wrap: anywhere; }
main, header, footer { max-width: 47.5rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 4.5rem; }
.eyebrow { color: var(--soft); font-size: .8125rem; letter-spacing: .06em; margin: 0 0 1.25rem; }
h1, h2 { font-family: var(--serif); font-weight: 500; text-wrap: balance; letter-spacing: -.008em; }
h1 { font-size: clamp(1.75rem, 5.2vw, 2.75rem); line-height: 1.18; margin: 0 0 1rem; }
h2 { font-size: clamp(1.35rem, 3.6vw, 1.75rem); line-height: 1.25; margin: 0 0 .75rem; }
h3 { font-size: .8125rem; font-weight: 600; color: var(--soft); letter-spacing: .03em; margin: 2rem 0 .5rem; }
.lead { font-family: var(--serif); font-size: 1.1875rem; line-height: 1.5; color: var(--soft); margin: 0 0 1.75rem; max-width: 38rem; }
section { padding: 3.25rem 0 0; }
section > .eyebrow { max-width: none; margin: 0 0 .6rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p { margin: 0 0 1rem; max-width: 40rem; }
small, .small { font-size: .875rem; color: var(--soft); line-height: 1.55; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: 1.1rem; margin: 0;
  border-top: 1px solid var(--line); padding-top: 1.1rem; }
dl.facts div { display: flex; flex-direction: column-reverse; }
dl.facts dt { color: var(--soft); font-size: .8125rem; }
dl.facts dd { margin: 0; font: 500 1.375rem/1.3 var(--serif); font-variant-numeric: lining-nums; }
figure { margin: 1.75rem 0; break-inside: avoid; }
.narrow { display: none; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem 2.5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; margin: 1rem 0 1.25rem; }
th { text-align: left; font-weight: 600; font-size: .8125rem; color: var(--soft); vertical-align: bottom; }
th, td { padding: .55rem 1rem .55rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
td small { display: block; }
.scroll { overflow-x: auto; }
.stack td > span { white-space: nowrap; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
.ours { color: var(--model); font-weight: 600; }
.better { color: var(--good); } .worse { color: var(--warm); }
.pair h3 { margin-top: .5rem; }
dl.list { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.5rem; margin: .5rem 0 1.25rem; font-size: .9375rem; }
dl.list dt { color: var(--soft); }
dl.list dd { margin: 0; font-variant-numeric: tabular-nums; }
.sample { margin: 1.5rem 0 2rem; border-left: 2px solid var(--model); padding-left: 1.25rem; break-inside: avoid; }
.sample blockquote { margin: 0; font: 1.125rem/1.65 var(--serif); white-space: pre-wrap; }
.sample b { font-weight: 600; color: var(--model); }
.sample figcaption { margin-top: .6rem; }
details { border-top: 1px solid var(--line); padding: .7rem 0; }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; color: var(--soft); font-size: .9375rem; }
summary:hover { color: var(--ink); }
pre, code { font: .8438rem/1.6 var(--mono); }
pre { background: var(--tint); padding: .9rem 1.1rem; border-radius: 4px; overflow-x: auto; margin: .75rem 0 1rem; white-space: pre-wrap; }
pre.command { user-select: all; margin: .5rem 0; }
.examples li { font: .8438rem/1.6 var(--mono); white-space: pre-wrap; }
.examples { padding-left: 1.1rem; margin: .3rem 0 .9rem; }
footer { padding-top: 3.5rem; padding-bottom: 4rem; }
@media (max-width: 42rem) {
  header { padding-top: 2.25rem; }
  section { padding-top: 2.25rem; }
  .wide { display: none; }
  .narrow { display: block; }
  .pair { grid-template-columns: 1fr; }
  .lead { font-size: 1.0625rem; }
  dl.facts { grid-template-columns: 1fr 1fr; }
  dl.list { grid-template-columns: 8.5rem 1fr; gap: .2rem 1rem; }
  dl.long { grid-template-columns: 1fr; gap: 0; }
  dl.long dd { margin-bottom: .6rem; }
  .sample { padding-left: 1rem; }
  .sample blockquote { font-size: 1.0625rem; }
  .stack thead { display: none; }
  .stack tr { display: block; padding: .7rem 0; border-bottom: 1px solid var(--line); }
  .stack td { display: grid; grid-template-columns: 7.5rem 1fr; padding: .15rem 0; border: 0; }
  .stack td:first-child { display: block; font-weight: 600; }
  .stack td:first-child small { font-weight: 400; }
  .stack td::before { content: attr(data-label); color: var(--soft); font-size: .875rem; }
  .stack td:first-child::before { content: none; }
  .stack td > span { display: block; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #ccc; --tint: #f5f5f5; --model: #0d5f66; --other: #999; --warm: #a8481f; --good: #2c6a3c; }
  body { font-size: 10.5pt; }
  header { padding-top: 0; }
  section { padding-top: 1.75rem; }
  h1, h2, h3, summary { break-after: avoid; }
  main, header, footer { max-width: none; padding: 0; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
}
"""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{{ style_hash }}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{{ report.name }}: {{ headline }}</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<p class="eyebrow">{{ report.name }}{% if report.task %} · {{ report.task|label }}{% endif %}{% if report.created %} · {{ report.created[:16]|replace("T", " ") }}{% endif %}</p>
<h1>{{ headline|capitalise|unbroken }}</h1>
{% if report.description %}
<p class="lead" lang="{{ report.description|lang }}">{{ report.description }}</p>
{% endif %}
{% if facts %}
<dl class="facts">
{% for name, value in facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endif %}
</header>
<main>
{% if metric %}
<section id="result">
<p class="eyebrow">Result</p>
<h2>{{ verdict|unbroken }}</h2>
<p class="small">{{ metric.metric|measure|capitalise }}, measured on: {{ metric.protocol }}.</p>
<figure>{{ interval_figure }}</figure>
<div class="scroll"><table class="stack">
<thead><tr><th>metric</th><th>this model</th>{% for name in baselines %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for m in report.metrics %}
<tr>
<td>{{ m.metric|measure }}<small>{{ m.protocol }}</small></td>
<td data-label="this model"><span class="ours">{{ m.model|interval }}</span></td>
{% for name in baselines %}
<td data-label="{{ name }}"><span>{% if name in m.baselines %}{{ m.baselines[name]|interval }} <small class="{{ m.verdict(name)|label if m.verdict(name) != 'cannot tell' else '' }}">{{ "model is " ~ m.verdict(name) if m.verdict(name) != "cannot tell" else "cannot tell" }}</small>{% else %}–{% endif %}</span></td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
<p class="small">Brackets hold the 95 % bootstrap interval. A model is called better or worse than a baseline only when the interval of their difference on the same text leaves out zero.{% if not metric.model.known %} There was too little text for an interval.{% endif %}{% if not metric.baselines %} No baseline was measured, so this number stands alone.{% endif %}{% if metric.metric == "bits_per_byte" %} Bits per byte is what it costs to encode unseen text with the model: lower is better, and it can be compared between tokenizers, which loss and perplexity cannot.{% endif %}</p>
</section>
{% endif %}
{% if learning %}
<section id="learning">
<p class="eyebrow">Learning</p>
<h2>{{ learning.heading|unbroken }}</h2>
<p>{{ learning.text }}</p>
<figure>{{ learning.figure }}</figure>
{% if learning.small %}
<figure class="pair">{% for figure in learning.small %}<div>{{ figure }}</div>{% endfor %}</figure>
{% endif %}
</section>
{% endif %}
{% macro show(sample) %}
<figure class="sample">
<blockquote lang="{{ (sample.prompt ~ sample.text)|lang }}"><b>{{ sample.prompt }}</b>{{ continuation(sample) }}</blockquote>
<figcaption class="small">{% if sample.step is not none %}step {{ "{:,}".format(sample.step) }}{% if settings(sample) %} · {% endif %}{% endif %}{{ settings(sample) }}</figcaption>
</figure>
{% endmacro %}
{% if last_samples %}
<section id="samples">
<p class="eyebrow">Samples</p>
<h2>What it writes</h2>
<p class="small">The prompt is in colour; what follows is the model's.</p>
{% for sample in last_samples %}{{ show(sample) }}{% endfor %}
{% if early_samples %}
<details><summary>While it learnt ({{ early_samples|length }})</summary>
{% for sample in early_samples %}{{ show(sample) }}{% endfor %}
</details>
{% endif %}
</section>
{% endif %}
{% if data %}
<section id="data">
<p class="eyebrow">Data</p>
<h2>{{ data.heading|capitalise|unbroken }}</h2>
{% if data.files %}<p class="small">From {{ data.files[:6]|join(", ") }}{% if data.files|length > 6 %} and {{ data.files|length - 6 }} more{% endif %}.</p>{% endif %}
<figure>{{ data.figure }}</figure>
{% if data.splits and data.columns %}
<table class="numbers">
<thead><tr><th>split</th>{% for column in data.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for name, cells in data.splits %}<tr><td>{{ name }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table>
{% endif %}
{% for note in data.notes %}<p>{{ note }}</p>{% endfor %}
{% if data.changed or data.idle %}
<p class="small">{% if data.changed %}Changed without being dropped: {{ data.changed }}. {% endif %}{% if data.idle %}Found nothing to do: {{ data.idle }}.{% endif %}</p>
{% endif %}
{% if data.examples %}
<details><summary>Examples of what was changed or dropped</summary>
{% for step, examples in data.examples %}
<h3>{{ step }}</h3>
<ul class="examples">{% for example in examples %}<li lang="{{ example|lang }}">{{ example }}</li>{% endfor %}</ul>
{% endfor %}
</details>
{% endif %}
</section>
{% endif %}
{% if report.model or report.tokenizer %}
<section id="model">
<p class="eyebrow">Model</p>
<h2>{{ model|unbroken }}</h2>
<div class="pair">
{% if report.model %}<div><h3>Transformer</h3><dl class="list">{% for key, value in report.model.items() if value is not none %}<dt>{{ key|label }}</dt><dd>{{ value|plain }}</dd>{% endfor %}</dl></div>{% endif %}
{% if report.tokenizer %}<div><h3>Tokenizer</h3><dl class="list">{% for key, value in report.tokenizer.items() if value is not none %}<dt>{{ key|label }}</dt><dd>{{ value|plain }}</dd>{% endfor %}</dl></div>{% endif %}
</div>
</section>
{% endif %}
{% if cost %}
<section id="cost">
<p class="eyebrow">Cost</p>
<h2>{{ cost.heading|unbroken }}</h2>
{% if cost.figure %}<figure>{{ cost.figure }}</figure>{% endif %}
{% if report.machine %}<dl class="list">{% for key, value in report.machine.items() if value is not none %}<dt>{{ key|label }}</dt><dd>{{ value|plain }}</dd>{% endfor %}</dl>{% endif %}
{% if report.energy %}<p class="small">The energy is an estimate: {{ report.energy.assumption }}</p>{% endif %}
</section>
{% endif %}
{% if report.recipe or report.hashes or report.next_commands %}
<section id="again">
<p class="eyebrow">Again and further</p>
<h2>Everything needed to repeat it</h2>
{% if report.next_commands %}
<h3>Next</h3>
{% for command in report.next_commands %}<pre class="command">{{ command }}</pre>{% endfor %}
{% endif %}
{% if report.hashes %}
<h3>Hashes</h3>
<dl class="list long">{% for key, value in report.hashes.items() %}<dt>{{ key|label }}</dt><dd><code>{{ value }}</code></dd>{% endfor %}</dl>
{% endif %}
{% if report.recipe %}
<details><summary>The recipe as resolved</summary><pre>{{ report.recipe }}</pre></details>
{% endif %}
</section>
{% endif %}
</main>
<footer class="small">Made by Formary{% if report.formary_version %} {{ report.formary_version }}{% endif %}. This page loads nothing and sends nothing.</footer>
</body>
</html>"""

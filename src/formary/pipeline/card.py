"""The model card (README.md) beside the weights: front matter that Hugging Face reads, then prose for people."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from formary import durable
from formary.pipeline.findings import ReportData
from formary.pipeline.report import (
    TASKS,
    clock,
    continuation,
    data_story,
    energy_of,
    headline,
    interval_text,
    measure_name,
    model_sentence,
    plain,
    settings_of,
    step_name,
)


def write_model_card(path: Path, report: ReportData) -> None:
    """Write README.md for the model folder: YAML front matter that Hugging Face reads, then prose for people.

    Raises:
        StorageError: the file cannot be written.
    """
    durable.write_text(Path(path), render_model_card(report))


def render_model_card(report: ReportData) -> str:
    """The card as Markdown text."""
    front = yaml.safe_dump(_front_matter(report), sort_keys=False, allow_unicode=True, width=100)
    blocks = [f"---\n{front}---", f"# {_inline(report.name)}"]
    if report.description:
        blocks.append(_inline(report.description))
    does = TASKS.get(report.task, ("", "", ""))[2]
    blocks.append(f"{_inline(model_sentence(report))}{f'; it {does}' if does else ''}. Made with Formary.")
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
        blocks += ["## A sample", _fenced(last.prompt + continuation(last)), _inline(settings_of(last))]
    if report.privacy:
        blocks += ["## Privacy", "\n".join(f"- {_inline(sentence)}" for sentence in report.privacy)]
    blocks += ["## Limits", _limits(report)]
    made = dict(report.machine) | {f"time, {stage}": clock(seconds) for stage, seconds in report.times.items()}
    if report.energy:
        made["energy, estimated"] = f"{energy_of(report.energy.kwh)} ({report.energy.assumption})"
    if made:
        blocks += ["## How it was made", _card_table(made)]
    if report.hashes:
        blocks += ["## Hashes", _card_table(report.hashes)]
    if report.recipe:
        blocks += ["## Recipe", _fenced(report.recipe, "yaml")]
    return "\n\n".join(blocks) + "\n"


def _front_matter(report: ReportData) -> dict[str, Any]:
    tag = TASKS.get(report.task, ("", "", ""))[0]
    front: dict[str, Any] = {"license": report.license or "other"}
    if report.language:
        front["language"] = report.language
    front["library_name"] = "transformers"
    if tag:
        front["pipeline_tag"] = tag
    front["tags"] = ["formary", report.task.replace("_", "-")]
    front["tags"] += ["differential-privacy"] if report.privacy else []
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
        name = measure_name(m.metric)
        lines.append("| " + " | ".join(map(_cell, [name, m.protocol, interval_text(m.model), *others])) + " |")
    return "\n".join(line.rstrip() for line in lines)


def _usage(report: ReportData) -> str:
    loader = TASKS.get(report.task, ("", "AutoModel", ""))[1]
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
    data = data_story(report)
    if data is None:
        return "No account of the data was given."
    steps = [
        f"- {_inline(step_name(step))}: {step.get('dropped') or 0:,} dropped, {step.get('changed') or 0:,} changed"
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
        f"| {_cell(str(key).replace('_', ' '))} | {_cell(plain(value))} |"
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

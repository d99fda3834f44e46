"""What a report and a model card tell of a run: measured numbers with their intervals, samples, curves, and where all came from.

Plain data, as JSON and back; how it looks is for `report` and `card`, where it comes from for `paper`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from formary.evaluate.interval import Interval
from formary.evaluate.labelled import LOWER_IS_BETTER as LABELLED_LOWER

LOWER_IS_BETTER = ("bits_per_byte", "loss", "perplexity", *LABELLED_LOWER)


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
    image: str | None = None  # what was asked about, as a data URI
    made: str | None = None  # and what was answered, where that is a picture


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
    lr_finder: Mapping[str, Any] = field(default_factory=dict)  # lr_finder.json, where the run searched its rate
    batch_finder: Mapping[str, Any] = field(default_factory=dict)  # batch_finder.json, likewise
    incidents: Sequence[Mapping[str, Any]] = ()  # lines of incidents.jsonl: skipped steps and roll-backs
    forecast: str = ""  # how right `formary doctor` was, in a sentence
    privacy: Sequence[str] = ()  # what a private training promises, as sentences
    profile: Mapping[str, Any] = field(default_factory=dict)  # times.json of `train.profiling`
    metrics: Sequence[Metric] = ()
    samples: Sequence[Sample] = ()
    details: Mapping[str, Any] = field(default_factory=dict)  # of a labelled task's answers, as evaluation gives them
    leakage: Mapping[str, Any] = field(default_factory=dict)  # rows, of, examples
    notes: Sequence[str] = ()
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

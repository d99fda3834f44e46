"""What /metrics tells Prometheus: requests, times, tokens, and how full the queues and slots are.

A registry of its own, so that several servers can live in one process; what models do is read when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from formary.serve.service import Service

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAUGES = {
    "queued_requests": "Prompts that wait",
    "queued_tokens": "Tokens that wait, prompts and answers",
    "active_answers": "Answers being written",
    "reading_answers": "Answers whose prompts are being read",
    "free_slots": "Slots that are not in use",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Tokens of prompts that came from the prefix cache",
    "generated_tokens": "Tokens that were written",
    "steps": "Steps of the engine",
    "proposed": "Tokens that speculation guessed",
    "accepted": "Guessed tokens that were right",
}


class Metrics:
    """The server's counters and times."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "formary_requests", "Requests by route and status", ("route", "status"), registry=self.registry
        )
        self.first_token = Histogram(
            "formary_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.per_token = Histogram(
            "formary_time_per_token_seconds",
            "Mean time between an answer's tokens",
            ("model",),
            buckets=(0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2),
            registry=self.registry,
        )
        self.registry.register(_Models(service))

    def answered(self, scope: MutableMapping[str, Any], status: int) -> None:
        """Count a request; unknown paths are one route, so that nobody can fill the memory with their names."""
        route = scope.get("route")
        self._requests.labels(getattr(route, "path", "other"), str(status)).inc()

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)


class _Models(Collector):
    """Reads the workers' states."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        gauges = {name: GaugeMetricFamily(f"formary_{name}", says, labels=["model"]) for name, says in _GAUGES.items()}
        counters = {
            name: CounterMetricFamily(f"formary_{name}", says, labels=["model"]) for name, says in _COUNTERS.items()
        }
        for name, served in list(self._service.served.items()):
            state = served.worker.state
            queued, tokens = served.worker.queued
            values = (queued, tokens, state.active, state.reading, state.free)
            for gauge, value in zip(gauges.values(), values, strict=True):
                gauge.add_metric([name], value)
            for field, counter in counters.items():
                counter.add_metric([name], getattr(state.statistics, field))
        yield from gauges.values()
        yield from counters.values()

"""Forecasts of series: PatchTST-like encoders that read the past of one channel and what is known of the future.

Every channel is a sequence of its own (channel independence, Nie et al. 2023, section 3.1). Quantiles are learned by the
pinball loss (Koenker and Bassett 1978), in the unit of what is read, so that neither a series nor a wild time of it
outweighs others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from formary.data.records import RowForm
from formary.data.series import FORM, points_of
from formary.data.times import calendar, cycles_of, texts_of
from formary.data.tokenizer import Tokenizer, wordless
from formary.errors import DataError
from formary.model.config import ModelConfig, Topology
from formary.model.embedders import SeriesEmbedder
from formary.model.heads import ForecastHead
from formary.model.topologies import Encoder, Network
from formary.recipe.schema import Objective, Recipe
from formary.tasks.models import scratch_config
from formary.tasks.protocol import Answer, Answers, Batch, Example, Precision, Progress, Row
from formary.tasks.reading import outputs
from formary.tasks.windows import Settings, Windows, columns_of, moves

POINT = "point"  # the label of an output that is learned by its error alone
_LEAST_SPREAD = 1e-3  # of differences from the season before, where the spread of the series is 1
_MOST_WINDOWS = 100_000  # of training; of longer data every second, third, ... is taken


class Forecast:
    """The next steps of a series, each with its quantiles."""

    name = "forecast"
    topologies: ClassVar[tuple[Topology, ...]] = ("encoder",)
    embedder: ClassVar[str] = "series"
    form: ClassVar[RowForm] = FORM
    asks: ClassVar[tuple[str, ...]] = ("time", "values")
    answers: ClassVar[Answers] = "forecasts"

    def __init__(
        self, horizon: int, labels: Sequence[str], patch: int, settings: Settings, recipe: Recipe | None = None
    ) -> None:
        self.tokenizer = wordless()
        self.horizon, self.labels, self.told, self.recipe = horizon, tuple(labels), settings, recipe
        self.quantiles = tuple(float(label) for label in self.labels if label != POINT)
        self.windows = Windows(settings, horizon, patch)
        self.last_season = min(settings.season, self.windows.before)

    @classmethod
    def special_tokens(cls, recipe: Recipe) -> str:
        return "masked_lm"

    @classmethod
    def vocabulary(cls, recipe: Recipe, rows: Sequence[Row]) -> Tokenizer:
        return wordless()

    @classmethod
    def learn(cls, recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row], *, start: ModelConfig | None) -> Self:
        asked = recipe.train.objective
        series = [points_of(row, f"training row {number}") for number, row in enumerate(rows, 1)]
        if not series:
            raise DataError("data.sources: there are no training rows")
        steps = sorted({str(points.step) for points in series})
        if len(steps) > 1:
            raise DataError(f"data.sources: series have different steps ({', '.join(steps)}); train a model for each")
        columns = columns_of(series, asked)
        if not any(moves(points.values[name]) for points in series for name in columns if name in points.values):
            raise DataError(
                f"data.sources: every series is constant in training ({', '.join(columns)}): nothing to learn"
            )
        scales = []
        for name in asked.known:
            numbers = np.concatenate([points.values[name] for points in series])
            scales.append((float(np.nanmean(numbers)), float(np.nanstd(numbers)) or 1.0))
        settings = Settings(
            context=recipe.train.context,
            season=asked.season or series[0].step.season,
            columns=columns,
            known=tuple(asked.known),
            scales=tuple(scales),
            cycles=tuple(cycles_of(series[0].step, max(len(points.times) for points in series))),
            step=steps[0],
            anchor=asked.anchor,
            every=asked.origins_every or asked.horizon,
            names=dict(recipe.data.columns),
        )
        patch = (start or scratch_config(recipe, tokenizer, "encoder")).patch_size
        return cls(asked.horizon, _labels(asked), patch or 1, settings, recipe)

    @classmethod
    def of_model(cls, config: ModelConfig, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Self:
        if config.horizon is None or "columns" not in settings:
            raise DataError(
                "formary.json: this model does not say which columns it forecasts; train it with task forecast"
            )
        lists = {name: tuple(settings[name]) for name in ("columns", "known", "cycles")}
        scales = tuple((float(mean), float(spread)) for mean, spread in settings["scales"])
        told = Settings(**{**settings, **lists, "scales": scales})
        return cls(config.horizon, config.labels, config.patch_size or 1, told)

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.told)

    def model_config(self) -> ModelConfig:
        assert self.recipe is not None
        return self.head(scratch_config(self.recipe, self.tokenizer, "encoder"))

    def head(self, config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(
            config,
            transformer=dataclasses.replace(config.transformer, context=self.windows.before + self.windows.after),
            head="forecast",
            labels=self.labels,
            horizon=self.horizon,
            channels=1
            + (self.told.anchor == "season")
            + len(self.told.known)
            + calendar(np.zeros(1, dtype="M8[s]"), self.told.cycles).shape[1],
        )

    def examples(self, rows: Sequence[Row], *, targets: bool, where: str = "row") -> list[Example]:
        many = sum(len(row["time"]) for row in rows if isinstance(row.get("time"), list | tuple)) * len(
            self.told.columns
        )
        every = max(1, many // _MOST_WINDOWS) if targets else self.told.every
        return self._examples(rows, every=every, backtest=targets, learned=targets, where=where)

    def _examples(
        self, rows: Sequence[Row], *, every: int, backtest: bool, learned: bool, where: str = "row"
    ) -> list[Example]:
        found: list[Example] = []
        short: list[str] = []
        for number, row in enumerate(rows):
            place = f"{where} {number + 1}"
            points = self.windows.points(row, place)
            again = backtest or points.start is not None
            origins = self.windows.origins(points, every=every) if again else [self.windows.end(points, place)]
            if not origins:
                short.append(f"{points.name or 'the series'} has {len(points.times) - (points.start or 0):,} steps")
            for column in self.told.columns:
                found += self.windows.around(points, column, origins, number, learned=learned)
        if short and not found:
            raise DataError(
                f"{where} 1: {short[0]}, too few for a context of {self.told.context:,} (train.context) before the first part "
                f"and a horizon of {self.horizon:,} (train.objective.horizon) in each; lower these, or change the shares of data.split"
            )
        if short:
            self.windows.noted.append(
                f"{len(short):,} series are too short for context and horizon and left out: {short[0]}, ..."
            )
        return found

    def collate(self, examples: Sequence[Example]) -> Batch:
        steps = np.stack([example.inputs for example in examples])
        targets = steps[:, self.windows.before : self.windows.before + self.horizon, 0].copy()
        steps[:, self.windows.before :, 0] = np.nan
        batch = {"steps": torch.from_numpy(steps), "targets": torch.from_numpy(targets)}
        if self.told.anchor == "season":
            steps[:, self.windows.before :, 1] = 0.0  # the second channel tells the values too
            spread = np.sqrt((steps[:, : self.windows.before, 1] ** 2).mean(axis=1, keepdims=True)) + _LEAST_SPREAD
            steps[:, :, 1] /= spread
            batch["spread"] = torch.from_numpy(spread)
        return batch

    def loss(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """Twice the pinball loss, its mean over quantiles, and the error of a point of its own; steps missing left out."""
        given = ~batch["targets"].isnan()
        said, unit = self._said(network, batch)
        errors = (torch.where(given, batch["targets"], 0.0)[..., None] - said) / unit[..., None] * given[..., None]
        total = errors.new_zeros(())
        if self.quantiles:
            levels = torch.tensor(self.quantiles, device=errors.device)
            of_quantiles = errors[..., -len(self.quantiles) :]
            total = total + 2 * torch.maximum(levels * of_quantiles, (levels - 1) * of_quantiles).mean(-1).sum()
        if self.labels[0] == POINT:
            point = errors[..., 0]
            squared = self.recipe is not None and self.recipe.train.objective.point == "mse"
            total = total + (point.square() if squared else point.abs()).sum()
        return total, given.sum()

    def _said(self, network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
        """(batch, horizon, labels) in float32, in the unit of the whole series, and the unit of each window in it."""
        assert isinstance(network, Encoder) and isinstance(network.head, ForecastHead)
        assert isinstance(network.embedder, SeriesEmbedder)
        level, unit = network.embedder.norm.statistics(batch["steps"][..., 0])
        if self.told.anchor == "season":
            past = batch["steps"][:, self.windows.before - self.last_season : self.windows.before, 0]
            again = past[:, torch.arange(self.horizon, device=past.device) % self.last_season]
            level, unit = torch.where(again.isnan(), level, again), batch["spread"]
        said: Tensor = network.head(network(batch["steps"])).float()
        return network.embedder.norm.inverse(said, level[..., None], unit[..., None]), unit

    def predict(
        self,
        network: Network,
        rows: Sequence[Row],
        *,
        precision: Precision = nullcontext,
        targets: bool = False,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Answer]:
        """For each series its forecasts, {"series", "forecasts": [{"column", "origin", "time", "point", "quantiles"}]}.

        A row that says `from` where its part begins is forecast from there on again and again (a backtest); of another
        row what comes after its end.
        """
        examples = self._examples(rows, every=self.told.every, backtest=targets, learned=False)

        def answer(network: Network, batch: Batch) -> list[NDArray[np.float32]]:
            return list(self._said(network, batch)[0].cpu().numpy())

        said = outputs(self, network, examples, answer, precision=precision, progress=progress)
        found: list[Answer] = [{"series": str(row.get("series") or ""), "forecasts": []} for row in rows]
        for example, steps in zip(examples, said):
            points, column, origin, level, unit = example.memory
            ahead = points.step.times(points.times[0], np.arange(origin, origin + self.horizon))
            forecast = self._forecast(steps.astype(np.float64) * unit + level)
            given = {"column": column, "origin": origin, "time": texts_of(ahead)}
            found[example.row]["forecasts"].append(given | forecast)
        return found

    def _forecast(self, steps: NDArray[np.float64]) -> dict[str, Any]:
        """One forecast of (horizon, labels); quantiles are put in order where they cross (Chernozhukov et al. 2010)."""
        ordered = np.sort(steps[:, len(self.labels) - len(self.quantiles) :], axis=1)
        names = self.labels[len(self.labels) - len(self.quantiles) :]
        point = steps[:, 0] if self.labels[0] == POINT else ordered[:, self.quantiles.index(0.5)]
        return {POINT: point.tolist(), "quantiles": {name: ordered[:, n].tolist() for n, name in enumerate(names)}}

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns of its rows."""
        return ("time", *self.told.columns, *self.told.known)

    def worded(self, row: Row) -> str:
        """A row in one line."""
        points = points_of(row, "row")
        until = texts_of(points.times[[-1]])[0]
        return f"{points.name or 'the series'}: {len(points.times):,} steps of {points.step} until {until}"

    def notes(self) -> list[str]:
        return list(dict.fromkeys(self.windows.noted))


def _labels(asked: Objective) -> tuple[str, ...]:
    """What is said of each step: a point of its own, and quantiles in order."""
    levels = sorted(set(asked.quantiles) | ({0.5} if asked.point == "median" else set()))
    return tuple(([] if asked.point == "median" else [POINT]) + [f"{level:g}" for level in levels])

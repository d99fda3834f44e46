"""Forecasts: what is learned, what is read at the end of a series and in a backtest, and series that are hard to read."""

import numpy as np
import pytest
import torch

from formary.data.tokenizer import wordless
from formary.errors import DataError, RecipeError
from formary.hub import checkpoint
from formary.model.norms import InstanceNorm
from formary.model.topologies import build
from formary.recipe.reading import parse
from formary.tasks.forecast import Forecast


def row(values, start=None, name="", first="2024-01-01", **columns):
    times = np.datetime64(first, "h") + np.arange(len(values))
    listed = {"value": [None if np.isnan(v) else float(v) for v in values]} | {k: list(v) for k, v in columns.items()}
    made = {"series": name, "time": [str(t) for t in times], "values": listed}
    return made if start is None else {**made, "from": start}


def wave(count=150, level=5.0):
    return level + 2 * np.sin(np.arange(count) * 2 * np.pi / 8)


def made(rows, *, context=16, switches=None, **objective):
    objective = {"horizon": 4, "season": 8, "quantiles": [0.1, 0.5, 0.9], **objective}
    recipe = parse(
        f"""
        name: t
        task: forecast
        data: {{sources: [x]}}
        model: {{preset: series-mini, size: 1x32, switches: {switches or {"patch_size": 4, "dropout": 0.0}}}}
        train: {{batch: 4, context: {context}, objective: {objective}}}
        """
    )
    return Forecast.learn(recipe, wordless(), rows, start=None)


@pytest.mark.parametrize("objective", [{}, {"anchor": "season"}, {"point": "mse"}, {"point": "mae", "quantiles": []}])
def test_a_wave_is_learned_and_its_level_does_not_matter(learned, objective):
    rows = [row(wave())]
    task = made(rows, **objective)
    network = learned(task, rows, steps=150)
    (answer,) = task.predict(network, [row(100 * wave(70, level=50.0))])
    (forecast,) = answer["forecasts"]
    assert forecast["point"] == pytest.approx(100 * wave(74, level=50.0)[70:], abs=40)
    assert forecast["time"] == [
        "2024-01-03T22:00:00",
        "2024-01-03T23:00:00",
        "2024-01-04T00:00:00",
        "2024-01-04T01:00:00",
    ]
    assert list(forecast["quantiles"]) == [f"{q:g}" for q in task.quantiles]


def test_the_forecast_moves_and_stretches_with_the_series():
    rows = [row(wave())]
    task = made(rows)
    network = build(task.model_config(), seed=1).eval()
    values = np.random.default_rng(0).normal(size=60)
    one, other = (task.predict(network, [row(given)])[0]["forecasts"][0]["point"] for given in (values, 7 * values - 3))
    assert other == pytest.approx(7 * np.array(one) - 3, rel=1e-3)


def test_a_backtest_sees_nothing_after_its_origins():
    values = wave(60)
    task = made([row(values)])
    network = build(task.model_config(), seed=1).eval()
    (answer,) = task.predict(network, [row(values, start=40)])
    assert [forecast["origin"] for forecast in answer["forecasts"]] == [40, 44, 48, 52, 56]
    for forecast in answer["forecasts"]:
        (alone,) = task.predict(network, [row(values[: forecast["origin"]])])
        assert alone["forecasts"][0]["point"] == pytest.approx(forecast["point"], abs=1e-3)


def test_the_loss_is_twice_the_pinball_loss_of_known_steps_in_the_unit_of_each_window():
    values = wave(60) + np.random.default_rng(0).normal(size=60)
    values[[20, 25, 41]] = np.nan
    task = made([row(values)], quantiles=[0.2, 0.5], point="mae")
    network = build(task.model_config(), seed=1).eval()
    batch = task.collate(task.examples([row(values)], targets=True))
    total, count = task.loss(network, batch)
    said, unit = task._said(network, batch)
    expected = 0.0
    for targets, steps, scale in zip(batch["targets"], said, unit):
        for target, (point, low, middle) in zip(targets, steps):
            if not target.isnan():
                pinball = [max(q * (target - f), (q - 1) * (target - f)) for q, f in ((0.2, low), (0.5, middle))]
                expected += (sum(pinball) + (target - point).abs()) / scale[0]
    assert int(count) == int((~batch["targets"].isnan()).sum())
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_the_network_never_reads_the_values_to_come():
    task = made([row(wave())])
    batch = task.collate(task.examples([row(wave(40))], targets=True))
    assert batch["steps"][:, 16:, 0].isnan().all() and not batch["steps"][:, :16, 0].isnan().any()


def test_known_columns_reach_the_forecast_and_must_be_there(learned):
    rng = np.random.default_rng(0)
    sale = (rng.random(220) < 0.3).astype(float)
    values = 5 + 3 * sale + 0.01 * rng.normal(size=220)
    rows = [row(values, sale=sale)]
    task = made(rows, known=["sale"], values=["value"], quantiles=[0.5])
    network = learned(task, rows, steps=150)
    history = np.r_[values[:60], [np.nan] * 4]
    for future in ([1, 0, 0, 1], [0, 1, 1, 0]):
        (answer,) = task.predict(network, [row(history, sale=[*sale[:60], *future])])
        assert answer["forecasts"][0]["point"] == pytest.approx([5 + 3 * f for f in future], abs=0.8)
    with pytest.raises(DataError, match=r"row 1: column 'sale' has to be known for the 4 steps after 2024-01-03T11"):
        task.predict(network, [row(values[:60], sale=sale[:60])])


def test_a_short_series_is_forecast_with_a_note_and_is_too_short_to_learn_from():
    task = made([row(wave())])
    network = build(task.model_config(), seed=1).eval()
    (answer,) = task.predict(network, [row(wave(5))])
    assert np.isfinite(answer["forecasts"][0]["point"]).all()
    assert any("fewer than the context" in note for note in task.notes())
    with pytest.raises(DataError, match=r"training row 1: the series has 12 steps, too few"):
        task.examples([row(wave(12))], targets=True, where="training row")
    with pytest.raises(DataError, match=r"at least two known values"):
        task.predict(network, [row([np.nan, 1.0, np.nan])])


def test_a_still_series_is_forecast_as_still_and_cannot_be_learned_alone():
    with pytest.raises(DataError, match=r"constant"):
        made([row(np.full(60, 7.0))])
    task = made([row(wave())])
    network = build(task.model_config(), seed=1).eval()
    (answer,) = task.predict(network, [row(np.full(60, 7.0))])
    assert answer["forecasts"][0]["point"] == pytest.approx([7.0] * 4, abs=0.5)


def test_missing_values_are_read_as_missing():
    values = wave(60)
    values[3:9] = np.nan
    task = made([row(wave())])
    network = build(task.model_config(), seed=1).eval()
    (answer,) = task.predict(network, [row(values)])
    assert np.isfinite(answer["forecasts"][0]["point"]).all()


def test_quantiles_do_not_cross():
    task = made([row(wave())])
    network = build(task.model_config(), seed=3).eval()
    with torch.no_grad():
        network.head.output.bias.copy_(torch.randn_like(network.head.output.bias))
    (answer,) = task.predict(network, [row(wave(60))])
    low, middle, high = (np.array(given) for given in answer["forecasts"][0]["quantiles"].values())
    assert (low <= middle).all() and (middle <= high).all()


@pytest.mark.parametrize(
    ("given", "objective", "error", "message"),
    [
        (
            [row(wave()), {**row(wave()), "time": [str(np.datetime64("2024-01-01") + n) for n in range(150)]}],
            {},
            DataError,
            "different steps",
        ),
        (
            [row(wave())],
            {"values": ["sales"]},
            RecipeError,
            "train.objective.values: there is no column of numbers 'sales'",
        ),
        ([row(wave())], {"known": ["value"]}, RecipeError, "none to forecast"),
        ([], {}, DataError, "no training rows"),
    ],
)
def test_what_cannot_be_learned_is_refused(given, objective, error, message):
    with pytest.raises(error, match=message):
        made(given, **objective)


def test_another_step_or_a_missing_column_is_refused():
    task = made([row(wave(), other=wave())], values=["value", "other"])
    network = build(task.model_config(), seed=1)
    with pytest.raises(DataError, match=r"row 1: column 'other' is missing"):
        task.predict(network, [row(wave())])
    daily = {**row(wave(), other=wave()), "time": [str(np.datetime64("2024-01-01") + n) for n in range(150)]}
    with pytest.raises(
        DataError, match=r"row 1: its step is 1 day, and the model learned series with a step of 1 hour"
    ):
        task.predict(network, [daily])


def test_a_model_folder_answers_as_the_network_did(tmp_path):
    task = made([row(wave())], switches={"patch_size": 4, "instance_norm": "last"}, anchor="season")
    network = build(task.model_config(), seed=1).eval()
    checkpoint.save(tmp_path, network, formary={"task": "forecast", "settings": task.settings()})
    loaded = checkpoint.load(tmp_path)
    assert loaded.family == "formary" and loaded.config == network.config
    again = Forecast.of_model(loaded.config, wordless(), loaded.formary["settings"])
    assert again.predict(loaded.network, [row(wave(60))]) == task.predict(network, [row(wave(60))])


@pytest.mark.parametrize("level", ["mean", "last"])
def test_instance_norm_is_reversible(level):
    norm = InstanceNorm(level)
    values = torch.randn(3, 10) * 5 + 2
    assert norm.inverse(norm(values, *norm.statistics(values)), *norm.statistics(values)).allclose(values, atol=1e-3)
    found, unit = norm.statistics(torch.tensor([[1.0, 3.0, float("nan"), float("nan")]]))
    assert found.item() == (2.0 if level == "mean" else 3.0) and unit.item() == pytest.approx((1 + norm.EPS) ** 0.5)

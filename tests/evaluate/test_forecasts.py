"""Metrics of forecasts equal statsmodels' and the published formulas; baselines see nothing of the future."""

import numpy as np
import pytest

from formary.data.series import Points
from formary.data.times import Step
from formary.evaluate import forecast_baselines, forecasts
from formary.recipe.schema import Evaluate

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)


def series(values, start=None, name=""):
    step = Step("month", 3)  # whose usual season is 4
    values = np.asarray(values, dtype=np.float64)
    times = step.times(np.datetime64("2024-01-01", "s"), np.arange(len(values)))
    return Points(name, times, step, {"value": values}, start)


def answer(rng, truth_of, origins, horizon, spread=1.0):
    found = []
    for origin in origins:
        point = truth_of[origin : origin + horizon] + rng.normal(size=horizon)
        quantiles = {f"{q:g}": (point + spread * (q - 0.5)).tolist() for q in LEVELS}
        found.append({"column": "value", "origin": origin, "point": point.tolist(), "quantiles": quantiles})
    return {"series": "", "forecasts": found}


@pytest.fixture
def measured():
    rng = np.random.default_rng(0)
    values = 10 + np.sin(np.arange(200) / 3) + rng.normal(size=200)
    points, origins = series(values, 100), list(range(100, 195, 5))
    return points, answer(rng, values, origins, 5), values, origins


def by_name(points, given, season=1, **others):
    found = forecasts.metrics(
        [points], {"model": [given], **others}, season=season, settings=Evaluate(bootstrap=100), where="test"
    )
    return {entry["metric"]: entry for entry in found}


def test_errors_equal_statsmodels_and_the_definitions_of_sktime(measured):
    tools = pytest.importorskip("statsmodels.tools.eval_measures")
    points, given, values, origins = measured
    truth = np.concatenate([values[o : o + 5] for o in origins])
    point = np.concatenate([f["point"] for f in given["forecasts"]])
    found = {name: entry["model"]["value"] for name, entry in by_name(points, given, season=7).items()}
    assert found["mae"] == pytest.approx(tools.meanabs(truth, point))
    assert found["mse"] == pytest.approx(tools.mse(truth, point))
    # sktime: MeanAbsolutePercentageError(), (symmetric=True), MeanAbsoluteScaledError(sp=7), as its sources define them
    assert found["mape"] == pytest.approx(100 * np.mean(np.abs((truth - point) / truth)))
    assert found["smape"] == pytest.approx(100 * np.mean(2 * np.abs(truth - point) / (np.abs(truth) + np.abs(point))))
    history = values[:100]
    assert found["mase"] == pytest.approx(np.mean(np.abs(truth - point)) / np.mean(np.abs(history[7:] - history[:-7])))


def test_crps_is_twice_sklearns_pinball_loss_and_nears_the_integral(measured):
    loss = pytest.importorskip("sklearn.metrics").mean_pinball_loss
    points, given, values, origins = measured
    truth = np.concatenate([values[o : o + 5] for o in origins])
    each = [
        loss(truth, np.concatenate([f["quantiles"][f"{q:g}"] for f in given["forecasts"]]), alpha=q) for q in LEVELS
    ]
    assert by_name(points, given)["crps"]["model"]["value"] == pytest.approx(2 * np.mean(each))
    # Of a uniform distribution on [0, 1] the CRPS at y is y^2 - y + 1/3 (many levels come near it).
    levels = (np.arange(2000) + 0.5) / 2000
    near = 2 * forecasts.pinball(np.array(0.3), levels, levels).mean()
    assert near == pytest.approx(0.3**2 - 0.3 + 1 / 3, abs=1e-4)


def test_coverage_counts_and_has_no_verdict(measured):
    points, given, values, _ = measured
    entry = by_name(points, given, other=[given])["coverage_80"]
    inside = [
        f["quantiles"]["0.1"][n] <= values[f["origin"] + n] <= f["quantiles"]["0.9"][n]
        for f in given["forecasts"]
        for n in range(5)
    ]
    assert entry["model"]["value"] == pytest.approx(np.mean(inside)) and entry["baselines"] == {}


def test_missing_truth_is_left_out_and_a_still_history_has_no_mase():
    values = np.r_[np.ones(20), 2.0, np.nan, 4.0, 5.0]
    given = {"forecasts": [{"column": "value", "origin": 20, "point": [1.0, 1.0, 1.0, 1.0]}]}
    found = by_name(series(values, 20), given)
    assert "mase" not in found and "crps" not in found
    assert found["mae"]["model"]["value"] == pytest.approx((1 + 3 + 4) / 3)


def test_blocks_are_the_cube_root_of_all_horizons_long(measured):
    points, given, _, origins = measured  # 19 horizons of 5 steps: stretches of 3
    steps = forecasts.steps_of([points], [given], season=24)
    assert steps.blocks.tolist() == [(o - 100) // 15 for o in origins]


def test_a_better_forecast_is_called_better():
    rng = np.random.default_rng(1)
    values = rng.normal(size=400).cumsum()
    points, origins = series(values, 200), range(200, 390, 5)
    near = {
        "forecasts": [{"column": "value", "origin": o, "point": (values[o : o + 5] + 0.1).tolist()} for o in origins]
    }
    far = {
        "forecasts": [{"column": "value", "origin": o, "point": (values[o : o + 5] + 2.0).tolist()} for o in origins]
    }
    assert by_name(points, near, far=[far])["mae"]["verdicts"] == {"far": "better"}


# Baselines


def said(values, origins=(100,), season=4, horizon=6, context=8):
    known = series(values[:100])
    return forecast_baselines.baselines(
        [known],
        [series(values, 100)],
        [list(origins)],
        columns=["value"],
        horizon=horizon,
        context=context,
        season=season,
        levels=LEVELS,
    )


def test_naive_baselines_repeat_the_last_value_and_the_last_season():
    values = np.arange(120.0)
    found = {name: given[0]["forecasts"][0]["point"] for name, given in said(values).items()}
    assert found["naive"] == [99.0] * 6
    assert found["seasonal naive"] == [96.0, 97.0, 98.0, 99.0, 96.0, 97.0]
    assert found["linear"] == pytest.approx(np.arange(100.0, 106.0), abs=0.5)


def test_baselines_do_not_look_ahead():
    values = np.random.default_rng(2).normal(size=130)
    other = values.copy()
    other[100:] = 1e6
    assert said(values) == said(other)


def test_exponential_smoothing_equals_statsmodels_refitted_nowhere():
    ets = pytest.importorskip("statsmodels.tsa.exponential_smoothing.ets").ETSModel
    rng = np.random.default_rng(3)
    values = 20 + np.tile([0.0, 3.0, 1.0, -2.0], 35) + rng.normal(size=140) * 0.3
    found = said(values, origins=(100, 110))["ETS"][0]["forecasts"]
    model = ets(values[:100], error="add", trend="add", damped_trend=True, seasonal="add", seasonal_periods=4)
    assert found[0]["point"] == pytest.approx(np.asarray(model.fit(disp=False, maxiter=200).forecast(6)), rel=1e-6)
    assert np.abs(np.array(found[1]["point"]) - values[110:116]).mean() < 1.0

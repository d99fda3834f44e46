"""Series and rows of tables over HTTP: forecasts with their quantiles, labels, and requests that are neither."""

import pytest

from formary.data.tokenizer import wordless
from formary.infer.loaded import Model
from formary.model.topologies import build
from formary.recipe.reading import parse
from formary.serve.playground import described
from formary.tasks.registry import labelled_task

TIMES = [f"2024-01-{day:02}" for day in range(1, 31)]
SERIES = {"time": TIMES, "values": {"value": [float(n % 7) for n in range(30)]}}
ROWS = [{"age": str(20 + 7 * n % 50), "home": "own" if n % 2 else "rent", "label": "ab"[n % 2]} for n in range(20)]


def made(task, rows, more):
    recipe = parse(f"name: t\ntask: {task}\ndata: {{sources: [x]}}\n{more}")
    learned = labelled_task(task).learn(recipe, wordless(), rows, start=None)
    network = build(learned.model_config(), seed=0).eval()
    return Model(network, learned.tokenizer, formary={"task": task, "settings": learned.settings()})


@pytest.fixture(scope="module")
def models():
    series = "model: {preset: series-mini, size: 1x32, switches: {patch_size: 7}}\ntrain: {context: 14, objective: {horizon: 7}}"
    return {
        "series": made("forecast", [SERIES], series),
        "table": made("classify_row", ROWS, "model: {preset: table-mini, size: 1x32}"),
    }


@pytest.fixture
def served(models, start):
    with start(models) as running:
        yield running


def test_a_series_is_forecast_by_columns_or_by_points(served):
    rows = [{"time": time, "value": value} for time, value in zip(TIMES, SERIES["values"]["value"])]
    body = {"inputs": [SERIES, {"time": TIMES, "values": SERIES["values"]["value"]}, {"rows": rows}]}
    said = served.post("/v1/predict/series", body)
    assert said.status_code == 200, said.text
    one, other, third = said.json()["answers"]
    assert one == other == third
    (forecast,) = one["forecasts"]
    assert forecast["time"][0] == "2024-01-31" and len(forecast["point"]) == 7
    assert next(iter(forecast["quantiles"])) == "0.025"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"time": TIMES, "values": [1.0]}, "'value' has 1 values for 30 times"),
        ({"time": ["soon", "later"], "values": [1.0, 2.0]}, "the time 'soon' cannot be read"),
        (
            {"time": ["2024-01-01", "2024-01-02", "2024-01-02"], "values": [1.0, 2.0, 3.0]},
            "2024-01-02 was there before",
        ),
        ({"time": TIMES, "values": {"other": [1.0] * 30}}, "column 'value' is missing"),
        ({"time": ["2024-01", "2024-02"], "values": [1.0, 2.0]}, "its step is 1 month"),
        ("tomorrow", "a series is"),
    ],
)
def test_what_is_no_series_is_a_mistake_of_the_request(served, given, message):
    said = served.post("/v1/predict/series", {"inputs": [SERIES, given]})
    assert said.status_code == 400 and message in said.text and "row 2" in said.text


def test_a_row_is_labelled_and_a_wrong_cell_named(served):
    said = served.post("/v1/predict/table", {"inputs": [{"age": 30, "home": "own"}, {"age": None, "home": "tent"}]})
    assert [set(answer["probabilities"]) for answer in said.json()["answers"]] == [{"a", "b"}] * 2
    wrong = served.post("/v1/predict/table", {"inputs": [{"age": "thirty"}]})
    assert wrong.status_code == 400 and "column 'age' holds 'thirty'" in wrong.text


def test_the_playground_knows_what_they_read(models):
    assert described("s", models["series"])["tabs"] == ["forecast"]
    assert described("s", models["series"])["columns"] == ["time", "value"]
    assert described("t", models["table"])["tabs"] == ["row"]
    assert described("t", models["table"])["columns"] == ["age", "home"]

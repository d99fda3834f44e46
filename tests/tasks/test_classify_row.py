"""Rows of a table: numbers and names as tokens, missing cells, names never seen, and cells that are not as they must be."""

import numpy as np
import pytest
import torch

from formary.data.table import MISSING, OTHER
from formary.data.table import learned as learn_table
from formary.data.tokenizer import wordless
from formary.errors import DataError, RecipeError
from formary.evaluate import table_baselines
from formary.hub import checkpoint
from formary.model.topologies import build
from formary.recipe.reading import parse
from formary.tasks.classify_row import ClassifyRow


def rows(count=60, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        age, home = int(rng.integers(18, 80)), str(rng.choice(["own", "rent", "other"]))
        label = "good" if age > (45 if home == "rent" else 30) else "bad"
        made.append(
            {
                "age": str(age),
                "home": home,
                "income": "" if rng.random() < 0.2 else f"{rng.normal():.2f}",
                "label": label,
            }
        )
    return made


def made(given, **objective):
    recipe = parse(
        f"""
        name: t
        task: classify_row
        data: {{sources: [x]}}
        model: {{preset: table-mini, size: 2x32, switches: {{dropout: 0.0}}}}
        train: {{batch: 4, objective: {objective or "{}"}}}
        """
    )
    return ClassifyRow.learn(recipe, wordless(), given, start=None)


def test_what_needs_both_a_number_and_a_name_is_learned(learned):
    given = rows()
    task = made(given)
    answers = task.predict(learned(task, given, steps=300), given)
    assert np.mean([answer["label"] == row["label"] for answer, row in zip(answers, given)]) > 0.95
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1)


def test_an_answer_depends_on_nothing_else_in_the_batch_and_on_each_cell():
    given = rows()
    task = made(given)
    network = build(task.model_config(), seed=1).eval()
    together = task.predict(network, given)
    (alone,) = task.predict(network, given[:1])
    assert alone["probabilities"] == pytest.approx(together[0]["probabilities"], abs=1e-5)
    for change in (
        {"age": "20"},
        {"age": ""},
        {"home": "rent" if given[0]["home"] != "rent" else "own"},
        {"home": ""},
        {"income": "NA"},
    ):
        (other,) = task.predict(network, [{**given[0], "income": "1.5", **change}])
        (same,) = task.predict(network, [{**given[0], "income": "1.5"}])
        assert other["probabilities"] != same["probabilities"], change


def test_numbers_become_the_normal_scores_of_their_ranks_whatever_their_unit():
    numbers = np.random.default_rng(0).lognormal(size=500)
    scores = [
        learn_table([{"x": f * n} for n in numbers], but=(), only=None)[0].cells([{"x": f * n} for n in numbers], "row")
        for f in (1, 1000)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert scores[0].mean() == pytest.approx(0, abs=0.02) and scores[0].std() == pytest.approx(1, abs=0.05)


def test_missing_and_new_cells_have_numbers_of_their_own():
    table, _ = learn_table([{"c": c, "n": n} for n, c in enumerate("aaabbbbcz?")], but=(), only=["c", "n"])
    assert table.columns[0].names == ("a", "b") and table.sizes == (4, 0)
    cells = table.cells([{"c": "a", "n": 1}, {"c": "z", "n": None}, {"c": "", "n": 2}, {"n": 2}], "row")
    assert cells[:, 0].tolist() == [OTHER + 1, OTHER, MISSING, MISSING] and np.isnan(cells[1, 1])
    assert table.notes() == ["column 'c' is missing in 1 rows", "1 values of 'c' are rare or new and read as one"]


def test_columns_that_tell_nothing_are_left_out_and_named():
    given = [{"row": n, "name": f"person {n}", "same": 1, "empty": "", "age": n % 7} for n in range(30)]
    table, notes = learn_table(given, but=(), only=None)
    assert [column.name for column in table.columns] == ["age"]
    assert notes == ["columns that tell nothing are left out: row, name, same, empty"]


def test_a_word_among_numbers_is_refused_by_row_and_column():
    given = [{"age": str(n % 40), "label": "ab"[n % 2]} for n in range(50)]
    given[16]["age"] = "forty"
    with pytest.raises(DataError, match=r"training row 17: column 'age' holds 'forty', and 49 other rows have numbers"):
        made(given)
    task = made(rows())
    network = build(task.model_config(), seed=1)
    with pytest.raises(DataError, match=r"row 2: column 'age' holds 'forty', and the model knows it as a number"):
        task.predict(network, [rows()[0], {"age": "forty"}])
    with pytest.raises(DataError, match=r"row 1: it has none of the columns that the model reads: age, home, income"):
        task.predict(network, [{"text": "hello"}])
    with pytest.raises(RecipeError, match=r"train.objective.columns: there is no column 'wage'"):
        made(rows(), columns=["wage"])
    with pytest.raises(DataError, match=r"row 1: field 'label' is empty"):
        task.examples([{**rows()[0], "label": ""}], targets=True)


def test_a_model_folder_answers_as_the_network_did(tmp_path):
    task = made(rows())
    network = build(task.model_config(), seed=1).eval()
    checkpoint.save(tmp_path, network, formary={"task": "classify_row", "settings": task.settings()})
    loaded = checkpoint.load(tmp_path)
    assert loaded.family == "formary" and loaded.config == network.config
    again = ClassifyRow.of_model(loaded.config, wordless(), loaded.formary["settings"])
    assert again.predict(loaded.network, rows(5, seed=2)) == task.predict(network, rows(5, seed=2))


def test_no_missing_number_meets_a_gradient():
    task = made(rows())
    network = build(task.model_config(), seed=1)
    loss, _ = task.loss(network, task.collate(task.examples(rows(), targets=True)))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert (
        network.embedder.missing.grad[1].abs().sum() > 0
        and torch.isnan(task.table.cells(rows(), "row")[:, 2].sum() * torch.ones(1)).any()
    )


def test_baselines_learn_from_training_rows_alone():
    known, asked = rows(400), rows(80, seed=5)
    task = made(known)
    found = table_baselines.baselines(known, asked, task.table.columns, "single")
    assert list(found) == ["majority class", "logistic regression", "gradient-boosted trees"]
    right = {
        name: np.mean([a["label"] == row["label"] for a, row in zip(given, asked)]) for name, given in found.items()
    }
    assert right["gradient-boosted trees"] > 0.9 > right["majority class"]
    hidden = [{**row, "label": "good"} for row in asked]
    assert table_baselines.baselines(known, hidden, task.table.columns, "single") == found


def test_numbers_are_a_regression():
    given = [{**row, "label": 3.5 + float(row["age"])} for row in rows()]
    task = made(given)
    assert task.kind == "regression"
    found = table_baselines.baselines(given, given, task.table.columns, "regression")
    assert set(found) == {"mean", "ridge", "gradient-boosted trees"}

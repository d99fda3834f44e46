"""Metrics of labels are those of scikit-learn on the drawn rows, and nothing about the rows makes them fail."""

from __future__ import annotations

import json
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from formary.errors import DataError
from formary.evaluate import label_scores, linear
from formary.evaluate.labels import baselines, details, label_names, metrics
from formary.recipe.schema import Evaluate

pytestmark = pytest.mark.filterwarnings("error")
QUICK = Evaluate(bootstrap=100)
WHERE = "test, some rows"
QUIET = settings(max_examples=40, deadline=None)


def oracle(function, *arguments, **options):
    """scikit-learn's value; what it warns of as undefined is not the claim here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def single_case(seed: int, rows: int, classes: int, *, levels: int = 0):
    """True and answered classes with probabilities; with few levels many probabilities tie."""
    random = np.random.default_rng(seed)
    true = random.integers(0, classes, rows)
    probabilities = random.dirichlet(np.ones(classes), rows) + 0.5 * np.eye(classes)[true] * random.random((rows, 1))
    if levels:
        probabilities = np.round(probabilities * levels) + 0.01
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return true, probabilities.argmax(axis=1), probabilities


def as_rows(true, guess, probabilities=None, texts=None):
    rows = [{"text": texts[n] if texts else f"text {n}", "label": f"class {t}"} for n, t in enumerate(true)]
    answers = [{"label": f"class {g}"} for g in guess]
    for number, answer in enumerate(answers):
        if probabilities is not None:
            shares = {f"class {c}": float(p) for c, p in enumerate(probabilities[number])}
            answer |= {"probability": shares[answer["label"]], "probabilities": shares}
    return rows, answers


def names(classes: int) -> list[str]:
    return [f"class {number}" for number in range(classes)]


def measured(rows, answers, labels, kind, **others):
    entries = metrics(rows, {"model": answers, **others}, settings=QUICK, where=WHERE, labels=labels, kind=kind)
    json.dumps(entries, allow_nan=False)
    return {entry["metric"]: entry for entry in entries}


def values(entries) -> dict[str, float]:
    return {name: entry["model"]["value"] for name, entry in entries.items()}


def of_scikit_learn(true, guess, probabilities, weights=None) -> dict[str, float]:
    """The single-label metrics; classes the rows lack are left out of what is averaged one against the rest."""
    w = {"sample_weight": weights}
    found = {
        "accuracy": oracle(sk.accuracy_score, true, guess, **w),
        "balanced_accuracy": oracle(sk.balanced_accuracy_score, true, guess, **w),
        "macro_f1": oracle(sk.f1_score, true, guess, average="macro", **w),
        "micro_f1": oracle(sk.f1_score, true, guess, average="micro", **w),
        "macro_precision": oracle(sk.precision_score, true, guess, average="macro", **w),
        "macro_recall": oracle(sk.recall_score, true, guess, average="macro", **w),
        "log_loss": oracle(sk.log_loss, true, probabilities, labels=range(probabilities.shape[1]), **w),
    }
    if len(set(true)) > 1:
        found["mcc"] = oracle(sk.matthews_corrcoef, true, guess, **w)
    classes = probabilities.shape[1]
    held = [c for c in ([1] if classes == 2 else range(classes)) if c in true]
    if held:
        each = [oracle(sk.average_precision_score, true == c, probabilities[:, c], **w) for c in held]
        found["average_precision"] = np.mean(each)
    if held and len(set(true)) > 1:
        found["roc_auc"] = np.mean([oracle(sk.roc_auc_score, true == c, probabilities[:, c], **w) for c in held])
    return found


# One label ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_single_label_metrics_equal_scikit_learn(classes):
    true, guess, probabilities = single_case(0, 300, classes)
    ours = values(measured(*as_rows(true, guess, probabilities), names(classes), "single"))
    ece = ours.pop("ece")
    assert ours == pytest.approx(of_scikit_learn(true, guess, probabilities))
    if classes > 2:
        assert ours["roc_auc"] == pytest.approx(sk.roc_auc_score(true, probabilities, multi_class="ovr"))
    assert ece == pytest.approx(naive_ece(true == guess, probabilities.max(axis=1)))


def naive_ece(hits, confidence, weights=None):
    weights = np.ones(len(hits)) if weights is None else weights
    edges = np.linspace(0, 1, 16)
    gaps = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        gaps += abs((weights * inside * (hits * 1.0 - confidence)).sum())
    return gaps / weights.sum()


@QUIET
@given(st.integers(0, 10**6), st.integers(1, 25), st.integers(2, 5), st.sampled_from([0, 2, 6]))
def test_single_label_metrics_equal_scikit_learn_on_any_few_rows(seed, rows, classes, levels):
    true, guess, probabilities = single_case(seed, rows, classes, levels=levels)
    table = label_scores.single_label(true, guess, classes)
    table |= label_scores.single_label_probabilities(true, guess, probabilities)
    ours = {name: float(statistic(np.ones((1, rows)))[0]) for name, statistic in table.items() if name != "ece"}
    defined = {name: value for name, value in ours.items() if math.isfinite(value)}
    assert defined == pytest.approx(of_scikit_learn(true, guess, probabilities), abs=1e-12)


@QUIET
@given(st.integers(0, 10**6), st.integers(2, 25), st.integers(2, 5), st.sampled_from([0, 3]))
def test_resampled_single_label_metrics_equal_scikit_learn_with_sample_weights(seed, rows, classes, levels):
    true, guess, probabilities = single_case(seed, rows, classes, levels=levels)
    table = label_scores.single_label(true, guess, classes)
    table |= label_scores.single_label_probabilities(true, guess, probabilities)
    weights = np.random.default_rng(seed).multinomial(rows, np.ones(rows) / rows, size=4).astype(float)
    for number, drawn in enumerate(weights):
        kept = drawn > 0  # a row that was not drawn is not there
        expected = of_scikit_learn(true[kept], guess[kept], probabilities[kept], drawn[kept])
        expected["ece"] = naive_ece(true == guess, probabilities.max(axis=1), drawn)
        ours = {name: statistic(weights)[number] for name, statistic in table.items()}
        assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert not any(math.isfinite(ours[name]) for name in set(ours) - set(expected))


def test_the_first_metric_is_accuracy_and_baselines_are_judged_on_the_same_rows():
    true, guess, probabilities = single_case(1, 200, 3)
    rows, answers = as_rows(true, guess, probabilities)
    majority = [{"label": "class 0"}] * 200
    entries = measured(rows, answers, names(3), "single", **{"majority class": majority})
    first = next(iter(entries.values()))
    assert first["metric"] == "accuracy" and first["protocol"] == WHERE
    assert first["baselines"]["majority class"]["value"] == pytest.approx((true == 0).mean())
    assert first["verdicts"] == {"majority class": "better"}
    assert first["says"].startswith("accuracy 0.") and "better than majority class" in first["says"]
    assert first["model"]["low"] < first["model"]["value"] < first["model"]["high"]


def test_models_without_probabilities_lack_the_metrics_of_probabilities():
    true, guess, probabilities = single_case(1, 50, 3)
    rows, answers = as_rows(true, guess, probabilities)
    _, bare = as_rows(true, guess)
    entries = measured(rows, answers, names(3), "single", bare=bare)
    assert entries["accuracy"]["verdicts"] == {"bare": "cannot tell"}
    assert entries["roc_auc"]["verdicts"] == {} and entries["log_loss"]["baselines"] == {}
    assert not {"roc_auc", "average_precision", "ece", "log_loss"} & set(measured(rows, bare, names(3), "single"))


def test_a_lower_log_loss_is_better():
    true, guess, probabilities = single_case(1, 300, 3)
    rows, answers = as_rows(true, guess, probabilities)
    _, blind = as_rows(true, guess, np.full_like(probabilities, 1 / 3))
    assert measured(rows, answers, names(3), "single", blind=blind)["log_loss"]["verdicts"] == {"blind": "better"}
    assert measured(rows, blind, names(3), "single", model2=answers)["log_loss"]["verdicts"] == {"model2": "worse"}


def test_one_class_in_the_test_set_leaves_out_what_needs_two():
    true, guess, probabilities = single_case(2, 20, 2)
    entries = values(measured(*as_rows(np.ones_like(true), guess, probabilities), names(2), "single"))
    assert "roc_auc" not in entries and "mcc" not in entries
    assert entries["accuracy"] == pytest.approx((guess == 1).mean())
    zeros = values(measured(*as_rows(np.zeros_like(true), guess, probabilities), names(2), "single"))
    assert "average_precision" not in zeros


def test_labels_that_training_never_saw_count_as_errors():
    true, guess, probabilities = single_case(3, 60, 3)
    known = np.minimum(guess, 1)
    rows, answers = as_rows(true, known, probabilities[:, :2] / probabilities[:, :2].sum(axis=1, keepdims=True))
    entries = values(measured(rows, answers, names(2), "single"))
    assert entries["macro_f1"] == pytest.approx(sk.f1_score(true, known, average="macro"))
    padded = np.column_stack([probabilities[:, :2] / probabilities[:, :2].sum(axis=1, keepdims=True), np.zeros(60)])
    assert entries["log_loss"] == pytest.approx(sk.log_loss(true, padded))
    table = details(rows, answers, labels=names(2), kind="single")
    assert table["confusion"]["labels"] == names(3)
    assert table["classes"][2]["recall"] == 0.0 and table["classes"][2]["precision"] is None


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_rows_are_measured_without_a_warning(kind, count):
    given_answer = {
        "single": {"label": "a", "probability": 1.0, "probabilities": {"a": 1.0, "b": 0.0}},
        "multi": {"labels": [], "probabilities": {"a": 0.2, "b": 0.1}},
        "regression": {"value": 1.0},
    }[kind]
    label = {"single": "a", "multi": [], "regression": 2}[kind]
    rows = [{"text": "", "label": label}] * count
    answers = [given_answer] * count
    labels = ["value"] if kind == "regression" else ["a", "b"]
    entries = measured(rows, answers, labels, kind, other=answers)
    assert next(iter(entries)) == {"single": "accuracy", "multi": "subset_accuracy", "regression": "mae"}[kind]
    assert all(entry["verdicts"] == {"other": "cannot tell"} for entry in entries.values())
    json.dumps(details(rows, answers, labels=labels, kind=kind, columns=["nothing"]), allow_nan=False)


def test_no_rows_are_refused_in_words():
    with pytest.raises(DataError, match="test, 0 rows: there are no rows"):
        metrics([], {"model": []}, settings=QUICK, where="test, 0 rows", labels=["a"], kind="single")


def test_labels_of_any_type_are_compared_by_name():
    assert label_names(True) == ["true"] and label_names(3.0) == ["3"] and label_names(["a", 2]) == ["a", "2"]
    rows = [{"text": "x", "label": value} for value in (1, 0, 1)]
    answers = [{"label": "1"}, {"label": "0"}, {"label": "0"}]
    assert values(measured(rows, answers, ["0", "1"], "single"))["accuracy"] == pytest.approx(2 / 3)


# Several labels ----------------------------------------------------------------------------------------------------------


@QUIET
@given(st.integers(0, 10**6), st.integers(2, 20), st.integers(2, 4))
def test_several_labels_equal_scikit_learn_with_sample_weights(seed, rows, labels):
    random = np.random.default_rng(seed)
    true, scores = random.random((rows, labels)) < 0.4, np.round(random.random((rows, labels)), 1)
    guess = scores >= 0.5
    table = label_scores.several_labels(true, guess) | label_scores.several_labels_probabilities(true, scores)
    weights = random.multinomial(rows, np.ones(rows) / rows, size=3).astype(float)
    for number, drawn in enumerate(weights):
        kept = drawn > 0
        held = (true[kept] | guess[kept]).any(axis=0)
        if not held.any():
            continue
        y, g, w = true[kept][:, held], guess[kept][:, held], drawn[kept]
        single = y.shape[1] == 1  # scikit-learn takes one column for two classes
        f1 = oracle(sk.f1_score, y, g, sample_weight=w) if single else None
        expected = {
            "subset_accuracy": np.average((y == g).all(axis=1), weights=w),
            "micro_f1": f1 if single else oracle(sk.f1_score, y, g, average="micro", sample_weight=w),
            "macro_f1": f1 if single else oracle(sk.f1_score, y, g, average="macro", sample_weight=w),
        }
        present = true[kept].any(axis=0)
        if present.any():
            each = [
                sk.average_precision_score(true[kept][:, c], scores[kept][:, c], sample_weight=w)
                for c in np.flatnonzero(present)
            ]
            expected["average_precision"] = np.mean(each)
        assert {name: table[name](weights)[number] for name in expected} == pytest.approx(expected)


def test_several_labels_are_read_from_lists():
    rows = [{"text": "x", "label": ["a", "b"]}, {"text": "y", "label": []}, {"text": "z", "label": ["c"]}]
    answers = [
        {"labels": ["a"], "probabilities": {"a": 0.9, "b": 0.2}},
        {"labels": [], "probabilities": {"a": 0.1, "b": 0.3}},
        {"labels": ["b"], "probabilities": {"a": 0.1, "b": 0.6}},
    ]
    entries = values(measured(rows, answers, ["a", "b"], "multi"))
    assert entries["subset_accuracy"] == pytest.approx(1 / 3)
    assert entries["micro_f1"] == pytest.approx(2 * 1 / (2 + 3))
    assert entries["macro_f1"] == pytest.approx((1 + 0 + 0) / 3)
    found = details(rows, answers, labels=["a", "b"], kind="multi")
    assert "confusion" not in found and sum(part["rows"] for part in found["calibration"]["bins"]) == 9
    assert [row["row"] for row in found["worst"]] == [3, 1], "the label missed at probability 0 is the worst error"


# Numbers -----------------------------------------------------------------------------------------------------------------


@QUIET
@given(st.integers(0, 10**6), st.integers(2, 25), st.sampled_from([None, 0]), st.sampled_from([1.0, 1e6]))
def test_regression_metrics_equal_scikit_learn_and_scipy_on_the_drawn_rows(seed, rows, digits, scale):
    random = np.random.default_rng(seed)
    true = random.normal(0, 2, rows)
    guess = true + random.normal(0, 1, rows)
    if digits is not None:
        true, guess = np.round(true, digits), np.round(guess, digits)  # ties
    true, guess = true * scale + 5 * scale, guess * scale + 5 * scale
    table = label_scores.numbers(true, guess)
    weights = random.multinomial(rows, np.ones(rows) / rows, size=3).astype(float)
    for number, drawn in enumerate(weights):
        y, g = np.repeat(true, drawn.astype(int)), np.repeat(guess, drawn.astype(int))
        expected = {
            "mae": sk.mean_absolute_error(true, guess, sample_weight=drawn),
            "rmse": sk.root_mean_squared_error(true, guess, sample_weight=drawn),
        }
        if len(set(y)) > 1:
            expected["r2"] = sk.r2_score(true, guess, sample_weight=drawn)
        if len(set(y)) > 1 and len(set(g)) > 1:
            expected["pearson"] = scipy.stats.pearsonr(y, g).statistic
            expected["spearman"] = scipy.stats.spearmanr(y, g).statistic
        ours = {name: statistic(weights)[number] for name, statistic in table.items()}
        assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-7, abs=1e-9)
        assert not any(math.isfinite(ours[name]) for name in set(ours) - set(expected))


def test_a_constant_baseline_has_an_error_and_no_correlation():
    random = np.random.default_rng(0)
    true = random.normal(size=80)
    rows = [{"text": "x", "label": float(value)} for value in true]
    answers = [{"value": float(value)} for value in true + random.normal(0, 0.3, 80)]
    constant = [{"value": 0.1}] * 80
    entries = measured(rows, answers, ["value"], "regression", mean=constant)
    assert list(entries) == ["mae", "rmse", "r2", "pearson", "spearman"]
    assert entries["mae"]["verdicts"] == {"mean": "better"} and entries["pearson"]["baselines"] == {}
    assert list(values(measured(rows, constant, ["value"], "regression"))) == ["mae", "rmse", "r2"]


# Details -----------------------------------------------------------------------------------------------------------------


def test_the_confusion_matrix_and_the_classes_equal_scikit_learn():
    true, guess, probabilities = single_case(4, 200, 4)
    rows, answers = as_rows(true, guess, probabilities)
    found = details(rows, answers, labels=names(4), kind="single")
    assert found["confusion"] == {"labels": names(4), "counts": sk.confusion_matrix(true, guess).tolist()}
    per_class = zip(*sk.precision_recall_fscore_support(true, guess), strict=True)
    for ours, (precision, recall, f1, support) in zip(found["classes"], per_class, strict=True):
        assert (ours["precision"], ours["recall"], ours["f1"]) == pytest.approx((precision, recall, f1))
        assert ours["support"] == support
    shown = found["calibration"]["bins"]
    assert sum(part["rows"] for part in shown) == 200
    gaps = [part["rows"] * abs(part["accuracy"] - part["confidence"]) for part in shown if part["rows"]]
    assert found["calibration"]["ece"] == pytest.approx(sum(gaps) / 200)


def test_the_rarest_of_many_classes_share_a_line_of_the_confusion_matrix():
    true = np.concatenate([np.repeat(np.arange(60), 3), np.arange(40)])
    found = details(*as_rows(true, np.roll(true, 1)), labels=names(60), kind="single")
    assert len(found["confusion"]["counts"]) == 50 and found["confusion"]["labels"][-1] == "(other labels)"
    assert np.sum(found["confusion"]["counts"]) == len(true) and len(found["classes"]) == 60


def test_the_worst_rows_are_wrong_and_the_most_confident_first():
    true, guess, probabilities = single_case(5, 200, 3)
    rows, answers = as_rows(true, guess, probabilities)
    worst = details(rows, answers, labels=names(3), kind="single")["worst"]
    confidence = probabilities.max(axis=1)
    expected = sorted(np.flatnonzero(true != guess), key=lambda n: -confidence[n])[:20]
    assert [row["row"] - 1 for row in worst] == expected
    assert worst[0]["probability"] == pytest.approx(confidence[expected[0]])
    assert worst[0]["label"] == rows[expected[0]]["label"] and worst[0]["text"] == rows[expected[0]]["text"]


def test_the_slice_where_a_model_fails_is_named_first():
    rows = [
        {"text": "word " * (n % 9 + 1), "label": "ab"[n % 2], "shop": "north" if n % 5 else "south", "id": n}
        for n in range(200)
    ]
    answers = [{"label": row["label"] if row["shop"] == "north" else "ba"[n % 2]} for n, row in enumerate(rows)]
    found = details(rows, answers, labels=["a", "b"], kind="single", columns=["shop", "id", "label"])["slices"]
    first = found[0]
    assert (first["by"], first["slice"], first["rows"]) == ("shop", "south", 40)
    assert first["value"] == 0.0 and 0 < first["high"] < 0.15 and first["below"]
    assert {part["by"] for part in found} == {"shop", "label", "text length"}, "a column of many values makes no slice"
    lengths = [part for part in found if part["by"] == "text length"]
    assert sum(part["rows"] for part in lengths) == 200 and len(lengths) == 4


def test_regression_details_show_the_largest_errors_and_points():
    rows = [{"text": "x" * (n + 1), "label": n, "group": n % 2} for n in range(40)]
    answers = [{"value": n + (3.0 if n == 7 else 0.1)} for n in range(40)]
    found = details(rows, answers, labels=["value"], kind="regression", columns=["group"])
    assert found["worst"][0] == {"row": 8, "text": "x" * 8, "label": 7.0, "answer": 10.0, "error": 3.0}
    assert len(found["points"]) == 40 and found["points"][7] == [7.0, 10.0]
    assert {part["by"] for part in found["slices"]} == {"text length", "value", "group"}
    assert all(part["metric"] == "mae" for part in found["slices"])


# Baselines ---------------------------------------------------------------------------------------------------------------

GOOD, BAD = "a lovely film with good actors", "an awful film with bad actors"


def test_a_linear_model_learns_what_the_majority_does_not_know():
    train = [{"text": f"{GOOD} {n}", "label": 1} for n in range(12)] + [
        {"text": f"{BAD} {n}", "label": 0} for n in range(9)
    ]
    test = [{"text": "good and lovely", "label": 1}, {"text": "bad and awful", "label": 0}] * 5
    found = baselines(train, test, kind="single")
    assert list(found) == ["majority class", "TF-IDF + logistic regression"]
    assert {answer["label"] for answer in found["majority class"]} == {"1"}
    assert found["majority class"][0]["probabilities"] == pytest.approx({"0": 9 / 21, "1": 12 / 21})
    assert [answer["label"] for answer in found["TF-IDF + logistic regression"]] == ["1", "0"] * 5
    entries = measured(
        test, found["TF-IDF + logistic regression"], ["0", "1"], "single", majority=found["majority class"]
    )
    assert entries["accuracy"]["verdicts"] == {"majority": "better"} and entries["roc_auc"]["model"]["value"] == 1.0


def test_the_second_text_is_read_too():
    train = [{"text": "same", "text_pair": word, "label": word} for word in ("good", "bad")] * 6
    test = [{"text": "same", "text_pair": "bad", "label": "bad"}, {"text": "same", "text_pair": None, "label": "bad"}]
    assert baselines(train, test, kind="single")["TF-IDF + logistic regression"][0]["label"] == "bad"


def test_chinese_is_read_by_characters():
    assert linear.is_unspaced(["酒店位置比较偏远", "很好 good"]) and not linear.is_unspaced(
        ["The word 酒店 means hotel"]
    )
    train = [{"text": f"房间很好，{n}号服务员热情", "label": 1} for n in range(8)] + [
        {"text": f"太差了，{n}号很失望", "label": 0} for n in range(8)
    ]
    test = [{"text": "服务热情", "label": 1}, {"text": "真失望", "label": 0}]
    assert [answer["label"] for answer in baselines(train, test, kind="single")[linear.LINEAR["single"]]] == ["1", "0"]


def test_several_labels_and_numbers_have_linear_baselines():
    train = [{"text": f"red {n}", "label": ["red"]} for n in range(8)] + [
        {"text": f"red blue {n}", "label": ["red", "blue"]} for n in range(6)
    ]
    found = baselines(train, [{"text": "blue", "label": ["red", "blue"]}], kind="multi")
    assert found["majority class"][0] == {"labels": ["red"], "probabilities": {"blue": 6 / 14, "red": 1.0}}
    assert set(found[linear.LINEAR["multi"]][0]["labels"]) == {"red", "blue"}
    train = [{"text": "cheap " * (n % 3) + "dear", "label": 10 - 3 * (n % 3)} for n in range(30)]
    found = baselines(
        train, [{"text": "dear", "label": 10}, {"text": "cheap cheap dear", "label": 4}], kind="regression"
    )
    assert found["mean"][0]["value"] == pytest.approx(7)
    assert found["TF-IDF + ridge"][0]["value"] > 8 > found["TF-IDF + ridge"][1]["value"]


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_a_baseline_that_cannot_learn_is_left_out(kind):
    label = {"single": "a", "multi": [], "regression": 1.5}[kind]
    for text in ("", "!!!", "word"):
        found = baselines([{"text": text, "label": label}], [{"text": "other", "label": label}], kind=kind)
        assert len(found) == (2 if kind == "regression" and text == "word" else 1)
    assert baselines([], [{"text": "x", "label": label}], kind=kind) == {}


def test_the_strength_is_chosen_with_a_class_too_rare_for_folds():
    train = [{"text": f"{GOOD} {n}", "label": "good"} for n in range(9)] + [
        {"text": f"{BAD} {n}", "label": "bad"} for n in range(9)
    ]
    found = baselines([*train, {"text": "odd", "label": "rare"}], [{"text": "odd", "label": "rare"}], kind="single")
    assert set(found[linear.LINEAR["single"]][0]["probabilities"]) == {"good", "bad", "rare"}

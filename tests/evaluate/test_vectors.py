"""Figures of sentence vectors equal those of scikit-learn and scipy; ties are neither luck nor gain."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score
from sklearn.metrics.pairwise import cosine_similarity

from formary.errors import DataError
from formary.evaluate import vectors
from formary.evaluate.vectors import baselines, cosines, details, metrics, ranked, spearman
from formary.recipe.schema import Evaluate

SETTINGS = Evaluate(bootstrap=100)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"text": f"text {number}", "positive": f"positive {number}"} for number in range(count)]


def answers_of(texts: np.ndarray, positives: np.ndarray) -> list[dict]:
    return [{"vector": a.tolist(), "positive": b.tolist()} for a, b in zip(texts, positives, strict=True)]


def noisy_pairs(count: int, *, seed: int, noise: float, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    texts = random.normal(size=(count, width))
    return texts, texts + noise * random.normal(size=(count, width))


def value(entries: list[dict], name: str) -> float:
    return next(entry["model"]["value"] for entry in entries if entry["metric"] == name)


@pytest.mark.parametrize("seed", range(4))
def test_recall_and_mrr_equal_scikit_learn(seed):
    texts, positives = noisy_pairs(60, seed=seed, noise=1.0)
    found = metrics(pairs(60), {"model": answers_of(texts, positives)}, settings=SETTINGS, where="test")
    similar = cosine_similarity(texts, positives)
    for k in (1, 5, 10):
        expected = top_k_accuracy_score(np.arange(60), similar, k=k)
        assert value(found, f"recall_at_{k}") == pytest.approx(expected, abs=1e-12)
    expected = label_ranking_average_precision_score(np.eye(60), similar)
    assert value(found, "mrr") == pytest.approx(expected, abs=1e-12)


def test_the_search_is_the_same_in_small_pieces(monkeypatch):
    texts, positives = noisy_pairs(50, seed=0, noise=1.0)
    whole = ranked(pairs(50), answers_of(texts, positives))
    monkeypatch.setattr(vectors, "_AT_ONCE", 160)
    pieces = ranked(pairs(50), answers_of(texts, positives))
    assert (whole.above == pieces.above).all() and (whole.tied == pieces.tied).all()
    assert (whole.rival == pieces.rival).all()


def test_a_collapsed_model_scores_what_chance_scores():
    same = np.ones((20, 4))
    found = metrics(pairs(20), {"model": answers_of(same, same)}, settings=SETTINGS, where="test")
    assert value(found, "recall_at_1") == pytest.approx(1 / 20)
    assert value(found, "recall_at_5") == pytest.approx(5 / 20)
    assert value(found, "mrr") == pytest.approx(np.mean(1 / np.arange(1, 21)))


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.integers(0, 11), st.integers(1, 12))
@settings(deadline=None)
def test_ties_count_as_the_average_over_random_orders(similarities, own, k):
    own = own % len(similarities)
    angles = np.array(similarities) * 0.3
    positives = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    texts = np.tile([1.0, 0.0], (len(similarities), 1))
    rows = [{"text": f"{n}", "positive": f"{n}"} for n in range(len(similarities))]
    ranks = ranked(rows, answers_of(texts, positives))
    random = np.random.default_rng(0)
    places = []
    for _ in range(400):
        shuffled = random.permutation(len(similarities))
        order = shuffled[np.argsort(angles[shuffled], kind="stable")]
        places.append(int(np.flatnonzero(order == own)[0]) + 1)
    assert ranks.recall(k)[own] == pytest.approx(np.mean(np.array(places) <= k), abs=0.13)
    assert ranks.reciprocal()[own] == pytest.approx(np.mean(1 / np.array(places)), abs=0.09)


def test_a_repeated_positive_is_one_candidate():
    rows = [{"text": "a", "positive": "x"}, {"text": "b", "positive": "x"}, {"text": "c", "positive": "y"}]
    texts = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    positives = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ranks = ranked(rows, answers_of(texts, positives))
    assert ranks.candidates == 2
    assert ranks.recall(1).tolist() == [1, 1, 1]


def test_another_right_answer_of_the_same_text_takes_no_place():
    rows = [{"text": "a", "positive": "x"}, {"text": "a", "positive": "y"}, {"text": "b", "positive": "z"}]
    texts = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    positives = np.array([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]])
    assert ranked(rows, answers_of(texts, positives)).recall(1).tolist() == [1, 1, 1]


def test_a_zero_vector_is_like_nothing():
    answers = [{"vector": [0.0, 0.0], "positive": [1.0, 0.0]}, {"vector": [2.0, 0.0], "positive": [3.0, 0.0]}]
    assert cosines(answers).tolist() == [0.0, 1.0]


def graded(count: int, *, seed: int) -> tuple[list[dict], list[dict], np.ndarray]:
    """Rows with scores of few levels, hence many ties, and vectors that follow them roughly."""
    random = np.random.default_rng(seed)
    scores = random.integers(0, 6, size=count)
    texts, noise = random.normal(size=(count, 6)), random.normal(size=(count, 6))
    positives = texts * (scores[:, None] / 5) + noise
    rows = [{**row, "score": int(score)} for row, score in zip(pairs(count), scores, strict=True)]
    return rows, answers_of(texts, positives), scores.astype(float)


@pytest.mark.parametrize("seed", range(4))
def test_spearman_equals_scipy(seed):
    rows, answers, scores = graded(80, seed=seed)
    found = metrics(rows, {"model": answers}, settings=SETTINGS, where="test")
    assert [entry["metric"] for entry in found] == ["spearman"]
    assert value(found, "spearman") == pytest.approx(scipy.stats.spearmanr(cosines(answers), scores)[0], abs=1e-12)


def test_resampled_spearman_equals_scipy_on_the_drawn_rows(monkeypatch):
    monkeypatch.setattr(vectors, "_AT_ONCE", 90)
    _, answers, scores = graded(40, seed=5)
    measured = cosines(answers)
    drawn = np.random.default_rng(1).integers(0, 40, size=(7, 40))
    weights = np.stack([np.bincount(line, minlength=40) for line in drawn]).astype(float)
    expected = [scipy.stats.spearmanr(measured[line], scores[line])[0] for line in drawn]
    assert spearman(measured, scores)(weights) == pytest.approx(expected, abs=1e-12)


def test_a_constant_column_correlates_with_nothing():
    assert spearman(np.ones(5), np.arange(5.0))(np.ones((1, 5))).tolist() == [0.0]


def test_rows_with_scores_are_graded_and_rows_without_are_searched():
    rows, answers, _ = graded(10, seed=0)
    texts, positives = noisy_pairs(30, seed=1, noise=0.1)
    found = metrics(
        [*rows, *({**row, "score": None} for row in pairs(30))],
        {"model": [*answers, *answers_of(texts, positives)]},
        settings=SETTINGS,
        where="test",
    )
    assert [entry["metric"] for entry in found] == ["recall_at_1", "recall_at_5", "recall_at_10", "mrr", "spearman"]
    assert "30 queries, 30 different candidates" in found[0]["protocol"]
    assert "10 scored pairs" in found[-1]["protocol"]


def test_entries_have_intervals_and_verdicts():
    good, bad = (answers_of(*noisy_pairs(60, seed=2, noise=noise)) for noise in (0.3, 3.0))
    answers = {"model": good, "noise": bad, "twin": good}
    found = metrics(pairs(60), answers, settings=SETTINGS, where="test, 60 rows")
    assert all(entry["verdicts"] == {"noise": "better", "twin": "cannot tell"} for entry in found)
    assert found[-1]["model"]["low"] <= found[-1]["model"]["value"] <= found[-1]["model"]["high"]
    assert found[0]["protocol"].startswith("test, 60 rows")
    json.dumps(found)


def test_a_recall_that_cannot_fail_is_left_out():
    found = metrics(pairs(4), {"model": answers_of(*noisy_pairs(4, seed=0, noise=1))}, settings=SETTINGS, where="test")
    assert [entry["metric"] for entry in found] == ["recall_at_1", "mrr"]


@pytest.mark.parametrize(
    ("sentences", "options"),
    [
        (["the cat sat", "a cat on a mat", "dogs run", "the dogs sat on a mat"], {"token_pattern": r"(?u)\w+"}),
        (["猫坐在垫子上", "狗在跑", "今天天气好", "猫和狗"], {"analyzer": "char", "ngram_range": (1, 3)}),
    ],
)
def test_the_baseline_is_scikit_learns_tf_idf(sentences, options):
    train = [{"text": a, "positive": b} for a, b in zip(sentences, sentences[1:] + sentences[:1], strict=True)]
    rows = [{"text": sentences[0], "positive": sentences[1]}, {"text": sentences[3], "positive": sentences[2]}]
    found = baselines(train, rows)["TF-IDF cosine"]
    oracle = TfidfVectorizer(**options).fit([row[c] for row in train for c in ("text", "positive")])
    texts, positives = (oracle.transform([row[column] for row in rows]) for column in ("text", "positive"))
    assert cosines(found) == pytest.approx(np.diag(cosine_similarity(texts, positives)), abs=1e-12)
    assert ranked(rows, found).candidates == 2


def test_the_baseline_is_measured_beside_dense_vectors():
    rows = [{"text": f"word{n} common", "positive": f"common word{n} too"} for n in range(20)]
    answers = {"model": answers_of(*noisy_pairs(20, seed=0, noise=5.0)), **baselines(rows, rows)}
    found = metrics(rows, answers, settings=SETTINGS, where="test")
    assert found[0]["baselines"]["TF-IDF cosine"]["value"] == 1
    assert found[0]["verdicts"] == {"TF-IDF cosine": "worse"}


def test_training_texts_without_words_give_no_baseline():
    assert baselines([], pairs(2)) == {}
    assert baselines([{"text": "...", "positive": "!"}], pairs(2)) == {}


def test_details_show_the_pairs_that_are_found_last():
    texts, positives = noisy_pairs(30, seed=3, noise=0.1)
    positives[7] = -texts[7]
    found = details(pairs(30), answers_of(texts, positives))
    worst = found["worst"][0]
    assert (worst["row"], worst["text"], worst["positive"]) == (7, "text 7", "positive 7")
    expected = int(np.argmax(cosine_similarity(texts[7:8], np.delete(positives, 7, axis=0))))
    assert worst["found"] == f"positive {expected if expected < 7 else expected + 1}"
    assert found["cosine"]["pairs"] > 0.8 > found["cosine"]["others"]
    json.dumps(found)


def test_details_show_the_scored_rows_that_are_furthest_off():
    rows, answers, scores = graded(30, seed=4)
    found = details(rows, answers)
    ranks = [scipy.stats.rankdata(column) for column in (cosines(answers), scores)]
    assert found["furthest"][0]["row"] == int(np.argmax(np.abs(ranks[0] - ranks[1])))
    assert found["worst"] == []
    json.dumps(found)


def test_errors_say_which_row():
    row = {"text": "a", "positive": "b", "score": "high"}
    answer = {"vector": [1.0], "positive": [1.0]}
    with pytest.raises(DataError, match="test, row 1: score 'high' is not a number"):
        metrics([row], {"model": [answer]}, settings=SETTINGS, where="test")
    with pytest.raises(DataError, match="no rows"):
        metrics([], {"model": []}, settings=SETTINGS, where="test")
    with pytest.raises(DataError, match="at least two rows with a score"):
        metrics([{**row, "score": 1}], {"model": [answer]}, settings=SETTINGS, where="test")

"""Rankings are worth what RecBole's formulas and scikit-learn say; the sampled protocol is its own expectation."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from formary.errors import DataError
from formary.evaluate import ranking
from formary.recipe.schema import Evaluate
from formary.tasks.ranking import ranked

SETTINGS = Evaluate(bootstrap=100)
NAMES = {number: f"i{number}" for number in range(200)}


def answers_of(scores, targets, k=10):
    return [ranked(row, NAMES, k=k, target=int(target)) for row, target in zip(scores, targets)]


def value(entries, name):
    return next(entry["model"]["value"] for entry in entries if entry["metric"] == name)


def measured(answers, items, **others):
    rows = [{"history": ["a"] * (number % 9), "item": "x"} for number in range(len(answers))]
    return ranking.metrics(
        rows, {"model": answers}, items=items, settings=SETTINGS.model_copy(update=others), where="test"
    )


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_recboles_formulas_and_scikit_learns_ndcg(seed):
    random = np.random.default_rng(seed)
    scores, targets = random.normal(size=(50, 40)), random.integers(0, 40, 50)
    answers = answers_of(scores, targets)
    found = measured(answers, 40)
    relevant = np.eye(40)[targets]
    order = (-scores).argsort(axis=1)
    place = np.array([list(row).index(target) + 1 for row, target in zip(order, targets)])
    assert value(found, "ndcg@10-full") == pytest.approx(ndcg_score(relevant, scores, k=10), abs=1e-12)
    for k in (5, 10, 20):  # Hit@K: whether the item is in the first K
        assert value(found, f"hr@{k}-full") == pytest.approx((place <= k).mean(), abs=1e-12)
    assert value(found, "mrr-full") == pytest.approx((1 / place).mean(), abs=1e-12)
    assert ranking.gains(answers, "mrr", 10).mean() == pytest.approx((1 / place * (place <= 10)).mean(), abs=1e-12)
    top = order[:, :10]
    share = np.bincount(top.ravel(), minlength=40) / top.size
    assert value(found, "coverage@10") == pytest.approx(len(set(top.ravel())) / 40)  # |union of lists| / |I|
    assert value(found, "shannon_entropy@10") == pytest.approx(-sum(p * math.log(p) for p in share if p))
    ordered = np.sort(np.bincount(top.ravel(), minlength=40))  # sum (2 i - |I| - 1) P(i) / (|I| sum P(i))
    gini = sum((2 * (i + 1) - 40 - 1) * p for i, p in enumerate(ordered)) / (40 * ordered.sum())
    assert value(found, "gini@10") == pytest.approx(gini)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.data())
def test_ties_are_worth_the_mean_of_all_their_orders(scores, data):
    target = data.draw(st.integers(0, len(scores) - 1))
    k = data.draw(st.integers(1, len(scores)))
    (answer,) = answers_of([np.array(scores, dtype=float)], [target])
    places = []
    for nudged in range(40):
        noise = np.random.default_rng(nudged).permutation(len(scores)) * 1e-3
        places.append(1 + sum(s + n > scores[target] + noise[target] for s, n in zip(scores, noise)))
    assert min(places) >= answer["rank"] and max(places) <= answer["rank"] + answer["tied"] - 1
    expected = np.mean([p <= k for p in range(answer["rank"], answer["rank"] + answer["tied"])])
    assert ranking.gains([answer], "hr", k)[0] == pytest.approx(expected)
    by_sklearn = ndcg_score(np.eye(len(scores))[[target]], [scores], k=k)  # averages over ties too
    assert ranking.gains([answer], "ndcg", k)[0] == pytest.approx(by_sklearn)


@pytest.mark.parametrize("tied", [1, 7])
def test_the_sampled_protocol_is_the_mean_over_samples(tied):
    random, (others, sampled, k) = np.random.default_rng(0), (60, 20, 5)
    scores = np.concatenate([random.normal(size=others - tied + 1) + 0.5, np.zeros(tied)])
    (answer,) = answers_of([scores], [len(scores) - 1])
    hits, gains = [], []
    for _ in range(20_000):
        drawn = random.choice(others, sampled, replace=False)
        place = (scores[drawn] > 0).sum() + random.integers(0, (scores[drawn] == 0).sum() + 1)
        hits.append(place < k)
        gains.append((place < k) / math.log2(place + 2))
    assert ranking.gains([answer], "hr", k, sampled)[0] == pytest.approx(np.mean(hits), abs=0.02)
    assert ranking.gains([answer], "ndcg", k, sampled)[0] == pytest.approx(np.mean(gains), abs=0.02)
    assert ranking.gains([answer], "hr", k, others)[0] == ranking.gains([answer], "hr", k)[0]


def test_the_sampled_protocol_is_named_and_not_given_unasked():
    answers = answers_of(np.random.default_rng(0).normal(size=(20, 30)), [3] * 20)
    assert not [entry for entry in measured(answers, 30) if "sampled" in entry["metric"]]
    entry = next(e for e in measured(answers, 30, sampled=9) if e["metric"] == "hr@10-sampled9")
    assert entry["model"]["value"] == 1.0 and "drawn evenly" in entry["protocol"]


def test_an_item_that_cannot_be_recommended_is_a_miss_and_new_items_are_also_ranked_among_themselves():
    scores = np.array([3.0, 2.0, 1.0, 0.5])
    assert ranked(scores, NAMES, k=2, barred=[1], target=1)["rank"] is None
    answer = ranked(scores, NAMES, k=2, barred=[0], target=3, new=2)
    assert (answer["rank"], answer["candidates"], answer["new"]) == (3, 3, {"rank": 2, "tied": 1, "candidates": 2})
    found = measured([answer, ranked(scores, NAMES, k=2, target=0, new=2)], 4)
    assert value(found, "ndcg@10-new") == pytest.approx(1 / math.log2(3))
    assert ranking.gains([ranked(scores, NAMES, k=2, barred=[1], target=1)], "hr", 10)[0] == 0.0


def test_scores_in_answers_are_shares_of_what_may_be_recommended():
    answer = ranked(np.array([1.0, 0.0, -np.inf, 0.0]), NAMES, k=4, barred=[1])
    assert [entry["item"] for entry in answer["items"]] == ["i0", "i3"]
    assert sum(entry["score"] for entry in answer["items"]) == pytest.approx(1.0)
    assert ranked(np.zeros(2), NAMES, k=4, barred=[0, 1])["items"] == []


def test_rows_without_an_item_are_refused():
    with pytest.raises(DataError, match="nothing to measure"):
        ranking.metrics([{"history": []}], {"model": [{"items": []}]}, items=3, settings=SETTINGS, where="test")


class Catalogue:
    """What baselines ask of a task: items are their own tokens."""

    open = 5

    def known_items(self, names):
        return [int(name) for name in names]

    def item_of(self, row):
        return int(row["item"])

    def ranked(self, scores, history, target):
        return ranked(scores, NAMES, k=5, barred=history, target=target)


def test_baselines_know_what_is_popular_what_goes_together_and_what_follows():
    training = [{"history": list("01")}, {"history": list("012")}, {"history": list("012")}, {"history": list("34")}]
    given = ranking.baselines(Catalogue(), training, [{"history": ["3"], "item": "4"}, {"history": ["0"], "item": "1"}])
    assert [answer["rank"] for answer in given["most popular"]] == [4, 1]
    assert [answer["rank"] for answer in given["item-kNN"]] == [1, 1]
    assert [answer["rank"] for answer in given["first-order Markov"]] == [1, 1]
    alike = ranking._similar([[0, 1], [0, 1, 2], [0, 1, 2], [3, 4]], 5).toarray()
    assert alike[0, 2] == pytest.approx(2 / math.sqrt(3 * 2)) and alike[3, 4] == 1.0 and alike[1, 1] == 0.0


def test_details_part_rows_by_the_length_of_their_history():
    answers = answers_of(np.eye(30)[:12], range(12))
    rows = [{"history": ["a"] * length, "item": "x"} for length in [1] * 6 + [30] * 6]
    found = ranking.details(rows, answers)
    assert list(found["by the number of items in the history"]) == ["0 to 4", "20 to 99"]
    assert found["listed most"][0]["share of lists"] > 0


def test_variety_counts_items_that_nobody_is_recommended():
    assert ranking.gini(Counter(a=1, b=1), 2) == 0.0 and ranking.gini(Counter(a=5), 4) == pytest.approx(0.75)
    assert ranking.coverage(Counter(a=9, b=1), 10) == 0.2

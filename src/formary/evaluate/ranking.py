"""Measures rankings of items: hit rate, NDCG and MRR of the item that a user took next, and how varied what is listed is.

Ranks are among all items that could be recommended ("-full"); the sampled protocol is named ("-sampled100") and given in
expectation, without its noise. Formulas are those of RecBole's documentation (Zhao et al. 2021) for one right item a user;
items of equal score stand in random order. Baselines: most popular, item-kNN, first-order Markov.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.errors import DataError
from formary.evaluate import interval
from formary.evaluate.interval import Interval
from formary.recipe.schema import Evaluate

Floats = NDArray[np.float64]
Row = Mapping[str, Any]
Answer = Mapping[str, Any]

_K = 10
_ENTRIES = (("ndcg", _K), ("hr", _K), ("hr", 1), ("hr", 5), ("hr", 20), ("mrr", None))
_SAMPLED = (("ndcg", _K), ("hr", _K))  # what is told of the sampled protocol
_NEIGHBOURS = 100  # of an item in item-kNN, RecBole's default
_ITEMS_AT_ONCE = 1000  # whose neighbours are looked for together
_LENGTHS = (5, 20, 100)  # at which histories are parted
_LISTED = 10  # items shown

LOWER_IS_BETTER = ("gini@10",)


def metrics(
    rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]], *, items: int, settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    """NDCG, hit rates and MRR with intervals over rows, then coverage and diversity of the first 10.

    Args:
        rows: with `item`, the one that was taken.
        answers: as `tasks.ranking.ranked` makes them, by model.
        items: how many there are to recommend.

    Raises:
        DataError: no row has an item.
    """
    kept = [number for number, row in enumerate(rows) if row.get("item") is not None]
    if not kept:
        raise DataError(
            f"{where}: no row has an `item`, the one taken after its history, so there is nothing to measure"
        )
    by_model = {name: [given[number] for number in kept] for name, given in answers.items()}
    protocol = f"{where}, each item among all {items:,} that its user could be recommended, ties in random order"
    entries = [_entry(f"{_named(*one)}-full", one, by_model, protocol, settings) for one in _ENTRIES]
    if settings.sampled:
        among = f"{where}, each item among {settings.sampled:,} others drawn evenly, in expectation"
        entries += [
            _entry(f"{_named(*one)}-sampled{settings.sampled}", one, by_model, among, settings, settings.sampled)
            for one in _SAMPLED
        ]
    if new := [number for number, answer in enumerate(by_model["model"]) if "new" in answer]:
        of_new = {name: [given[number].get("new", given[number]) for number in new] for name, given in by_model.items()}
        count = max(answer["candidates"] for answer in of_new["model"])
        among = f"{where}, {len(new):,} with an item that no training row has, each among the {count:,} such items"
        entries += [_entry(f"{_named(*one)}-new", one, of_new, among, settings) for one in _SAMPLED]
    lists = {
        name: [[entry["item"] for entry in answer["items"][:_K]] for answer in given]
        for name, given in by_model.items()
    }
    for name, measure in _VARIETY.items():
        found = {
            model: measure(Counter(item for one in given for item in one), items) for model, given in lists.items()
        }
        entries.append(
            _variety(name, found, f"{where}, over the first {_K} of all rows together; one number, no interval")
        )
    return entries


def details(rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, Any]:
    """What lies behind the figures: hits by the length of histories, and the items that are listed most."""
    pairs = [(row, answer) for row, answer in zip(rows, answers) if row.get("item") is not None]
    groups: dict[str, list[Answer]] = {}
    for low, high in zip((0, *_LENGTHS), (*_LENGTHS, None)):
        name = f"{low} or more" if high is None else f"{low} to {high - 1}"
        inside = [
            answer
            for row, answer in pairs
            if len(row["history"]) >= low and (high is None or len(row["history"]) < high)
        ]
        if inside:
            groups[name] = inside
    listed = Counter(entry["item"] for _, answer in pairs for entry in answer["items"][:_K])
    return {
        "by the number of items in the history": {
            name: {"rows": len(given)} | {_named(*one): round(float(gains(given, *one).mean()), 4) for one in _SAMPLED}
            for name, given in groups.items()
        },
        "listed most": [
            {"item": item, "share of lists": round(count / len(pairs), 4)}
            for item, count in listed.most_common(_LISTED)
        ],
    }


def gains(answers: Sequence[Answer], metric: str, k: int | None, sampled: int | None = None) -> Floats:
    """What each answer's rank is worth: (answers,); ties take the mean of the places that they share.

    Args:
        metric: hr: 1 within the first k. ndcg: 1 / log2(rank + 1) within them. mrr: 1 / rank.
        k: None: no cut.
        sampled: as if ranked among so many other candidates drawn evenly without replacement, in expectation: of `above`
            better ones as many are drawn as the hypergeometric distribution says (Krichene and Rendle 2020, section 5).
    """
    found = np.zeros(len(answers))
    for number, answer in enumerate(answers):
        if answer["rank"] is not None:
            first, tied = answer["rank"] - 1, answer["tied"]
            sums = _summed(metric, k, answer["candidates"], sampled)
            found[number] = (sums[first + tied] - sums[first]) / tied
    return found


@lru_cache(maxsize=4096)
def _summed(metric: str, k: int | None, candidates: int, sampled: int | None) -> Floats:
    """(candidates + 1,) cumulative worth of the places, the first of which has 0 candidates above it."""
    above = np.arange(candidates)
    inside = above < (candidates if k is None else k)
    worth = {"hr": np.ones(candidates), "ndcg": 1 / np.log2(above + 2), "mrr": 1 / (above + 1)}[metric] * inside
    if sampled is not None and sampled < candidates - 1:
        chances = (_drawn(above, int(hits), candidates - 1, sampled) * worth[hits] for hits in np.flatnonzero(inside))
        worth = np.minimum(sum(chances, np.zeros(candidates)), 1.0)
    return np.concatenate([[0.0], np.cumsum(worth)])


def _drawn(better: NDArray[np.int64], hits: int, others: int, sampled: int) -> Floats:
    """The chance that of `sampled` out of `others` exactly `hits` are among the `better` ones (hypergeometric)."""
    from scipy.special import gammaln

    def choose(n: Any, r: Any) -> Any:
        fits = (r >= 0) & (r <= n)
        n, r = np.where(fits, n, 0), np.where(fits, r, 0)
        return np.where(fits, gammaln(n + 1) - gammaln(r + 1) - gammaln(n - r + 1), -np.inf)

    found: Floats = np.exp(
        choose(better, np.asarray(hits))
        + choose(others - better, np.asarray(sampled - hits))
        - choose(others, np.asarray(sampled))
    )
    return found


def coverage(counts: Mapping[str, int], items: int) -> float:
    """The share of all items that anybody is recommended (RecBole's ItemCoverage)."""
    return len(counts) / max(1, items)


def shannon_entropy(counts: Mapping[str, int], items: int) -> float:
    """-sum p log p over items, p an item's share of all recommendations, in nats: more is more varied."""
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def gini(counts: Mapping[str, int], items: int) -> float:
    """0: all items are recommended alike; near 1: a few take all. Items never recommended count (RecBole's GiniIndex)."""
    ordered = np.sort(
        np.concatenate([np.zeros(max(0, items - len(counts))), np.array(list(counts.values()), dtype=float)])
    )
    size, total = len(ordered), ordered.sum()
    return float(((2 * np.arange(1, size + 1) - size - 1) * ordered).sum() / (size * total)) if total else 0.0


_VARIETY: dict[str, Callable[[Mapping[str, int], int], float]] = {
    f"coverage@{_K}": coverage,
    f"shannon_entropy@{_K}": shannon_entropy,
    f"gini@{_K}": gini,
}


def baselines(task: Any, training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Answers without learning: the most popular items, those taken by the same users as the history's, those after its last.

    Args:
        task: knows the tokens of items, and which of them a user may be recommended.
        training: rows with `history`.
    """
    histories = [task.known_items(row["history"]) for row in training]
    asked = [(task.known_items(row["history"]), task.item_of(row)) for row in rows]
    popular = np.bincount([item for one in histories for item in one], minlength=task.open).astype(np.float64)
    similar, after = _similar(histories, task.open), _transitions(histories, task.open)
    share = popular / (popular.sum() + 1)  # below 1: it orders what was never seen after the last item
    scores: dict[str, Callable[[list[int]], Floats]] = {
        "most popular": lambda history: popular,
        "item-kNN": lambda history: np.asarray(similar[history].sum(axis=0)).ravel() if history else popular,
        "first-order Markov": lambda history: share + (after[history[-1]].toarray().ravel() if history else 0.0),
    }
    return {name: [task.ranked(score(known), known, item) for known, item in asked] for name, score in scores.items()}


def _similar(histories: Sequence[Sequence[int]], size: int) -> Any:
    """(size, size) sparse cosines between the users of two items, the largest 100 of each (Deshpande and Karypis 2004)."""
    from scipy import sparse

    pairs = np.array([(user, item) for user, history in enumerate(histories) for item in set(history)]).reshape(-1, 2)
    taken = sparse.csr_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(histories), size))
    lengths = np.sqrt(np.asarray(taken.sum(axis=0)).ravel())
    unit = taken @ sparse.diags(np.divide(1.0, lengths, out=np.zeros(size), where=lengths > 0))
    parts = []
    for start in range(0, size, _ITEMS_AT_ONCE):
        part = (unit[:, start : start + _ITEMS_AT_ONCE].T @ unit).toarray()
        part[np.arange(len(part)), start + np.arange(len(part))] = 0.0
        if size > _NEIGHBOURS:
            part[part < np.partition(part, size - _NEIGHBOURS, axis=1)[:, size - _NEIGHBOURS, None]] = 0.0
        parts.append(sparse.csr_matrix(part))
    return sparse.vstack(parts, format="csr")


def _transitions(histories: Sequence[Sequence[int]], size: int) -> Any:
    """(size, size) sparse counts of how often one item came right after another."""
    from scipy import sparse

    pairs = np.array([pair for history in histories for pair in pairwise(history)]).reshape(-1, 2).astype(np.int64)
    return sparse.csr_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(size, size))


def _named(metric: str, k: int | None) -> str:
    return metric if k is None else f"{metric}@{k}"


def _entry(
    name: str,
    what: tuple[str, int | None],
    answers: Mapping[str, Sequence[Answer]],
    protocol: str,
    settings: Evaluate,
    sampled: int | None = None,
) -> dict[str, Any]:
    statistics = {model: interval.mean(gains(given, *what, sampled)) for model, given in answers.items()}
    count = len(answers["model"])
    return interval.metric_entry(name, protocol, statistics, count, settings=settings, share_of_rows=what[0] == "hr")


def _variety(name: str, values: Mapping[str, float], protocol: str) -> dict[str, Any]:
    """A metric of all lists together: a resample of users has fewer different items, so it would say nothing of the doubt."""
    found = {model: Interval(value, -math.inf, math.inf) for model, value in values.items()}
    model, others = found["model"], {other: value for other, value in found.items() if other != "model"}
    beside = "; ".join(f"{other} {interval.number(value.value)}" for other, value in others.items())
    return {
        "metric": name,
        "protocol": protocol,
        "model": model.to_json(),
        "baselines": {other: value.to_json() for other, value in others.items()},
        "verdicts": dict.fromkeys(others, "cannot tell"),
        "says": f"{name.replace('_', ' ')} {interval.number(model.value)}" + (f" (beside {beside})" if beside else ""),
    }

"""Measures sentence vectors: is a text's own positive found among all of them, and do cosines follow given similarities.

Pairs are scored by recall@k and mean reciprocal rank, rows with a `score` by Spearman's correlation, both beside TF-IDF.
The candidates are the test set itself, so figures compare only on the same rows. It does not make vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.errors import DataError
from formary.evaluate import interval
from formary.evaluate.texts import tokenizer_name
from formary.recipe.schema import Evaluate

Floats = NDArray[np.float64]
Row = Mapping[str, Any]
Answer = Mapping[str, Any]
Statistic = Callable[[Floats], Floats]

_CUTOFFS = (1, 5, 10)
_EQUAL = 1e-6  # cosines closer than this are one: what float32 vectors cannot tell apart
_AT_ONCE = 5_000_000  # similarities, or resampled rows, held in memory at a time
_EXAMPLES = 10


@dataclass(frozen=True)
class Ranks:
    """Where each query's own positive stands among the candidates."""

    above: Floats  # (queries,) candidates more similar than it
    tied: Floats  # (queries,) candidates as similar as it, itself among them
    rival: NDArray[np.int64]  # (queries,) the row of the most similar wrong candidate, -1 where there is none
    candidates: int

    def recall(self, k: int) -> Floats:
        """The chance that it is among the first `k` when those tied stand in random order: (queries,)."""
        return np.clip((k - self.above) / self.tied, 0.0, 1.0)

    def reciprocal(self) -> Floats:
        """The expected 1 / rank when those tied stand in random order: (queries,)."""
        sums = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, self.candidates + 1))])  # harmonic numbers
        first, last = self.above.astype(np.int64), (self.above + self.tied).astype(np.int64)
        return np.asarray((sums[last] - sums[first]) / self.tied)


def metrics(
    rows: Sequence[Row],
    answers: Mapping[str, Sequence[Answer]],
    *,
    settings: Evaluate,
    where: str,
    prefix: str = "",
) -> list[dict[str, Any]]:
    """Recall@1, @5, @10 and MRR of pairs, Spearman's correlation of rows with a `score`; intervals over queries.

    Rows with a score are graded pairs (as in STS-B): a `positive` of theirs may be a poor match, so they take no part in
    the search. Spearman comes first when most rows have a score, else recall@1.

    Args:
        rows: with `text` and `positive`, and perhaps a number `score` (None counts as absent).
        answers: {"vector", "positive"} per row, by model: the vectors of the row's text and of its positive; a list,
            a numpy array, or a sparse row as `baselines` makes.
        where: what was measured, such as "test, 1,000 rows".
        prefix: of the metrics' names.

    Raises:
        DataError: there are no rows, or a score is not a number.
    """
    if not rows:
        raise DataError(f"{where}: there are no rows to compare vectors on; give the split at least one row")
    scores = _scores(rows, where)
    graded, pairs = _numbers(~np.isnan(scores)), _numbers(np.isnan(scores))
    entries = []
    if len(pairs):
        chosen = [rows[number] for number in pairs]
        ranks = {name: ranked(chosen, [given[n] for n in pairs]) for name, given in answers.items()}
        candidates = next(iter(ranks.values())).candidates
        protocol = f"{where}, {len(pairs):,} queries, {candidates:,} different candidates, cosine, ties in random order"
        cutoffs = [k for k in _CUTOFFS if k == 1 or k < candidates]
        for k in [*cutoffs, None]:
            name = prefix + ("mrr" if k is None else f"recall_at_{k}")
            values = {model: r.reciprocal() if k is None else r.recall(k) for model, r in ranks.items()}
            statistics = {model: interval.mean(found) for model, found in values.items()}
            entries.append(interval.metric_entry(name, protocol, statistics, len(pairs), settings=settings))
    if len(graded) > 1:
        correlations = {
            name: spearman(cosines([given[n] for n in graded]), scores[graded]) for name, given in answers.items()
        }
        protocol = f"{where}, {len(graded):,} scored pairs, cosine against score"
        first = 0 if len(graded) > len(pairs) else len(entries)
        entries.insert(first, interval.metric_entry("spearman", protocol, correlations, len(graded), settings=settings))
    if not entries:
        raise DataError(f"{where}: a correlation needs at least two rows with a score; add rows")
    return entries


def details(rows: Sequence[Row], answers: Sequence[Answer], *, examples: int = _EXAMPLES) -> dict[str, Any]:
    """What lies behind the figures: rows whose positive stands lowest, and whether the vectors have collapsed.

    Returns:
        {"worst": [{"row", "text", "positive", "rank", "found"}] of pairs, where rank counts from 1 (expected, among
        ties) and "found" is the most similar wrong candidate; "cosine": mean cosine of "pairs" and of "others" (each
        text with the next row's positive): a model whose two means are alike tells nothing apart; "furthest": scored
        rows whose place by cosine and by score differ most, [{"row", "text", "positive", "score", "cosine"}]}.
        Rows count from 0.
    """
    scores = _scores(rows, "rows")
    graded, pairs = _numbers(~np.isnan(scores)), _numbers(np.isnan(scores))
    found: dict[str, Any] = {"worst": [], "furthest": [], "cosine": {"pairs": None, "others": None}}
    if len(rows):
        shifted = [
            {"vector": a["vector"], "positive": b["positive"]}
            for a, b in zip(answers, [*answers[1:], answers[0]], strict=True)
        ]
        found["cosine"]["pairs"] = float(cosines(answers).mean())
        found["cosine"]["others"] = float(cosines(shifted).mean()) if len(rows) > 1 else None
    if len(pairs):
        ranks = ranked([rows[n] for n in pairs], [answers[n] for n in pairs])
        expected = ranks.above + (ranks.tied + 1) / 2
        for place in np.argsort(-expected, kind="stable")[:examples]:
            row, rival = rows[pairs[place]], int(ranks.rival[place])
            shown = {"row": int(pairs[place]), "text": row["text"], "positive": row["positive"]}
            wrong = rows[pairs[rival]]["positive"] if rival >= 0 else None
            found["worst"].append({**shown, "rank": float(expected[place]), "found": wrong})
    if len(graded):
        measured = cosines([answers[n] for n in graded])
        once = np.ones((1, len(graded)))
        apart = np.abs(_weighted_ranks(measured)(once)[0] - _weighted_ranks(scores[graded])(once)[0])
        for place in np.argsort(-apart, kind="stable")[:examples]:
            row = rows[graded[place]]
            shown = {"row": int(graded[place]), "text": row["text"], "positive": row["positive"]}
            found["furthest"].append({**shown, "score": float(row["score"]), "cosine": float(measured[place])})
    return found


def baselines(train_rows: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Vectors without learning: TF-IDF of words (of 1 to 3 characters where no spaces part words), sparse rows.

    Words and their rarity are those of the training texts; a text none of whose words occur there has cosine 0 with all.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    known = [str(row[column]) for row in train_rows for column in ("text", "positive")]
    if not any(text.strip() for text in known) or not rows:
        return {}
    if tokenizer_name(known) == "13a":
        vectorizer = TfidfVectorizer(token_pattern=r"(?u)\w+", dtype=np.float64)
    else:
        vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), dtype=np.float64)
    try:
        vectorizer.fit(known)
    except ValueError:  # punctuation only: there is no word to count
        return {}
    texts, positives = (vectorizer.transform([str(row[column]) for row in rows]) for column in ("text", "positive"))
    return {"TF-IDF cosine": [{"vector": texts[n], "positive": positives[n]} for n in range(len(rows))]}


def ranked(rows: Sequence[Row], answers: Sequence[Answer]) -> Ranks:
    """The standing of each row's positive among the different positives of all rows, by cosine with the row's text.

    A positive that occurs in several rows is one candidate. Where a text occurs in several rows, its other positives
    are right answers too and take no place in the ranking of this one.
    """
    queries, positives = _unit_vectors(answers, "vector"), _unit_vectors(answers, "positive")
    first_row: dict[str, int] = {}  # the row that stands for a candidate
    for number, row in enumerate(rows):
        first_row.setdefault(str(row["positive"]), number)
    candidate_rows = np.array(list(first_row.values()))
    place = {positive: number for number, positive in enumerate(first_row)}
    own = np.array([place[str(row["positive"])] for row in rows])
    right: dict[str, set[int]] = {}
    for row, candidate in zip(rows, own, strict=True):
        right.setdefault(str(row["text"]), set()).add(int(candidate))
    candidates = positives[candidate_rows].T
    above, tied, rival = np.empty(len(rows)), np.empty(len(rows)), np.full(len(rows), -1)
    at_once = max(1, _AT_ONCE // len(candidate_rows))
    for start in range(0, len(rows), at_once):
        part = range(start, min(start + at_once, len(rows)))
        similar = _dense(queries[part.start : part.stop] @ candidates)  # (part, candidates)
        mine = similar[np.arange(len(part)), own[part.start : part.stop]][:, None].copy()
        for line, number in enumerate(part):
            similar[line, list(right[str(rows[number]["text"])])] = -np.inf
        above[part.start : part.stop] = (similar > mine + _EQUAL).sum(axis=1)
        tied[part.start : part.stop] = (np.abs(similar - mine) <= _EQUAL).sum(axis=1) + 1
        nearest = similar.argmax(axis=1)
        wrong = np.isfinite(similar[np.arange(len(part)), nearest])
        rival[part.start : part.stop] = np.where(wrong, candidate_rows[nearest], -1)
    return Ranks(above, tied, rival, len(candidate_rows))


def cosines(answers: Sequence[Answer]) -> Floats:
    """The cosine of each row's two vectors, 0 where one of them is 0: (rows,)."""
    first, second = _unit_vectors(answers, "vector"), _unit_vectors(answers, "positive")
    product = first.multiply(second) if hasattr(first, "multiply") else first * second
    return np.asarray(product.sum(axis=1), dtype=np.float64).reshape(-1)


def spearman(first: Floats, second: Floats) -> Statistic:
    """Spearman's correlation of two columns under multiplicities of rows; 0 where a column has one value only."""
    ranks = _weighted_ranks(first), _weighted_ranks(second)

    def statistic(weights: Floats) -> Floats:
        at_once = max(1, _AT_ONCE // len(first))
        parts = [weights[start : start + at_once] for start in range(0, len(weights), at_once)]
        return np.concatenate([_correlation(ranks[0](part), ranks[1](part), part) for part in parts])

    return statistic


def _weighted_ranks(values: Floats) -> Statistic:
    """Mean ranks from 1 when row i occurs weights[i] times: (resamples, rows) -> (resamples, rows)."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    group = np.empty(len(values), dtype=np.int64)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(values))))

    def ranks(weights: Floats) -> Floats:
        inside = np.add.reduceat(weights[:, order], starts, axis=1)
        through = np.cumsum(inside, axis=1)
        return np.asarray((through - inside + (inside + 1) / 2)[:, group])

    return ranks


def _correlation(first: Floats, second: Floats, weights: Floats) -> Floats:
    """Pearson's correlation of each line: (resamples, rows) each -> (resamples,)."""
    total = weights.sum(axis=1, keepdims=True)
    first, second = (x - (weights * x).sum(axis=1, keepdims=True) / total for x in (first, second))
    spread = np.sqrt((weights * first**2).sum(axis=1) * (weights * second**2).sum(axis=1))
    shared = (weights * first * second).sum(axis=1)
    return np.divide(shared, spread, out=np.zeros_like(shared), where=spread > 1e-9)


def _unit_vectors(answers: Sequence[Answer], name: str) -> Any:
    """(rows, width) of length 1, or 0 where they were 0: a numpy array, or a sparse table of sparse rows."""
    from sklearn.preprocessing import normalize

    vectors = [answer[name] for answer in answers]
    if not hasattr(vectors[0], "indptr"):
        return normalize(np.asarray(vectors, dtype=np.float64))
    starts = np.cumsum([0, *(len(vector.data) for vector in vectors)])
    parts = [np.concatenate([getattr(vector, part) for vector in vectors]) for part in ("data", "indices")]
    return normalize(type(vectors[0])((*parts, starts), shape=(len(vectors), vectors[0].shape[1])))


def _dense(product: Any) -> Floats:
    return np.asarray(product.toarray() if hasattr(product, "toarray") else product, dtype=np.float64)


def _numbers(chosen: NDArray[np.bool_]) -> list[int]:
    return [int(number) for number in np.flatnonzero(chosen)]


def _scores(rows: Sequence[Row], where: str) -> Floats:
    """(rows,) the given similarity, not a number where a row has none."""
    scores = np.full(len(rows), np.nan)
    for number, row in enumerate(rows):
        value = row.get("score")
        if value is None:
            continue
        try:
            scores[number] = float(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where}, row {number + 1}: score {value!r} is not a number; give the similarity of text and "
                "positive as a number, or leave the column out"
            ) from error
    return scores

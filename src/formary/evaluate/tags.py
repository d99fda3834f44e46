"""How well words are tagged: accuracy of tags, and of entities where the tags spell them out in BIO or BIOES.

An entity counts when its words and its type are all right. Sequences that break the scheme are read as conlleval does:
an inside tag without its beginning begins an entity.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.errors import DataError
from formary.evaluate import interval
from formary.recipe.schema import Evaluate

Row = Mapping[str, Any]
Answer = Mapping[str, Any]
Entity = tuple[int, int, str]  # first word, word after the last, type
Array = NDArray[np.float64]

_WORST = 20
_CONFUSIONS = 20


def metrics(
    rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]], *, settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    """Metrics of the model beside baselines on the same rows; the first is entity F1, or the accuracy of plain tags.

    Args:
        rows: with `tags`.
        answers: by model, each with `tags`; "model" is the one that is judged.

    Raises:
        DataError: there are no rows, or an answer has another number of tags than its row.
    """
    if not rows:
        raise DataError(f"{where}: there are no rows to measure tags on; give the split at least one row")
    gold = [list(row["tags"]) for row in rows]
    given = {name: [list(answer["tags"]) for answer in said] for name, said in answers.items()}
    for name, said in given.items():
        for number, (right, tags) in enumerate(zip(gold, said, strict=True), 1):
            if len(right) != len(tags):
                raise DataError(f"{where}: {name} gave {len(tags)} tags for the {len(right)} words of row {number}")
    entries = []

    def add(name: str, how: str, statistics: Mapping[str, Callable[[Array], Array]], *, share: bool = False) -> None:
        protocol = ", ".join(filter(None, [where, how]))
        entries.append(
            interval.metric_entry(name, protocol, statistics, len(rows), settings=settings, share_of_rows=share)
        )

    if is_scheme(gold):
        counts = {name: _entity_counts(gold, said) for name, said in given.items()}
        how = "strict (words and type), stray inside tags begin an entity"
        add("entity_f1", how, {name: _ratio(2 * c[0], c[1] + c[2]) for name, c in counts.items()})
        add("entity_precision", how, {name: _ratio(c[0], c[2]) for name, c in counts.items()})
        add("entity_recall", how, {name: _ratio(c[0], c[1]) for name, c in counts.items()})
    words = np.array([len(tags) for tags in gold], dtype=np.float64)
    hits = {name: _hits(gold, said) for name, said in given.items()}
    add("tag_accuracy", "words", {name: _ratio(right, words) for name, right in hits.items()})
    add("tag_macro_f1", "mean over tags", {name: _macro(gold, said) for name, said in given.items()})
    whole = {name: _ratio((right == words).astype(np.float64), np.ones(len(rows))) for name, right in hits.items()}
    add("sentence_accuracy", "every tag right", whole, share=True)
    return entries


def details(rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, Any]:
    """Where the model is right and wrong, JSON-able.

    Returns:
        {"entities"?: [{"type", "precision", "recall", "f1", "support"}], "tags": [{"tag", ...}], "confusions":
        [{"true", "said", "words", "example"}], "worst": [{"row" (from 1), "errors", "sentence"}]}.
    """
    gold = [list(row["tags"]) for row in rows]
    said = [list(answer["tags"]) for answer in answers]
    found: dict[str, Any] = {}
    if is_scheme(gold):
        types = sorted({kind for tags in [*gold, *said] for _, _, kind in entities(tags)})
        found["entities"] = [
            _scores("type", kind, *(counts.sum() for counts in _entity_counts(gold, said, only=kind))) for kind in types
        ]
    pairs = Counter((a, b) for right, tags in zip(gold, said) for a, b in zip(right, tags))
    true, answered = Counter[str](), Counter[str]()
    for (a, b), count in pairs.items():
        true[a] += count
        answered[b] += count
    found["tags"] = [_scores("tag", tag, pairs[tag, tag], count, answered[tag]) for tag, count in true.most_common()]
    example: dict[tuple[str, str], str] = {}
    for row, right, tags in zip(rows, gold, said):
        for word, a, b in zip(row["tokens"], right, tags):
            if a != b:
                example.setdefault((a, b), str(word))
    wrong = [(pair, count) for pair, count in pairs.most_common() if pair[0] != pair[1]][:_CONFUSIONS]
    found["confusions"] = [{"true": a, "said": b, "words": n, "example": example[a, b]} for (a, b), n in wrong]
    errors = [sum(a != b for a, b in zip(right, tags)) for right, tags in zip(gold, said)]
    order = sorted(range(len(rows)), key=lambda number: -errors[number])[:_WORST]
    found["worst"] = [
        {"row": n + 1, "errors": errors[n], "sentence": _marked(rows[n]["tokens"], gold[n], said[n])}
        for n in order
        if errors[n]
    ]
    return found


def baselines(training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """What needs no model: the commonest tag of each word, and for entities the longest names seen in training."""
    by_word: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for row in training:
        overall.update(row["tags"])
        for word, tag in zip(row["tokens"], row["tags"]):
            by_word[word][tag] += 1
    if not overall:
        return {}
    usual = overall.most_common(1)[0][0]
    commonest = {word: counts.most_common(1)[0][0] for word, counts in by_word.items()}
    found = {"most frequent tag": [{"tags": [commonest.get(word, usual) for word in row["tokens"]]} for row in rows]}
    if is_scheme([row["tags"] for row in training]):
        found["dictionary"] = _by_dictionary(training, rows)
    return found


def is_scheme(sentences: Sequence[Sequence[str]]) -> bool:
    """Whether tags spell entities: all are O or a letter of BIOESLU, a hyphen and a type, and some are not O."""
    tags = {tag for sentence in sentences for tag in sentence}
    spelled = [tag for tag in tags if tag != "O"]
    return bool(spelled) and all(tag[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") and len(tag) > 2 for tag in spelled)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence in BIO, IOB1, BIOES or BILOU."""
    found: list[Entity] = []
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        letter, _, of = tag.partition("-")
        begins = letter in ("B", "S", "U") or (letter in ("I", "E", "L") and of != kind)
        if kind and (letter not in ("I", "E", "L") or begins):
            found.append((start, place, kind))
            kind = ""
        if begins:
            start, kind = place, of
        if kind and letter in ("E", "S", "L", "U"):
            found.append((start, place + 1, kind))
            kind = ""
    return found


def _entity_counts(
    gold: Sequence[Sequence[str]], said: Sequence[Sequence[str]], *, only: str | None = None
) -> tuple[Array, Array, Array]:
    """Per sentence: entities found exactly, entities there, entities said; (rows,) each."""
    table = []
    for right, tags in zip(gold, said, strict=True):
        true = {entity for entity in entities(right) if only in (None, entity[2])}
        answered = {entity for entity in entities(tags) if only in (None, entity[2])}
        table.append((len(true & answered), len(true), len(answered)))
    both, true_counts, answered_counts = np.array(table, dtype=np.float64).T
    return both, true_counts, answered_counts


def _hits(gold: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> Array:
    return np.array([sum(a == b for a, b in zip(right, tags)) for right, tags in zip(gold, said)], dtype=np.float64)


def _ratio(above: Array, below: Array) -> Callable[[Array], Array]:
    """Sum over sentences divided by sum; 0 where there is nothing to divide by."""

    def statistic(weights: Array) -> Array:
        divisor = weights @ below
        return np.asarray(np.divide(weights @ above, divisor, out=np.zeros_like(divisor), where=divisor > 0))

    return statistic


def _macro(gold: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> Callable[[Array], Array]:
    """The mean F1 over all tags that occur or are said.

    A rare tag that a resample leaves out keeps its F1 of the whole: left out of the mean instead, the rare and hard tags
    would be missed by most resamples, and the interval would lie above the value.
    """
    names = sorted({tag for tags in [*gold, *said] for tag in tags})
    number = {name: place for place, name in enumerate(names)}
    both, total = (np.zeros((len(gold), len(names))) for _ in range(2))
    for place, (right, tags) in enumerate(zip(gold, said, strict=True)):
        for a, b in zip(right, tags):
            total[place, number[a]] += 1
            total[place, number[b]] += 1
            both[place, number[a]] += a == b

    whole = 2 * both.sum(axis=0) / total.sum(axis=0)

    def statistic(weights: Array) -> Array:
        counted = weights @ total
        f1 = np.broadcast_to(whole, counted.shape).copy()
        np.divide(2 * (weights @ both), counted, out=f1, where=counted > 0)
        return np.asarray(f1.mean(axis=1))

    return statistic


def _by_dictionary(training: Sequence[Row], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The longest names seen in training, with their usual type, spelled in the scheme they were seen in."""
    kinds: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    spellings: dict[tuple[tuple[str, ...], str], Counter[tuple[str, ...]]] = defaultdict(Counter)
    for row in training:
        for start, end, kind in entities(row["tags"]):
            name = tuple(row["tokens"][start:end])
            kinds[name][kind] += 1
            spellings[name, kind][tuple(row["tags"][start:end])] += 1
    usual_kind = {name: counts.most_common(1)[0][0] for name, counts in kinds.items()}
    spelled = {name: spellings[name, kind].most_common(1)[0][0] for name, kind in usual_kind.items()}
    longest = max(map(len, kinds), default=0)
    answers = []
    for row in rows:
        tokens, place = list(row["tokens"]), 0
        tags = ["O"] * len(tokens)
        while place < len(tokens):
            sizes = range(min(longest, len(tokens) - place), 0, -1)
            size = next((size for size in sizes if tuple(tokens[place : place + size]) in spelled), 0)
            if size:
                tags[place : place + size] = spelled[tuple(tokens[place : place + size])]
                if place and tags[place][0] == "I" and tags[place - 1][2:] == tags[place][2:]:
                    tags[place] = "B" + tags[place][1:]  # IOB1 marks the beginning after a neighbour of the same type
            place += max(size, 1)
        answers.append({"tags": tags})
    return answers


def _scores(of: str, name: str, both: float, support: float, answered: float) -> dict[str, Any]:
    return {
        of: name,
        "precision": both / answered if answered else None,
        "recall": both / support if support else None,
        "f1": 2 * both / (support + answered) if support + answered else None,
        "support": int(support),
    }


def _marked(tokens: Sequence[Any], right: Sequence[str], tags: Sequence[str]) -> str:
    """The sentence with each wrongly tagged word as word[true → said]."""
    return " ".join(str(t) if a == b else f"{t}[{a} → {b}]" for t, a, b in zip(tokens, right, tags))

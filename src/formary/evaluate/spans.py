"""How well answers are found in a context: exact match and F1 as SQuAD measures them, also for Chinese and Japanese.

Answers are compared after SQuAD's normalisation (Rajpurkar et al. 2016; the unanswerable as in Rajpurkar et al. 2018);
each Chinese or Japanese character counts as a word of its own, as in CMRC 2018 (Cui et al. 2019).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.errors import DataError
from formary.evaluate import interval
from formary.recipe.schema import Evaluate

Row = Mapping[str, Any]
Answer = Mapping[str, Any]
Array = NDArray[np.float64]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNITS = re.compile(f"[{_CJK}]|[^{_CJK}\\s]+")
_SENTENCE = re.compile(r"[^.!?。！？\n]+(?:[.!?。！？]+[\"'”’」』)）]*|\n|$)")
_WORST = 20


def metrics(
    rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]], *, settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    """F1 first, then exact match; apart for questions with and without an answer where both occur.

    Args:
        rows: with `answers`, whose texts are all right ones; none means that there is no answer.
        answers: by model, each with `answer`, "" for none; "model" is the one that is judged.

    Raises:
        DataError: there are no rows.
    """
    if not rows:
        raise DataError(f"{where}: there are no rows to measure answers on; give the split at least one row")
    gold = [right_answers(row) for row in rows]
    scores = {
        name: np.array([score(str(answer["answer"]), right) for answer, right in zip(said, gold, strict=True)])
        for name, said in answers.items()
    }
    has = np.array([bool(right) for right in gold])
    how = "SQuAD's normalisation, best of the right answers"
    entries = []
    parts = [("", np.ones(len(rows), dtype=bool))]
    if has.any() and not has.all():
        parts += [("answerable_", has), ("unanswerable_", ~has)]
    for prefix, inside in parts:
        for place, name in enumerate(("f1", "exact_match")):
            entries.append(
                interval.metric_entry(
                    prefix + name,
                    f"{where}, {how}" + (f", {int(inside.sum()):,} of them" if prefix else ""),
                    {model: _mean(values[:, place], inside) for model, values in scores.items()},
                    len(rows),
                    settings=settings,
                )
            )
    return entries


def details(rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, Any]:
    """Where the model is right and wrong, JSON-able.

    Returns:
        {"question_words": [{"first_word", "rows", "f1", "exact_match"}], "answer_length": [...], "worst": [...]}.
    """
    gold = [right_answers(row) for row in rows]
    scores = np.array([score(str(answer["answer"]), right) for answer, right in zip(answers, gold, strict=True)])
    words = [(str(row["question"]).split() or [""])[0].lower().strip(string.punctuation) for row in rows]
    lengths = [_length(right) for right in gold]
    worst = [n for n in np.argsort(scores[:, 0], kind="stable").tolist() if scores[n, 0] < 1][:_WORST]
    return {
        "question_words": _slices("first_word", words, scores)[:10],
        "answer_length": _slices("words", lengths, scores),
        "worst": [
            {
                "row": n + 1,
                "question": str(rows[n]["question"])[:200],
                "right": gold[n][0] if gold[n] else "(no answer)",
                "said": str(answers[n]["answer"]) or "(no answer)",
                "probability": answers[n].get("probability"),
                "f1": float(scores[n, 0]),
            }
            for n in worst
        ],
    }


def baselines(training: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """The sentence of the context most like the question by TF-IDF, and its first sentence."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    contexts = list(dict.fromkeys(str(row["context"]) for row in [*training, *rows]))
    try:
        vectors = TfidfVectorizer(tokenizer=units, token_pattern=None, lowercase=True).fit(contexts)
    except ValueError:  # no words at all
        return {}
    best, first = [], []
    for row in rows:
        cut = sentences(str(row["context"]))
        question = vectors.transform([str(row["question"])])
        likeness = (vectors.transform(cut) @ question.T).toarray()[:, 0]
        best.append({"answer": cut[int(likeness.argmax())]})
        first.append({"answer": cut[0]})
    return {"best TF-IDF sentence": best, "first sentence": first}


def score(answer: str, right: Sequence[str]) -> tuple[float, float]:
    """(F1, exact match) of an answer against the best of the right ones; none at all means that "" is right."""
    if not right:
        same = float(not normalised(answer))
        return same, same
    return max(f1(answer, one) for one in right), max(float(normalised(answer) == normalised(one)) for one in right)


def f1(answer: str, right: str) -> float:
    """Words in common: the harmonic mean of precision and recall, 0 to 1."""
    said, true = units(normalised(answer)), units(normalised(right))
    if not said or not true:
        return float(said == true)
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true))


def normalised(text: str) -> str:
    """Lower case without punctuation, English articles and surplus white space."""
    kept = "".join(letter for letter in text.lower() if not _is_punctuation(letter))
    return " ".join(_ARTICLES.sub(" ", kept).split())


def units(text: str) -> list[str]:
    """Words, and each Chinese or Japanese character by itself."""
    return _UNITS.findall(text)


def sentences(text: str) -> list[str]:
    """A text cut after full stops, question and exclamation marks of English and Chinese; at least one piece."""
    return [cut for piece in _SENTENCE.findall(text) if (cut := piece.strip())] or [text]


def right_answers(row: Row) -> list[str]:
    """The right answers' texts, in whichever of SQuAD's forms the row holds them."""
    given = row["answers"]
    if isinstance(given, Mapping):
        return [str(text) for text in given.get("text", ())]
    return [str(one["text"]) if isinstance(one, Mapping) else str(one) for one in given or ()]


def _is_punctuation(letter: str) -> bool:
    return letter in string.punctuation or (not letter.isascii() and unicodedata.category(letter).startswith("P"))


def _mean(values: Array, inside: NDArray[np.bool_]) -> Callable[[Array], Array]:
    def statistic(weights: Array) -> Array:
        chosen = weights[:, inside]
        total = chosen.sum(axis=1)
        return np.asarray(np.divide(chosen @ values[inside], total, out=np.full(len(total), np.nan), where=total > 0))

    return statistic


def _slices(by: str, names: Sequence[str], scores: Array) -> list[dict[str, Any]]:
    found = []
    for name, count in Counter(names).most_common():
        mean = scores[[n == name for n in names]].mean(axis=0)
        found.append({by: name, "rows": count, "f1": float(mean[0]), "exact_match": float(mean[1])})
    return found


def _length(right: Sequence[str]) -> str:
    if not right:
        return "no answer"
    count = min(len(units(one)) for one in right)
    return "1" if count <= 1 else "2 to 3" if count <= 3 else "4 to 7" if count <= 7 else "8 or more"

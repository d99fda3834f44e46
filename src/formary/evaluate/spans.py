"""How well answers are found in a context: exact match and F1 as SQuAD measures them, also for Chinese and Japanese.

Answers are compared after SQuAD's normalisation (Rajpurkar et al. 2016; the unanswerable as in Rajpurkar et al. 2018);
each Chinese or Japanese character is a word of its own, cut as in CMRC 2018 (whose F1 also asks for their order).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
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
_CJK = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_HAS_CJK = re.compile(f"[{_CJK}]")
_UNITS = re.compile(f"[{_CJK}]|[^{_CJK}\\s]+")
_FULL_WIDTH = re.compile("[\u3000-\u303f\uff00-\uffef]")  # the punctuation of Chinese and Japanese alone
_ASKING = re.compile(
    "为什么|為什麼|什么|什麼|谁|誰|哪|何时|何時|多少|几|幾|怎么|怎麼|如何|なぜ|どこ|どの|どう|いつ|いくつ|何"
)
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
    if any(_HAS_CJK.search(one) for right in gold for one in right):
        how += ", Chinese and Japanese by characters in any order"
    entries = []
    parts = [("", np.ones(len(rows), dtype=bool))]
    if has.any() and not has.all():
        parts += [("answerable_", has), ("unanswerable_", ~has)]
    for prefix, inside in parts:
        count = int(inside.sum())
        for place, name in enumerate(("f1", "exact_match")):
            measured = {model: values[inside, place] for model, values in scores.items()}
            entries.append(
                interval.metric_entry(
                    prefix + name,
                    f"{where}, {how}" + (f", {count:,} of them" if prefix else ""),
                    {model: interval.mean(values) for model, values in measured.items()},
                    count,
                    settings=settings,
                    share_of_rows=all(np.isin(values, (0, 1)).all() for values in measured.values()),
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
    words = [_asking(str(row["question"])) for row in rows]
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
    """The sentence of the context most like the question by TF-IDF as in training, and its first sentence."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    cut = {context: sentences(context) for context in dict.fromkeys(str(row["context"]) for row in rows)}
    found = {"first sentence": [{"answer": cut[str(row["context"])][0]} for row in rows]}
    try:
        vectors = TfidfVectorizer(tokenizer=units, token_pattern=None, lowercase=True)
        vectors.fit(list(dict.fromkeys(str(row["context"]) for row in training)))
    except ValueError:  # no words to learn from
        return found
    pieces = {context: vectors.transform(of_context) for context, of_context in cut.items()}
    best = []
    for row in rows:
        context = str(row["context"])
        likeness = (pieces[context] @ vectors.transform([str(row["question"])]).T).toarray()[:, 0]
        best.append({"answer": cut[context][int(likeness.argmax())]})
    return {"best TF-IDF sentence": best, **found}


def score(answer: str, right: Sequence[str]) -> tuple[float, float]:
    """(F1, exact match) of an answer against the best of the right ones; none at all means that "" is right."""
    right = [one for one in right if normalised(one)] or [""]  # as SQuAD 2: an article alone is no answer
    return max(f1(answer, one) for one in right), max(float(normalised(answer) == normalised(one)) for one in right)


def f1(answer: str, right: str) -> float:
    """Words in common: the harmonic mean of precision and recall, 0 to 1."""
    said, true = units(normalised(answer)), units(normalised(right))
    if not said or not true:
        return float(said == true)
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true))


def normalised(text: str) -> str:
    """Lower case without punctuation, English articles and surplus white space.

    SQuAD strips ASCII punctuation alone, and so does this; quotes, dashes and dots beyond it go beside Chinese and
    Japanese characters only, as in CMRC 2018.
    """
    wide = _HAS_CJK.search(text) is not None
    kept = "".join(letter for letter in text.lower() if not _is_punctuation(letter, wide))
    return " ".join(_ARTICLES.sub(" ", kept).split())


def units(text: str) -> list[str]:
    """Words, and each Chinese or Japanese character by itself."""
    return _UNITS.findall(text)


def sentences(text: str) -> list[str]:
    """A text cut after full stops, question and exclamation marks of English and Chinese; at least one piece."""
    return [cut for piece in _SENTENCE.findall(text) if (cut := piece.strip())] or [text]


def right_answers(row: Row) -> list[str]:
    """The right answers' texts, in whichever of SQuAD's forms the row holds them; blank ones are no answers."""
    given = row["answers"]
    texts = given.get("text") if isinstance(given, Mapping) else given
    found = [str(one["text"]) if isinstance(one, Mapping) else str(one) for one in (() if texts is None else texts)]
    return [text for text in found if text.strip()]


def _is_punctuation(letter: str, wide: bool) -> bool:
    if letter in string.punctuation:
        return True
    beyond = wide or _FULL_WIDTH.match(letter) is not None
    return beyond and not letter.isascii() and unicodedata.category(letter)[0] == "P"


def _asking(question: str) -> str:
    """The word that a question begins with; in Chinese and Japanese, which have no such place, its question word."""
    if _HAS_CJK.search(question):
        asking = _ASKING.search(question)
        return asking.group() if asking else "(other)"
    return (question.split() or [""])[0].lower().strip(string.punctuation)


def _slices(by: str, names: Sequence[str], scores: Array) -> list[dict[str, Any]]:
    """Means of the rows of each name, the commonest name first."""
    members: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        members.setdefault(name, []).append(number)
    found = []
    for name, numbers in sorted(members.items(), key=lambda pair: -len(pair[1])):
        mean = scores[numbers].mean(axis=0)
        found.append({by: name, "rows": len(numbers), "f1": float(mean[0]), "exact_match": float(mean[1])})
    return found


def _length(right: Sequence[str]) -> str:
    if not right:
        return "no answer"
    count = min(len(units(one)) for one in right)
    return "1" if count <= 1 else "2 to 3" if count <= 3 else "4 to 7" if count <= 7 else "8 or more"

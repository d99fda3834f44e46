"""Measures choices: of two answers the one that people preferred, and of a question's choices a right one.

Both have simple ways to be right more often than by chance: the longer text, the usual position, the words of the
question. They are the baselines. How far apart answers are is not judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.errors import DataError
from formary.evaluate import interval, linear
from formary.evaluate.slices import FEW_VALUES, Slice, worst
from formary.recipe.schema import Evaluate
from formary.tasks.questions import Question

Pair = Mapping[str, str]
Answer = Mapping[str, Any]
Floats = NDArray[np.float64]

_WORST = 20  # rows shown
_SHOWN = 500  # characters of a text that is shown


# Preferences ---------------------------------------------------------------------------------------------------------


def metrics(
    pairs: Sequence[Pair], answers: Mapping[str, Sequence[Answer]], *, settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    """The share of pairs in which the chosen text is preferred, with its interval and paired verdicts.

    Args:
        pairs: with `chosen` and `rejected`.
        answers: {"preferred": "chosen" or "rejected"} per pair, by model; "model" is the one that is judged.
        where: what was measured, such as "test, 1,000 rows".

    Raises:
        DataError: there are no pairs.
    """
    if not pairs:
        raise DataError(f"{where}: there are no pairs to compare; give the split at least one row")
    return [
        interval.metric_entry(
            "preference_accuracy",
            f"{where}, share of pairs in which the chosen text is preferred; chance is 0.5",
            {name: interval.mean(_right(given)) for name, given in answers.items()},
            len(pairs),
            settings=settings,
            share_of_rows=True,
        )
    ]


def details(pairs: Sequence[Pair], answers: Sequence[Answer]) -> dict[str, Any]:
    """The mean margin, and the share right where the chosen text is the longer one and where it is not.

    Returns:
        {"mean_margin": nats, "by_length": [{"chosen_is", "rows", "preference_accuracy"}]}
    """
    right, longer = (
        _right(answers),
        np.array([len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs], dtype=bool),
    )
    slices = [
        {"chosen_is": name, "rows": int(chosen.sum()), "preference_accuracy": float(right[chosen].mean())}
        for name, chosen in (("longer", longer), ("not longer", ~longer))
        if chosen.any()
    ]
    margins = [float(answer["margin"]) for answer in answers]
    return {"mean_margin": float(np.mean(margins)) if margins else None, "by_length": slices}


def baselines(pairs: Sequence[Pair]) -> dict[str, list[dict[str, Any]]]:
    """Whoever prefers the longer text, and of equally long ones the rejected: it knows nothing of what they say."""
    longer = (len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
    return {"the longer text": [{"preferred": "chosen" if chosen else "rejected"} for chosen in longer]}


def _right(answers: Sequence[Answer]) -> Floats:
    return np.array([answer["preferred"] == "chosen" for answer in answers], dtype=np.float64)


# Multiple choice -----------------------------------------------------------------------------------------------------


def question_metrics(
    questions: Sequence[Question], answers: Mapping[str, Sequence[Answer]], *, settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    """The share of questions answered by a right choice, with its interval and paired verdicts; chance is in its protocol.

    Args:
        questions: each with at least one right choice.
        answers: {"index": the number of a choice, or None for one taken at random} per question, by model; "model" is
            the one that is judged.
        where: what was measured, such as "test, 1,000 rows".

    Raises:
        DataError: there are no questions, or one has no right choice.
    """
    _check(questions, where)
    return [
        interval.metric_entry(
            "accuracy",
            f"{where}, share of questions answered by a right choice; chance is {_chances(questions).mean():.3f}",
            {name: interval.mean(_credits(questions, given)) for name, given in answers.items()},
            len(questions),
            settings=settings,
            share_of_rows=True,
        )
    ]


def question_details(
    questions: Sequence[Question], answers: Sequence[Answer], *, columns: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, Any]:
    """Where the model is right and wrong, JSON-able.

    Args:
        columns: of the rows; those with few distinct values make slices.

    Returns:
        {"chance", "mean_probability": of the answers given, "by_choices": [{"choices", "rows", "accuracy", "chance"}],
        "by_position": the same by the place of the (first) right choice, from 1, with how often it was answered,
        "worst": the most confidently wrong [{"row" (from 1), "question", "right", "answer", "probability"}],
        "slices": worst first, as `labels.details` has them}.
    """
    hits, chances = _credits(questions, answers), _chances(questions)
    counts = [len(question.choices) for question in questions]
    places = [question.right[0] + 1 for question in questions]
    said = Counter(int(answer["index"]) + 1 for answer in answers)
    by_choices = [
        {
            "choices": count,
            "rows": int(rows.sum()),
            "accuracy": float(hits[rows].mean()),
            "chance": float(chances[rows].mean()),
        }
        for count, rows in _groups(counts)
    ]
    by_position = [
        {"right_is_at": place, "rows": int(rows.sum()), "accuracy": float(hits[rows].mean()), "answered": said[place]}
        for place, rows in _groups(places)
    ]
    sure = np.array([float(answer.get("probability", 0.0)) for answer in answers])
    order = [int(n) for n in np.argsort(np.where(hits > 0, np.inf, -sure), kind="stable")[:_WORST] if hits[n] == 0]
    return {
        "chance": float(chances.mean()),
        "mean_probability": float(sure.mean()),
        "by_choices": by_choices,
        "by_position": by_position,
        "worst": [_wrong(number, questions[number], answers[number]) for number in order],
        "slices": worst(_parts(columns or {}), hits, "accuracy"),
    }


def question_baselines(training: Sequence[Question], questions: Sequence[Question]) -> dict[str, list[dict[str, Any]]]:
    """What needs no network and mostly no question: a random choice, position, length, shared words, and the choices alone.

    The last two are left out where training has no words to learn from, or every choice is right.
    """
    positions = Counter(place for question in training for place in question.right)
    found = {
        "random choice": [_uniform(question) for question in questions],
        "most frequent position": [_best([positions[n] for n in range(len(q.choices))]) for q in questions],
        "longest choice": [_best([len(choice) for choice in question.choices]) for question in questions],
    }
    if (similar := _similarities(training, questions)) is not None:
        found["TF-IDF similarity to the question"] = similar
    if alone := _choices_alone(training, questions):
        found["choices alone, TF-IDF + logistic regression"] = alone
    return found


def _similarities(training: Sequence[Question], questions: Sequence[Question]) -> list[dict[str, Any]] | None:
    """The choice with the largest cosine to the question; the first of equal ones."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    known = [text for question in training for text in (question.text, *question.choices)]
    unspaced = linear.is_unspaced(known)
    vectorizer = TfidfVectorizer(
        analyzer="char" if unspaced else "word", token_pattern=None if unspaced else r"(?u)\b\w+\b", sublinear_tf=True
    )
    try:
        vectorizer.fit(known)
    except ValueError:  # no words
        return None
    asked = vectorizer.transform([question.text for question in questions])
    offered = vectorizer.transform([choice for question in questions for choice in question.choices])
    found, start = [], 0
    for number, question in enumerate(questions):
        stop = start + len(question.choices)
        found.append(_best((offered[start:stop] @ asked[number].T).toarray()[:, 0].tolist()))
        start = stop
    return found


def _choices_alone(training: Sequence[Question], questions: Sequence[Question]) -> list[dict[str, Any]]:
    """The choice most like right ones of training, whatever is asked: what gives answers away (Gururangan et al. 2018)."""
    texts = [choice for question in training for choice in question.choices]
    labels = [["right" if n in q.right else "wrong"] for q in training for n in range(len(q.choices))]
    if not texts or len({label for (label,) in labels}) < 2:
        return []
    asked = [choice for question in questions for choice in question.choices]
    learned = linear.answers(texts, labels, asked, kind="single").get(linear.LINEAR["single"])
    if not learned:
        return []
    shares = iter(answer["probabilities"]["right"] for answer in learned)
    return [_best([next(shares) for _ in question.choices]) for question in questions]


def _best(scores: Sequence[float]) -> dict[str, Any]:
    return {"index": int(np.argmax(scores))}


def _uniform(question: Question) -> dict[str, Any]:
    return {"index": None, "probabilities": [1 / len(question.choices)] * len(question.choices)}


def _check(questions: Sequence[Question], where: str) -> None:
    if not questions:
        raise DataError(f"{where}: there are no questions to measure; give the split at least one row")
    for number, question in enumerate(questions, 1):
        if not question.right:
            raise DataError(f"{where}: row {number} has no answer ({question.text[:60]!r}); complete it or take it out")


def _chances(questions: Sequence[Question]) -> Floats:
    return np.array([len(question.right) / len(question.choices) for question in questions], dtype=np.float64)


def _credits(questions: Sequence[Question], answers: Sequence[Answer]) -> Floats:
    """(rows,) 1 for a right choice and 0 for another; for one taken at random, how often it is right."""
    chances = _chances(questions)
    taken = [answer["index"] for answer in answers]
    hits = [c if n is None else float(n in q.right) for q, n, c in zip(questions, taken, chances, strict=True)]
    return np.array(hits, dtype=np.float64)


def _groups(values: Sequence[Any]) -> list[tuple[Any, NDArray[np.bool_]]]:
    """Each distinct value with the rows that have it, in order."""
    return [(value, np.array([one == value for one in values], dtype=bool)) for value in sorted(set(values))]


def _wrong(number: int, question: Question, answer: Answer) -> dict[str, Any]:
    shown: dict[str, Any] = {"row": number + 1, "question": question.text[:_SHOWN]}
    shown["right"] = "; ".join(question.choices[n] for n in question.right)[:_SHOWN]
    shown["answer"] = question.choices[answer["index"]][:_SHOWN]
    return shown | {"probability": float(answer["probability"])} if "probability" in answer else shown


def _parts(columns: Mapping[str, Sequence[Any]]) -> list[Slice]:
    """A slice for each value of the columns that have few."""
    return [
        Slice(name, value, rows)
        for name, values in columns.items()
        if all(isinstance(value, Hashable) for value in values) and 2 <= len(set(values)) <= FEW_VALUES
        for value, rows in _groups([str(value) for value in values])
    ]

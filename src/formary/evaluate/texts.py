"""Measures written answers against reference texts: BLEU, chrF, ROUGE and exact match, beside two translators of no skill.

Every metric is a function of sums or means over rows, so resampled rows are summed and scored anew, by sacrebleu itself.
It does not generate text and does not judge meaning: another good wording scores low.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formary.errors import DataError, MissingExtra
from formary.evaluate import interval
from formary.recipe.schema import Evaluate

Floats = NDArray[np.float64]
Row = Mapping[str, Any]
Answer = Mapping[str, Any]
Statistic = Callable[[Floats], Floats]

_BLEU_ORDER = 4  # words in BLEU's longest n-gram
_SLICES = 4  # groups of about equally many rows, by the length of their source
_EXAMPLES = 10  # worst and best rows shown
_LONGEST_SOURCE = 2000  # characters of a source that are compared when the nearest one is looked for
_KNOWN_AT_ONCE, _ASKED_AT_ONCE = 20_000, 100  # a block of similarities is this large: 8 MB

_KANA = "\u3040-\u30ff\u31f0-\u31ff"
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer: no spaces between words either
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff"  # parts of words that \w leaves out
_ALONE = rf"{_KANA}{_HAN}{_UNSPACED}"
_UNIT = re.compile(rf"(?=[\w{_UNSPACED}])[{_ALONE}]|(?:(?![_{_ALONE}])[\w{_MARKS}])+")
_LETTER, _IS_KANA, _IS_HAN, _IS_UNSPACED = (
    re.compile(p) for p in (r"[^\W\d_]", f"[{_KANA}]", f"[{_HAN}]", f"[{_UNSPACED}]")
)


@dataclass(frozen=True)
class Scores:
    """What one model's texts give per row; sums over rows are all that the metrics need."""

    bleu: Floats  # (rows, 10) answer length, reference length, matches and n-grams of 1 to 4 words
    chrf: Floats  # (rows, 18) n-grams of the answer, of the reference, and matches, for 1 to 6 characters
    rouge: Floats  # (rows, 3) F1 of ROUGE-1, ROUGE-2, ROUGE-L
    exact: Floats  # (rows,) 1.0 where answer and reference are equal up to white space


class References:
    """The reference texts, made ready to score any number of models against.

    Raises:
        MissingExtra: sacrebleu is not installed.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        sacrebleu = library()
        self._targets = list(targets)
        self._bleu = sacrebleu.BLEU(tokenize=tokenizer_name(targets), force=True, references=[self._targets])
        self._chrf = sacrebleu.CHRF(references=[self._targets])
        self._units = [units(target) for target in targets]

    def score(self, texts: Sequence[str]) -> Scores:
        """The statistics of one model's texts, in the order of the references."""
        bleu, chrf = (m._extract_corpus_statistics(list(texts), None) for m in (self._bleu, self._chrf))
        rouge = [rouge_f1(units(text), target) for text, target in zip(texts, self._units, strict=True)]
        exact = [_trimmed(text) == _trimmed(target) for text, target in zip(texts, self._targets, strict=True)]
        return Scores(*(np.asarray(table, dtype=np.float64) for table in (bleu, chrf, rouge, exact)))

    def bleu(self, sums: Floats) -> Floats:
        """sacrebleu's BLEU of summed statistics, 0 to 100: (..., 10) -> (...)."""
        return _scored(self._bleu, sums)

    def chrf(self, sums: Floats) -> Floats:
        """sacrebleu's chrF of summed statistics, 0 to 100: (..., 18) -> (...)."""
        return _scored(self._chrf, sums)

    @property
    def signatures(self) -> tuple[str, str]:
        """sacrebleu's own description of how BLEU and chrF were counted, with its version."""
        return str(self._bleu.get_signature()), str(self._chrf.get_signature())


def metrics(
    rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]], *, settings: Evaluate, where: str
) -> list[dict[str, Any]]:
    """BLEU, chrF, ROUGE-1, ROUGE-2, ROUGE-L and exact match, each with its interval and paired verdicts.

    The first one, the headline, is BLEU (Papineni et al. 2002) where references are sentences, and exact match where
    they are words and names: BLEU counts runs of up to four words, and a reference of three or fewer holds no such run,
    so on these it measures little but its own smoothing. The median length in BLEU's words decides.

    Args:
        rows: with `source` and `target`, or with `messages`, whose last one is the reference.
        answers: {"text": str} per row, by model; "model" is the one that is judged, the others are baselines.
        where: what was measured, such as "test, 1,000 rows".

    Raises:
        MissingExtra: sacrebleu is not installed.
        DataError: there are no rows.
    """
    if not rows:
        raise DataError(f"{where}: there are no rows to compare texts on; give the split at least one row")
    references = References([source_and_target(row)[1] for row in rows])
    scores = {name: references.score([str(answer["text"]) for answer in given]) for name, given in answers.items()}
    lengths = next(iter(scores.values())).bleu[:, 1]
    bleu_signature, chrf_signature = references.signatures
    rouge = "words, or characters where no spaces part words; lower case, no stemming; mean F1 of rows"
    table: list[tuple[str, str, Callable[[Scores], Statistic]]] = [
        ("bleu", f"sacrebleu {bleu_signature}", lambda s: _of_sums(s.bleu, references.bleu)),
        ("chrf", f"sacrebleu {chrf_signature}", lambda s: _of_sums(s.chrf, references.chrf)),
        ("rouge_1", rouge, lambda s: interval.mean(s.rouge[:, 0])),
        ("rouge_2", rouge, lambda s: interval.mean(s.rouge[:, 1])),
        ("rouge_l", rouge, lambda s: interval.mean(s.rouge[:, 2])),
        ("exact_match", "equal up to white space", lambda s: interval.mean(s.exact)),
    ]
    if np.median(lengths) < _BLEU_ORDER:
        table.insert(0, table.pop())
    return [
        interval.metric_entry(
            name,
            f"{where}, {protocol}",
            {model: statistic(measured) for model, measured in scores.items()},
            len(rows),
            settings=settings,
        )
        for name, protocol, statistic in table
    ]


def details(rows: Sequence[Row], answers: Sequence[Answer], *, examples: int = _EXAMPLES) -> dict[str, Any]:
    """What lies behind the figures: the worst and the best rows, lengths, and slices by the length of the source.

    Returns:
        {"worst", "best": [{"row", "source", "target", "text", "chrf"}] by the chrF of a row, which unlike its BLEU is
        not 0 for most; "length_ratio": answer to reference in characters, {"corpus", "median"}; "empty", "copied": the
        number of answers without text, and of those that repeat the source; "by_source_length": [{"from", "to" (words
        or CJK characters), "rows", "bleu", "chrf", "exact_match"}]}. Rows count from 0.
    """
    if not rows:
        return {"worst": [], "best": [], "length_ratio": None, "empty": 0, "copied": 0, "by_source_length": []}
    pairs = [source_and_target(row) for row in rows]
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    texts = [str(answer["text"]) for answer in answers]
    references = References(targets)
    scores = references.score(texts)
    per_row = references.chrf(scores.chrf)
    order = np.argsort(per_row, kind="stable")

    def shown(number: int) -> dict[str, Any]:
        source, target = pairs[number]
        chrf = float(per_row[number])
        return {"row": number, "source": source, "target": target, "text": texts[number], "chrf": chrf}

    ratios = [len(text) / len(target) for text, target in zip(texts, targets, strict=True) if target]
    characters = sum(map(len, targets))
    slices = []
    lengths = np.array([len(units(source)) for source in sources])
    for chosen in _slices(lengths):
        slices.append(
            {
                "from": int(lengths[chosen].min()),
                "to": int(lengths[chosen].max()),
                "rows": len(chosen),
                "bleu": float(references.bleu(scores.bleu[chosen].sum(axis=0))),
                "chrf": float(references.chrf(scores.chrf[chosen].sum(axis=0))),
                "exact_match": float(scores.exact[chosen].mean()),
            }
        )
    return {
        "worst": [shown(int(number)) for number in order[:examples]],
        "best": [shown(int(number)) for number in order[::-1][:examples]],
        "length_ratio": {
            "corpus": sum(map(len, texts)) / characters if characters else None,
            "median": float(np.median(ratios)) if ratios else None,
        },
        "empty": sum(not text.strip() for text in texts),
        "copied": sum(
            _trimmed(text) == _trimmed(source) != _trimmed(target)
            for text, (source, target) in zip(texts, pairs, strict=True)
        ),
        "by_source_length": slices,
    }


def baselines(train_rows: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Two translators of no skill: one repeats the source, one recalls the target of the most similar training source.

    A model that does not beat the second one has learned no more than to look things up.
    """
    sources = [source_and_target(row)[0] for row in rows]
    found: dict[str, list[dict[str, Any]]] = {"copy source": [{"text": source} for source in sources]}
    if train_rows:
        memory = [source_and_target(row) for row in train_rows]
        nearest = nearest_texts([source for source, _ in memory], sources)
        found["nearest source (translation memory)"] = [{"text": memory[place][1]} for place in nearest]
    return found


def commonest(train_rows: Sequence[Row], count: int) -> dict[str, list[dict[str, Any]]]:
    """`count` times the target that training rows have most often, the baseline where there is no source text."""
    counts = Counter(source_and_target(row)[1] for row in train_rows)
    return {"most frequent text": [{"text": counts.most_common(1)[0][0]}] * count} if counts else {}


def nearest_texts(known: Sequence[str], asked: Sequence[str]) -> list[int]:
    """For each asked text the place of the most similar known one: the same text, else the highest TF-IDF cosine.

    TF-IDF counts runs of 1 to 3 characters without regard to case, in the first 2,000 of each text; among equals the
    earliest is taken. Memory is that of the known texts' sparse table, however many are asked.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    same = {text: place for place, text in reversed(list(enumerate(known)))}
    places = [same.get(text, 0) for text in asked]
    others = [number for number, text in enumerate(asked) if text not in same]
    if not others or not any(text.strip() for text in known):
        return places
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), dtype=np.float32)
    table = vectorizer.fit_transform([text[:_LONGEST_SOURCE] for text in known])
    queries = vectorizer.transform([asked[number][:_LONGEST_SOURCE] for number in others])
    best = np.zeros(len(others), dtype=np.int64)
    highest = np.full(len(others), -1.0)
    for start in range(0, len(known), _KNOWN_AT_ONCE):
        block = table[start : start + _KNOWN_AT_ONCE].T.tocsr()  # (n-grams, known)
        for first in range(0, len(others), _ASKED_AT_ONCE):
            similar = (queries[first : first + _ASKED_AT_ONCE] @ block).toarray()
            rows = slice(first, first + len(similar))
            found = similar.argmax(axis=1)
            reached = similar[np.arange(len(similar)), found]
            better = reached > highest[rows]
            best[rows] = np.where(better, start + found, best[rows])
            highest[rows] = np.where(better, reached, highest[rows])
    for number, place in zip(others, best, strict=True):
        places[number] = int(place)
    return places


def source_and_target(row: Row) -> tuple[str, str]:
    """What is read and what should be written; of a conversation the last two messages."""
    if "messages" in row:
        contents = [str(message["content"]) for message in row["messages"]]
        return contents[-2] if len(contents) > 1 else "", contents[-1] if contents else ""
    return str(row["source"]), str(row["target"])


def library() -> Any:
    """The sacrebleu package with its classes BLEU and CHRF.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise MissingExtra("translate", "BLEU and chrF: sacrebleu") from error
    return sacrebleu


def tokenizer_name(targets: Sequence[str]) -> str:
    """sacrebleu's tokenizer for the script of the references: "zh", "char" (Japanese, Thai, ...) or "13a".

    A text counts as written without spaces from a fifth of its letters on: Chinese about software is full of Latin names.
    """
    text = "\n".join(targets)
    letters, kana, han, unspaced = (
        len(pattern.findall(text)) for pattern in (_LETTER, _IS_KANA, _IS_HAN, _IS_UNSPACED)
    )
    alone = kana + han + unspaced
    if alone == 0 or alone < 0.2 * letters:
        return "13a"
    return "zh" if han > 0.9 * alone else "char"


def units(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; CJK characters, which no spaces part, one by one.

    On plain English this is what the `rouge_score` package counts; letters with accents, which it drops, are kept.
    """
    return _UNIT.findall(text.lower())


def rouge_f1(answer: Sequence[str], reference: Sequence[str]) -> tuple[float, float, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L of two lists of units, 0 to 1 (Lin 2004)."""
    shared = [_overlap(answer, reference, size) for size in (1, 2)]
    common = common_subsequence(answer, reference)
    return shared[0], shared[1], _f1(common, len(answer), len(reference))


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, whole rows of the table at once as bits (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, unit in enumerate(first):
        places[unit] = places.get(unit, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full  # a 0 bit: the subsequence grows here
    for unit in second:
        matching = row & places.get(unit, 0)
        row = (row + matching | row - matching) & full
    return len(first) - row.bit_count()


def _overlap(answer: Sequence[str], reference: Sequence[str], size: int) -> float:
    counts = [Counter(zip(*(text[k:] for k in range(size)), strict=False)) for text in (answer, reference)]
    return _f1((counts[0] & counts[1]).total(), counts[0].total(), counts[1].total())


def _f1(common: int, answered: int, expected: int) -> float:
    return 2 * common / (answered + expected) if common else 0.0


def _of_sums(statistics: Floats, score: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
    """A corpus metric under multiplicities of rows: (resamples, rows) -> (resamples,)."""
    return lambda weights: score(weights @ statistics)


def _scored(metric: Any, sums: Floats) -> Floats:
    flat = sums.reshape(-1, sums.shape[-1]).tolist()
    return np.array([metric._compute_score_from_stats(row).score for row in flat]).reshape(sums.shape[:-1])


def _slices(lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The row numbers of each slice; rows of one length stay together."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _SLICES + 1)[1:-1], method="lower"))
    group = np.searchsorted(edges, lengths, side="left")
    return [np.flatnonzero(group == number) for number in np.unique(group)]


def _trimmed(text: str) -> str:
    return " ".join(text.split())

"""Figures of written answers equal those of sacrebleu and rouge_score, and the baselines find what they should."""

from __future__ import annotations

import builtins
import json
import random
import re
from itertools import pairwise

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sklearn.feature_extraction.text import TfidfVectorizer

from formary.errors import DataError, MissingExtra
from formary.evaluate import texts
from formary.evaluate.texts import baselines, common_subsequence, details, metrics, nearest_texts, tokenizer_name, units
from formary.recipe.schema import Evaluate

SETTINGS = Evaluate(bootstrap=100)
ENGLISH = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat,",
    "over",
    "under",
    "(runs)",
    "quickly;",
    "it's",
    "3.5",
    "km.",
    "New-York",
    "U.S.",
    "said:",
    "yes!",
    "no?",
]
CHINESE = [*"输入时检查拼写您所需要的图表标题保留其他人更改，。！", "LibreOffice", "3.5", " "]
FRENCH = ["le", "été", "où", "garçon,", "l'élève", "naïf", "à", "3", "h", "00", ";", "«", "oui", "»", "Français"]


def sentences(words: list[str], count: int, *, seed: int, between: str = " ", longest: int = 14) -> list[str]:
    chance = random.Random(seed)
    return [between.join(chance.choices(words, k=chance.randint(1, longest))) for _ in range(count)]


def noisy(targets: list[str], words: list[str], *, seed: int, between: str = " ", share: float = 0.3) -> list[str]:
    """Answers that resemble their references, some of them exactly, one of them empty."""
    chance = random.Random(seed)
    found = []
    for target in targets:
        pieces = target.split(between) if between else list(target)
        found.append(between.join(chance.choice(words) if chance.random() < share else piece for piece in pieces))
    return ["", *found[1:]]


def rows_of(targets: list[str]) -> list[dict[str, str]]:
    return [{"source": f"source {number}", "target": target} for number, target in enumerate(targets)]


def said(answers: list[str]) -> list[dict[str, str]]:
    return [{"text": answer} for answer in answers]


def value(entries: list[dict], name: str) -> float:
    return next(entry["model"]["value"] for entry in entries if entry["metric"] == name)


@pytest.mark.parametrize(
    ("words", "between", "tokenize"), [(ENGLISH, " ", "13a"), (FRENCH, " ", "13a"), (CHINESE, "", "zh")]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bleu_and_chrf_equal_sacrebleu(words, between, tokenize, seed):
    targets = sentences(words, 60, seed=seed, between=between)
    answers = noisy(targets, words, seed=seed + 10, between=between)
    found = metrics(rows_of(targets), {"model": said(answers)}, settings=SETTINGS, where="test")
    assert value(found, "bleu") == sacrebleu.corpus_bleu(answers, [targets], tokenize=tokenize).score
    assert value(found, "chrf") == sacrebleu.corpus_chrf(answers, [targets]).score


def test_japanese_is_scored_by_characters():
    targets = ["これは日本語の文です。", "猫がマットの上に座っています。", "東京タワー"]
    answers = ["これは日本語です。", "犬がマットの上に座っている。", "東京の塔"]
    found = metrics(rows_of(targets), {"model": said(answers)}, settings=SETTINGS, where="test")
    assert value(found, "bleu") == sacrebleu.corpus_bleu(answers, [targets], tokenize="char").score


@given(st.lists(st.tuples(st.text(max_size=40), st.text(max_size=40)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_any_unicode_scores_as_sacrebleu_scores_it(pairs):
    answers, targets = [a for a, _ in pairs], [b for _, b in pairs]
    found = metrics(rows_of(targets), {"model": said(answers)}, settings=SETTINGS, where="test")
    expected = sacrebleu.corpus_bleu(answers, [targets], tokenize=tokenizer_name(targets), force=True)
    assert value(found, "bleu") == expected.score
    assert value(found, "chrf") == sacrebleu.corpus_chrf(answers, [targets]).score


def test_resampled_rows_score_as_the_corpus_they_make_up():
    targets = sentences(ENGLISH, 20, seed=0)
    answers = noisy(targets, ENGLISH, seed=1)
    references = texts.References(targets)
    scores = references.score(answers)
    drawn = np.random.default_rng(0).integers(0, 20, size=(5, 20))
    weights = np.stack([np.bincount(line, minlength=20) for line in drawn]).astype(float)
    expected = [sacrebleu.corpus_bleu([answers[n] for n in line], [[targets[n] for n in line]]).score for line in drawn]
    assert references.bleu(weights @ scores.bleu) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_rouge_equals_google_rouge_score_on_english(seed):
    targets = sentences(ENGLISH, 40, seed=seed)
    answers = noisy(targets, ENGLISH, seed=seed + 20, share=0.5)
    found = metrics(rows_of(targets), {"model": said(answers)}, settings=SETTINGS, where="test")
    oracle = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    scored = [oracle.score(target, answer) for target, answer in zip(targets, answers, strict=True)]
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        expected = np.mean([row[theirs].fmeasure for row in scored])
        assert value(found, ours) == pytest.approx(expected, abs=1e-12)


def test_rouge_of_chinese_counts_characters():
    class Characters:
        def tokenize(self, text: str) -> list[str]:
            return re.findall(r"[一-龥]|[a-z0-9]+", text.lower())

    targets = sentences(CHINESE, 30, seed=3, between="")
    answers = noisy(targets, CHINESE, seed=4, between="")
    found = metrics(rows_of(targets), {"model": said(answers)}, settings=SETTINGS, where="test")
    oracle = rouge_scorer.RougeScorer(["rouge2", "rougeL"], tokenizer=Characters())
    scored = [oracle.score(target, answer) for target, answer in zip(targets, answers, strict=True)]
    assert value(found, "rouge_2") == pytest.approx(np.mean([row["rouge2"].fmeasure for row in scored]), abs=1e-12)
    assert value(found, "rouge_l") == pytest.approx(np.mean([row["rougeL"].fmeasure for row in scored]), abs=1e-12)


@given(st.text(alphabet="aZ09 _-.,!'\"\n\t", max_size=60))
def test_plain_text_has_the_units_of_rouge_score(text):
    assert units(text) == [word for word in re.split(r"[^a-z0-9]+", text.lower()) if word]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("L'Été, à 10 h", ["l", "été", "à", "10", "h"]),
        ("用LibreOffice写。", ["用", "libreoffice", "写"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("ラーメン", ["ラ", "ー", "メ", "ン"]),
    ],
)
def test_accents_stay_in_words_and_cjk_characters_stand_alone(text, expected):
    assert units(text) == expected


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_the_common_subsequence_is_as_long_as_the_table_says(first, second):
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    assert common_subsequence(first, second) == table[-1, -1]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["The cat sat.", "C'est l'été."], "13a"),
        (["输入时检查拼写", "在 LibreOffice Writer 中打开文档"], "zh"),
        (["これは日本語の文です。", "東京"], "char"),
        (["ภาษาไทยเขียนติดกัน"], "char"),
        (["He said 你好 and went away to the market square."], "13a"),
        (["한국어 문장입니다."], "13a"),
        (["", "123"], "13a"),
    ],
)
def test_the_tokenizer_follows_the_script_of_the_references(targets, expected):
    assert tokenizer_name(targets) == expected


def test_sentences_are_headed_by_bleu_and_names_by_exact_match():
    of_sentences, of_names = ["the cat sat on the mat"] * 3, ["New York", "Paris", "Rio de Janeiro"]
    first = [
        metrics(rows_of(targets), {"model": said(targets)}, settings=SETTINGS, where="test")[0]
        for targets in (of_sentences, of_names)
    ]
    assert [entry["metric"] for entry in first] == ["bleu", "exact_match"]
    assert first[0]["model"]["value"] == pytest.approx(100)
    assert first[1]["model"]["value"] == 1


def test_exact_match_forgives_white_space_only():
    rows = rows_of(["a b", "a b", "a b", "a b"])
    found = metrics(rows, {"model": said([" a  b\n", "a b", "A b", "a b."])}, settings=SETTINGS, where="test")
    assert value(found, "exact_match") == 0.5


def test_entries_name_the_protocol_and_judge_against_baselines():
    targets = sentences(ENGLISH, 60, seed=5)
    answers = {
        "model": said(noisy(targets, ENGLISH, seed=6, share=0.1)),
        "worse one": said(noisy(targets, ENGLISH, seed=7, share=0.9)),
        "twin": said(noisy(targets, ENGLISH, seed=6, share=0.1)),
    }
    found = metrics(rows_of(targets), answers, settings=SETTINGS, where="test, 60 rows")
    bleu = found[0]
    assert [entry["metric"] for entry in found] == ["bleu", "chrf", "rouge_1", "rouge_2", "rouge_l", "exact_match"]
    assert bleu["protocol"].startswith("test, 60 rows, sacrebleu nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert bleu["verdicts"] == {"worse one": "better", "twin": "cannot tell"}
    assert bleu["model"]["low"] < bleu["model"]["value"] < bleu["model"]["high"]
    assert bleu["baselines"]["twin"] == bleu["model"]
    json.dumps(found)


def test_a_missing_sacrebleu_is_an_error_that_names_the_extra(monkeypatch):
    genuine = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "sacrebleu":
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match=r'pip install "formary\[translate\]"'):
        metrics(rows_of(["a"]), {"model": said(["a"])}, settings=SETTINGS, where="test")


def test_no_rows_is_an_error_that_says_where():
    with pytest.raises(DataError, match="validation: there are no rows"):
        metrics([], {"model": []}, settings=SETTINGS, where="validation")


def test_a_conversation_is_scored_by_its_last_message():
    messages = [{"role": "user", "content": "Say hello there to me"}, {"role": "assistant", "content": "hello there"}]
    found = metrics([{"messages": messages}], {"model": said(["hello there"])}, settings=SETTINGS, where="test")
    assert value(found, "exact_match") == 1
    assert baselines([], [{"messages": messages}])["copy source"] == said(["Say hello there to me"])


def test_details_show_worst_and_best_rows_and_slices_that_cover_all():
    targets = sentences(ENGLISH, 40, seed=8)
    rows = [{"source": source, "target": t} for source, t in zip(sentences(FRENCH, 40, seed=9), targets, strict=True)]
    answers = noisy(targets, ENGLISH, seed=10)
    answers[1] = rows[1]["source"]
    found = details(rows, said(answers))
    oracle = [sacrebleu.sentence_chrf(a, [t]).score for a, t in zip(answers, targets, strict=True)]
    assert [row["chrf"] for row in found["worst"]] == sorted(oracle)[:10]
    assert [row["chrf"] for row in found["best"]] == sorted(oracle)[::-1][:10]
    assert found["worst"][0] == {"row": 0, **rows[0], "text": "", "chrf": 0.0}
    assert found["empty"] == 1
    assert found["copied"] == 1
    assert sum(part["rows"] for part in found["by_source_length"]) == 40
    spans = [(part["from"], part["to"]) for part in found["by_source_length"]]
    assert all(before[1] < after[0] for before, after in pairwise(spans))
    assert found["length_ratio"]["corpus"] == sum(map(len, answers)) / sum(map(len, targets))
    json.dumps(found)


def test_details_of_no_rows_and_of_empty_texts_are_defined():
    assert details([], [])["worst"] == []
    empty = details([{"source": "", "target": ""}], said([""]))
    assert empty["length_ratio"] == {"corpus": None, "median": None}
    json.dumps(empty)


def test_the_nearest_source_is_that_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(texts, "_KNOWN_AT_ONCE", 17)
    monkeypatch.setattr(texts, "_ASKED_AT_ONCE", 7)
    known = sentences(ENGLISH, 100, seed=11)
    asked = sentences(ENGLISH, 30, seed=12)
    table = TfidfVectorizer(analyzer="char", ngram_range=(1, 3))
    similar = (table.fit_transform(known) @ table.transform(asked).T).toarray()
    found = nearest_texts(known, asked)
    assert similar[found, np.arange(30)] == pytest.approx(similar.max(axis=0), abs=1e-6)


def test_a_known_source_recalls_its_own_earliest_target():
    train = [
        {"source": "open", "target": "ouvrir"},
        {"source": "Open", "target": "Ouvrir"},
        {"source": "Open", "target": "Ouvert"},
    ]
    found = baselines(train, [{"source": "Open", "target": "?"}, {"source": "opens", "target": "?"}])
    assert found["nearest source (translation memory)"] == said(["Ouvrir", "ouvrir"])
    assert found["copy source"] == said(["Open", "opens"])


def test_baselines_survive_texts_without_anything_in_common():
    blank = [{"source": "", "target": "x"}]
    assert baselines(blank, [{"source": "abc", "target": "y"}])["nearest source (translation memory)"] == said(["x"])
    train = [{"source": "abc", "target": "x"}, {"source": "def", "target": "z"}]
    assert baselines(train, [{"source": "中文", "target": "y"}])["nearest source (translation memory)"] == said(["x"])
    assert list(baselines([], blank)) == ["copy source"]

"""Tags and entities: equal to nervaluate and scikit-learn, on schemes kept and broken."""

import nervaluate
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from formary.evaluate.tags import baselines, details, entities, is_scheme, metrics
from formary.recipe.schema import Evaluate

QUICK = Evaluate(bootstrap=100)
BIO = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
SENTENCES = st.lists(st.lists(st.tuples(BIO, BIO), min_size=1, max_size=12), min_size=1, max_size=8)


def measured(gold, said, **others):
    rows = [{"tokens": [f"w{n}" for n in range(len(tags))], "tags": tags} for tags in gold]
    answers = {"model": [{"tags": tags} for tags in said]}
    answers |= {name: [{"tags": tags} for tags in given] for name, given in others.items()}
    return {entry["metric"]: entry for entry in metrics(rows, answers, settings=QUICK, where="test")}


@settings(max_examples=60, deadline=None)
@given(SENTENCES)
def test_entity_scores_equal_nervaluates_strict_also_where_the_scheme_is_broken(pairs):
    gold = [[a for a, _ in sentence] for sentence in pairs]
    said = [[b for _, b in sentence] for sentence in pairs]
    assume(is_scheme(gold))
    strict = nervaluate.Evaluator(gold, said, tags=["PER", "LOC"], loader="list").evaluate()["overall"]["strict"]
    found = measured(gold, said)
    for ours, theirs in (("entity_f1", "f1"), ("entity_precision", "precision"), ("entity_recall", "recall")):
        assert found[ours]["model"]["value"] == pytest.approx(getattr(strict, theirs), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(SENTENCES)
def test_word_scores_equal_scikit_learns(pairs):
    gold, said = [[a for a, _ in s] for s in pairs], [[b for _, b in s] for s in pairs]
    flat, answered = [a for tags in gold for a in tags], [b for tags in said for b in tags]
    found = measured(gold, said)
    assert found["tag_accuracy"]["model"]["value"] == pytest.approx(accuracy_score(flat, answered))
    macro = f1_score(flat, answered, average="macro", zero_division=0)
    assert found["tag_macro_f1"]["model"]["value"] == pytest.approx(macro)
    whole = np.mean([a == b for a, b in zip(gold, said)])
    assert found["sentence_accuracy"]["model"]["value"] == pytest.approx(whole)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O B-A", [(0, 2, "A"), (3, 4, "A")]),
        ("I-A I-A O", [(0, 2, "A")]),
        ("B-A I-B", [(0, 1, "A"), (1, 2, "B")]),
        ("B-A B-A", [(0, 1, "A"), (1, 2, "A")]),
        ("B-A I-A E-A S-B O", [(0, 3, "A"), (3, 4, "B")]),
        ("B-A L-A U-B", [(0, 2, "A"), (2, 3, "B")]),
        ("B-A E-A I-A", [(0, 2, "A"), (2, 3, "A")]),
        ("B-A X I-A", [(0, 1, "A"), (2, 3, "A")]),
        ("O O", []),
    ],
)
def test_entities_in_every_scheme(tags, expected):
    assert entities(tags.split()) == expected


def test_plain_tags_have_accuracy_first_and_no_entities():
    found = measured([["nn", "vb"]], [["nn", "nn"]])
    assert next(iter(found)) == "tag_accuracy" and not any(name.startswith("entity") for name in found)
    assert next(iter(measured([["B-A", "O"]], [["O", "O"]]))) == "entity_f1"


def test_baselines_tag_by_the_word_and_by_the_names_seen():
    training = [
        {"tokens": ["Ann", "Lee", "met", "Bob"], "tags": ["B-PER", "I-PER", "O", "B-PER"]},
        {"tokens": ["Bob", "ran"], "tags": ["B-PER", "O"]},
    ]
    rows = [{"tokens": ["Ann", "Lee", "saw", "Ann"], "tags": ["O"] * 4}]
    made = baselines(training, rows)
    assert made["most frequent tag"][0]["tags"] == ["B-PER", "I-PER", "B-PER", "B-PER"]
    assert made["dictionary"][0]["tags"] == ["B-PER", "I-PER", "O", "O"]


def test_details_name_confusions_and_the_worst_sentences():
    rows = [{"tokens": ["Ann", "ran"], "tags": ["B-PER", "O"]}, {"tokens": ["Bob"], "tags": ["B-PER"]}]
    found = details(rows, [{"tags": ["O", "O"]}, {"tags": ["B-PER"]}])
    assert found["confusions"] == [{"true": "B-PER", "said": "O", "words": 1, "example": "Ann"}]
    assert found["worst"] == [{"row": 1, "errors": 1, "sentence": "Ann[B-PER → O] ran"}]
    assert found["entities"] == [{"type": "PER", "precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2}]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ("S-P B-P E-P", "S-P B-P E-P"),
        ("U-P B-P L-P", "U-P B-P L-P"),
        ("I-P B-P I-P", "I-P B-P I-P"),  # IOB1
    ],
)
def test_the_dictionary_spells_entities_in_the_scheme_of_the_training_rows(seen, expected):
    words = ["Ann", "Bo", "Li"]
    made = baselines([{"tokens": words, "tags": seen.split()}], [{"tokens": words, "tags": seen.split()}])
    assert made["dictionary"][0]["tags"] == expected.split()


def test_details_show_types_that_are_said_but_never_true():
    found = details([{"tokens": ["Ann"], "tags": ["B-PER"]}], [{"tags": ["B-LOC"]}])
    assert {"type": "LOC", "precision": 0.0, "recall": None, "f1": 0.0, "support": 0} in found["entities"]


def test_scores_by_type_and_tag_equal_scikit_learns():
    gold, said = [["a", "b", "b", "c"], ["a", "a"]], [["a", "b", "c", "c"], ["b", "a"]]
    rows = [{"tokens": list("wxyz")[: len(tags)], "tags": tags} for tags in gold]
    flat, answered = [a for tags in gold for a in tags], [b for tags in said for b in tags]
    expected = precision_recall_fscore_support(flat, answered, labels=["a", "b", "c"])
    found = {one["tag"]: one for one in details(rows, [{"tags": tags} for tags in said])["tags"]}
    for place, tag in enumerate("abc"):
        row = [found[tag][name] for name in ("precision", "recall", "f1", "support")]
        assert row == pytest.approx([column[place] for column in expected])


def test_the_interval_of_macro_f1_holds_its_value_where_many_tags_are_rare():
    gold = [["common", "common", f"rare{number}"] for number in range(30)]
    said = [["common", "common", "common"] for _ in range(30)]  # every rare tag is missed
    model = measured(gold, said)["tag_macro_f1"]["model"]
    assert model["low"] <= model["value"] <= model["high"] < 0.1

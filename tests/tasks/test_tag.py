"""Tagging: words and tokens stay aligned in every tokenizer, long sentences keep every tag, and sequences stay legal."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formary.data.tokenizer import train as train_tokenizer
from formary.errors import DataError
from formary.model.topologies import build
from formary.recipe.reading import parse
from formary.recipe.schema import Tokenizer as TokenizerSettings
from formary.tasks import crf
from formary.tasks.reading import owned, windows
from formary.tasks.tag import Tag

ROWS = [
    {"tokens": ["Ann", "Lee", "likes", "Rome"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]},
    {"tokens": ["Rome", "likes", "Ann"], "tags": ["B-LOC", "O", "B-PER"]},
    {"tokens": ["likes"], "tags": ["O"]},
    {"tokens": ["Ann", "likes", "New", "York"], "tags": ["B-PER", "O", "B-LOC", "I-LOC"]},
]
CHINESE = [
    {"tokens": list("我爱北京"), "tags": ["O", "O", "B-LOC", "I-LOC"]},
    {"tokens": list("北京爱我"), "tags": ["B-LOC", "I-LOC", "O", "O"]},
]
KINDS = {"characters": 8, "bytes": 8, "bpe": 262, "wordpiece": 40, "unigram": 21}


def made(rows, *, preset="bert-mini", context=32, kind="characters", start=None, **objective):
    recipe = parse(
        f"""
        name: t
        task: tag
        data: {{sources: [x]}}
        model: {{preset: {preset}, size: 1x32}}
        train: {{batch: 4, context: {context}, objective: {objective or "{}"}}}
        """
    )
    texts = [" ".join(map(str, row["tokens"])) for row in rows if isinstance(row.get("tokens"), list)] * 20
    settings = TokenizerSettings(kind=kind, vocab_size=KINDS[kind])
    return Tag.learn(recipe, train_tokenizer(texts, settings, task=Tag.special_tokens(recipe)), rows, start=start)


def tags(answers):
    return [answer["tags"] for answer in answers]


@pytest.mark.parametrize("preset", ["bert-mini", "gpt-mini"])
@pytest.mark.parametrize("transitions", ["repair", "crf", "none"])
def test_encoders_and_decoders_learn_tags(learned, preset, transitions):
    rows = ROWS[1:] if preset == "gpt-mini" else ROWS  # "New" is known only by what follows
    task = made(rows, preset=preset, transitions=transitions)
    answers = task.predict(learned(task, rows, steps=100), rows)
    assert tags(answers) == [row["tags"] for row in rows]
    assert all(0 < share <= 1 for answer in answers for share in answer["probabilities"])


@pytest.mark.parametrize("rows", [ROWS, CHINESE], ids=["english", "chinese"])
@pytest.mark.parametrize("kind", KINDS)
def test_words_become_the_tokens_of_running_text_in_every_tokenizer(kind, rows):
    if kind in ("bpe", "unigram", "wordpiece") and rows is CHINESE:
        kind = "characters"
    task = made(rows, kind=kind)
    spaced = task.tokenizer.backend.encode(
        "".join(rows[0]["tokens"]) if rows is CHINESE else " ".join(rows[0]["tokens"])
    )
    (example, *_) = task.examples(rows, targets=True)
    assert example.inputs.tolist() == spaced.ids
    names = [task.tokenizer.backend.id_to_token(int(example.inputs[place])) for place in example.memory]
    assert len(names) == len(rows[0]["tokens"])
    if kind == "characters":
        assert names == [word[0] for word in rows[0]["tokens"]]
    assert example.target.tolist() == [task.numbers[tag] for tag in rows[0]["tags"]]


def test_a_decoder_reads_a_word_from_its_last_token():
    task = made(ROWS, preset="gpt-mini")
    (example, *_) = task.examples(ROWS, targets=True)
    names = [task.tokenizer.backend.id_to_token(int(example.inputs[place])) for place in example.memory]
    assert names == ["n", "e", "s", "e"]


@pytest.mark.parametrize("preset", ["bert-mini", "gpt-mini"])
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(preset):
    task = made(ROWS, preset=preset)
    network = build(task.model_config(), seed=1).eval()
    for row, answer in zip(ROWS, task.predict(network, ROWS)):
        (alone,) = task.predict(network, [row])
        assert alone["tags"] == answer["tags"]
        assert alone["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)


def test_every_word_of_a_long_sentence_gets_its_tag_once(learned):
    rows = [{"tokens": ROWS[0]["tokens"] * 9, "tags": ROWS[0]["tags"] * 9}, ROWS[1]]
    task = made(rows, context=24)
    examples = task.examples(rows, targets=True)
    assert len(examples) > 5 and max(len(example.inputs) for example in examples) <= 24
    targets = np.concatenate([example.target for example in examples if example.row == 0])
    assert [task.labels[number] for number in targets] == rows[0]["tags"]
    assert "1 sentence was longer than the context of 24 tokens and read in overlapping windows" in task.notes()
    assert tags(task.predict(learned(task, rows, steps=100), rows)) == [row["tags"] for row in rows]


def test_a_word_longer_than_the_context_and_a_word_of_nothing_have_tags():
    rows = [{"tokens": ["Ann", "x" * 99, "", "\u200b", "Rome"], "tags": ["B-PER", "O", "O", "O", "B-LOC"]}]
    for kind in ("characters", "wordpiece"):
        task = made([*rows, *ROWS], context=16, kind=kind)
        (answer,) = task.predict(build(task.model_config(), seed=0), rows)
        assert len(answer["tags"]) == 5


def test_a_text_is_split_into_words_and_chinese_characters():
    task = made([*ROWS, *CHINESE])
    network = build(task.model_config(), seed=0)
    given, empty = task.predict(network, [{"tokens": "Ann likes  北京"}, {"tokens": ""}])
    assert given["tokens"] == ["Ann", "likes", "北", "京"] and len(given["tags"]) == 4
    assert empty["tags"] == []


def test_repair_leaves_no_illegal_sequence_and_none_may():
    repaired, free = made(ROWS), made(ROWS, transitions="none")
    illegal = 0
    for seed in range(20):
        network = build(repaired.model_config(), seed=seed)
        for answer in repaired.predict(network, ROWS):
            assert crf.is_legal(answer["tags"], repaired.labels)
        illegal += sum(not crf.is_legal(answer["tags"], free.labels) for answer in free.predict(network, ROWS))
    assert illegal > 0


def test_tags_that_are_no_scheme_and_data_of_another_scheme_are_not_repaired():
    parts_of_speech = [{"tokens": ["a", "b"], "tags": ["DT", "NN"]}]
    assert not made(parts_of_speech).rules.step.any()
    other = [*ROWS, {"tokens": ["Lee", "likes"], "tags": ["I-PER", "O"]}]
    task = made(other)
    assert not task.rules.step.any() and "1 training row breaks the scheme" in task.notes()[0]


@pytest.mark.parametrize("transitions", ["repair", "crf", "none"])
def test_a_finished_model_answers_as_it_did_while_it_learned(learned, transitions):
    task = made(ROWS, transitions=transitions)
    network = learned(task, ROWS, steps=30)
    before = task.predict(network, ROWS)
    task.finish(network)
    assert not any("transitions" in name for name, _ in network.named_parameters())
    fresh = Tag.of_model(network.config, task.tokenizer, task.settings())
    assert fresh.predict(network, ROWS) == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "field 'tokens' holds str 'a b'"),
        ({"tokens": ["a"], "tags": "O"}, "field 'tags' holds str 'O'"),
        ({"tokens": [], "tags": []}, "field 'tokens' is empty"),
        ({"tokens": [1], "tags": ["O"]}, r"holds list \[1\]"),
        ({"tags": ["O"]}, "field 'tokens' is missing"),
        ({"tokens": ["a"]}, "field 'tags' is missing"),
    ],
)
def test_a_row_that_is_not_as_it_must_be_is_named(row, message):
    with pytest.raises(DataError, match="training row 2: .*" + message):
        made([ROWS[0], row])
    with pytest.raises(DataError, match=r"row 1 \(id q7\): .*" + message):
        made(ROWS).examples([{"id": "q7", **row}], targets=True)


def test_tags_unseen_in_training_are_counted_and_teach_nothing():
    task = made(ROWS, transitions="crf")
    rows = [{"tokens": ["Ann", "likes"], "tags": ["B-PER", "VERB"]}]
    network = build(task.model_config(), seed=0)
    task.prepare(network)
    loss, count = task.loss(network, task.collate(task.examples(rows, targets=True)))
    assert int(count) == 1 and torch.isfinite(loss)
    assert task.notes() == ["tags that no training row has count as errors: 'VERB' (1)"]


# The linear chain -------------------------------------------------------------------------------------------------------


def all_scores(emissions, transitions):
    found = {}
    for path in itertools.product(range(emissions.shape[1]), repeat=len(emissions)):
        score = transitions.first[path[0]] + transitions.last[path[-1]]
        score += sum(emissions[place, label] for place, label in enumerate(path))
        found[path] = score + sum(transitions.step[a, b] for a, b in itertools.pairwise(path))
    return found


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_best_path_and_loss_equal_brute_force(length, labels, seed):
    rng = np.random.default_rng(seed)
    emissions = rng.normal(size=(length, labels)) * 2
    flat = rng.normal(size=labels * (labels + 2)) * 2
    transitions = crf.Transitions.of_flat(flat, labels)
    assert np.array_equal(transitions.flat(), flat)
    scores = all_scores(emissions, transitions)
    best = crf.best_path(emissions, transitions)
    assert scores[tuple(best)] == pytest.approx(max(scores.values()))
    target = rng.integers(labels, size=length)
    target[rng.random(length) < 0.2] = -100
    fits = [value for path, value in scores.items() if all(t in (-100, p) for t, p in zip(target, path))]
    expected = np.logaddexp.reduce(list(scores.values())) - np.logaddexp.reduce(fits)
    padded = torch.full((1, length + 2, labels), 9.0, dtype=torch.float64)
    padded[0, :length] = torch.from_numpy(emissions)
    targets = torch.zeros(1, length + 2, dtype=torch.long)
    targets[0, :length] = torch.from_numpy(target)
    mask = torch.arange(length + 2)[None] < length
    assert float(crf.crf_loss(padded, targets, mask, torch.from_numpy(flat))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("tags", "legal"),
    [
        ("O B-A I-A O", True),
        ("I-A", False),
        ("B-A I-B", False),
        ("B-A B-A", True),
        ("O I-A", False),
        ("B-A I-A I-A", True),
    ],
)
def test_bio(tags, legal):
    assert crf.is_legal(tags.split(), ["O", "B-A", "I-A", "B-B", "I-B"]) is legal


@pytest.mark.parametrize(
    ("tags", "legal"),
    [
        ("S-A O", True),
        ("B-A E-A", True),
        ("B-A I-A E-A S-A", True),
        ("B-A O", False),
        ("B-A", False),
        ("E-A", False),
        ("B-A S-A", False),
    ],
)
def test_bioes(tags, legal):
    assert crf.is_legal(tags.split(), ["O", "B-A", "I-A", "E-A", "S-A"]) is legal


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (["O", "B-A", "I-A"], True),
        (["O", "U-A", "B-A", "L-A"], True),
        (["O", "I-A"], False),
        (["NN", "O"], False),
        (["O"], False),
        (["BI-A", "O", "B-B"], False),
        (["B-A-B", "I-A-B"], True),
    ],
)
def test_a_scheme_is_recognised(labels, scheme):
    assert crf.is_scheme(labels) is scheme


# Windows ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 20), st.data())
def test_windows_fit_and_each_unit_belongs_to_exactly_one(sizes, room, data):
    shared = data.draw(st.integers(0, room))
    stretches = windows(sizes, room=room, shared=shared)
    assert all(sum(min(size, room) for size in sizes[start:stop]) <= room for start, stop in stretches)
    for before, after in itertools.pairwise(stretches):
        assert before[0] < after[0] <= before[1] < after[1]
        assert sum(min(size, room) for size in sizes[after[0] : before[1]]) <= shared
    own = owned(stretches)
    assert [number for part in own for number in range(*part)] == list(range(len(sizes)))
    assert all(start <= begin <= end <= stop for (start, stop), (begin, end) in zip(stretches, own))

"""Guessing a recipe: each rule on data made for it, and that the guesses hold."""

import random

import pytest

from formary.data.tokenizer import train
from formary.errors import DataError, RecipeError
from formary.model.topologies import build, parameter_count
from formary.recipe.guess import guess
from formary.recipe.guess_rows import guess_rows
from formary.recipe.presets import preset
from formary.recipe.reading import parse
from formary.recipe.sample import Sample

SENTENCE = "The miller's daughter walked to the river, and the water ran over the stones. "


def recipe_for(rows, *, kind="text", files=1, share=1.0, task=None, **options):
    fields = {name: options.pop(name) for name in ("validation", "test") if name in options}
    if isinstance(rows, str):
        rows = [{"text": rows}]
    sample = Sample(sources=("data",), kind=kind, files=files, rows=rows, share=share, **fields)
    found = guess(sample, name="guessed", task=task, **options)
    return parse(found.recipe), found


def prose(characters, seed=0):
    """English-looking text of made-up words, a few of them frequent."""
    rng = random.Random(seed)
    syllables = [
        "ba",
        "con",
        "der",
        "el",
        "fo",
        "gri",
        "hal",
        "is",
        "jo",
        "kar",
        "lum",
        "mer",
        "no",
        "pel",
        "ris",
        "ten",
    ]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(1500)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    text, size = [], 0
    while size < characters:
        sentence = " ".join(rng.choices(words, weights, k=12)).capitalize() + "."
        text.append(sentence)
        size += len(sentence) + 1
    return "\n".join(text)


# Documents


def test_chapters_are_documents():
    text = "\n".join(f"Chapter {number}\n\n{SENTENCE * 20}" for number in range(1, 41))
    recipe, found = recipe_for(text)
    assert "[Cc][Hh][Aa]" in recipe.data.documents and "about 40" in found.recipe


def test_chinese_chapters_are_documents():
    text = "\n".join(
        f"第{number}回桃园结义\n{'话说天下大势，分久必合，合久必分。' * 30}" for number in "一二三四五六七八九十" * 3
    )
    assert recipe_for(text)[0].data.documents.startswith("第[")


def test_chinese_texts_between_blank_lines_are_documents():
    text = "\n\n".join(f"春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少{number}。" for number in range(200))
    recipe, _ = recipe_for(text)
    assert recipe.data.documents == "paragraph" and recipe.data.split.by == "hash"


def test_lines_that_end_as_sentences_do_are_documents():
    assert (
        recipe_for("\n".join(f"{SENTENCE.strip()[:-1]} {number}." for number in range(300)))[0].data.documents == "line"
    )


def test_running_text_is_one_document_cut_in_its_own_order():
    text = "\n\n".join("\n".join([SENTENCE[:60], SENTENCE[60:]] * 4) for _ in range(200))
    recipe, _ = recipe_for(text)
    assert recipe.data.documents == "file" and recipe.data.split.by == "order"


def test_many_files_are_a_document_each():
    recipe, _ = recipe_for([{"text": SENTENCE * 5}] * 8, files=400, share=0.02)
    assert recipe.data.documents == "file" and recipe.data.split.by == "hash"


# Columns


def test_a_column_called_text_is_preferred_to_a_longer_one():
    rows = [{"text": f"short words {i}", "notes": f"{SENTENCE} {i}"} for i in range(100)]
    assert recipe_for(rows, kind="jsonl")[0].data.columns == {}


def test_a_usual_name_is_preferred_and_others_are_named():
    rows = [{"review": f"good words {i}", "notes": f"{SENTENCE} {i}"} for i in range(100)]
    recipe, found = recipe_for(rows, kind="jsonl")
    assert recipe.data.columns == {"text": "review"} and "notes would do too" in found.recipe


@pytest.mark.parametrize(
    "values",
    [
        ["yes and no", "no and yes"],  # two values: a label
        [f"2021-01-{day:02} 10:00:00" for day in range(1, 29)],
        [f"{number}" for number in range(50)],
        [["a", "list"]],
    ],
)
def test_labels_dates_numbers_and_lists_are_no_text(values):
    rows = [{"value": values[i % len(values)]} for i in range(100)]
    with pytest.raises(DataError, match=r"no column holds text \(columns: value\)"):
        recipe_for(rows, kind="csv")


# Tokenizer


@pytest.mark.parametrize(
    ("task", "characters"),
    [(task, size) for task in ("causal_lm", "masked_lm", "denoise") for size in (150_000, 700_000)]
    + [("causal_lm", 70_000), ("denoise", 70_000)],
)
def test_the_guessed_vocabulary_is_reached_when_a_fifth_of_the_text_is_held_back(task, characters):
    text = prose(characters)
    recipe, _ = recipe_for(text, task=task)
    kept = text[: int(len(text) * 0.8)].split("\n")
    tokenizer = train(kept, recipe.data.tokenizer, task=task)
    assert recipe.data.tokenizer.kind in ("bpe", "wordpiece")
    assert tokenizer.vocab_size == recipe.data.tokenizer.vocab_size


def test_text_that_repeats_itself_gets_no_vocabulary_to_train():
    recipe, _ = recipe_for("the same line again\n" * 5000)
    assert recipe.data.tokenizer.kind == "characters"


def test_chinese_is_read_by_characters_and_a_little_english_as_well():
    assert recipe_for("话说天下大势，分久必合。\n" * 500)[0].data.tokenizer.kind == "characters"
    assert recipe_for(prose(5000))[0].data.tokenizer.kind == "characters"


def test_more_text_gets_a_larger_vocabulary_and_model():
    text = prose(300_000)
    small, _ = recipe_for(text)
    large, _ = recipe_for(text, share=0.005, gflops=1e6)
    assert large.data.tokenizer.vocab_size >= small.data.tokenizer.vocab_size
    assert (small.model.size, large.model.size) == ("4x128", "6x384")


def test_chinese_words_come_from_jieba_when_it_is_there():
    text = "话说天下大势，分久必合。\n" * 500
    with_jieba, _ = recipe_for(text, task="masked_lm")
    without, found = recipe_for(text, task="masked_lm", chinese_words=False)
    assert with_jieba.data.words == "jieba" and with_jieba.train.objective.whole_words
    assert without.data.words == "none" and not without.train.objective.whole_words
    assert "formary[zh]" in found.recipe


# Split, sizes, time


@pytest.mark.parametrize("count", [3, 4, 5, 7, 9, 15, 60])
def test_with_few_documents_every_part_gets_one(count):
    from formary.data.split import cuts

    recipe, _ = recipe_for([{"text": f"{SENTENCE * 5} {i}"} for i in range(count)], kind="jsonl")
    split = recipe.data.split
    first, second = cuts(count, split)
    assert split.by == "order" and 0 < first < second < count


def test_parts_with_files_of_their_own_get_no_share():
    rows = [{"text": f"{SENTENCE} {i}"} for i in range(300)]
    _, found = recipe_for(rows, kind="jsonl", validation=("v.jsonl",), test=("t.jsonl",))
    assert "split:" not in found.recipe


@pytest.mark.parametrize(
    ("task", "topology"), [("causal_lm", "decoder"), ("masked_lm", "encoder"), ("denoise", "encoder_decoder")]
)
def test_the_expected_parameters_are_those_of_the_model(task, topology):
    text = prose(400_000)
    recipe, found = recipe_for(text, task=task)
    config = preset(
        recipe.model.preset,
        vocab_size=recipe.data.tokenizer.vocab_size,
        context=recipe.train.context,
        size=recipe.model.size,
        topology=topology,
    )
    assert found.parameters == pytest.approx(parameter_count(build(config, empty=True)), rel=0.03)


def test_the_context_leaves_several_sequences_of_a_little_text():
    recipe, _ = recipe_for(prose(3000))
    assert recipe.train.context * 20 < 3000


def test_a_slow_machine_gets_fewer_steps_not_a_longer_run():
    text = prose(700_000)
    fast, quick = recipe_for(text, gflops=1000.0)
    slow, long = recipe_for(text, gflops=5.0)
    assert slow.train.steps < fast.train.steps
    assert quick.seconds < 600 and "hours) would make more" in long.recipe


def test_the_time_is_half_on_a_machine_twice_as_fast():
    text = prose(100_000)
    assert recipe_for(text, gflops=100.0)[1].seconds == pytest.approx(2 * recipe_for(text, gflops=200.0)[1].seconds)


# What is written


def test_addresses_in_the_text_are_masked():
    rows = [{"text": f"{SENTENCE} write to miller{i}@example.org"} for i in range(300)]
    assert recipe_for(rows, kind="jsonl")[0].data.clean.pii == "mask"
    assert recipe_for([{"text": f"{SENTENCE} {i}"} for i in range(300)], kind="jsonl")[0].data.clean.pii == "keep"


@pytest.mark.parametrize(("task", "mark"), [("masked_lm", "[MASK]"), ("denoise", "<extra_id_0>")])
def test_prompts_have_the_gap_their_task_fills(task, mark):
    prompts = recipe_for(prose(20_000), task=task)[0].generate.prompts
    assert prompts and all(prompt.count(mark) == 1 for prompt in prompts)


def test_odd_characters_in_prompts_and_names_survive():
    line = 'He said "yes: no" # then 😀\u00a0\\ went \u200bhome again and again.'
    recipe, _ = recipe_for([{"te'xt: #1": f"{line} {i} {SENTENCE}"} for i in range(300)], kind="jsonl")
    assert recipe.data.columns == {"text": "te'xt: #1"}
    assert recipe.generate.prompts[0].startswith('He said "yes: no" # then')


def test_an_unknown_task_names_the_known():
    with pytest.raises(RecipeError, match="causal_lm, masked_lm, denoise"):
        recipe_for(prose(5000), task="paint")


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match="about 5 characters"):
        recipe_for("hello")


def rows_recipe(rows):
    sample = Sample(sources=("data.jsonl",), kind="jsonl", files=1, rows=rows, share=1.0)
    found = guess_rows(sample, name="guessed")
    return parse(found.recipe), found


@pytest.mark.parametrize(("question", "answer"), [("input", "answer"), ("input", "scores"), ("question", "answer")])
def test_questions_with_choices_are_multiple_choice(question, answer):
    value = [0, 1] if answer == "scores" else "b"
    rows = [
        {"category": "x", question: f"which letter is number {n}?", "choices": ["a", "b"], answer: value}
        for n in range(40)
    ]
    recipe, _ = rows_recipe(rows)
    assert recipe.task == "multiple_choice"
    named = {"question": question, "answer": answer}
    assert recipe.data.columns == {ours: theirs for ours, theirs in named.items() if ours != theirs}


def test_rows_without_choices_among_questions_are_said_to_be_left_out():
    rows = [{"input": f"which letter is number {n}?", "choices": ["a", "b"], "scores": [0, 1]} for n in range(30)]
    rows += [{"input": f"write {n}", "target": "it"} for n in range(10)]
    recipe, found = rows_recipe(rows)
    assert recipe.task == "multiple_choice" and "25% lack them and are left out" in found.recipe


# Events


def test_events_of_users_become_a_recipe_that_recommends():
    rng = random.Random(0)
    rows = [
        {"customer_id": str(n % 40), "sku": f"s{rng.randrange(60)}", "amount": "3", "timestamp": str(n)}
        for n in range(1200)
    ]
    sample = Sample(sources=("shop.csv",), kind="csv", files=1, rows=rows, share=0.5)
    found = guess_rows(sample, name="shop")
    recipe = parse(found.recipe)
    assert recipe.task == found.task == "next_item"
    assert recipe.data.columns == {"user": "customer_id", "item": "sku", "time": "timestamp"}
    assert recipe.model.preset == "sasrec-mini" and recipe.train.context == 60
    assert recipe.train.objective.exclude_seen is False  # many things are bought again
    assert "40 users and 60 items" in found.saw[-1]


def test_rows_with_times_that_are_no_events_are_left_to_other_rules():
    once = [{"user": str(n), "item": "a", "time": str(n)} for n in range(100)]
    reviews = [
        {"user": str(n % 9), "item": str(n % 7), "time": str(n), "text": f"it was {n} good", "rating": str(n % 2)}
        for n in range(100)
    ]
    for rows, task in ((once, None), (reviews, "classify")):
        found = guess_rows(Sample(sources=("x",), kind="csv", files=1, rows=rows, share=1.0), name="x")
        assert (found.task if found else None) == task
    found = guess_rows(Sample(sources=("x",), kind="csv", files=1, rows=reviews, share=1.0), name="x", task="next_item")
    assert found.task == "next_item"

"""`formary init`: what it looks at, what it writes, and that it overwrites nothing."""

import gzip
import itertools
import json

import pytest
from typer.testing import CliRunner

from formary.cli import init as module
from formary.cli.init import take_sample
from formary.cli.main import app
from formary.data.documents import read_documents, write_documents
from formary.data.tokenizer import train
from formary.recipe import read

ENGLISH = "The miller's daughter walked to the river. It was morning, and the water ran over the stones.\n"
CHINESE = "却说曹操领兵来到河边，见水势甚急，不敢轻渡。\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_speed", lambda: 100.0)
    return tmp_path


def formary(*arguments):
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def rows_of(count):
    return [
        {"id": i, "body": f"Row {i} tells of river number {i * 7} and hill {i}.", "label": i % 2} for i in range(count)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_a_recipe_is_written_that_formary_reads_and_the_next_command_is_shown(here):
    (here / "tale.txt").write_text(ENGLISH * 50)
    result = formary("tale.txt")
    assert result.exit_code == 0 and "formary run recipe.yaml" in result.output
    recipe = read(here / "recipe.yaml")
    assert recipe.name == "tale" and recipe.data.sources == ["tale.txt"]


def test_every_value_has_its_reason_beside_or_above_it(here):
    (here / "tale.txt").write_text(ENGLISH * 50)
    formary("tale.txt")
    lines = (here / "recipe.yaml").read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        value = "" if line.startswith("#") else line.partition(": ")[2]
        assert not value or "  # " in line or above.lstrip().startswith("#"), line


def test_an_existing_recipe_is_kept_unless_forced(here):
    (here / "tale.txt").write_text(ENGLISH * 50)
    (here / "recipe.yaml").write_text("mine")
    result = formary("tale.txt")
    assert result.exit_code == 2 and "--force" in result.stderr
    assert (here / "recipe.yaml").read_text() == "mine"
    assert formary("tale.txt", "--force").exit_code == 0
    assert read(here / "recipe.yaml").name == "tale"


def test_paths_count_from_the_recipes_folder(here):
    (here / "tale.txt").write_text(ENGLISH * 50)
    assert formary("tale.txt", "--out", "recipes/mine.yaml").exit_code == 0
    assert read(here / "recipes" / "mine.yaml").data.sources == ["../tale.txt"]


def test_an_absolute_path_stays_absolute(here):
    (here / "tale.txt").write_text(ENGLISH * 50)
    formary(here / "tale.txt")
    assert read(here / "recipe.yaml").data.sources == [str(here / "tale.txt")]


def test_a_name_without_latin_letters_becomes_a_plain_one(here):
    (here / "三国.txt").write_text(CHINESE * 50, encoding="utf-8")
    assert formary("三国.txt").exit_code == 0
    assert read(here / "recipe.yaml").name == "my-data"


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "denoise"])
@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_what_is_guessed_prepares_and_its_tokenizer_trains(here, task, text):
    # Numbered sentences: enough different words that a vocabulary is asked for, which training then has to reach.
    words = [f"{first}{second}" for first in ("bel", "tor", "mis", "gan") for second in ("ra", "lo", "ne", "ti", "su")]
    pieces = [f"{words[i % 20]} {words[i * 7 % 20]} {i % 90}. {text}" for i in range(900)]
    (here / "tale.txt").write_text("".join(pieces), encoding="utf-8")
    assert formary("tale.txt", "--task", task).exit_code == 0
    recipe = read(here / "recipe.yaml")
    story = write_documents(recipe.data, here / "documents", base=here)
    assert all(story["splits"][split]["rows"] for split in ("train", "validation", "test"))
    documents = [row.values["text"] for row in read_documents(here / "documents" / "train.jsonl")]
    tokenizer = train(documents, recipe.data.tokenizer, task=task)
    assert sum(len(tokenizer.encode(text)) for text in documents) > recipe.train.context


def test_an_unknown_task_is_refused_with_the_nearest(here):
    (here / "tale.txt").write_text(ENGLISH * 50)
    result = formary("tale.txt", "--task", "causal_ml")
    assert result.exit_code == 2 and "did you mean 'causal_lm'?" in result.stderr
    assert not (here / "recipe.yaml").exists()


def test_a_table_maps_its_text_column(here):
    write_rows(here / "rows.jsonl", rows_of(300))
    result = formary("rows.jsonl")
    assert read(here / "recipe.yaml").data.columns == {"text": "body"}
    assert "label (0, 1)" in result.output


def test_files_named_for_it_become_validation_and_test(here):
    for part, count in {"train": 300, "valid": 50, "test": 40}.items():
        write_rows(here / f"rows_{part}.jsonl", rows_of(count))
    formary("rows_train.jsonl")
    data = read(here / "recipe.yaml").data
    assert (data.sources, data.validation, data.test) == (
        ["rows_train.jsonl"],
        ["rows_valid.jsonl"],
        ["rows_test.jsonl"],
    )
    assert read(here / "recipe.yaml").name == "rows"


def test_a_test_file_by_itself_is_data_like_any_other(here):
    write_rows(here / "rows_test.jsonl", rows_of(300))
    formary("rows_test.jsonl")
    data = read(here / "recipe.yaml").data
    assert data.sources == ["rows_test.jsonl"] and data.test == []


@pytest.mark.parametrize(
    ("encoding", "text"), [("gb18030", CHINESE), ("cp1252", "Il était une forêt.\n"), ("utf-16", ENGLISH)]
)
def test_another_encoding_is_found(here, encoding, text):
    (here / "old.txt").write_bytes((text * 50).encode(encoding))
    assert formary("old.txt").exit_code == 0
    assert read(here / "recipe.yaml").data.encoding == encoding


def test_only_the_beginning_of_a_large_file_is_read_and_the_whole_is_estimated(here, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_CHARS", 100_000)
    rows = rows_of(60_000)
    write_rows(here / "rows.jsonl", rows)
    sample = take_sample(["rows.jsonl"], relative_to=here)
    assert len(sample.rows) < len(rows) / 2
    assert len(sample.rows) / sample.share == pytest.approx(len(rows), rel=0.1)


def test_a_compressed_file_is_estimated_as_well(here, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_CHARS", 100_000)
    text = "".join(f"Line {i * i} of {i * 31} lines.\n" for i in range(100_000))
    (here / "long.txt.gz").write_bytes(gzip.compress(text.encode()))
    sample = take_sample(["long.txt.gz"], relative_to=here)
    looked = sum(len(row["text"]) for row in sample.rows)
    assert looked <= 100_000 and looked / sample.share == pytest.approx(len(text), rel=0.1)


def test_files_of_several_kinds_are_refused(here):
    (here / "mixed").mkdir()
    (here / "mixed" / "a.txt").write_text(ENGLISH * 50)
    write_rows(here / "mixed" / "b.jsonl", rows_of(20))
    result = formary("mixed")
    assert result.exit_code == 2 and "several kinds (jsonl, text)" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file"),
        ("empty.txt", "", "empty"),
        ("short.txt", "hello", "too few to learn from"),
        ("rows.jsonl", '{"text": "a b"}\n{text}\n', "rows.jsonl line 2"),
        ("rows.csv", "a,b\n1,2\n3,4\n", "no column holds text (columns: a, b)"),
    ],
)
def test_data_that_cannot_be_used_is_refused_and_nothing_written(here, name, content, message):
    if content is not None:
        (here / name).write_text(content)
    result = formary(name)
    assert result.exit_code == 2 and message in result.stderr
    assert not (here / "recipe.yaml").exists()


def test_what_was_seen_comes_as_json(here):
    (here / "tale.txt").write_text(ENGLISH * 50)
    found = json.loads(formary("tale.txt", "--json").stdout)
    assert found["task"] == "causal_lm" and found["parameters"] > 0 and found["saw"]


@pytest.mark.parametrize("words", [2, 40, 900])
def test_the_model_that_preferences_start_from_reads_as_much_as_they_need(here, words):
    rows = [{"prompt": f"What of {i}?", "chosen": "Yes.", "rejected": f"No {i} " * words} for i in range(80)]
    write_rows(here / "pairs.jsonl", rows)
    formary("pairs.jsonl")
    first, second = read(here / "pairs-chat.yaml"), read(here / "recipe.yaml")
    assert first.train.context >= second.train.context


def test_conversations_get_more_room_than_other_rows(here):
    rows = [{"instruction": f"Say {i}: " + ENGLISH * 8, "output": f"It is said, {i}."} for i in range(80)]
    write_rows(here / "talks.jsonl", rows)
    write_rows(
        here / "labels.jsonl", [{"text": row["instruction"], "label": "ab"[i % 2]} for i, row in enumerate(rows)]
    )
    found = []
    for name in ("talks", "labels"):
        formary(f"{name}.jsonl", "--out", f"{name}.yaml")
        found.append(read(here / f"{name}.yaml").train.context)
    assert found[1] <= 384 < found[0] <= 1024


def test_preferences_get_a_first_recipe_that_trains_a_model_to_start_from(here):
    rows = [
        {"prompt": f"What of {i}?", "chosen": f"A long and good answer, {i}.", "rejected": f"Nothing at all {i}"}
        for i in range(80)
    ]
    write_rows(here / "pairs.jsonl", rows)
    result = formary("pairs.jsonl")
    assert result.exit_code == 0 and "pairs-chat.yaml, which is run first" in result.output
    first, second = read(here / "pairs-chat.yaml"), read(here / "recipe.yaml")
    assert (first.task, second.task, second.model.start) == ("chat", "preference", "recipe:pairs-chat.yaml")
    assert first.data.columns == {"response": "chosen"}
    assert first.data.split == second.data.split and first.data.split.group == "prompt"
    assert formary("pairs.jsonl", "--out", "other.yaml").exit_code == 2  # pairs-chat.yaml is there


@pytest.mark.parametrize(
    ("names", "columns"),
    [(("instruction", "output"), {}), (("Prompt", "Response"), {"prompt": "Prompt", "response": "Response"})],
)
def test_instructions_with_answers_are_conversations(here, names, columns):
    write_rows(here / "asked.jsonl", [dict(zip(names, (f"Say it {i}.", f"It is said, {i}."))) for i in range(60)])
    formary("asked.jsonl")
    recipe = read(here / "recipe.yaml")
    assert recipe.task == "chat" and recipe.data.columns == columns


@pytest.mark.parametrize(("titles", "group"), [(30, "title"), (3, "context")])
def test_no_article_or_context_with_questions_is_in_two_splits(here, titles, group):
    rows = [
        {
            "title": f"T{i % titles}",
            "question": f"Which river is number {i}?",
            "context": f"River {i} flows.",
            "answers": {"text": ["River"], "answer_start": [0]},
        }
        for i in range(120)
    ]
    write_rows(here / "questions.jsonl", rows)
    formary("questions.jsonl")
    assert read(here / "recipe.yaml").data.split.group == group


@pytest.mark.parametrize("names", [("文本", "标签"), ("评论", "情感"), ("Content", "Sentiment")])
def test_columns_are_known_in_chinese_and_in_capitals(here, names):
    rows = [dict(zip(names, (f"第{i}本书写得很好，值得一读。", ("好", "差")[i % 2]))) for i in range(60)]
    write_rows(here / "rows.jsonl", rows)
    formary("rows.jsonl")
    recipe = read(here / "recipe.yaml")
    assert recipe.task == "classify" and recipe.data.columns == {"text": names[0], "label": names[1]}

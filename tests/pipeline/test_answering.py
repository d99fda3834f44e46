"""Rows with right answers are read once, errors name them, and a bar is shown only where someone looks."""

import io
import json

import pytest
import yaml
from rich.console import Console

import formary
from formary.data.tokenizer import train as train_tokenizer
from formary.errors import DataError
from formary.infer.loaded import Model
from formary.model.topologies import build
from formary.pipeline import model as pipeline_model
from formary.pipeline.answering import answered
from formary.pipeline.progress import bar
from formary.pipeline.repeat import cross_validate
from formary.recipe.reading import parse
from formary.tasks.classify import Classify
from formary.tasks.reading import Reader
from formary.tasks.translate import Translate
from formary.train.machine import runtime

ROWS = [{"text": "ab" * n, "label": "yn"[n % 2]} for n in range(1, 7)]
PAIRS = [{"source": "ab" * (n % 5 + 1), "target": "ba"} for n in range(150)]


def made(kind, rows, model):
    recipe = parse(
        f"{{name: t, task: {kind.name}, data: {{sources: [x], tokenizer: {{kind: characters}}}}, "
        f"model: {{{model}}}, train: {{batch: 4, context: 8}}}}"
    )
    texts = [text for row in rows for text in row.values()]
    words = train_tokenizer(texts, recipe.data.tokenizer, task=kind.special_tokens(recipe))
    task = kind.learn(recipe, words, rows, start=None)
    network = build(task.model_config(), seed=0)
    return Model(network, words, formary={"task": kind.name, "settings": task.settings()})


@pytest.fixture(scope="module")
def classifier():
    return made(Classify, ROWS, "preset: bert-mini, size: 1x32")


@pytest.fixture(scope="module")
def writer():
    return made(Translate, PAIRS, "preset: seq2seq-mini, size: 1x32")


def terminal(**options):
    return Console(file=io.StringIO(), force_terminal=True, width=100, **options)


def test_rows_with_labels_are_read_once(classifier, monkeypatch):
    read = []
    whole = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, texts, pairs=None: read.extend(texts) or whole(self, texts, pairs))
    given, notes = answered(classifier, [*ROWS, {"text": "ba", "label": "new"}], precision=runtime_precision())
    assert read == [row["text"] for row in ROWS] + ["ba"]
    assert given == classifier.predict([*(row["text"] for row in ROWS), "ba"], precision="float32")
    assert "labels that no training row has count as errors: 'new' (1)" in notes


def runtime_precision():
    return runtime(parse("{name: t, data: {sources: [x]}, machine: {precision: float32}}").machine).autocast


@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_row_without_its_label_is_named(classifier, place):
    rows = [row if number != place else {"text": "a", "label": None} for number, row in enumerate(ROWS)]
    with pytest.raises(DataError, match=rf"^row {place + 1}: field 'label' is empty"):
        answered(classifier, rows, precision=runtime_precision())


def test_a_row_that_cannot_be_answered_in_writing_is_named_by_its_number(writer):
    rows = [*PAIRS[:140], {"source": 5, "target": "ba"}]
    with pytest.raises(DataError, match=r"^row 141: field 'source' holds int"):
        answered(writer, rows, precision=runtime_precision())


def test_written_answers_do_not_depend_on_how_many_rows_come_at_once(writer):
    given, _ = answered(writer, PAIRS, precision=runtime_precision())
    assert given == [writer.predict([row], precision="float32")[0] for row in PAIRS[:5]] * 30


@pytest.mark.parametrize(("kind", "rows", "last"), [("classifier", ROWS, "6/6"), ("writer", PAIRS, "150/150")])
def test_a_bar_counts_the_answers_on_a_terminal(request, kind, rows, last):
    console = terminal()
    answered(request.getfixturevalue(kind), rows, precision=runtime_precision(), console=console)
    assert "answering" in console.file.getvalue() and last in console.file.getvalue()


def test_no_bar_where_nobody_looks():
    for console in (None, Console(file=io.StringIO()), terminal(force_interactive=False)):
        with bar(console, "answering") as progress:
            progress(1, 2)
        assert console is None or console.file.getvalue() == ""


def test_evaluate_shows_no_bar_beside_json(finished, command):
    shown = command("evaluate", finished.model, finished.folder / "text.txt", "--json")
    assert json.loads(shown.stdout)["documents"] == 1 and shown.stderr == ""


def test_the_model_that_preferences_start_from_is_loaded_once_for_both_splits(tmp_path, monkeypatch):
    start = preference_start(tmp_path)
    rows = [{"prompt": f"{n}", "chosen": "a" * (n % 3 + 1), "rejected": "b"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "pairs",
        "task": "preference",
        "data": {"sources": ["rows.jsonl"], "split": {"by": "order", "test": 0.25, "validation": 0.1}},
        "model": {"start": str(start)},
        "train": {"steps": 1, "batch": 4, "context": 32},
        "evaluate": {"bootstrap": 100},
        "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded, load = [], pipeline_model.loaded_start
    monkeypatch.setattr(pipeline_model, "loaded_start", lambda *given: loaded.append(1) or load(*given))
    done = cross_validate(tmp_path / "recipe.yaml", 2, folder=tmp_path / "folds", console=Console(quiet=True))
    assert len(loaded) == 2 * 2  # for each fold: to train, and to evaluate
    assert done.pooled[0]["metric"] == "preference_accuracy"


def preference_start(folder):
    """A random decoder that chats, saved in a folder."""
    from formary.hub.checkpoint import save
    from formary.tasks.chat import Chat

    rows = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "a"}]}]
    recipe = parse(
        "{name: t, task: chat, data: {sources: [x], tokenizer: {kind: bytes}}, "
        "model: {preset: gpt-mini, size: 1x32}, train: {context: 128}}"
    )
    words = train_tokenizer(["ab"], recipe.data.tokenizer, task=Chat.special_tokens(recipe))
    task = Chat.learn(recipe, words, rows, start=None)
    save(folder / "start", build(task.model_config(), seed=0), formary={"task": "chat", "settings": task.settings()})
    words.save(folder / "start")
    assert formary.load(folder / "start").task.name == "chat"
    return folder / "start"

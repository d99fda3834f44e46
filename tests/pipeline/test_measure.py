"""Measuring without a run: benchmarks and rows asked of a causal model, and what is said of rows, once."""

import json
from typing import get_args

import numpy as np
import pytest
from typer.testing import CliRunner

import formary
from formary.cli.main import app
from formary.data.tokenizer import train as train_tokenizer
from formary.errors import DataError, FormaryError
from formary.evaluate import few_shot
from formary.evaluate.benchmark import Benchmark, TextMetric
from formary.hub.checkpoint import save
from formary.infer.loaded import Model
from formary.infer.stepper import Stepper
from formary.model.topologies import build
from formary.pipeline.measure import compare, measure, measure_rows, rows_for
from formary.recipe.presets import preset
from formary.recipe.reading import parse
from formary.recipe.schema import Evaluate
from formary.tasks.chat import Chat
from formary.tasks.classify import Classify
from formary.tasks.registry import LABELLED

QUESTIONS = [{"question": f"q{n}", "choices": ["ab", "ba", "long"][: 2 + n % 2], "answer": n % 2} for n in range(12)]
QUICK = Evaluate(bootstrap=100)


def small(task="causal_lm", kind="bytes"):
    """A tokenizer of bytes, and a random decoder for it."""
    recipe = parse(f"{{name: t, task: causal_lm, data: {{sources: [x], tokenizer: {{kind: {kind}}}}}}}")
    tokenizer = train_tokenizer([""], recipe.data.tokenizer, task="causal_lm")
    config = preset("gpt-mini", vocab_size=tokenizer.vocab_size, context=96, size="1x32")
    return build(config, seed=1).eval(), tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    network, tokenizer = small()
    save(folder, network)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model):
    return formary.load(model)


def rows_file(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("normalise", ["none", "length", "bytes"])
@pytest.mark.parametrize(("prefix", "separator"), [("", "\n\n"), ("Say.\n", "\n")])
def test_the_likeliest_choice_is_taken(loaded, normalise, prefix, separator):
    asked = Benchmark("b", tuple(QUESTIONS[:6]), "choices", normalise=normalise, prefix=prefix, separator=separator)
    asked = asked.with_shots(1)
    answers = few_shot.measured(loaded, asked, settings=QUICK)["answers"]
    for row, answer in zip(asked.rows, answers, strict=True):
        text, scores = few_shot.prompt(asked, row), []
        for choice in row["choices"]:
            tokens = loaded.tokenizer.encode(f"{text} {choice}")
            own = Stepper(loaded.network, slots=1).token_logprobs(tokens)[-len(f" {choice}".encode()) :]
            scores.append(sum(own) / {"none": 1, "length": len(own), "bytes": len(choice.encode())}[normalise])
        shares = np.exp(scores) / np.exp(scores).sum()
        assert answer["index"] == int(np.argmax(scores)) and answer["probabilities"] == pytest.approx(shares, abs=1e-4)


def test_accuracy_stands_beside_chance_and_the_most_frequent_answer(loaded):
    asked = Benchmark("facts", tuple(QUESTIONS), "choices").with_shots(2)
    found = few_shot.measured(loaded, asked, settings=QUICK)
    (metric,) = found["metrics"]
    assert metric["metric"] == "accuracy" and metric["protocol"] == "2 shots, likelihood per byte, facts, 10 rows"
    right = [answer["index"] == row["answer"] for row, answer in zip(asked.rows, found["answers"])]
    assert metric["model"]["value"] == pytest.approx(np.mean(right))
    chance, frequent = metric["baselines"].values()
    assert chance["value"] == pytest.approx(np.mean([1 / len(row["choices"]) for row in asked.rows]))
    most = max(sum(row["answer"] == place for row in asked.rows) for place in (0, 1))
    assert frequent["value"] == pytest.approx(most / 10)
    assert metric["model"]["low"] <= metric["model"]["value"] <= metric["model"]["high"]


def test_a_choice_counts_by_its_score_where_scores_are_shares(loaded):
    rows = tuple({"question": str(n), "choices": ["a", "b"], "answer": [0.75, 0.25]} for n in range(8))
    found = few_shot.measured(loaded, Benchmark("shares", rows, "choices"), settings=QUICK)
    gained = [(0.75, 0.25)[answer["index"]] for answer in found["answers"]]
    assert found["metrics"][0]["model"]["value"] == pytest.approx(np.mean(gained))
    assert "a choice counts by its score" in found["metrics"][0]["protocol"]


def test_targets_are_written_greedily_and_matched(loaded):
    said = loaded.generate("1:", max_tokens=4, temperature=0.0).text
    rows = ({"question": "1:", "targets": ["other", f" {said} "]}, {"question": "2:", "targets": ["never said"]})
    asked = Benchmark("b", rows, "targets", metrics=("exact_match",), max_tokens=4, stop=())
    found = few_shot.measured(loaded, asked, settings=QUICK)
    assert found["answers"][0]["text"] == said and found["metrics"][0]["model"]["value"] == 0.5
    assert found["metrics"][0]["protocol"] == "0 shots, written greedily, equal up to white space, b, 2 rows"


def test_the_answer_is_what_the_pattern_finds_in_what_is_written(loaded):
    said = loaded.generate("1:", max_tokens=6, temperature=0.0).text
    rows = ({"question": "1:", "targets": [said[:1]]}, {"question": "1:", "targets": ["never said"]})
    asked = Benchmark("b", rows, "targets", metrics=("exact_match",), max_tokens=6, stop=(), pattern=r"(?s).")
    found = few_shot.measured(loaded, asked, settings=QUICK)
    assert [answer["text"] for answer in found["answers"]] == [said[0]] * 2
    assert found["metrics"][0]["model"]["value"] == 0.5
    assert "written greedily, first match of (?s)., equal up to white space, b" in found["metrics"][0]["protocol"]


def test_every_metric_of_texts_can_be_named(loaded):
    pytest.importorskip("sacrebleu")
    rows = tuple({"question": f"{n}:", "targets": ["5"]} for n in range(3))
    named = get_args(TextMetric)
    asked = Benchmark("b", rows, "targets", metrics=named, max_tokens=4)
    assert {one["metric"] for one in few_shot.measured(loaded, asked, settings=QUICK)["metrics"]} == set(named)


def test_rouge_and_bleu_are_measured_where_they_are_named(loaded):
    pytest.importorskip("sacrebleu")
    rows = tuple({"question": f"{n}:", "targets": ["a b c d e"]} for n in range(3))
    asked = Benchmark("b", rows, "targets", metrics=("exact_match", "rouge_l", "bleu"), max_tokens=4)
    metrics = few_shot.measured(loaded, asked, settings=QUICK)["metrics"]
    assert [metric["metric"] for metric in metrics] == ["exact_match", "rouge_l", "bleu"]
    assert all("b, 3 rows" in metric["protocol"] for metric in metrics)


def test_prompts_longer_than_the_context_are_told(loaded):
    rows = tuple({"question": "word " * 40, "choices": ["a", "b"], "answer": 0} for _ in range(2))
    (note,) = few_shot.measured(loaded, Benchmark("long", rows, "choices"), settings=QUICK)["notes"]
    assert note.startswith("long: 1 prompt was longer than the context of 96 tokens") or "2 prompts were" in note


def test_rows_are_asked_with_examples_of_another_file(model, tmp_path):
    train = rows_file(tmp_path, [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(4)], "train.jsonl")
    rows = rows_file(tmp_path, [{"text": f"r{n}", "label": "ab"[n % 2]} for n in range(8)])
    found = measure(str(model), [rows], shots=2, examples=train)
    assert found["benchmarks"] == [{"name": "rows.jsonl", "licence": "", "rows": 8, "shots": 2}]
    assert "the most frequent answer (a)" in found["metrics"][0]["baselines"]


def test_the_command_measures_benchmarks_by_name_and_by_file(model, tmp_path):
    rows_file(tmp_path, QUESTIONS)
    (tmp_path / "own.yaml").write_text("{name: own, licence: CC0-1.0, rows: rows.jsonl, shots: 1}")
    shown = CliRunner().invoke(app, ["evaluate", str(model), str(tmp_path / "own.yaml")])
    assert shown.exit_code == 0 and "measured on: 1 shot, likelihood per byte, own, 11 rows" in shown.stdout
    made = CliRunner().invoke(app, ["evaluate", str(model), str(tmp_path / "own.yaml"), "--shots", "0", "--json"])
    assert json.loads(made.stdout)["benchmarks"] == [{"name": "own", "licence": "CC0-1.0", "rows": 12, "shots": 0}]


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        (["addition", "rows.jsonl"], {}, "rows.jsonl: is no benchmark"),
        (["addition"], {"examples": "rows.jsonl"}, "--examples belongs to rows"),
        (["rows.jsonl"], {"examples": "rows.jsonl"}, "--examples needs --shots"),
        (["nothing.jsonl"], {"shots": 1}, "nothing.jsonl: there is no such file of rows"),
        (["rows.jsonl"], {"shots": 20}, "rows.jsonl: 20 shots need 20 examples, and there are 11"),
        (["rows.jsonl"], {"shots": -1}, "--shots -1: must be 0 or more"),
    ],
)
def test_what_cannot_be_asked_is_refused(model, tmp_path, monkeypatch, data, options, says):
    rows_file(tmp_path, QUESTIONS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormaryError, match=says):
        measure(str(model), data, **options)


def test_questions_of_a_conversation_may_stand_under_other_names_than_messages(tmp_path):
    kind, asked = LABELLED["chat"], [{"instruction": "Hi", "output": "Ho"}, {"prompt": "Hi"}]
    rows, _ = rows_for(kind, rows_file(tmp_path, asked), columns={}, answers=False)
    assert rows == asked and [Chat.pair(None, row)["source"] for row in rows] == ["Hi", "Hi"]
    with pytest.raises(DataError, match="column 'tokens' is missing"):
        rows_for(LABELLED["tag"], rows_file(tmp_path, asked), columns={}, answers=False)


def test_notes_tell_of_each_row_once(tmp_path):
    recipe = parse(
        """
        name: t
        task: classify
        data: {sources: [x], tokenizer: {kind: characters}}
        model: {preset: bert-mini, size: 1x32}
        train: {batch: 4, context: 8}
        """
    )
    rows = [{"text": "ab" * n, "label": "yn"[n % 2]} for n in range(1, 7)]
    tokenizer = train_tokenizer(
        [row["text"] for row in rows], recipe.data.tokenizer, task=Classify.special_tokens(recipe)
    )
    task = Classify.learn(recipe, tokenizer, rows, start=None)
    config = task.model_config()
    model = Model(build(config, seed=0), tokenizer, formary={"task": "classify", "settings": task.settings()})
    given = [{"text": "ab" * 20, "label": "y"}, {"text": "a", "label": "new"}, {"text": "b", "label": "n"}]
    notes = measure_rows(model, "m", [rows_file(tmp_path, given)])["notes"]
    assert any(note.startswith("1 text was longer") for note in notes)
    assert all("2 " not in note.split("context")[0] for note in notes)


def test_an_untouched_model_is_compared_with_the_one_that_was_fine_tuned_from_it(tmp_path):
    network, tokenizer = small()
    for name, formary_json in (
        ("tuned", {"task": "chat", "settings": {"context": 96, "longest_answer": 8}}),
        ("plain", None),
    ):
        (tmp_path / name).mkdir()
        save(tmp_path / name, network, formary=formary_json)
        tokenizer.save(tmp_path / name)
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for first, second in (("tuned", "plain"), ("plain", "tuned")):
        found = compare(str(tmp_path / first), str(tmp_path / second), str(tmp_path / "rows.jsonl"))
        assert found["rows"] == 8 and found["verdict"] == "cannot tell which is better"
        assert found["metrics"][0]["model"] == found["metrics"][0]["baselines"]["B"]
    with pytest.raises(FormaryError, match="has no head for a task"):
        compare(str(tmp_path / "plain"), str(tmp_path / "plain"), str(tmp_path / "rows.jsonl"))

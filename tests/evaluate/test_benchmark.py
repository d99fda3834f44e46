"""Benchmarks as data: YAML with rows beside it, BIG-bench tasks as they are, and messages that name file, line and field."""

import json
import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from formary.errors import DataError
from formary.evaluate import few_shot
from formary.evaluate.benchmark import filled, find, is_benchmark, load, ready, rows_as_benchmark

ROWS = [{"input": f"{n} and 1", "options": [str(n + 1), str(n), "none"], "scores": [1, 0, 0]} for n in range(6)]
FIELDS = {
    "name": "sums",
    "licence": "CC0-1.0",
    "rows": "rows.jsonl",
    "columns": {"question": "input", "choices": "options", "answer": "scores"},
    "template": "{input} make",
}


def written(folder, given_rows=ROWS, **changes):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given_rows), encoding="utf-8")
    fields = {name: value for name, value in (FIELDS | changes).items() if value is not None}
    (folder / "sums.yaml").write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return folder / "sums.yaml"


def task_json(folder, **changes):
    fields = {
        "name": "colours",
        "description": "d",
        "keywords": ["k"],
        "canary": "c",
        "metrics": ["multiple_choice_grade"],
        "preferred_score": "multiple_choice_grade",
        "examples": [
            {"input": "the sky", "target_scores": {"red": 0, "blue": 1}},
            {"input": "grass", "target_scores": {"green": 1, "blue": 0}},
        ],
    }
    folder.mkdir(exist_ok=True)
    (folder / "task.json").write_text(json.dumps(fields | changes), encoding="utf-8")
    return folder / "task.json"


def test_a_file_names_its_columns_and_writes_its_prompts(tmp_path):
    (one,) = load(written(tmp_path, shots=2))
    assert one.rows[3] == {"question": "3 and 1 make", "choices": ["4", "3", "none"], "answer": [1, 0, 0]}
    assert (one.name, one.licence, one.scored, one.metrics) == ("sums", "CC0-1.0", "choices", ("accuracy",))


@given(st.integers(0, 5))
def test_examples_that_are_set_aside_are_not_asked(tmp_path_factory, shots):
    (whole,) = load(written(tmp_path_factory.mktemp("sums")))
    asked = whole.with_shots(shots)
    questions = {row["question"] for row in (*asked.rows, *asked.examples)}
    assert len(asked.examples) == asked.shots == shots and len(asked.rows) == 6 - shots and len(questions) == 6
    assert asked == whole.with_shots(shots)


def test_prompts_hold_solved_examples(tmp_path):
    one = load(written(tmp_path))[0].with_shots(1)
    (shown,) = one.examples
    right = shown["choices"][0]
    assert few_shot.prompt(one, one.rows[0]) == f"{shown['question']} {right}\n\n{one.rows[0]['question']}"


def test_more_shots_than_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="6 shots need 6 examples, and there are 5"):
        load(written(tmp_path))[0].with_shots(6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shot": 3}, "sums.yaml line 9, field 'shot': unknown; did you mean 'shots'"),
        ({"licence": None}, "sums.yaml line 1, field 'licence': is needed"),
        ({"shots": "three"}, "sums.yaml line 9, field 'shots': input should be a valid integer"),
        ({"columns": {"questoin": "input"}}, "sums.yaml line 5, field 'columns.questoin': unknown; did you mean"),
        ({"metric": "f1"}, "sums.yaml line 9, field 'metric': input should be"),
        ({"metric": "bleu"}, "sums.yaml line 9, field 'metric': bleu is not for rows with choices"),
        ({"rows": "../rows.jsonl"}, "sums.yaml line 3, field 'rows': ../rows.jsonl leaves the benchmark's folder"),
        ({"rows": "/etc/passwd"}, "sums.yaml line 3, field 'rows': /etc/passwd leaves the benchmark's folder"),
        ({"rows": "others.jsonl"}, "sums.yaml line 3, field 'rows': there is no file others.jsonl"),
        ({"template": "{quest}:"}, "rows.jsonl line 1: the template asks for 'quest', which the row has not"),
        ({"columns": {"question": "input", "choices": "options"}}, "rows.jsonl line 1: field 'answer' is missing"),
    ],
)
def test_a_wrong_file_is_named_with_line_and_field(tmp_path, changes, says):
    with pytest.raises(DataError) as caught:
        load(written(tmp_path, **changes))
    assert says in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    folder = tmp_path / "own"
    folder.mkdir()
    path = written(folder)
    (folder / "rows.jsonl").unlink()
    os.symlink(tmp_path / "secret.jsonl", folder / "rows.jsonl")
    with pytest.raises(DataError, match="leaves the benchmark's folder"):
        load(path)


def test_a_wrong_row_is_named(tmp_path):
    rows = [*ROWS[:2], ROWS[2] | {"scores": [0, 0, 0]}]
    with pytest.raises(DataError, match=r"rows.jsonl line 3: field 'answer' gives no choice a score above 0"):
        load(written(tmp_path, given_rows=rows))


def test_templates_fill_columns_and_nothing_else():
    assert filled("{a} {a.b} {{x}} { }", {"a": "{b}", "x": 1}, "row") == "{b} {a.b} {1} { }"


def test_bigbench_prompts_are_composed_as_bigbench_composes_them(tmp_path):
    (one,) = load(task_json(tmp_path, task_prefix="Say the colour.\n"))
    assert one.normalise == "none" and one.rows[0]["choices"] == ["red", "blue"] and one.rows[0]["answer"] == 1
    asked = one.with_shots(1)
    text = few_shot.prompt(asked, asked.rows[0])
    assert text.startswith("Say the colour.\n\nQ: ") and text.count("\n  choice: ") == 4 and text.endswith("\nA:")
    assert asked.between == " " and asked.separator == "\n"
    (bare,) = load(
        task_json(tmp_path, append_choices_to_input=False, example_input_prefix="", example_output_prefix=" is ")
    )
    assert [row["question"] for row in bare.rows] == ["the sky is", "grass is"] and bare.between == " "


def test_bigbench_texts_repetitions_and_subtasks(tmp_path):
    examples = [{"input": "a", "target": ["b", "c"]}] * 2 + [{"input": "d", "target": "e"}]
    (one,) = load(task_json(tmp_path / "x", examples=examples, metrics=["exact_str_match", "bleurt"]))
    assert one.scored == "targets" and one.metrics == ("exact_match",) and len(one.rows) == 2
    assert one.rows[0] == {"question": "\nQ: a\nA:", "targets": ["b", "c"]} and "bleurt" in one.notes[0]
    both = [{"input": "a", "target": "b", "target_scores": {"b": 1, "c": 0}}]
    two = load(task_json(tmp_path / "y", examples=both, metrics=["exact_str_match", "multiple_choice_grade"]))
    assert [one.scored for one in two] == ["choices", "targets"]
    whole = tmp_path / "whole"
    task_json(whole)
    (whole / "task.json").write_text(json.dumps({"name": "whole", "keywords": []}))
    task_json(whole / "first", name="first")
    task_json(whole / "second", name="second")
    assert [one.name for one in load(whole / "task.json")] == ["whole/first", "whole/second"]


@pytest.mark.parametrize(
    ("fields", "stop", "pattern"),
    [
        ({}, tuple(".?!;\n"), None),
        ({"output_regex": r"[-+]?\d+"}, (), r"[-+]?\d+"),
        ({"output_regex": "[a-h][1-8]", "stop_string": "#"}, ("#",), "[a-h][1-8]"),
        ({"stop_string": "\n"}, ("\n",), None),
        ({"output_regex": ""}, (), None),  # all that is written
        ({"metrics": ["numeric_match_with_0_1_relative_error"]}, ("\n",), None),  # a point is no end
    ],
)
def test_bigbench_answers_end_and_are_found_as_the_task_says(tmp_path, fields, stop, pattern):
    (one,) = load(
        task_json(tmp_path, examples=[{"input": "a", "target": "1"}], **{"metrics": ["exact_str_match"]} | fields)
    )
    assert (one.stop, one.pattern) == (stop, pattern)


def test_bigbench_metrics_of_texts_have_our_names(tmp_path):
    named = ["exact_str_match", "case_insensitive_str_match", "numeric_match_with_0_1_relative_error", "rouge", "bleu"]
    (one,) = load(task_json(tmp_path, examples=[{"input": "a", "target": "1"}], metrics=[*named, "bleurt"]))
    ours = ("exact_match", "case_insensitive_match", "numeric_match", "rouge_1", "rouge_2", "rouge_lsum", "bleu")
    assert one.metrics == ours and one.notes == ("colours: bleurt is not measured here",)


@pytest.mark.parametrize(("given", "says"), [("(", "is no regular expression"), (5, "must be a text, not 5")])
def test_a_wrong_bigbench_pattern_is_named(tmp_path, given, says):
    path = task_json(
        tmp_path, examples=[{"input": "a", "target": "1"}], metrics=["exact_str_match"], output_regex=given
    )
    with pytest.raises(DataError, match=rf"task\.json: field 'output_regex' {says}"):
        load(path)


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ({"input": "a"}, "example 1: has neither 'target' nor 'target_scores'"),
        ({"target": "a"}, "example 1: field 'input' must be a text"),
        (
            {"input": "a", "target_scores": {"b": 0, "c": 0}},
            "example 1: field 'answer' gives no choice a score above 0",
        ),
    ],
)
def test_a_wrong_bigbench_example_is_named(tmp_path, example, says):
    with pytest.raises(DataError, match=says):
        load(task_json(tmp_path, examples=[example]))


def test_ready_benchmarks_load_with_their_licence_and_are_known_by_name():
    assert {"general-knowledge", "addition"} <= set(ready())
    for name, path in ready().items():
        (one,) = load(path)
        assert one.name == name and one.licence == "Apache-2.0" and len(one.with_shots(None).rows) > 20
    assert find("addition") == ready()["addition"] and find("no-such-benchmark") is None


def test_other_files_are_no_benchmarks(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "a", "label": "b"}]')
    (tmp_path / "text.txt").write_text("a")
    assert not is_benchmark(tmp_path / "rows.json") and not is_benchmark(tmp_path / "text.txt")


def test_labelled_texts_become_questions_with_the_labels_as_choices():
    rows = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
    one = rows_as_benchmark("rows", rows, [{"text": "fine", "label": "maybe"}])
    assert one.rows[0] == {"question": "good\nLabel:", "choices": ["maybe", "no", "yes"], "answer": 2}
    with pytest.raises(DataError, match="every row has the label 'yes'"):
        rows_as_benchmark("rows", rows[:1], [])
    with pytest.raises(DataError, match="shots are for rows with question, choices and answer, or with text and label"):
        rows_as_benchmark("rows", [{"tokens": []}], [])

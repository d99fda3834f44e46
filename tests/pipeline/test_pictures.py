"""Runs on pictures from end to end: their speed is in images, their report shows them, and their models answer files."""

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from formary.data.images import data_uri
from formary.infer.loaded import load
from formary.pipeline.measure import rows_for
from formary.pipeline.run import run
from formary.recipe.reading import parse
from formary.tasks.generate_image import GenerateImage

_RNG = np.random.default_rng(8)
_ATTACK = "<b>coat</b>"
_CLASSES = ("bag", _ATTACK.replace("/", ""), "shoe")


def picture(number):
    """A picture whose level tells its class."""
    return (_RNG.integers(0, 80, (8, 8, 3)) + 60 * (number % 3)).astype(np.uint8)


def folders(root, count):
    for number in range(count):
        path = root / _CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(path)


def finished(folder, task, data, **train):
    recipe = {
        "name": "tiny",
        "task": task,
        "data": {"split": {"validation": 0.15, "test": 0.3}, "tokenizer": {"kind": "characters"}, **data},
        "model": {
            "preset": {"classify_image": "vit-mini", "caption": "caption-mini"}.get(task, "clip-mini"),
            "size": "1x32",
            "switches": {"image_size": 8, "patch_size": 4},
        },
        "train": {"steps": 6, "batch": 8, "context": 32, "validate_every": 6, **train},
        "evaluate": {"bootstrap": 100},
        "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with (folder / "said.txt").open("w") as said:
        run(folder / "recipe.yaml", folder=folder / "run", console=Console(file=said, width=200))
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A finished run on pictures in folders by class; only to look at."""
    folder = tmp_path_factory.mktemp("labelled")
    folders(folder / "in", 72)
    return finished(folder, "classify_image", {"sources": ["in"], "columns": {"label": "@folder"}})


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A finished run on pictures with texts; only to look at."""
    folder = tmp_path_factory.mktemp("captioned")
    rows = [{"photo": data_uri(picture(n)), "said": f"a {_CLASSES[n % 3]}"} for n in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"image": "photo", "caption": "said"}
    return finished(folder, "caption", {"sources": ["rows.jsonl"], "columns": columns})


@pytest.fixture(scope="module")
def matched(tmp_path_factory):
    """A finished run that matches pictures and texts; only to look at."""
    folder = tmp_path_factory.mktemp("matched")
    rows = [{"image": data_uri(picture(n)), "text": f"a {_CLASSES[n % 3]}"} for n in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return finished(folder, "match_image_text", {"sources": ["rows.jsonl"]}, steps=60, optimiser={"lr": 2e-3})


def page(folder):
    return (folder / "run/report.html").read_text(encoding="utf-8")


def pictures_in(text):
    return re.findall(r'<img src="(data:image/png;base64,[A-Za-z0-9+/=]+)" alt="the picture">', text)


def test_the_speed_is_in_images(labelled):
    assert "images/s" in (labelled / "said.txt").read_text() and "tokens/s" not in (labelled / "said.txt").read_text()
    assert re.search(r"Training read [\d,]+ images per second", page(labelled))


def test_the_report_shows_what_was_taken_for_something_else_and_samples(labelled):
    details = json.loads((labelled / "run/evaluation.json").read_text())["details"]
    text = page(labelled)
    wrong = [entry["image"] for entry in details["worst"]]
    assert wrong and all("text" not in entry for entry in details["worst"])
    samples = text.split('id="samples"')[1]
    assert pictures_in(text.split('id="errors"')[1].split('id="learning"')[0]) == wrong
    assert len(pictures_in(samples)) == 5


def test_the_page_lets_in_its_own_pictures_and_markup_stays_text(labelled):
    text = page(labelled)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "img-src data:" in policy and "http" not in policy
    assert "<b>coat" not in text and "&lt;b&gt;coat" in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)


def test_a_page_without_pictures_lets_in_none(finished_runs):
    text = (finished_runs("causal_lm").run_folder / "report.html").read_text()
    assert "img-src" not in text


def test_of_captions_nothing_is_said_that_needs_a_source_text(captioned):
    details = json.loads((captioned / "run/evaluation.json").read_text())["details"]
    assert not details.keys() & {"copied", "by_source_length"}
    assert details["worst"][0].keys() >= {"image", "target", "text", "chrf"} and "source" not in details["worst"][0]
    text = page(captioned)
    assert "by source length" not in text.lower() and "copied" not in text
    assert len(pictures_in(text)) >= 5


# The commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(labelled):
    return labelled / "run/model"


def test_one_picture_is_answered(model, command, tmp_path, monkeypatch):
    folders(tmp_path / "new", 3)
    monkeypatch.chdir(tmp_path)
    result = command("predict", model, "new/bag/0.png")
    said, sure, path = result.stdout.rstrip("\n").split("\t")
    (expected,) = load(model).predict([{"image": str(tmp_path / "new/bag/0.png")}])
    assert said == expected["label"] and float(sure) == pytest.approx(expected["probability"], abs=1e-3)
    assert path == "new/bag/0.png"


def test_a_folder_is_answered_and_what_is_broken_is_named(model, command, tmp_path):
    for number in range(5):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:50])
    (tmp_path / "4.png").write_text("no picture")
    result = command("predict", model, tmp_path, "--json")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 3
    assert "note: 2 of 5 cannot be read and are left out: " in result.stderr
    assert "3.png (" in result.stderr and "4.png (not a PNG or JPEG picture" in result.stderr


def test_answers_are_written_beside_the_paths(model, command, tmp_path):
    folders(tmp_path / "in", 6)
    command("predict", model, tmp_path / "in", "--out", tmp_path / "answers.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(row["image"].endswith(".png") and row["prediction"]["label"] for row in rows)


def test_paths_come_from_standard_input_too(model, command, tmp_path):
    folders(tmp_path / "in", 2)
    result = command("predict", model, "-", input=f"{tmp_path}/in/bag/0.png\n\n")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 1


def test_folders_archives_and_tables_are_measured_alike(model, command, tmp_path):
    pictures = np.stack([picture(n) for n in range(12)])
    labels = np.array(_CLASSES)[np.arange(12) % 3]
    np.savez(tmp_path / "all.npz", image_test=pictures, label_test=labels)
    rows = [{"image": data_uri(one), "label": str(label)} for one, label in zip(pictures, labels)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "theirs.jsonl").write_text("\n".join(json.dumps({"p": r["image"], "l": r["label"]}) for r in rows))
    for number, (one, label) in enumerate(zip(pictures, labels)):
        (tmp_path / "in" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(tmp_path / "in" / label / f"{number}.png")
    found = [
        json.loads(command("evaluate", model, tmp_path / data, *more, "--json").stdout)
        for data, more in (
            ("in", ()),
            ("all.npz/test", ()),
            ("rows.jsonl", ()),
            ("theirs.jsonl", ("--column", "image=p", "--column", "label=l")),
        )
    ]
    values = [{metric["metric"]: metric["model"]["value"] for metric in one["metrics"]} for one in found]
    assert all(one["rows"] == 12 for one in found)
    for other in values[1:]:
        assert other == pytest.approx(values[0], nan_ok=True)


def test_numbers_and_columns_are_called_as_in_the_training_data(command, tmp_path):
    pictures, labels = np.stack([picture(n) for n in range(60)]), np.arange(60) % 3
    np.savez(tmp_path / "all.npz", x_train=pictures[:48], y_train=labels[:48], x_test=pictures[48:], y_test=labels[48:])
    columns = {"image": "x", "label": "y"}
    data = {"sources": ["all.npz/train"], "test": ["all.npz/test"], "columns": columns, "names": ["a", "b", "c"]}
    model = finished(tmp_path, "classify_image", data) / "run/model"
    assert load(model).task.labels == ("a", "b", "c")
    result = command("evaluate", model, tmp_path / "all.npz/test", "--json")
    told = json.loads(result.stdout)
    ran = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert told["metrics"][0]["model"]["value"] == pytest.approx(ran["metrics"][0]["model"]["value"])


def test_a_task_that_does_not_ask_for_a_picture_takes_one_where_there_is_one(tmp_path):
    rows = [{"image": data_uri(picture(n)), "label": "ab"[n % 2]} for n in range(8)]
    recipe = parse("""
        name: t
        task: generate_image
        data: {sources: [x]}
        model: {preset: gpt-mini, size: 1x32}
        train: {objective: {side: 6, colours: 4}}
        """)
    task = GenerateImage.learn(recipe, GenerateImage.vocabulary(recipe, rows), rows, start=None)
    assert rows_for(task, "a", columns={}, answers=False) == ([{"label": "a"}], [])
    for number in range(2):
        (tmp_path / "in/b").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(tmp_path / f"in/b/{number}.png")
    (tmp_path / "in/b/2.png").write_text("broken")
    found, notes = rows_for(task, str(tmp_path / "in"), columns={}, answers=False)
    assert [set(row) for row in found] == [{"image"}] * 2 and "1 of 3" in notes[0]
    found, _ = rows_for(task, str(tmp_path / "in"), columns={}, answers=True)
    assert [row["label"] for row in found] == ["b", "b"]
    (tmp_path / "asked.jsonl").write_text('{"label": "a"}\n{"label": "b", "seed": 3}\n')
    found, notes = rows_for(task, str(tmp_path / "asked.jsonl"), columns={}, answers=False)
    assert found == [{"label": "a"}, {"label": "b", "seed": 3}] and not notes


def test_two_models_are_compared_on_a_folder(model, command, tmp_path):
    folders(tmp_path / "in", 12)
    (tmp_path / "in/bag/0.png").write_text("broken")
    result = command("compare", model, model, tmp_path / "in")
    assert result.exit_code == 0 and "cannot tell" in result.stdout and "1 of 12 cannot be read" in result.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gone.png", "no such file"),
        ("notes.txt", "this model reads files (.png, .jpg, .jpeg"),
        ("photo.gif", "convert others first"),
        ("broken.png", "not a PNG or JPEG picture"),
        ("two", "none of 2 can be read; the first:"),
        ("other.csv", "Map another name with --column image"),
        ("all.npz", "holds the parts train, test; name the part to read"),
    ],
)
def test_what_cannot_be_answered_is_told_with_what_to_do(model, command, tmp_path, given, said):
    for name in ("notes.txt", "photo.gif", "broken.png", "two/a.png", "two/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no picture")
    (tmp_path / "other.csv").write_text("photo,label\na.png,x\n")
    np.savez(tmp_path / "all.npz", x_train=np.zeros((2, 8, 8), np.uint8), x_test=np.zeros((2, 8, 8), np.uint8))
    result = command("predict", model, tmp_path / given)
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


def test_labels_that_the_model_does_not_know_are_refused(model, command, tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    result = command("evaluate", model, tmp_path)
    assert result.exit_code == 2 and "files in folders have the label that their folder is called" in result.output


@pytest.mark.parametrize("what", ["chat", "bench", "generate"])
def test_what_is_for_texts_says_that_the_model_reads_none(captioned, labelled, command, what):
    for folder in (captioned, labelled):
        result = command(what, folder / "run/model", *(["hello"] if what == "generate" else []), input="hello\n")
        assert result.exit_code == 2 and re.search("reads (no text|patches)|encoder", result.output), result.output


def test_captions_are_written_for_files_and_measured_on_tables(captioned, command, tmp_path):
    model = captioned / "run/model"
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    result = command("predict", model, tmp_path / "0.png", "--json")
    assert result.exit_code == 0 and "text" in json.loads(result.stdout)
    measured = json.loads(command("evaluate", model, captioned / "rows.jsonl", "--json").stdout)
    assert measured["rows"] == 60
    refused = command("evaluate", model, tmp_path)
    assert refused.exit_code == 2 and "name the files in a CSV or JSONL" in refused.output


def test_the_report_shows_pictures_whose_text_was_found_late(matched):
    details = json.loads((matched / "run/evaluation.json").read_text())["details"]
    assert details["worst"][0].keys() == {"row", "image", "text", "rank", "found"}
    text = page(matched)
    assert "<b>coat" not in text and "text retrieval recall at 1" in text
    assert len(pictures_in(text)) >= 10


def test_pictures_are_found_by_a_text_and_named_by_one_of_several(matched, command, tmp_path, monkeypatch):
    folders(tmp_path / "new", 6)
    monkeypatch.chdir(tmp_path)
    model = matched / "run/model"
    lines = command("predict", model, "new", "--find", "a shoe").stdout.splitlines()
    scores = [float(line.split("\t")[0]) for line in lines]
    assert len(lines) == 6 and scores == sorted(scores, reverse=True)
    assert lines[0].split("\t")[1].startswith("new/")
    told = command("predict", model, "new/bag/0.png", "--candidate", "a bag", "--candidate", "a shoe").stdout
    label, sure, path = told.rstrip("\n").split("\t")
    assert label in ("a bag", "a shoe") and 0 < float(sure) <= 1 and path == "new/bag/0.png"
    vectors = json.loads(command("predict", model, "a bag", "--json").stdout)
    assert list(vectors) == ["text_vector"] and len(vectors["text_vector"]) == 128
    refused = command("predict", model, "new", "--candidate", "a bag")
    assert refused.exit_code == 2 and "two or more different texts" in refused.stderr
    lost = command("predict", model, "lost.png")
    assert lost.exit_code == 2 and "lost.png" in lost.stderr


def test_classes_that_were_never_taught_are_measured(matched, command, tmp_path):
    folders(tmp_path / "new", 12)
    model = matched / "run/model"
    found = json.loads(command("evaluate", model, tmp_path / "new", "--zero-shot", "a {label}", "--json").stdout)
    first = found["metrics"][0]
    assert first["metric"] == "accuracy" and found["rows"] == 12 and 0 <= first["model"]["value"] <= 1
    assert "no place for the label" in command("evaluate", model, tmp_path / "new", "--zero-shot", "a").stderr


def test_only_models_that_match_take_texts_with_pictures(model, command, tmp_path):
    folders(tmp_path / "new", 2)
    assert "match_image_text" in command("predict", model, tmp_path / "new", "--find", "a").stderr
    refused = command("evaluate", model, tmp_path / "new", "--zero-shot", "a {label}")
    assert "does not match pictures and texts" in refused.stderr

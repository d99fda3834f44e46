"""Recommending from events to report, at the command line and over HTTP; items with a text alone are recommended too."""

import json
import random

import pytest
import yaml
from fastapi.testclient import TestClient
from rich.console import Console
from safetensors.numpy import load_file
from typer.testing import CliRunner

import formary
from formary.cli.main import app
from formary.errors import RecipeError
from formary.pipeline.measure import compare, measure
from formary.pipeline.run import run

WORDS = ["red", "blue", "green", "grey"]
TEXTS = {f"film {n:02}": f"{WORDS[n % 4]} film about {WORDS[n // 4]}" for n in range(16)}


def events(users=40, seed=0):
    rng = random.Random(seed)
    lines = ["who,film,at"]
    for user in range(users):
        start = rng.randrange(16)
        lines += [f"u{user},film {(start + step) % 16:02},{step}" for step in range(8)]
    return "\n".join([*lines, lines[1], "lonely,film 01,3"]) + "\n"


def write(folder, **changes):
    (folder / "events.csv").write_text(events(), encoding="utf-8")
    rows = (
        json.dumps({"id": item, "title": text}) for item, text in {**TEXTS, "film 99": "grey film about red"}.items()
    )
    (folder / "films.jsonl").write_text("\n".join(rows), encoding="utf-8")
    recipe = {
        "name": "tiny",
        "task": "next_item",
        "data": {"sources": ["events.csv"], "columns": {"user": "who", "item": "film", "time": "at"}},
        "model": {"preset": "sasrec-mini", "size": "1x32", "switches": {"dropout": 0.0}},
        "train": {
            "steps": 60, "batch": 16, "context": 12, "validate_every": 30, "best": "metric", "optimiser": {"lr": 5e-3},
        },
        "evaluate": {"bootstrap": 100, "sampled": 5},
        "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
    }  # fmt: skip
    for name, value in changes.items():
        recipe[name] = {**recipe.get(name, {}), **value}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def execute(recipe, *overrides, folder="run"):
    return run(recipe, overrides=overrides, folder=recipe.parent / folder, console=Console(quiet=True))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    return folder, execute(write(folder))


def said(result, name):
    return next(metric for metric in result.metrics if metric["metric"] == name)


def test_a_run_is_measured_over_all_items_beside_its_baselines(done):
    folder, result = done
    assert result.did == ("documents", "tokenizer", "train", "evaluate", "report")
    first = result.metrics[0]
    assert first["metric"] == "ndcg@10-full" and "each item among all 16" in first["protocol"]
    assert set(first["baselines"]) == {"most popular", "item-kNN", "first-order Markov"}
    assert first["verdicts"]["most popular"] == "better" and first["model"]["value"] > 0.8
    assert said(result, "hr@10-sampled5")["model"]["value"] == pytest.approx(1.0)
    assert 0 < said(result, "coverage@10")["model"]["value"] <= 1
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "first-order Markov" in page and "film" in page
    story = json.loads((folder / "run/data/documents/story.json").read_text())
    assert any("1 user with one event" in note and "lonely" in note for note in story["warnings"])
    assert [step["dropped"] for step in story["steps"] if step["step"] == "duplicates"] == [1]
    assert execute(folder / "recipe.yaml").did == ()


def test_the_folder_is_gpt2s_and_transformers_scores_items_alike(done):
    transformers = pytest.importorskip("transformers")
    import torch

    _, result = done
    model = formary.load(result.model)
    assert model.family == "gpt2"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(result.model)
    ids = [model.tokenizer.bos_id, *model.task.known_items(["film 03", "film 04"])]
    with torch.no_grad():
        scores = theirs(torch.tensor([ids])).logits[0, -1]
    (answer,) = model.predict([{"history": ["film 03", "film 04"]}], k=1, exclude_seen=False)
    best = scores[len(model.tokenizer.special_ids) :].argmax() + len(model.tokenizer.special_ids)
    assert answer["items"][0]["item"] == model.task.names[int(best)] == "film 05"


def test_the_command_line_recommends_and_says_what_it_does_not_know(done):
    _, result = done
    runner = CliRunner()
    shown = runner.invoke(app, ["recommend", str(result.model), "--history", "film 03,film 04,film 77", "--k", "2"])
    assert shown.exit_code == 0 and shown.stdout.splitlines()[0].startswith("1\tfilm 05\t")
    assert len(shown.stdout.strip().splitlines()) == 2 and "film 77" in shown.stderr
    shown = runner.invoke(app, ["recommend", str(result.model), "--history", '["film 03", "film 04", "?"]', "--json"])
    answer = json.loads(shown.stdout)
    assert answer["unknown"] == ["?"] and len(answer["items"]) == 10 and answer["items"][0]["item"] == "film 05"
    assert runner.invoke(app, ["recommend", str(result.model)]).exit_code == 0  # somebody new
    shown = runner.invoke(app, ["predict", str(result.model), "film 03,film 04"])
    assert shown.exit_code == 0 and shown.stdout.startswith("film 05, ")


def test_rows_of_histories_and_events_are_answered_and_measured(done, tmp_path):
    folder, result = done
    runner = CliRunner()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"history": ["film 03"]}\n{"history": "film 07, film 08"}\n', encoding="utf-8")
    shown = runner.invoke(app, ["predict", str(result.model), str(rows), "--json"])
    assert [json.loads(line)["items"][0]["item"] for line in shown.stdout.splitlines()] == ["film 04", "film 09"]
    held = tmp_path / "later.csv"
    held.write_text("user,item,time\n" + "".join(f"v,film {n:02},{n}\n" for n in range(6)), encoding="utf-8")
    measured = measure(str(result.model), [str(held)])
    assert measured["rows"] == 1 and measured["metrics"][0]["metric"] == "ndcg@10-full"
    shown = compare(str(result.model), str(result.model), str(folder / "run/data/documents/test.jsonl"))
    assert shown["verdict"] == "cannot tell which is better"


def test_over_http_histories_go_in_and_ranked_items_come_out(done):
    from formary.serve.app import create_app
    from formary.serve.service import ServerSettings, Service

    _, result = done
    service = Service(ServerSettings())
    service.add("films", formary.load(result.model))
    service.ready()
    try:
        client = TestClient(create_app(service))
        assert service.served["films"].abilities == ("predict",)
        body = {"inputs": [{"history": ["film 03", "film 04", "nothing"]}, "film 03,film 04"], "k": 3}
        answered = client.post("/v1/predict/films", json=body).json()
        assert answered["task"] == "next_item" and len(answered["answers"]) == 2
        first, second = answered["answers"]
        assert first["unknown"] == ["nothing"] and first["items"] == second["items"]
        assert first["items"][0]["item"] == "film 05" and len(first["items"]) == 3
        for wrong, named in (({"k": 0}, "k"), ({"beams": 2}, "beams"), ({"inputs": [{"text": "x"}]}, "row 1")):
            refused = client.post("/v1/predict/films", json={"inputs": ["film 03"], **wrong})
            assert refused.status_code == 400 and named in refused.json()["error"]["message"]
    finally:
        service.stop()


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A model of texts, then two runs that know films by their titles: one keeps some films out of training."""
    folder = tmp_path_factory.mktemp("cold")
    pairs = ({"text": text, "positive": text.replace("film", "picture")} for text in TEXTS.values())
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    texts = {
        "name": "texts", "task": "embed",
        "data": {"sources": ["pairs.jsonl"], "split": {"test": 0, "validation": 0}, "tokenizer": {"kind": "characters"}},
        "model": {"preset": "bert-mini", "size": "1x32"}, "train": {"steps": 5, "batch": 8, "context": 64},
        "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
    }  # fmt: skip
    (folder / "texts.yaml").write_text(yaml.safe_dump(texts), encoding="utf-8")
    execute(folder / "texts.yaml", folder="texts")
    items = {"sources": ["films.jsonl"], "columns": {"item": "id", "text": "title"}, "vectors": "texts/model"}
    recipe = write(folder, data={"items": items, "split": {"cold": 0.2}})
    return folder, recipe, execute(recipe)


def test_items_that_have_only_a_text_are_recommended_and_measured_apart(described):
    folder, _, result = described
    assert result.did == ("documents", "items", "tokenizer", "train", "evaluate", "report")
    vectors = load_file(folder / "run/data/items/vectors.safetensors")["vectors"]
    assert vectors.shape == (17, 32)
    metric = said(result, "hr@10-new")
    assert "that no training row has" in metric["protocol"]
    model = formary.load(result.model)
    assert model.family == "formary" and model.config.features == 32
    (answer,) = model.predict([{"history": ["film 03"]}], k=20)
    assert {entry["item"] for entry in answer["items"]} == {*TEXTS, "film 99"} - {"film 03"}


def test_texts_are_turned_into_vectors_once(described):
    _, recipe, _ = described
    assert execute(recipe).did == ()
    assert execute(recipe, "train.seed=3").did == ("train", "evaluate", "report")


def test_what_cannot_describe_items_is_refused(described, tmp_path):
    _, recipe, result = described
    with pytest.raises(RecipeError, match="gives no vectors"):
        execute(recipe, f"data.items.vectors={result.model}", folder="other")
    with pytest.raises(RecipeError, match=r"formary run nowhere|neither a recipe"):
        execute(recipe, "data.items.vectors=recipe:nowhere", folder="other")
    with pytest.raises(RecipeError, match=r"data\.items: task classify names no items"):
        execute(recipe, "task=classify", "model.preset=bert-mini", folder="other")


def test_a_masked_encoder_runs_the_same_way(tmp_path):
    result = execute(
        write(tmp_path, model={"preset": "bert4rec-mini"}, train={"objective": {"mask_rate": 0.3}, "steps": 20})
    )
    assert said(result, "hr@10-full")["model"]["value"] > 0
    assert formary.load(result.model).predict(["film 03"], k=2)[0]["items"]

"""A labelled task from rows to report, and its model at the command line."""

import json
import random

import pytest
import yaml
from rich.console import Console

import formary
from formary.errors import DataError, RecipeError
from formary.pipeline.run import run
from formary.pipeline.stages import findings


def rows(count=160, seed=0):
    rng = random.Random(seed)
    words = ["the", "film", "book", "was", "long", "and", "very", "much", "about", "old", "house"]
    made = []
    for number in range(count):
        good = rng.random() < 0.5
        text = " ".join(rng.choices(words, k=5)) + (" good" if good else " bad") + f" {number}"
        made.append({"text": text, "label": "yes" if good else "no", "shop": rng.choice("ab")})
    return made


def write(folder, given, **changes):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    recipe = {
        "name": "tiny",
        "task": "classify",
        "data": {
            "sources": ["rows.jsonl"],
            "tokenizer": {"kind": "characters"},
            "split": {"validation": 0.1, "test": 0.25},
        },
        "model": {"preset": "bert-mini", "size": "1x32"},
        "train": {"steps": 12, "batch": 8, "context": 48, "validate_every": 4, "best": "metric"},
        "evaluate": {"bootstrap": 100},
        "machine": {"threads": 1, "device": "cpu", "precision": "float32"},
    }
    recipe.update(changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


def execute(recipe, *overrides):
    return run(recipe, overrides=overrides, folder=recipe.parent / "run", console=Console(quiet=True))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    return folder, execute(write(folder, rows()))


def test_a_run_measures_beside_baselines_and_reports_errors(done):
    folder, result = done
    assert result.did == ("documents", "tokenizer", "train", "evaluate", "report")
    first = result.metrics[0]
    assert first["metric"] == "accuracy"
    assert set(first["baselines"]) == {"majority class", "TF-IDF + logistic regression"}
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "Where it is right and where it is wrong" in page and "TF-IDF" in page
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("validation_accuracy" in record for record in records)


def test_a_second_run_has_nothing_to_do_and_another_seed_trains_only(done):
    folder, _ = done
    assert execute(folder / "recipe.yaml").did == ()
    again = execute(folder / "recipe.yaml", "train.seed=5")
    assert again.did == ("train", "evaluate", "report")


def test_transformers_gives_the_same_labels(done):
    transformers = pytest.importorskip("transformers")
    import torch

    _, result = done
    model = formary.load(result.model)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(result.model).eval()
    words = transformers.AutoTokenizer.from_pretrained(result.model)
    for row in rows(5, seed=3):
        (answer,) = model.predict([row["text"]], precision="float32")
        with torch.inference_mode():
            shares = theirs(**words(row["text"], return_tensors="pt")).logits.softmax(dim=-1)[0]
        expected = {theirs.config.id2label[n]: float(share) for n, share in enumerate(shares)}
        assert answer["probabilities"] == pytest.approx(expected, abs=1e-5)


def test_predict_evaluate_and_compare_at_the_command_line(done, command, tmp_path):
    folder, result = done
    data = folder / "rows.jsonl"
    assert command("predict", result.model, "a good film").stdout.split("\t")[0] in ("yes", "no")
    made = command("predict", result.model, data, "--out", tmp_path / "out.jsonl")
    assert made.exit_code == 0 and "160 answers" in made.stdout
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert {"text", "label", "shop", "prediction"} == set(first)
    measured = json.loads(command("evaluate", result.model, data, "--json").stdout)
    assert measured["metrics"][0]["metric"] == "accuracy" and measured["rows"] == 160
    same = command("compare", result.model, result.model, data)
    assert "cannot tell which is better" in same.stdout
    missing = command("predict", result.model, "nowhere.jsonl")
    assert missing.exit_code == 2 and "no such file of rows" in missing.stderr


@pytest.mark.parametrize("method", ["head", "last", "lora"])
def test_each_way_of_tuning_starts_from_a_model_and_leaves_a_plain_one(done, tmp_path, method):
    _, result = done
    recipe = write(tmp_path, rows(), model={"start": str(result.model)})
    tuned = execute(recipe, f"train.tune.method={method}", "train.tune.layers=1", "train.steps=3")
    model = formary.load(tuned.model)
    assert {answer["label"] for answer in model.predict(["good", "bad"])} <= {"yes", "no"}
    assert not any("lora" in name for name, _ in model.network.named_parameters())
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists() == (method == "lora")


def test_near_copies_of_training_rows_are_counted_and_scored_without(tmp_path):
    given = rows()
    long = " ".join(f"word{n}" for n in range(60))
    given += [{"text": f"{long} copy {n}", "label": "yes", "shop": "a"} for n in range(20)]
    result = execute(write(tmp_path, given), "train.steps=2")
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["leakage"]["rows"] >= 1
    first, again = findings(evaluation["metrics"])[1:3]
    assert first.startswith("accuracy ") and again.startswith("without near-duplicates: accuracy ")
    assert "without near-duplicates" in result.metrics[1]["protocol"]


def test_one_class_only_and_missing_labels_are_refused(tmp_path):
    with pytest.raises(DataError, match="every training row has the label 'yes'"):
        execute(write(tmp_path, [row | {"label": "yes"} for row in rows(40)]))
    with pytest.raises(DataError, match=r"rows.jsonl line 1: column 'label' is missing"):
        execute(write(tmp_path, [{"text": "a b c"}] * 3))


def test_another_vocabulary_than_the_model_to_start_from_is_refused(done, tmp_path):
    _, result = done
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "other"]))
    recipe = write(tmp_path, rows(), model={"start": str(result.model)})
    with pytest.raises(RecipeError, match="another vocabulary"):
        execute(recipe, "data.tokenizer.path=vocab.txt")


def test_pairs_that_share_their_first_text_are_no_duplicates(tmp_path):
    premises = ["a cat sat on the mat", "dogs run after birds"]
    given = [
        {"text": premises[n % 2], "text_pair": f"sentence number {n}", "label": "yes" if n % 3 else "no"}
        for n in range(60)
    ]
    execute(write(tmp_path, [*given, given[0]]), "train.steps=1")
    story = json.loads((tmp_path / "run" / "data" / "documents" / "story.json").read_text())
    assert sum(split["rows"] for split in story["splits"].values()) == 60


def test_low_rank_updates_of_nothing_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"lora tunes a trained model; name one with model\.start"):
        execute(write(tmp_path, rows()), "train.tune.method=lora")


@pytest.mark.parametrize(
    ("task", "good", "bad", "says"),
    [
        ("classify", {"text": "a b", "label": "x"}, {"text": "c d", "label": None}, "field 'label' is empty"),
        ("tag", {"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
        (
            "answer_span",
            {"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [2]}},
            {"question": "q", "context": "a c", "answers": {"text": ["b"], "answer_start": [2]}},
            "'b' is not in its context",
        ),
        (
            "multiple_choice",
            {"question": "q", "choices": ["a", "b"], "answer": 0},
            {"question": "q", "choices": ["a", "b"], "answer": "z"},
            "'z'",
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"messages": [{"role": "customer", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "'customer' is usually 'user'",
        ),
    ],
)
def test_a_row_that_cannot_be_learned_is_named_by_its_line_in_the_file(tmp_path, task, good, bad, says):
    model = {"preset": "gpt-mini" if task == "chat" else "bert-mini", "size": "1x32"}
    with pytest.raises(DataError, match=rf"rows\.jsonl line 4: .*{says}"):
        execute(write(tmp_path, [good, good, good, bad, good], task=task, model=model))

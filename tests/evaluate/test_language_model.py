"""Measures of language models against the plainest recomputation: one document at a time, and transformers."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import formary
from formary.data.shards import TokenShards, write_tokens
from formary.data.tokenizer import load as load_tokenizer
from formary.evaluate.language_model import causal_losses, causal_metrics, evaluate
from formary.evaluate.ngram import NGram, Unigram
from formary.recipe import read
from formary.recipe.schema import Evaluate, Machine
from formary.tasks.cross_entropy import IGNORED
from formary.tasks.registry import pretraining_task
from formary.train.machine import runtime

CPU = runtime(Machine(threads=1, device="cpu", precision="float32"))
SETTINGS = Evaluate(bootstrap=100)
TEXTS = ["the cat sat.", "a dog ran away over the house", "x", "two birds flew and they sat on a mat"]


def write(folder, tokenizer, texts, **options):
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    write_tokens(rows, folder / "tokens", tokenizer, **options)
    return TokenShards.open(folder / "tokens")


def by_hand(network, tokens):
    """Losses of tokens[1:], the document read at once: (tokens - 1,)."""
    ids = torch.from_numpy(np.asarray(tokens).astype(np.int64))[None]
    with torch.inference_mode():
        logits = network.head(network(ids[:, :-1]))[0]
    return F.cross_entropy(logits, ids[0, 1:], reduction="none").double().numpy()


@pytest.fixture(scope="module")
def model(finished):
    return formary.load(finished.model)


@pytest.fixture(scope="module")
def split(finished):
    return {name: TokenShards.open(finished.run_folder / "data" / "tokens" / name) for name in ("train", "test")}


def metrics_of(model, shards, **options):
    found = causal_metrics(
        model.network, shards, **{"training": None, "settings": SETTINGS, "runtime": CPU, "split": "test", **options}
    )
    return {entry["metric"]: entry for entry in found}


def test_the_loss_is_that_of_reading_each_document_at_once(model, tmp_path):
    shards = write(tmp_path, model.tokenizer, [text[:30] for text in TEXTS])
    expected = np.concatenate(
        [by_hand(model.network, [shards.begin_id, *shards.document(i)]) for i in range(shards.documents)]
    )
    losses, places = causal_losses(model.network, shards, stride=None, max_tokens=None, runtime=CPU)
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    np.testing.assert_array_equal(places, np.arange(shards.tokens))
    assert metrics_of(model, shards)["loss"]["model"]["value"] == pytest.approx(expected.mean(), rel=1e-6)


def test_the_loss_is_the_one_transformers_finds(finished, model, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(finished.model).eval()
    shards = write(tmp_path, model.tokenizer, ["two birds flew away."])
    ids = torch.tensor([[shards.begin_id, *shards.document(0).tolist()]])
    with torch.inference_mode():
        expected = theirs(input_ids=ids, labels=ids).loss.item()
    assert metrics_of(model, shards)["loss"]["model"]["value"] == pytest.approx(expected, rel=1e-5)


def test_a_token_of_a_long_document_is_scored_once_with_at_least_the_stride_before_it(model, tmp_path):
    shards = write(tmp_path, model.tokenizer, [" ".join(TEXTS) * 3])
    tokens = np.array([shards.begin_id, *shards.document(0)])
    context, stride = model.config.context, 7
    expected = [*by_hand(model.network, tokens[: context + 1])]
    for begin in range(context, len(tokens) - 1, stride):
        end = min(begin + stride, len(tokens) - 1)
        expected += [*by_hand(model.network, tokens[end - context : end + 1])[-(end - begin) :]]
    losses, places = causal_losses(model.network, shards, stride=stride, max_tokens=None, runtime=CPU)
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    np.testing.assert_array_equal(places, np.arange(shards.tokens))


def test_baselines_are_the_ngram_models_themselves(model, split):
    found = metrics_of(model, split["test"], training=split["train"])
    train, test = split["train"], split["test"]
    size = model.config.vocab_size
    unigram = Unigram.fit(train.window(0, train.tokens), vocab_size=size).log_probs(test.window(0, test.tokens))
    ngram = NGram.fit(train.window(0, train.tokens), train.document_starts, order=5, vocab_size=size)
    five = ngram.log_probs(test.window(0, test.tokens), test.document_starts)
    for name, log_probs in (("unigram", unigram), ("5-gram", five)):
        loss = -np.mean(log_probs)
        assert found["loss"]["baselines"][name]["value"] == pytest.approx(loss)
        assert found["perplexity"]["baselines"][name]["value"] == pytest.approx(math.exp(loss))
        bits = loss / math.log(2) * test.tokens / test.document_bytes.sum()
        assert found["bits_per_byte"]["baselines"][name]["value"] == pytest.approx(bits)


def test_bits_per_byte_and_perplexity_follow_from_the_loss(model, split):
    found = metrics_of(model, split["test"])
    loss = found["loss"]["model"]["value"]
    bits = loss / math.log(2) * split["test"].tokens / split["test"].document_bytes.sum()
    assert found["bits_per_byte"]["model"]["value"] == pytest.approx(bits)
    assert found["perplexity"]["model"]["value"] == pytest.approx(math.exp(loss))
    for entry in found.values():
        assert entry["model"]["low"] < entry["model"]["value"] < entry["model"]["high"]


def test_a_byte_is_a_byte_where_characters_have_several(model, tmp_path):
    shards = write(tmp_path, model.tokenizer, ["éé the cat", "ü"])
    assert shards.document_bytes.tolist() == [12, 2]
    losses, _ = causal_losses(model.network, shards, stride=None, max_tokens=None, runtime=CPU)
    assert metrics_of(model, shards)["bits_per_byte"]["model"]["value"] == pytest.approx(
        losses.sum() / math.log(2) / 14
    )


def test_a_limit_stops_after_so_many_tokens(model, split):
    whole, _ = causal_losses(model.network, split["test"], stride=None, max_tokens=None, runtime=CPU)
    some, _ = causal_losses(model.network, split["test"], stride=None, max_tokens=100, runtime=CPU)
    np.testing.assert_allclose(some, whole[:100], atol=1e-5)
    limited = Evaluate(bootstrap=100, max_tokens=100)
    found = metrics_of(model, split["test"], training=split["train"], settings=limited)
    assert found["loss"]["model"]["value"] == pytest.approx(whole[:100].mean(), rel=1e-6)


def test_without_a_token_before_documents_places_stay_aligned(model, tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    letters = sorted(set("".join(TEXTS)))
    backend = Backend(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = load_tokenizer(tmp_path / "tokenizer.json")
    shards = write(tmp_path, plain, TEXTS, end_of_document=False)
    assert shards.begin_id is None and plain.vocab_size <= model.config.vocab_size
    losses, places = causal_losses(model.network, shards, stride=None, max_tokens=None, runtime=CPU)
    first = set(shards.document_starts[:-1].tolist())
    assert places.tolist() == [place for place in range(shards.tokens) if place not in first]
    expected = by_hand(model.network, shards.document(1))
    np.testing.assert_allclose(losses[len(TEXTS[0]) - 1 :][: len(expected)], expected, atol=1e-5)
    found = metrics_of(model, shards, training=shards)
    size = model.config.vocab_size
    unigram = Unigram.fit(shards.window(0, shards.tokens), vocab_size=size).log_probs(shards.window(0, shards.tokens))
    assert found["loss"]["baselines"]["unigram"]["value"] == pytest.approx(-unigram[places].mean())


@pytest.mark.parametrize("task", ["masked_lm", "denoise"])
def test_accuracy_and_loss_of_predictions_are_direct_counts(finished_runs, task):
    place = finished_runs(task)
    loaded, recipe = formary.load(place.model), read(place.recipe)
    made = pretraining_task(task)(recipe, loaded.tokenizer)
    shards = TokenShards.open(place.run_folder / "data" / "tokens" / "test")
    hits, loss, count, common = 0, 0.0, 0, 0
    train = TokenShards.open(place.run_folder / "data" / "tokens" / "train")
    commonest = int(np.bincount(train.window(0, train.tokens)).argmax())
    with torch.inference_mode():
        for batch in made.validation_batches(shards, max_tokens=None):
            if task == "masked_lm":
                hidden = loaded.network(batch["tokens"], mask=batch["mask"], types=batch["types"])
            else:
                hidden = loaded.network(batch["tokens"], batch["decoder_tokens"], source_mask=batch["mask"])
            logits = loaded.network.head(hidden)
            logits[..., sorted(loaded.tokenizer.special_ids)] = -torch.inf  # nobody guesses a mark for a word
            for row, column in (batch["targets"] != IGNORED).nonzero().tolist():
                target = int(batch["targets"][row, column])
                if target in loaded.tokenizer.special_ids:  # known beforehand: not scored
                    continue
                hits += int(logits[row, column].argmax()) == target
                common += target == commonest
                loss -= float(logits[row, column].log_softmax(-1)[target])
                count += 1
    found = {
        entry["metric"]: entry for entry in json.loads((place.run_folder / "evaluation.json").read_text())["metrics"]
    }
    assert found["accuracy"]["model"]["value"] == pytest.approx(hits / count)
    assert found["accuracy"]["baselines"]["commonest token"]["value"] == pytest.approx(common / count)
    assert found["loss"]["model"]["value"] == pytest.approx(loss / count, rel=1e-5)


def test_verdicts_point_the_right_way(model, split):
    cheating = metrics_of(model, split["test"], training=split["test"])["loss"]  # the baseline has seen the test text
    assert cheating["baselines"]["5-gram"]["high"] < cheating["model"]["low"]
    assert cheating["verdicts"]["5-gram"] == "worse" and "worse than 5-gram" in cheating["says"]
    with torch.no_grad():  # a head that says nothing is uniform, and worse than any count
        blank = formary.load(model.folder)
        for weight in blank.network.head.parameters():
            weight.zero_()
    nothing = metrics_of(blank, split["test"], training=split["train"])["loss"]
    assert nothing["model"]["value"] == pytest.approx(math.log(blank.config.vocab_size), rel=1e-5)
    assert nothing["verdicts"] == {"unigram": "worse", "5-gram": "worse"}


def test_evaluate_gives_the_same_figures_as_its_parts(finished, model, split):
    made = pretraining_task("causal_lm")(read(finished.recipe), model.tokenizer)
    whole = evaluate(
        made, model.network, split["test"], training=split["train"], settings=SETTINGS, runtime=CPU, split="test"
    )
    assert whole["split"] == "test"
    assert {entry["metric"]: entry for entry in whole["metrics"]} == metrics_of(
        model, split["test"], training=split["train"]
    )
    assert whole["metrics"] == json.loads((finished.run_folder / "evaluation.json").read_text())["metrics"]

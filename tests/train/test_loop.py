"""The loop: it learns, its result does not depend on how a batch is cut, and a stopped run resumes bit for bit."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from rich.console import Console

from formary.data.shards import TokenShards, write_tokens
from formary.data.tokenizer import train as train_tokenizer
from formary.errors import FormaryError, RecipeError
from formary.model.topologies import build
from formary.recipe import schema
from formary.recipe.reading import parse
from formary.tasks.registry import pretraining_task
from formary.train.loop import Interrupted, gradient, total_steps, train
from formary.train.machine import Runtime

CPU = Runtime(device=torch.device("cpu"), precision="float32", threads=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory, words):
    """Shards of a little language for every task, and a way to make its recipe."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 120), ("validation", 20)):
        texts = [" ".join(rng.choice(words, 30)) + ".\n" for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


PRESET = {"causal_lm": "gpt-mini", "masked_lm": "bert-mini", "denoise": "seq2seq-mini"}


def setting(place, task="causal_lm", **overrides):
    changes = [f"train.{key}={value}" for key, value in overrides.items()]
    recipe = parse(
        f"""
        name: tiny
        task: {task}
        data: {{sources: [x], words: tokenizer, tokenizer: {{kind: characters}}}}
        model: {{preset: {PRESET[task]}, size: 1x32}}
        train:
          {{steps: 12, batch: 4, context: 32, validate_every: 4, save_every: 3, optimiser: {{lr: 0.01}}}}
        """,
        overrides=changes,
    )
    texts = [json.loads(line)["text"] for line in (place / "train.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, recipe.data.tokenizer, task=task)
    shards = []
    for split in ("train", "validation"):
        folder = place / f"tokens-{task}-{split}"
        if not folder.exists():
            write_tokens(
                place / f"{split}.jsonl", folder, tokenizer, words="tokenizer", end_of_document=task == "causal_lm"
            )
        shards.append(TokenShards.open(folder))
    made = pretraining_task(task)(recipe, tokenizer)
    return recipe, made, build(made.model_config(), seed=0), shards


def run(place, folder, task="causal_lm", **overrides):
    recipe, made, network, (training, validation) = setting(place, task, **overrides)
    progress = train(
        made.loss,
        network,
        batches=made.training_batches(training),
        validation=lambda: made.validation_batches(validation, max_tokens=recipe.train.validation_tokens),
        settings=recipe.train,
        runtime=CPU,
        run=folder,
        checkpoints=folder / "checkpoints",
        console=Console(quiet=True),
    )
    return network, progress


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "denoise"])
def test_every_pretraining_task_learns(place, tmp_path, task):
    _, progress = run(place, tmp_path, task, steps=60, validate_every=20)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert losses[-1] < losses[0] < 3.6
    assert progress.best_loss == min(losses)
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("switch", [{}, {"objective.next_sentence": "true"}, {"objective.whole_words": "true"}])
def test_masked_lm_learns_with_each_of_its_switches(place, tmp_path, switch):
    _, progress = run(place, tmp_path, "masked_lm", steps=8, **switch)
    assert progress.step == 8 and np.isfinite(progress.best_loss)


def test_a_model_of_packed_documents_that_do_not_see_each_other_learns(place, tmp_path):
    _, progress = run(place, tmp_path, steps=8, **{"objective.cross_documents": "false"})
    assert np.isfinite(progress.best_loss)


@pytest.mark.parametrize(
    "extra", [{}, {"ema": 0.9}, {"optimiser.name": "muon"}, {"ramp": "{first: 8, share: 0.9}"}], ids=str
)
def test_an_interrupted_run_ends_with_the_same_bytes(place, tmp_path, extra):
    whole, _ = run(place, tmp_path / "whole", **extra)

    recipe, made, network, (training, validation) = setting(place, **extra)
    calls = []

    def loss(network, batch):
        if network.training:
            calls.append(1)
            if len(calls) == 8:
                os.kill(os.getpid(), signal.SIGTERM)
        return made.loss(network, batch)

    arguments = {
        "batches": made.training_batches(training),
        "validation": lambda: made.validation_batches(validation, max_tokens=None),
        "settings": recipe.train,
        "runtime": CPU,
        "run": tmp_path / "cut",
        "checkpoints": tmp_path / "cut" / "checkpoints",
        "console": Console(quiet=True),
    }
    with pytest.raises(Interrupted, match="stopped at step 8 and saved"):
        train(loss, network, **arguments)
    resumed = build(made.model_config(), seed=99)
    progress = train(made.loss, resumed, **arguments)

    assert progress.step == 12
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(9) == 1


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "denoise"])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(place, task):
    gradients = []
    for pieces in (4, 1, 3):
        recipe, made, network, (training, _) = setting(place, task, micro_batch=pieces, clip="null")
        loss, count, norm = gradient(made.loss, network, made.training_batches(training).batch(0), recipe.train, CPU)
        gradients.append([loss, count, norm, *(p.grad for p in network.parameters() if p.grad is not None)])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_the_gradient_is_clipped_to_the_norm_asked_for(place):
    recipe, made, network, (training, _) = setting(place, clip=0.01)
    _, _, norm = gradient(made.loss, network, made.training_batches(training).batch(0), recipe.train, CPU)
    assert norm > 0.01
    total = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    assert total.item() == pytest.approx(0.01, rel=1e-4)


def test_training_stops_early_and_keeps_the_best(place, tmp_path):
    network, progress = run(
        place, tmp_path, steps=200, validate_every=2, patience=2, **{"optimiser.lr": 3.0, "clip": "null"}
    )
    assert progress.step < 200
    assert progress.best_step <= progress.step - 4
    best = tmp_path / "checkpoints" / f"step-{progress.best_step:08d}"
    assert best.exists()
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


def test_steps_that_are_not_finite_are_skipped_and_too_many_end_the_run(place, tmp_path):
    recipe, made, network, (training, _) = setting(place, steps=50)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    with pytest.raises(FormaryError, match="training diverged: 10 steps in a row were skipped, and 3 roll-backs"):
        train(
            lambda network, batch: (made.loss(network, batch)[0] * float("nan"), torch.tensor(1)),
            network,
            batches=made.training_batches(training),
            validation=None,
            settings=recipe.train,
            runtime=CPU,
            run=tmp_path,
            checkpoints=tmp_path / "checkpoints",
            console=Console(quiet=True),
        )
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


def test_steps_come_from_steps_or_epochs_never_both(place):
    _, made, _, (training, _) = setting(place)
    batches = made.training_batches(training)
    assert total_steps(schema.Train(epochs=2), batches) == 2 * batches.steps_per_epoch
    assert total_steps(schema.Train(steps=7), batches) == 7
    with pytest.raises(RecipeError, match="one of them"):
        total_steps(schema.Train(steps=7, epochs=1), batches)

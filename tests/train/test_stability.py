"""Harmful steps: spikes are told from noise, training goes back with a smaller rate, and what happened is kept."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from formary.errors import FormaryError
from formary.model.topologies import build
from formary.recipe.presets import preset
from formary.recipe.schema import Stability, Train
from formary.train import checkpoint
from formary.train.loop import gradient, train
from formary.train.machine import Runtime
from formary.train.stability import Guard, Running, incidents_of, post_mortem

CPU = Runtime(device=torch.device("cpu"), precision="float32", threads=1)
SETTINGS = {
    "steps": 12,
    "batch": 4,
    "context": 32,
    "validate_every": 4,
    "save_every": 3,
    "optimiser": {"lr": 0.01},
    "schedule": {"name": "constant", "warmup": 0},
}


def network():
    return build(preset("gpt-mini", vocab_size=16, context=32, size="1x32", switches={}), seed=0)


def loss_of(network, batch):
    tokens = batch["tokens"]
    logits = network.head(network(tokens[:, :-1]))
    targets = tokens[:, 1:]
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), torch.tensor(targets.numel())


def batch_of(step):
    return {"tokens": torch.randint(16, (4, 33), generator=torch.Generator().manual_seed(step))}


def test_the_running_mean_and_spread_are_exact_while_everything_is_remembered():
    values = np.random.default_rng(0).normal(3, 2, 90)
    running = Running()
    for value in values:
        running.add(float(value))
    assert running.mean == pytest.approx(values.mean()) and running.variance == pytest.approx(values.var())


def test_they_forget_what_is_long_past():
    running = Running()
    for value in [100.0] * 50 + [1.0] * 2000:
        running.add(value)
    assert running.mean == pytest.approx(1, abs=0.01) and running.variance < 0.1


def warmed(spikes=6.0, steps=200):
    rng, guard = np.random.default_rng(1), Guard(Stability(), spikes=spikes)
    for loss, norm in zip(rng.normal(3, 0.1, steps), np.exp(rng.normal(0, 0.3, steps))):
        assert guard.judge(float(loss), float(norm)) is None
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "word"), [(5.0, 1.0, "loss 5 is"), (3.0, 40.0, "gradient norm 40 is"), (math.nan, 1.0, "finite")]
)
def test_a_spike_in_the_loss_or_the_gradient_is_named(loss, norm, word):
    assert word in warmed().judge(loss, norm)


def test_a_gradient_that_clipping_tames_is_no_spike():
    assert warmed().judge(3.0, 10.0) is None


def test_noise_and_a_falling_loss_are_no_spikes():
    guard = warmed()
    for step in range(500):
        assert guard.judge(3 - step / 200, 1.0) is None


def test_without_a_limit_only_what_is_not_finite_is_skipped():
    guard = warmed(spikes=None)
    assert guard.judge(1e6, 1e6) is None and guard.judge(math.inf, 1.0)


def test_a_lasting_change_is_taken_for_the_new_state_of_things():
    guard = warmed()
    judged = [guard.judge(4.5, 1.0) for _ in range(50)]
    assert judged[0] and judged[-1] is None


def test_what_the_guard_remembers_goes_into_a_checkpoint_and_comes_back():
    guard = warmed()
    guard.judge(9.0, 1.0)
    guard.rolled_back(2)
    other = Guard(Stability(), spikes=6.0)
    other.load_state(json.loads(json.dumps(guard.state())))
    assert other.memory == guard.memory and other.lr_factor == 0.25


def go(folder, loss, describe=None, **changes):
    return train(
        loss,
        network(),
        batches=SimpleNamespace(batch=batch_of, steps_per_epoch=10),
        validation=lambda: [batch_of(1000)],
        settings=Train.model_validate(SETTINGS | changes),
        runtime=CPU,
        run=folder,
        checkpoints=folder / "checkpoints",
        console=Console(quiet=True),
        describe=describe,
    )


def failing_while(condition, factor=math.nan):
    """A loss that is spoilt in training while the condition holds of the call's number."""
    calls = iter(range(10**6))

    def failing(network, batch):
        summed, count = loss_of(network, batch)
        spoilt = network.training and condition(next(calls))
        return (summed * factor if spoilt else summed), count

    return failing


def test_many_bad_steps_in_a_row_bring_back_the_last_good_checkpoint_and_a_smaller_rate(tmp_path):
    progress = go(tmp_path, failing_while(lambda call: 7 <= call < 11), stability={"roll_back_after": 4})
    assert progress.step == 12
    told = incidents_of(tmp_path)
    assert [one["step"] for one in told] == [7, 8, 9, 10, 6]
    assert told[-1]["why"] == "rolled back" and told[-1]["lr_factor"] == 0.5
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = {record["step"]: record["lr"] for record in records if "lr" in record}
    assert [rates[step] for step in (6, 7, 12)] == [0.01, 0.005, 0.005]
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)


def test_checkpoints_of_bad_steps_are_not_gone_back_to(tmp_path):
    settings = {"stability": {"roll_back_after": 4}, "save_every": 1, "keep": 20}
    go(tmp_path, failing_while(lambda call: 7 <= call < 11), **settings)
    assert incidents_of(tmp_path)[-1]["step"] == 7
    held = {step: checkpoint.load(checkpoint.path_of(tmp_path / "checkpoints", step)) for step in (6, 7, 8)}
    assert [held[step].state["guard"]["roll_backs"] for step in (6, 7, 8)] == [0, 1, 1]
    assert all(saved.state["guard"]["in_a_row"] == 0 for saved in held.values())


def test_a_training_without_a_checkpoint_goes_on_from_where_it_is_with_a_smaller_rate(tmp_path):
    go(tmp_path, failing_while(lambda call: call < 4), stability={"roll_back_after": 4}, save_every=100)
    assert [one["step"] for one in incidents_of(tmp_path)] == [0, 1, 2, 3, 3]


def test_what_stays_bad_ends_the_run_with_advice(tmp_path):
    with pytest.raises(FormaryError, match=r"2 roll-backs .* did not help; lower train\.optimiser\.lr"):
        go(tmp_path, failing_while(lambda call: call > 5), stability={"roll_back_after": 3, "roll_backs": 2})


def test_a_spike_is_skipped_and_leaves_the_weights_alone(tmp_path):
    class Scaled:
        """Steps of a loss that is 50 times as large once."""

        seen = None

        def __call__(self, network, batch):
            summed, count = loss_of(network, batch)
            if network.training and torch.equal(batch["tokens"], batch_of(110)["tokens"]):
                self.before = next(network.parameters()).detach().clone()
                return summed * 50, count
            if network.training and torch.equal(batch["tokens"], batch_of(111)["tokens"]):
                self.after = next(network.parameters()).detach().clone()
            return summed, count

    loss, lines = Scaled(), []
    train(
        loss,
        network(),
        batches=SimpleNamespace(batch=batch_of, steps_per_epoch=10),
        validation=None,
        settings=Train.model_validate(SETTINGS | {"steps": 115, "validate_every": 100}),
        runtime=CPU,
        run=tmp_path,
        checkpoints=tmp_path / "checkpoints",
        console=SimpleNamespace(print=lambda text, **_: lines.append(str(text)), is_terminal=False),
        spikes=6.0,
    )
    assert torch.equal(loss.before, loss.after)
    assert [one["step"] for one in incidents_of(tmp_path)] == [110]
    assert any("step 110: loss" in line and "standard deviations" in line for line in lines)


def test_a_skipped_step_is_told_with_its_texts_and_the_gradient_of_every_layer(tmp_path):
    loss = failing_while(lambda call: call == 5, factor=math.inf)
    go(tmp_path, loss, describe=lambda batch: [f"text {row[0]}" for row in batch["tokens"]])
    (told,) = incidents_of(tmp_path)
    assert told["step"] == 5 and told["shape"] == [4, 33] and len(told["worst"]) == 3
    assert all(one["text"].startswith("text ") and one["loss"] > 0 for one in told["worst"])
    assert any(".blocks.0" in layer for layer in told["layers"]) and None in told["layers"].values()


def test_telling_of_a_step_changes_nothing():
    made, batch = network(), batch_of(0)
    made.train()
    _, _, norm = gradient(loss_of, made, batch, Train.model_validate(SETTINGS | {"clip": 0.01}), CPU)
    state = {name: one.grad.clone() for name, one in made.named_parameters() if one.grad is not None}
    random = torch.get_rng_state()
    told = post_mortem(loss_of, made, batch, CPU, norm=norm, describe=None)
    assert torch.equal(random, torch.get_rng_state()) and made.training
    assert all(torch.equal(state[name], one.grad) for name, one in made.named_parameters() if one.grad is not None)
    assert math.sqrt(sum(size**2 for size in told["layers"].values())) == pytest.approx(norm, rel=1e-3)
    with torch.no_grad():
        losses = [loss_of(made.eval(), {"tokens": batch["tokens"][i : i + 1]}) for i in range(4)]
    worst = max(float(summed) / int(count) for summed, count in losses)
    assert told["worst"][0]["loss"] == pytest.approx(worst, rel=1e-3)

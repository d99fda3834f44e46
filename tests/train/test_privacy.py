"""Differentially private training: Opacus' epsilon, gradients as a loop over rows makes them, noise as announced."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from formary.data.tokenizer import train as train_tokenizer
from formary.errors import DataError, FormaryError, RecipeError
from formary.model.topologies import build
from formary.recipe import schema
from formary.recipe.reading import parse
from formary.tasks.protocol import Example
from formary.tasks.registry import labelled_task, pretraining_task
from formary.train.machine import Runtime
from formary.train.tuning import prepare

pytest.importorskip("opacus", reason="differentially private training needs Opacus")

from formary.train.privacy import PrivateTraining, check, one_of_each

CPU = Runtime(device=torch.device("cpu"), precision="float32", threads=1)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "one", "dog", "ran", "after", "two", "birds", "and", "they"]


def recipe_of(task, *overrides):
    return parse(
        f"""
        name: tiny
        task: {task}
        data: {{sources: [x], tokenizer: {{kind: bytes}}}}
        model: {{preset: {"gpt-mini" if task == "causal_lm" else "bert-mini"}, size: 2x32, switches: {{heads: 2}}}}
        train: {{steps: 12, batch: 4, context: 48, optimiser: {{lr: 0.01}}}}
        privacy: {{epsilon: 8, delta: 1.0e-3, seed: 3}}
        """,
        overrides=overrides,
    )


def rows_of(task, count=12):
    rng = np.random.default_rng(0)
    texts = [[str(word) for word in rng.choice(WORDS, rng.integers(2, 7))] for _ in range(count)]
    if task == "tag":
        return [{"tokens": words, "tags": ["A" if "a" in word else "B" for word in words]} for words in texts]
    return [{"text": " ".join(words), "label": "x" if "a" in words[0] else "y"} for words in texts]


def setting(task, *overrides, switches=None):
    """A recipe, its task, a network without dropout and one batch of rows of different length."""
    recipe = recipe_of(task, *overrides)
    for name, value in {"dropout": 0.0, **(switches or {})}.items():
        recipe.model.switches[name] = value
    rows = rows_of(task)
    tokenizer = train_tokenizer([], recipe.data.tokenizer, task="causal_lm" if task == "causal_lm" else "masked_lm")
    if task == "causal_lm":
        made = pretraining_task(task)(recipe, tokenizer)
        examples = [Example(np.array(tokenizer.encode(row["text"]), dtype=np.int64)) for row in rows]
        batch = made.collate_documents(examples)
    else:
        made = labelled_task(task).learn(recipe, tokenizer, rows, start=None)
        batch = made.collate(made.examples(rows, targets=True))
    network = build(made.model_config(), seed=0)
    if recipe.train.tune.method != "full":
        prepare(network, recipe.train.tune, seed=1)
        for name, parameter in network.named_parameters():  # at 0 the updates' A would have no gradient
            if "lora_b" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    return recipe, made, network.train(), batch


def clipped_sum(task, network, batch, clip):
    """The oracle: rows one by one, each row's mean loss, its gradient clipped by hand."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    sums, norms = [torch.zeros_like(parameter) for parameter in trained], []
    for row in range(len(batch["tokens"])):
        loss, count = task.loss(network, {name: tensor[row : row + 1] for name, tensor in batch.items()})
        gradients = torch.autograd.grad(loss / count, trained, allow_unused=True)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
        norms.append(norm)
        for total, gradient in zip(sums, gradients):
            if gradient is not None:
                total += gradient * min(1.0, clip / norm)
    return sums, norms


LLAMA = {"norm": "rms", "position": "rope", "gated": True, "activation": "silu", "qk_norm": True}
CASES = {
    "classify": ("classify", (), {}),
    "tag": ("tag", (), {}),
    "causal_lm": ("causal_lm", (), {}),
    "causal_lm, untied": ("causal_lm", (), {"tied_embeddings": False}),
    "causal_lm, rms and rope": ("causal_lm", (), LLAMA),
    "causal_lm, values and cap": ("causal_lm", (), {**LLAMA, "value_embeddings": 1, "logit_cap": 0.3}),
    "causal_lm, lora": ("causal_lm", ("train.tune.method=lora", "train.tune.rank=2"), LLAMA),
    "classify, lora": ("classify", ("train.tune.method=lora", "train.tune.rank=2"), {}),
    "classify, head": ("classify", ("train.tune.method=head",), {}),
    "tag, last": ("tag", ("train.tune.method=last", "train.tune.layers=1"), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("piece", [None, 5])
def test_the_clipped_gradients_of_rows_add_up_as_in_a_plain_loop(case, piece):
    name, overrides, switches = CASES[case]
    _, task, network, batch = setting(name, *overrides, switches=switches)
    _, norms = clipped_sum(task, network, batch, 1.0)
    clip = float(np.median(norms))  # half of the rows are cut
    expected, _ = clipped_sum(task, network, batch, clip)
    private = PrivateTraining(schema.Privacy(delta=1e-3, clip=clip), rows=100, expected=10).plan(5)
    private.noise_multiplier = 0.0
    private.attach(network, micro_batch=piece)
    private.gradient(task.loss, network, batch, None, CPU)
    for parameter, total in zip([p for p in network.parameters() if p.requires_grad], expected):
        torch.testing.assert_close(parameter.grad * 10, total, rtol=1e-4, atol=1e-6)
    private.detach()
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_gives_the_same_gradients_up_to_its_rounding(case):
    name, overrides, switches = CASES[case]
    _, task, network, batch = setting(name, *overrides, switches=switches)
    half = dataclasses.replace(CPU, precision="bfloat16")
    with half.autocast():
        expected, _ = clipped_sum(task, network, batch, 1e9)
    private = PrivateTraining(schema.Privacy(delta=1e-3, clip=1e9), rows=100, expected=10).plan(5)
    private.noise_multiplier = 0.0
    private.attach(network)
    private.gradient(task.loss, network, batch, None, half)
    found = torch.cat([p.grad.flatten() * 10 for p in network.parameters() if p.requires_grad])
    expected = torch.cat([total.flatten() for total in expected])
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_is_what_opacus_own_engine_counts(accountant):
    from opacus import PrivacyEngine

    settings = schema.Privacy(epsilon=3.0, delta=1e-4, accountant=accountant)
    private = PrivateTraining(settings, rows=1000, expected=50).plan(60)
    for _ in range(40):
        private.accountant.step(noise_multiplier=private.noise_multiplier, sample_rate=private.sample_rate)
    engine = PrivacyEngine(accountant=accountant)
    model = torch.nn.Linear(2, 1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(1000, 2)), batch_size=50)
    model, optimiser, data = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data,
        noise_multiplier=private.noise_multiplier,
        max_grad_norm=1.0,
    )
    steps = 0
    while steps < 40:
        for (rows,) in data:
            optimiser.zero_grad()
            model(rows).square().mean().backward()
            optimiser.step()
            steps += 1
            if steps == 40:
                break
    assert private.epsilon == pytest.approx(engine.get_epsilon(1e-4), abs=1e-6)
    for _ in range(20):
        private.accountant.step(noise_multiplier=private.noise_multiplier, sample_rate=private.sample_rate)
    assert 3.0 - 0.05 < private.epsilon <= 3.0


def test_epsilon_of_full_batches_is_that_of_the_gaussian_mechanism():
    """Without sampling the RDP bound has a closed form: min over a of a T / (2 s^2) + conversion (Canonne et al. 2020)."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(4.0, 1.0, 10)]
    orders = [1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64))

    def bound(a):
        return a * 10 / (2 * 16.0) - (math.log(1e-5) + math.log(a)) / (a - 1) + math.log((a - 1) / a)

    assert accountant.get_epsilon(1e-5) == pytest.approx(min(map(bound, orders)), abs=1e-6)


def test_the_noise_has_the_announced_standard_deviation():
    _, task, network, batch = setting("classify")
    private = PrivateTraining(schema.Privacy(delta=1e-3, clip=0.5), rows=100, expected=10).plan(5)
    private.attach(network)
    empty = {name: tensor[:0] for name, tensor in batch.items()}
    private.gradient(task.loss, network, empty, None, CPU)
    noise = torch.cat([parameter.grad.flatten() for parameter in network.parameters()]) * 10
    announced = private.noise_multiplier * 0.5
    assert len(noise) > 10_000
    assert float(noise.std()) == pytest.approx(announced, rel=4 / math.sqrt(2 * len(noise)))
    assert abs(float(noise.mean())) < 4 * announced / math.sqrt(len(noise))
    first = noise.clone()
    private.gradient(task.loss, network, empty, None, CPU)
    second = torch.cat([parameter.grad.flatten() for parameter in network.parameters()]) * 10
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / math.sqrt(len(noise))


def test_one_row_moves_the_gradient_by_at_most_clip():
    _, task, network, batch = setting("causal_lm", switches=LLAMA)
    private = PrivateTraining(schema.Privacy(delta=1e-3, clip=0.01), rows=100, expected=10).plan(5)
    private.noise_multiplier = 0.0
    private.attach(network)
    found = []
    for rows in (slice(0, 6), slice(0, 5)):
        private.gradient(task.loss, network, {name: tensor[rows] for name, tensor in batch.items()}, None, CPU)
        found.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]) * 10)
    assert 0.009 < float((found[0] - found[1]).norm()) <= 0.01 * 1.0001


def test_a_row_whose_gradient_is_not_finite_is_left_out():
    _, task, network, batch = setting("classify")
    private = PrivateTraining(schema.Privacy(delta=1e-3), rows=100, expected=10).plan(5)
    private.noise_multiplier = 0.0
    private.attach(network)
    private.gradient(task.loss, network, {name: tensor[1:] for name, tensor in batch.items()}, None, CPU)
    without = [parameter.grad.clone() for parameter in network.parameters()]

    def poison(module, gradients):
        gradient = gradients[0].clone()
        gradient[0] = float("nan")
        return (gradient,)

    handle = network.head.output.register_full_backward_pre_hook(poison)
    loss, _, norm = private.gradient(task.loss, network, batch, None, CPU)
    handle.remove()
    assert math.isfinite(loss) and math.isfinite(norm)
    for parameter, expected in zip(network.parameters(), without):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_every_row_is_drawn_by_itself_and_the_same_again_after_a_resume():
    examples = [Example(np.arange(2 + row % 5), row=row) for row in range(200)]
    private = PrivateTraining(schema.Privacy(delta=1e-3), rows=200, expected=20).plan(50)
    batches = private.batches(one_of_each(examples, 200), lambda found: {"tokens": torch.zeros(len(found), 1)})
    counts = np.zeros(200)
    sizes = []
    for step in range(400):
        rows = batches.rows(step)
        counts[rows] += 1
        sizes.append(len(rows))
    assert np.mean(sizes) == pytest.approx(20, abs=4 * math.sqrt(20 * 0.9 / 400))
    assert np.var(sizes) == pytest.approx(18, rel=0.35)
    assert abs(counts - 40).max() < 5 * math.sqrt(40 * 0.9)
    other = PrivateTraining(schema.Privacy(delta=1e-3), rows=200, expected=20).plan(50)
    again = other.batches(batches.draw, batches.collate)
    assert not all(np.array_equal(batches.rows(step), again.rows(step)) for step in range(5))
    private.accountant.step(noise_multiplier=private.noise_multiplier, sample_rate=0.1)
    other.load_state(private.state())
    assert all(np.array_equal(batches.rows(step), again.rows(step)) for step in range(50))
    assert other.epsilon == private.epsilon > 0


def test_an_empty_draw_is_a_batch_without_rows():
    _, task, *_ = setting("classify")
    examples = task.examples(rows_of("classify"), targets=True)
    private = PrivateTraining(schema.Privacy(delta=1e-3), rows=len(examples), expected=1).plan(50)
    private.sample_rate = 0.0
    batch = private.batches(one_of_each(examples, len(examples)), task.collate).batch(0)
    assert batch["tokens"].shape[0] == 0 == batch["targets"].shape[0]


def test_a_row_in_several_windows_gives_one_of_them():
    examples = [Example(np.arange(2), row=row) for row in (0, 0, 0, 2)]
    draw = one_of_each(examples, 3)
    rng = np.random.default_rng(0)
    assert {id(draw(0, rng)) for _ in range(50)} == {id(example) for example in examples[:3]}
    assert draw(1, rng) is None and draw(2, rng) is examples[3]


@pytest.mark.parametrize(
    ("task", "overrides", "field"),
    [
        ("embed", (), "task"),
        ("classify", ("train.batch=auto",), "train.batch"),
        ("classify", ("train.optimiser.lr=auto",), "train.optimiser.lr"),
        ("classify", ("data.tokenizer.kind=bpe",), "data.tokenizer"),
        ("classify", ("train.tune.lora_dropout=0.1",), "train.tune.lora_dropout"),
        ("classify", ("train.objective.class_weights=balanced",), "class_weights"),
        ("tag", ("train.objective.transitions=crf",), "transitions"),
        ("classify", ("data.augment.delete=0.1",), "data.augment"),
        ("classify", ("data.clean.near_duplicates=0.8",), "near_duplicates"),
        ("classify", ("machine.compile=true",), "machine.compile"),
    ],
)
def test_what_would_break_the_promise_is_refused(task, overrides, field):
    check(recipe_of("classify"))
    with pytest.raises(RecipeError, match=field):
        check(recipe_of(task, *overrides))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="one process"):
        check(recipe_of("classify"))


def test_a_delta_that_would_give_whole_rows_away_is_refused():
    with pytest.raises(DataError, match=r"privacy\.delta"):
        PrivateTraining(schema.Privacy(delta=1e-3), rows=1000, expected=10)
    with pytest.raises(DataError, match=r"train\.batch"):
        PrivateTraining(schema.Privacy(delta=1e-4), rows=900, expected=900)


def test_a_weight_that_is_used_past_its_layer_is_refused():
    _, task, network, batch = setting("classify")

    def past(network, part):
        loss, count = task.loss(network, part)
        return loss + network.pooler.dense.weight.sum(), count

    private = PrivateTraining(schema.Privacy(delta=1e-3), rows=100, expected=10).plan(5)
    private.attach(network)
    with pytest.raises(FormaryError, match="outside its layer"):
        private.gradient(past, network, batch, None, CPU)

"""Preference: the loss of the paper, a reference that is frozen, and pairs that are learned."""

import math

import pytest
import torch

from formary.data.tokenizer import train as train_tokenizer
from formary.errors import DataError, FormaryError, RecipeError
from formary.evaluate.labelled import SUITES
from formary.infer.answers import answers
from formary.infer.loaded import Model
from formary.model.topologies import build, with_head
from formary.recipe.presets import preset
from formary.recipe.reading import parse
from formary.recipe.schema import Evaluate
from formary.tasks.preference import Preference
from formary.tasks.protocol import ReferringTask

ROWS = [
    {"prompt": "hello", "chosen": "good day", "rejected": "go away, I say"},
    {"prompt": "help me", "chosen": "of course I will", "rejected": "no"},
    {"prompt": "bye", "chosen": "see you", "rejected": "at last"},
]


def made(*, rows=ROWS, context=64, beta=0.1, smoothing=0.0, start=True):
    recipe = parse(
        f"""
        name: t
        task: preference
        data: {{sources: [x], tokenizer: {{kind: bytes}}}}
        model: {{preset: gpt-mini, start: somewhere}}
        train: {{batch: 4, context: {context}, label_smoothing: {smoothing}, objective: {{beta: {beta}}}}}
        """
    )
    tokenizer = train_tokenizer([""], recipe.data.tokenizer, task=Preference.special_tokens(recipe))
    config = preset("gpt-mini", vocab_size=tokenizer.vocab_size, context=context, size="2x64")
    task = Preference.learn(recipe, tokenizer, rows, start=config if start else None)
    return task, with_head(build(config, seed=0), task.head(config), seed=0)


def by_hand(network, example):
    """Log-likelihoods of both answers, one token at a time."""
    found = []
    for side in (example.target.chosen, example.target.rejected):
        with torch.no_grad():
            table = network.head(network(torch.from_numpy(side.tokens)[None]))[0].log_softmax(-1)
        places = [place for place, learned in enumerate(side.learned) if learned]
        found.append(sum(float(table[place - 1, side.tokens[place]]) for place in places))
    return found


def test_the_loss_is_that_of_the_paper():
    task, start = made(beta=0.3)
    other = build(start.config, seed=5).eval()
    examples = task.examples(ROWS, targets=True)
    task.remember(start.eval(), examples)
    batch = task.collate(examples)
    loss, count = task.loss(other, batch)
    expected = 0.0
    for example in examples:
        (chosen, rejected), (chosen_start, rejected_start) = by_hand(other, example), by_hand(start, example)
        margin = 0.3 * ((chosen - chosen_start) - (rejected - rejected_start))
        expected += math.log1p(math.exp(-margin))
    assert loss.item() == pytest.approx(expected, rel=1e-4) and int(count) == 3


def test_label_smoothing_takes_a_share_of_pairs_for_the_wrong_way_round_while_training():
    task, start = made(smoothing=0.2)
    examples = task.examples(ROWS, targets=True)
    task.remember(start.eval(), examples)
    batch, swapped = task.collate(examples), task.collate(examples)
    for name in ("tokens", "targets"):
        swapped[name], swapped[f"rejected_{name}"] = swapped[f"rejected_{name}"], swapped[name]
    swapped["reference"] = swapped["reference"].flip(1)
    other = build(start.config, seed=5).eval()
    right, wrong = task.loss(other, batch)[0].item(), task.loss(other, swapped)[0].item()
    assert right != pytest.approx(wrong, rel=1e-3)
    assert task.loss(other.train(), batch)[0].item() == pytest.approx(0.8 * right + 0.2 * wrong, rel=1e-5)


def test_at_the_start_every_pair_costs_log_two():
    task, start = made()
    examples = task.examples(ROWS, targets=True)
    task.remember(start, examples)
    assert start.training  # as it was
    loss, count = task.loss(start.eval(), task.collate(examples))
    assert loss.item() / int(count) == pytest.approx(math.log(2), abs=1e-5)


def test_answers_and_their_ends_count_and_earlier_turns_do_not():
    task, _ = made(context=256)
    row = {
        "prompt": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "help me"},
        ],
        "chosen": [{"role": "assistant", "content": "sure"}],
        "rejected": "no",
    }
    (example,) = task.examples([row], targets=True)
    for side, text in ((example.target.chosen, "sure<|im_end|>"), (example.target.rejected, "no<|im_end|>")):
        assert task.tokenizer.decode(side.tokens[side.learned]) == text
        assert task.tokenizer.decode(side.targets[side.targets >= 0]) == text
    assert (example.target.chosen.tokens[:40] == example.target.rejected.tokens[:40]).all()


def test_preferences_are_learned_from_a_frozen_reference():
    task, network = made()
    examples = task.examples(ROWS, targets=True)
    task.remember(network, examples)
    batch = task.collate(examples)
    before = batch["reference"].clone()
    assert isinstance(task, ReferringTask)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-4)
    for _ in range(40):
        loss, count = task.loss(network, batch)
        (loss / count).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert torch.equal(task.collate(examples)["reference"], before)
    given = answers(task, network, ROWS)
    assert [answer["preferred"] for answer in given] == ["chosen"] * 3
    assert all(answer["margin"] > 1 for answer in given)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    task.remember(made()[1], task.examples(turned, targets=True))
    assert [answer["preferred"] for answer in answers(task, network, turned)] == ["rejected"] * 3
    metrics = SUITES["choices"].metrics(
        task,
        ROWS,
        {"model": given, **SUITES["choices"].baselines(task, ROWS, ROWS)},
        Evaluate(bootstrap=100),
        "test, 3 rows",
    )
    assert metrics[0]["metric"] == "preference_accuracy" and metrics[0]["model"]["value"] == 1.0
    assert metrics[0]["baselines"]["the longer text"]["value"] == pytest.approx(1 / 3)
    details = SUITES["choices"].details(task, ROWS, given)
    assert {part["chosen_is"]: part["rows"] for part in details["by_length"]} == {"longer": 1, "not longer": 2}


def test_a_saved_model_prefers_by_mean_log_likelihood_and_still_chats():
    task, network = made()
    network.eval()
    model = Model(network, task.tokenizer, formary={"task": "preference", "settings": task.settings()})
    for answer, example in zip(
        model.predict(ROWS, precision="float32"), task.examples(ROWS, targets=True), strict=True
    ):
        chosen, rejected = by_hand(network, example)
        pair = example.target
        assert answer["margin"] == pytest.approx(
            chosen / pair.chosen.learned.sum() - rejected / pair.rejected.learned.sum(), abs=1e-4
        )
    assert model.task.beta == 0.1
    assert model.chat([{"role": "user", "content": "hello"}], max_tokens=3).finish_reason in ("stop", "length")


def test_gradients_do_not_depend_on_padding():
    task, network = made()
    examples = task.examples(ROWS, targets=True)
    task.remember(network, examples)
    network.eval()

    def gradients(batches):
        network.zero_grad()
        for batch in batches:
            task.loss(network, batch)[0].backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    apart = gradients([task.collate([example]) for example in examples])
    for one, other in zip(gradients([task.collate(examples)]), apart, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("prompt", "chosen"), [("x" * 99, "yes"), ("x" * 99, "y" * 99), ("x", "y" * 99)])
def test_long_rows_are_cut_where_the_prompt_begins_the_same_for_both_answers(prompt, chosen):
    task, _ = made()
    (example,) = task.examples([{"prompt": prompt, "chosen": chosen, "rejected": "no"}], targets=True)
    pair = example.target
    before = [int(side.learned.argmax()) for side in (pair.chosen, pair.rejected)]
    assert before[0] == before[1] and (pair.chosen.tokens[: before[0]] == pair.rejected.tokens[: before[0]]).all()
    assert task.tokenizer.decode(pair.chosen.tokens[: before[0]]).endswith("x<|im_end|>\n<|im_start|>assistant\n")
    assert len(pair.chosen.tokens) == 64 and pair.rejected.learned.sum() == 3
    assert pair.chosen.learned.sum() >= min(32, len(chosen) + 1)
    assert task.notes() == [
        "1 row was longer than the context of 64 tokens and cut to it, where prompts begin; raise train.context to keep more"
    ]


def test_rows_and_models_that_do_not_fit_are_refused_with_what_to_do():
    task, network = made()
    with pytest.raises(RecipeError, match=r"model\.start: task preference changes a model that writes already"):
        made(start=False)
    with pytest.raises(DataError, match=r"training row 2: field 'rejected' holds None"):
        task.examples([ROWS[0], {"prompt": "a", "chosen": "b"}], targets=True, where="training row")
    with pytest.raises(DataError, match=r"row 1: field 'prompt' holds '', neither a text nor messages"):
        task.examples([{**ROWS[0], "prompt": ""}], targets=True)
    with pytest.raises(DataError, match=r"row 1: field 'prompt' has no message by the user"):
        task.examples([{**ROWS[0], "prompt": [{"role": "system", "content": "x"}]}], targets=True)
    with pytest.raises(FormaryError, match="remember must see the starting network"):
        task.loss(network, task.collate(task.examples(ROWS, targets=True)))

"""What the pretraining tasks hide and ask for: masks, spans, next tokens."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formary.data.shards import TokenShards, write_tokens
from formary.data.tokenizer import train as train_tokenizer
from formary.errors import RecipeError
from formary.recipe.reading import parse
from formary.recipe.schema import Ramp
from formary.tasks.cross_entropy import IGNORED
from formary.tasks.denoise import corrupt, noise_mask
from formary.tasks.registry import labelled_task, pretraining_task

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


def made(tmp_path, task, preset, *, kind="characters", context=48, words="tokenizer", **objective):
    changes = [f"train.objective.{key}={json.dumps(value)}" for key, value in objective.items()]
    recipe = parse(
        f"{{name: t, task: {task}, data: {{sources: [x], words: {words}, tokenizer: {{kind: {kind}, vocab_size: 290}}}}, "
        f"model: {{preset: {preset}, size: 1x32}}, train: {{batch: 6, context: {context}}}}}",
        overrides=changes,
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": TEXT * 4}) + "\n" for _ in range(5)))
    tokenizer = train_tokenizer([TEXT], recipe.data.tokenizer, task=task)
    write_tokens(rows, tmp_path / "tokens", tokenizer, words=words, end_of_document=task == "causal_lm")
    return pretraining_task(task)(recipe, tokenizer), tokenizer, TokenShards.open(tmp_path / "tokens")


def test_causal_targets_are_the_next_tokens(tmp_path):
    task, _, shards = made(tmp_path, "causal_lm", "gpt-mini")
    batch = task.training_batches(shards).batch(0)
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


def test_separated_documents_do_not_predict_each_others_first_token(tmp_path):
    task, tokenizer, shards = made(tmp_path, "causal_lm", "gpt-mini", context=200, cross_documents=False)
    batches = task.training_batches(shards)
    steps = [batches.batch(step) for step in range(6)]
    batch = {name: torch.cat([step[name] for step in steps]) for name in steps[0]}
    ends = batch["tokens"] == tokenizer.eos_id
    assert ends.any()
    assert (batch["targets"][ends] == IGNORED).all()
    assert (batch["targets"][~ends] != IGNORED).all()


def ramped(tmp_path, *, context=48, **ramp):
    task, _, shards = made(tmp_path, "causal_lm", "gpt-mini", context=context, cross_documents=False)
    plain = task.training_batches(shards)
    train = task.recipe.train.model_copy(update={"steps": 20, "ramp": Ramp(**ramp)})
    task.recipe = task.recipe.model_copy(update={"train": train})
    return plain, task.training_batches(shards)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.sampled_from([3, 6, 12, 24]), share=st.floats(0.05, 0.95))
def test_a_ramp_shows_the_same_tokens_in_sequences_that_grow_to_the_context(tmp_path, first, share):
    plain, short = ramped(tmp_path, first=first, share=share)
    lengths = []
    for step in range(20):
        batch, whole = short.batch(step), plain.batch(step)
        lengths.append(batch["tokens"].shape[1])
        assert set(batch) == set(whole)
        for name, tensor in whole.items():
            assert torch.equal(batch[name].reshape(tensor.shape), tensor)
            assert batch[name].shape == batch["tokens"].shape
    assert lengths == sorted(lengths) and set(lengths) <= {3, 6, 12, 24, 48}
    assert lengths[0] == first and all(length == 48 for length in lengths[math.ceil(20 * share) :])
    assert all(length < 48 for length in lengths[: math.floor(20 * share)])


def test_a_batch_of_a_ramp_is_a_function_of_its_step(tmp_path):
    _, one = ramped(tmp_path, first=12)
    _, other = ramped(tmp_path, first=12)
    for step in (7, 2, 5, 0):
        assert all(torch.equal(a, b) for a, b in zip(one.batch(step).values(), other.batch(step).values()))


@pytest.mark.parametrize(
    ("first", "context", "says"), [(5, 48, "one of 24, 12, 6, 3"), (48, 48, "24"), (4, 45, "has to be even")]
)
def test_a_ramp_that_does_not_lead_to_the_context_is_refused(tmp_path, first, context, says):
    with pytest.raises(RecipeError, match=f"train.ramp.first.*{says}"):
        ramped(tmp_path, context=context, first=first)


def test_masking_follows_berts_rates_and_hides_only_ordinary_tokens(tmp_path):
    task, tokenizer, shards = made(tmp_path, "masked_lm", "bert-mini")
    batches = task.training_batches(shards)
    chosen = masked = kept = ordinary = 0
    for step in range(150):
        batch = batches.batch(step)
        targets, tokens = batch["targets"], batch["tokens"]
        hidden = targets != IGNORED
        assert not (torch.isin(targets[hidden], torch.tensor(sorted(tokenizer.special_ids)))).any()
        assert (tokens[:, 0] == tokenizer.cls_id).all() and (tokens == tokenizer.sep_id).any(dim=1).all()
        chosen += int(hidden.sum())
        masked += int((tokens[hidden] == tokenizer.mask_id).sum())
        kept += int((tokens[hidden] == targets[hidden]).sum())
        ordinary += int(batch["mask"].sum()) - 2 * len(tokens)
    assert chosen / ordinary == pytest.approx(0.15, abs=0.01)
    assert masked / chosen == pytest.approx(0.8, abs=0.03)
    assert kept / chosen == pytest.approx(0.1, abs=0.03)


def test_whole_words_are_masked_together(tmp_path):
    task, tokenizer, shards = made(tmp_path, "masked_lm", "bert-mini", whole_words=True)
    batches = task.training_batches(shards)
    for step in range(20):
        batch = batches.batch(step)
        for tokens, targets, mask in zip(batch["tokens"], batch["targets"], batch["mask"]):
            original = torch.where(targets == IGNORED, tokens, targets)[mask].tolist()[1:-1]
            hidden = (targets != IGNORED)[mask].tolist()[1:-1]
            text = tokenizer.decode(original)
            if len(text) != len(original):
                continue
            for before, after, one, two in zip(text, text[1:], hidden, hidden[1:]):
                if before.isalpha() and after.isalpha():
                    assert one == two, text


def test_next_sentence_pairs_are_half_true_and_marked_by_type(tmp_path):
    task, tokenizer, shards = made(tmp_path, "masked_lm", "bert-mini", next_sentence=True)
    batches = task.training_batches(shards)
    follows = torch.cat([batches.batch(step)["is_next"] for step in range(60)]).float().mean()
    assert follows.item() == pytest.approx(0.5, abs=0.1)
    batch = batches.batch(0)
    original = torch.where(batch["targets"] == IGNORED, batch["tokens"], batch["targets"])
    for tokens, types, mask in zip(original, batch["types"], batch["mask"]):
        separators = (tokens == tokenizer.sep_id).nonzero().flatten().tolist()
        assert len(separators) == 2 and separators[-1] == int(mask.sum()) - 1
        assert types.tolist() == [int(separators[0] < i <= separators[1]) for i in range(len(types))]


@settings(deadline=None)
@given(length=st.integers(2, 300), density=st.floats(0.05, 0.6), span=st.floats(1, 8), seed=st.integers(0, 1000))
def test_a_corrupted_text_can_be_put_back_together(length, density, span, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50, length)
    noise = noise_mask(length, density, span, rng)
    assert len(noise) == length and not noise[0] and noise.any()
    assert abs(noise.sum() - length * density) <= 1 or noise.sum() in (1, length - 1)
    sentinels = list(range(1000, 1000 + length))
    source, target = corrupt(tokens, noise, sentinels)
    spans = {}
    for token in target:
        if token >= 1000:
            spans[int(token)] = current = []
        else:
            current.append(int(token))
    rebuilt = [piece for token in source for piece in (spans[int(token)] if token >= 1000 else [int(token)])]
    assert rebuilt == tokens.tolist()
    assert list(spans) == sentinels[: len(spans)]


def test_denoising_batches_end_both_sides_and_shift_the_decoder(tmp_path):
    task, tokenizer, shards = made(tmp_path, "denoise", "seq2seq-mini", kind="bpe", context=40)
    batch = task.training_batches(shards).batch(0)
    lengths = batch["mask"].sum(dim=1)
    assert (batch["tokens"].gather(1, (lengths - 1)[:, None]) == tokenizer.eos_id).all()
    for decoder, targets in zip(batch["decoder_tokens"].tolist(), batch["targets"].tolist()):
        wanted = [token for token in targets if token != IGNORED]
        assert wanted[-1] == tokenizer.eos_id and wanted[0] == tokenizer.sentinel_ids[0]
        assert decoder[: len(wanted)] == [tokenizer.pad_id, *wanted[:-1]]


@pytest.mark.parametrize(
    ("task", "preset", "objective", "message"),
    [
        ("masked_lm", "gpt-mini", {}, "needs a.? encoder"),
        ("causal_lm", "bert-mini", {}, "needs a.? decoder"),
        ("denoise", "bert-mini", {}, "needs a.? encoder_decoder"),
    ],
)
def test_a_model_that_does_not_fit_the_task_is_refused(tmp_path, task, preset, objective, message):
    with pytest.raises(RecipeError, match=message):
        made(tmp_path, task, preset, **objective)[0].model_config()


def test_whole_words_need_word_marks(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.words"):
        made(tmp_path, "masked_lm", "bert-mini", words="none", whole_words=True)


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'causal_lm'"):
        labelled_task("casual_lm")

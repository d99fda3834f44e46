"""Text to text with encoder-decoders and decoders: exact masks, cuts that are counted, and writing what was learned."""

import numpy as np
import pytest
import torch

from formary.data.tokenizer import train as train_tokenizer
from formary.errors import DataError, RecipeError
from formary.infer.answers import answers
from formary.infer.loaded import Model
from formary.model.topologies import build, with_head
from formary.recipe.presets import preset
from formary.recipe.reading import parse
from formary.tasks.cross_entropy import IGNORED
from formary.tasks.translate import Translate

ROWS = [
    {"source": "one cat", "target": "un chat"},
    {"source": "two cats", "target": "deux chats"},
    {"source": "the dog and the cat", "target": "le chien et le chat"},
    {"source": "a dog", "target": "un chien"},
]
BOTH = pytest.mark.parametrize("preset_name", ["seq2seq-mini", "gpt-mini"])


def made(preset_name, *, rows=ROWS, context=64, longest_target=40, start=None, smoothing=0.0):
    recipe = parse(
        f"""
        name: t
        task: translate
        data: {{sources: [x], tokenizer: {{kind: characters}}}}
        model: {{preset: {preset_name}, size: 2x64}}
        train:
          batch: 4
          context: {context}
          label_smoothing: {smoothing}
          objective: {{longest_target: {longest_target}}}
        """
    )
    texts = [row[column] for row in ROWS for column in ("source", "target")]
    tokenizer = train_tokenizer(texts, recipe.data.tokenizer, task=Translate.special_tokens(recipe))
    return Translate.learn(recipe, tokenizer, rows, start=start)


@BOTH
def test_a_few_pairs_are_learned_and_written_greedily_and_by_beam_search(learned, preset_name):
    task = made(preset_name)
    network = learned(task, ROWS, steps=300, lr=1e-3).train()
    wanted = [row["target"] for row in ROWS]
    for options in ({}, {"beams": 2, "length_penalty": 0.6}):
        assert [answer["text"] for answer in answers(task, network, ROWS, **options)] == wanted
    assert network.training  # as it was
    (short,) = answers(task, network, ROWS[:1], max_tokens=3)
    assert short["text"] == "un "


@BOTH
def test_a_saved_model_answers_texts_and_rows_through_its_own_task(learned, preset_name):
    task = made(preset_name)
    network = learned(task, ROWS, steps=300, lr=1e-3)
    model = Model(network, task.tokenizer, formary={"task": "translate", "settings": task.settings()})
    assert model.task.settings() == task.settings()
    assert model.predict(["a dog", {"source": "one cat"}]) == [{"text": "un chien"}, {"text": "un chat"}]


@BOTH
def test_an_answer_does_not_depend_on_what_else_is_asked(preset_name):
    task = made(preset_name)
    network = build(task.model_config(), seed=3).double().eval()
    rows = [{"source": "the cat " * n} for n in (1, 4, 2, 3)]
    together = answers(task, network, rows, max_tokens=10)
    assert together == [answers(task, network, [row], max_tokens=10)[0] for row in rows]


def test_an_encoder_decoder_reads_the_source_and_is_asked_for_the_target_and_its_end():
    task = made("seq2seq-mini")
    pad, end = task.tokenizer.pad_id, task.tokenizer.eos_id
    batch = task.collate(task.examples(ROWS[:2], targets=True))
    for number, row in enumerate(ROWS[:2]):
        source, target = ([*task.tokenizer.encode(row[column]), end] for column in ("source", "target"))
        line = batch["targets"][number]
        assert line[line != IGNORED].tolist() == target
        assert (line[len(target) :] == IGNORED).all()
        assert batch["decoder_tokens"][number, : len(target)].tolist() == [pad, *target[:-1]]
        assert batch["tokens"][number][batch["mask"][number]].tolist() == source
        assert task.prompt(row, "row 1") == tuple(source)


def test_a_decoder_is_asked_for_the_target_and_its_end_and_nothing_of_the_source():
    task = made("gpt-mini")
    end = task.tokenizer.eos_id
    batch = task.collate(task.examples(ROWS[:2], targets=True))
    assert set(batch) == {"tokens", "targets"}
    for number, row in enumerate(ROWS[:2]):
        source, target = (task.tokenizer.encode(row[column]) for column in ("source", "target"))
        line = [*source, end, *target, end]
        assert batch["tokens"][number, : len(line) - 1].tolist() == line[:-1]
        expected = [IGNORED] * len(source) + [*target, end]
        assert batch["targets"][number, : len(expected)].tolist() == expected
        assert (batch["targets"][number, len(expected) :] == IGNORED).all()
        assert task.prompt(row, "row 1") == (*source, end)


@BOTH
def test_the_loss_is_the_mean_of_the_rows_losses_whatever_the_padding(preset_name):
    task = made(preset_name)
    network = build(task.model_config(), seed=0).eval()
    examples = task.examples(ROWS, targets=True)
    total, count = task.loss(network, task.collate(examples))
    apart = [task.loss(network, task.collate([example])) for example in examples]
    assert total.item() == pytest.approx(sum(loss.item() for loss, _ in apart), rel=1e-5)
    assert int(count) == sum(len(row["target"]) + 1 for row in ROWS) == sum(int(part) for _, part in apart)


def test_smoothing_holds_while_training_only():
    task = made("seq2seq-mini", smoothing=0.2)
    network, batch = build(task.model_config(), seed=0), task.collate(task.examples(ROWS, targets=True))
    plain = made("seq2seq-mini").loss(network.eval(), batch)[0]
    assert task.loss(network.eval(), batch)[0] == plain
    assert task.loss(network.train(), batch)[0] != plain


@pytest.mark.parametrize(("preset_name", "source_kept"), [("seq2seq-mini", 12), ("gpt-mini", 5)])
def test_long_texts_are_cut_and_counted_and_a_cut_target_does_not_end(preset_name, source_kept):
    task = made(preset_name, context=12, longest_target=6)
    (example,) = task.examples([{"source": "the dog and the cat", "target": "le chien"}], targets=True)
    assert len(example.target) == 6 and task.tokenizer.eos_id not in example.target
    assert len(example.inputs) == source_kept + (preset_name == "gpt-mini")
    assert example.inputs[-1] == task.tokenizer.eos_id
    said = task.notes()
    assert said[0].startswith(f"1 source was longer than {source_kept} tokens and cut to them; raise train.context")
    assert said[1].startswith("1 target was longer than 6 tokens and cut to them; raise train.objective.longest_target")
    network = build(task.model_config(), seed=0).eval()
    answers(task, network, [{"source": "the dog " * 9}])  # fits


def test_a_decoder_keeps_half_of_its_context_for_sources():
    assert made("gpt-mini", context=20, longest_target=128).longest_target == 10
    assert made("seq2seq-mini", context=20, longest_target=128).longest_target == 20


def test_a_pretrained_network_goes_on_with_its_own_weights_and_start():
    task = made("seq2seq-mini")
    config = preset(
        "bart-base", vocab_size=task.tokenizer.vocab_size, context=64, size="1x32", switches={"decoder_start_id": 2}
    )
    start = build(config, seed=1)
    task = made("seq2seq-mini", start=config)
    network = with_head(start, task.head(config), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), network.parameters()))
    assert task.collate(task.examples(ROWS, targets=True))["decoder_tokens"][:, 0].tolist() == [2] * 4
    assert network.config.decoder_start_id == 2 and network.config.eos_id == task.tokenizer.eos_id


def test_what_the_family_puts_around_a_text_is_put_around_targets_once():
    from tokenizers import processors

    task = made("seq2seq-mini")
    backend = task.tokenizer.backend
    backend.post_processor = processors.TemplateProcessing(
        single="<unk> $A </s>", special_tokens=[(name, backend.token_to_id(name)) for name in ("<unk>", "</s>")]
    )
    (example,) = task.examples(ROWS[:1], targets=True)
    around = [task.tokenizer.unk_id, *task.tokenizer.encode("un chat"), task.tokenizer.eos_id]
    assert example.target.tolist() == around


def test_models_of_this_task_write_greedily_and_know_how_far():
    defaults = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 120, "repetition_penalty": 1.0}
    assert made("gpt-mini", longest_target=30).generation(defaults) == {
        "do_sample": False,
        "max_new_tokens": 30,
        "repetition_penalty": 1.0,
    }


def test_encoders_and_wrong_rows_are_refused_with_what_to_do():
    task = made("gpt-mini")
    with pytest.raises(RecipeError, match="this model writes no text"):
        task.head(preset("bert-mini", vocab_size=99, context=64))
    with pytest.raises(
        DataError, match=r"training row 2: field 'target' is missing; map another column with data\.columns\.target"
    ):
        task.examples([ROWS[0], {"source": "x"}], targets=True, where="training row")
    with pytest.raises(DataError, match=r"row 1 \(id 7\): field 'source' holds int 3, not a text"):
        answers(task, build(task.model_config()), [{"source": 3, "id": 7}])
    with pytest.raises(DataError, match="no training rows"):
        made("gpt-mini", rows=[])
    assert np.array_equal(task.examples([{"source": "a", "target": ""}], targets=True)[0].target, [task.end])

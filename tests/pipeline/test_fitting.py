"""A model that does not fit its task is refused before the data work, with the field and what would fit."""

import pytest

from formary.data.tokenizer import train as train_tokenizer
from formary.errors import CheckpointError, RecipeError
from formary.hub import checkpoint
from formary.model.topologies import build
from formary.pipeline.fitting import check_model
from formary.pipeline.run import run
from formary.recipe.presets import PRESETS, preset
from formary.recipe.reading import parse
from formary.tasks.registry import LABELLED, PRETRAINING

OF_TOPOLOGY = {
    "encoder": "bert-mini",
    "decoder": "gpt-mini",
    "encoder_decoder": "seq2seq-mini",
    "two_towers": "clip-mini",
}
READS = {"two_towers": "patches"}  # the others read tokens
TASKS = {**PRETRAINING, **LABELLED}
QUESTION = {"question": "a", "choices": ["b", "c"], "answer": 0}
ROWS = {
    "classify": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
    "tag": [{"tokens": ["a", "b"], "tags": ["x", "y"]}],
    "answer_span": [{"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [0]}}],
    "multiple_choice": [QUESTION, QUESTION],
    "embed": [{"text": "a", "positive": "b"}] * 2,
    "next_item": [{"user": "a", "history": ["b", "c"]}],
    "translate": [{"source": "a", "target": "b"}],
    "chat": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
}


def recipe(task, model, context=32, overrides=()):
    text = f"{{name: t, task: {task}, data: {{sources: [x.jsonl]}}, model: {model}, train: {{context: {context}}}}}"
    return parse(text, overrides=overrides)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A random model of each topology in a folder, without a tokenizer: it is not looked at."""
    folder = tmp_path_factory.mktemp("models")
    for topology, name in OF_TOPOLOGY.items():
        (folder / topology).mkdir()
        checkpoint.save(folder / topology, build(preset(name, vocab_size=300, context=64, size="1x32"), seed=0))
    return folder


@pytest.mark.parametrize("topology", OF_TOPOLOGY)
@pytest.mark.parametrize("name", TASKS)
def test_a_task_takes_the_presets_and_models_of_its_topologies_and_no_others(started, name, topology):
    fits, needs_start = topology in TASKS[name].topologies, getattr(TASKS[name], "needs_start", False)
    fits = fits and getattr(TASKS[name], "embedder", "tokens") == READS.get(topology, "tokens")
    for field, model in (
        ("preset", f"{{preset: {OF_TOPOLOGY[topology]}}}"),
        ("start", f"{{start: {started / topology}}}"),
    ):
        asked = recipe(name, model)
        if fits and not (needs_start and field == "preset"):
            check_model(asked, started)
        else:
            field = "start" if needs_start else field
            with pytest.raises(RecipeError, match=rf"^model\.{field}: task {name} "):
                check_model(asked, started)


def test_a_task_of_pictures_takes_models_of_patches_and_a_task_of_texts_none(tmp_path):
    vit = {"layers": 1, "image_size": 8}
    checkpoint.save(tmp_path, build(preset("vit-mini", vocab_size=0, context=5, switches=vit), seed=0))
    for model in ("{preset: vit-mini}", f"{{start: {tmp_path}}}"):
        check_model(recipe("classify_image", model, context=256), tmp_path)
        with pytest.raises(
            RecipeError, match=r"classify needs an encoder or a decoder, and .* is an encoder of patches"
        ):
            check_model(recipe("classify", model), tmp_path)


@pytest.mark.parametrize(
    ("task", "preset", "change", "why"),
    [
        ("classify", "bert-mini", "crop=2", "learns its rows as they are"),
        ("generate_image", "gpt-mini", "flip=true", "learns its rows as they are"),
        ("detect", "yolos-mini", "mixup=0.2", "has crop, flip, mosaic"),
        ("match_image_text", "clip-mini", "mixup=0.2", "has crop, flip, operations, erase"),
        ("caption", "caption-mini", "mosaic=0.5", "has crop, flip, operations, erase"),
        ("classify_image", "vit-mini", "mosaic=0.5", "has crop, flip, operations, erase, mixup"),
    ],
)
def test_a_change_of_pictures_that_a_task_cannot_make_is_refused(task, preset, change, why):
    kind = change.split("=")[0]
    with pytest.raises(RecipeError, match=rf"train\.augment\.{kind}: is nothing for task {task}; it {why}"):
        check_model(recipe(task, f"{{preset: {preset}}}", overrides=[f"train.augment.{change}"]), None)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_topologies_are_those_that_a_task_can_build(name):
    task = LABELLED[name]
    for topology, of in OF_TOPOLOGY.items():
        asked = recipe(name, f"{{preset: {of}, size: 1x32}}", overrides=["data.tokenizer.kind=characters"])
        if hasattr(task, "vocabulary"):
            words = task.vocabulary(asked, ROWS[name])
        else:
            words = train_tokenizer(["abcdefgh"], asked.data.tokenizer, task=task.special_tokens(asked))
        try:
            task.learn(asked, words, ROWS[name], start=None).model_config()
        except RecipeError:
            assert topology not in task.topologies
        else:
            assert topology in task.topologies


@pytest.mark.parametrize(
    ("task", "model", "context", "says"),
    [
        ("classify", "{start: encoder}", 65, r"train\.context: 65 is longer than the 64 that encoder can read"),
        ("classify", "{start: encoder, switches: {layers: 3}}", 32, r"model\.switches\.layers: a loaded model"),
        (
            "classify",
            "{preset: seq2seq-mini}",
            32,
            r"needs an encoder or a decoder, and seq2seq-mini is an encoder-dec",
        ),
        ("chat", "{start: encoder}", 32, "needs a decoder, and encoder is an encoder"),
        ("classify", "{preset: bert-mini, switches: {layer: 1}}", 32, "did you mean 'layers'"),
    ],
)
def test_what_can_be_known_beforehand_is_refused(started, task, model, context, says):
    with pytest.raises(RecipeError, match=says):
        check_model(recipe(task, model, context), started)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check_model(recipe("classify", "{start: empty}"), tmp_path)


def test_lora_needs_a_trained_model():
    asked = recipe("classify", "{preset: bert-mini}", overrides=["train.tune.method=lora"])
    with pytest.raises(RecipeError, match=r"lora tunes a trained model; name one with model\.start"):
        check_model(asked, None)


def test_every_preset_named_as_fitting_fits():
    for name in TASKS:
        if getattr(TASKS[name], "needs_start", False):
            continue
        wrong = next((p for p, fields in PRESETS.items() if fields["topology"] not in TASKS[name].topologies), None)
        if wrong:
            with pytest.raises(RecipeError) as refused:
                check_model(recipe(name, f"{{preset: {wrong}}}"), None)
            for fitting in str(refused.value).partition("; try ")[2].split(", "):
                check_model(recipe(name, f"{{preset: {fitting}}}"), None)


def test_a_run_is_refused_before_its_data_is_read(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "not", "label": "read"}\n')
    with pytest.raises(RecipeError, match="task classify needs"):
        run(recipe("classify", "{preset: seq2seq-mini}"), base=tmp_path, folder=tmp_path / "run")
    assert not (tmp_path / "run" / "data" / "documents").exists()


def test_the_model_that_another_recipe_will_train_is_looked_at_before_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "not", "label": "read"}\n')
    (tmp_path / "first.yaml").write_text(
        "{name: first, task: masked_lm, data: {sources: [x.jsonl]}, model: {preset: bert-mini}}"
    )
    with pytest.raises(
        RecipeError, match=r"model\.start: task chat needs a decoder, and recipe:first\.yaml is an encoder"
    ):
        run(recipe("chat", "{start: 'recipe:first.yaml'}"), base=tmp_path, folder=tmp_path / "run")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", [name for name in TASKS if name != "causal_lm"])
def test_a_ramp_is_for_packed_text(tmp_path, task):
    preset = OF_TOPOLOGY[TASKS[task].topologies[0]]
    with pytest.raises(RecipeError, match=r"train\.ramp: is for packed text"):
        check_model(recipe(task, f"{{preset: {preset}}}", overrides=["train.ramp.first=8"]), tmp_path)


def test_a_ramp_has_to_lead_to_the_context(tmp_path):
    check_model(recipe("causal_lm", "{preset: fast}", overrides=["train.ramp.first=8"]), tmp_path)
    with pytest.raises(
        RecipeError, match=r"train.ramp.first: 5 tokens do not double to train.context 32; take one of 16"
    ):
        check_model(recipe("causal_lm", "{preset: fast}", overrides=["train.ramp.first=5"]), tmp_path)

"""Chat: masks that are exactly the assistant's words, prompts as they will be asked, and rows that are not conversations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from formary.data.chat import CHATML, CHATML_WITH_EOS, Rendered, render
from formary.data.tokenizer import Tokenizer, load
from formary.data.tokenizer import train as train_tokenizer
from formary.errors import DataError, RecipeError
from formary.evaluate.labelled import SUITES
from formary.hub import checkpoint
from formary.infer.answers import answers
from formary.infer.loaded import Model
from formary.infer.loaded import load as load_model
from formary.model.topologies import build
from formary.recipe.presets import preset
from formary.recipe.reading import parse
from formary.recipe.schema import Evaluate
from formary.tasks.chat import Chat
from formary.tasks.cross_entropy import IGNORED


def talk(*contents, system=None):
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


ROWS = [
    talk("say a", "aaa"),
    talk("say b", "bb", "again", "bb bb"),
    talk("say c", "c", "thanks", system="be kind"),
]
RECIPE = """
name: t
task: chat
data: {{sources: [x], tokenizer: {{kind: {kind}, vocab_size: 300}}}}
model: {{preset: gpt-mini, size: 2x64}}
train: {{batch: 4, context: {context}}}
"""


def made(*, rows=ROWS, context=128, kind="bytes", special="chat", template=None):
    recipe = parse(RECIPE.format(context=context, kind=kind))
    texts = ["say a b c again thanks be kind system user assistant <|im_start|> \n"] * 3
    tokenizer = train_tokenizer(texts, recipe.data.tokenizer, task=special)
    if template:
        tokenizer.config["chat_template"] = template
    return Chat.learn(recipe, tokenizer, rows, start=None)


def learned_texts(task, row):
    """What is learned of a row, stretch by stretch."""
    found = []
    for example in task.examples([row], targets=True):
        edges = np.flatnonzero(np.diff(example.target.astype(np.int8))) + 1
        stretches = zip(np.split(example.inputs, edges), np.split(example.target, edges), strict=True)
        found += [task.tokenizer.decode(stretch) for stretch, learned in stretches if learned[0]]
    return found


@pytest.mark.parametrize(("special", "end"), [("chat", "<|im_end|>"), ("causal_lm", "<|endoftext|>")])
def test_the_loss_is_on_answers_and_their_end_alone(special, end):
    task = made(special=special)
    assert task.template == (CHATML if special == "chat" else CHATML_WITH_EOS)
    assert learned_texts(task, ROWS[1]) == [f"bb{end}", f"bb bb{end}"]
    assert learned_texts(task, ROWS[2]) == [f"c{end}"]
    (example,) = task.examples(ROWS[:1], targets=True)
    text = render(task.template, ROWS[0]["messages"], add_generation_prompt=False, **task.variables)
    assert task.tokenizer.decode(example.inputs) == text
    batch = task.collate([example])
    scored = batch["targets"][0] != IGNORED
    assert batch["targets"][0][scored].tolist() == example.inputs[example.target].tolist()
    assert batch["tokens"][0].tolist() == example.inputs[:-1].tolist()  # one place apart
    assert task.ends[0] == task.tokenizer.vocab[end]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab \n\té中😀<|>"), max_size=8), min_size=2, max_size=6), st.booleans())
def test_the_prompt_of_each_answer_is_the_prompt_that_the_model_is_given(contents, whole_turns):
    task = EVERY_BYTE
    messages = talk(*contents)["messages"]
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            (example,) = task.examples([{"messages": messages[: place + 1]}], targets=True)
            prompt = list(task.prompt({"messages": messages[: place + whole_turns]}, "row 1"))
            last = len(example.target) - 1 - example.target[::-1].argmax()
            first = last - example.target[: last + 1][::-1].argmin() + 1
            assert example.inputs[:first].tolist() == prompt
            said = task.tokenizer.decode(example.inputs[first : last + 1])
            assert said == message["content"] + "<|im_end|>"


EVERY_BYTE = made(context=2048)


def test_masks_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n\n{% endfor %}"
    )
    for kind in ("bpe", "bytes"):
        task = made(template=marked, kind=kind)
        task.tokenizer.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for row, example in zip(ROWS, task.examples(ROWS, targets=True), strict=True):
            found = theirs.apply_chat_template(
                row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            assert example.inputs.tolist() == found["input_ids"]
            assert example.target.tolist() == [bool(mask) for mask in found["assistant_masks"]]


def test_a_tokenizer_that_puts_a_space_before_every_text_reads_conversations_whole():
    names = ["<unk>", "</s>", "▁a", "▁b", "▁", "a", "b", ":"]
    backend = Backend(
        models.BPE({name: n for n, name in enumerate(names)}, [("▁", "a"), ("▁", "b")], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["</s>"])
    template = "{% for m in messages %}{{ m.content if m.role == 'user' else ': ' + m.content + eos_token }}{% endfor %}{{ ':' if add_generation_prompt }}"
    task = Chat(Tokenizer(backend, {"chat_template": template, "eos_token": "</s>"}), context=64)
    tokens, learned = task.read(Rendered("a: b</s>", ((2, 8),)))
    assert tokens.tolist() == task.tokenizer.encode("a: b</s>") == [2, 7, 3, 1]
    assert learned.tolist() == [False, False, True, True]


@pytest.mark.parametrize("special", ["chat", "causal_lm"])
def test_a_few_talks_are_learned_saved_and_answered(learned, special, tmp_path):
    task = made(special=special)
    network = learned(task, ROWS, steps=250, lr=2e-3)
    asked = [ROWS[0], ROWS[1], talk("say b"), talk("say c", system="be kind")]
    wanted = [{"text": text} for text in ("aaa", "bb bb", "bb", "c")]
    assert answers(task, network, asked) == wanted
    assert answers(task, network, asked[:2], beams=2) == wanted[:2]
    generation = task.generation({"do_sample": False})
    checkpoint.save(tmp_path, network, generation=generation, formary={"task": "chat", "settings": task.settings()})
    task.tokenizer.save(tmp_path)
    model = load_model(tmp_path)
    assert model.chat_template == task.template == load(tmp_path).config["chat_template"]
    assert model.predict(asked) == wanted
    assert model.predict(["say b"]) == wanted[2:3]
    assert model.chat(asked[2]["messages"]).text.removesuffix("<|im_end|>") == "bb"
    assert model.chat(asked[2]["messages"]).finish_reason == "stop"


def test_answers_may_be_as_long_as_the_longest_learned_but_half_the_context():
    task = made(context=100)
    task.examples(ROWS, targets=True)
    assert task.longest_answer == len("bb bb") + 1 and task.writing({}) == {"max_tokens": 6}
    task.examples([talk("say", "a" * 70)], targets=True)
    assert task.settings() == {"context": 100, "longest_answer": 50}
    assert Chat.of_model(task.model_config(), task.tokenizer, task.settings()).longest_answer == 50


def test_what_is_too_long_is_cut_left_out_and_counted():
    task = made(context=64)
    cut, nothing = talk("say a", "a" * 90), talk("a" * 90, "b")
    (example,) = task.examples([cut, nothing], targets=True)
    assert len(example.inputs) == 64 and example.row == 0 and example.target[-1]
    said = task.notes()
    assert (
        said[0]
        == "2 conversations were longer than the context of 64 tokens and cut to it; raise train.context to keep more"
    )
    assert said[1] == "1 conversation was left out: no answer to a user lies within the context"
    with pytest.raises(
        DataError, match=r"no conversation has an answer to a user within 64 tokens; raise train\.context"
    ):
        task.examples([nothing], targets=True)


def test_of_a_prompt_that_is_too_long_the_oldest_turns_are_left_out_and_the_system_message_stays():
    task = made(context=80)
    row = talk("one" * 9, "two", "three", "four", "say a", system="be kind")
    prompt = task.tokenizer.decode(task.prompt(row, "row 1"))
    assert prompt == render(task.template, talk("three", "four", "say a", system="be kind")["messages"])
    endless = task.prompt(talk("x" * 200), "row 1")
    assert len(endless) == task.context - task.longest_answer
    assert "2 conversations were too long to answer whole; the oldest part was left out" in task.notes()


def test_the_first_example_is_shown_with_what_is_learned_between_brackets():
    task = made()
    assert task.show(task.examples(ROWS[1:], targets=True)[0]) == [
        "the first conversation; what is learned stands between 【 and 】:",
        "<|im_start|>user",
        "say b<|im_end|>",
        "<|im_start|>assistant",
        "【bb<|im_end|>】",
        "<|im_start|>user",
        "again<|im_end|>",
        "<|im_start|>assistant",
        "【bb bb<|im_end|>】",
    ]


def test_rows_of_other_forms_are_converted_and_what_teaches_nothing_is_said():
    task = made()
    sharegpt = {"conversations": [{"from": "human", "value": "say a"}, {"from": "gpt", "value": "aaa"}]}
    opened = {"messages": [{"role": "assistant", "content": "hello"}, *ROWS[0]["messages"]]}
    assert learned_texts(task, sharegpt) == learned_texts(task, ROWS[0]) == learned_texts(task, opened)
    task.examples([talk("say c", "c", "thanks")], targets=True)
    assert task.notes() == [
        "1 row has the form ShareGPT's (from, value), read as messages",
        "1 conversation was closed by the user's turn; that turn teaches nothing",
        "1 conversation was opened by the assistant; words before any user's are not learned as answers",
    ]


def test_a_talk_without_answer_is_asked_but_not_measured():
    task = made()
    rows = [talk("say a", "aaa"), talk("say c", "c", "thanks")]
    given = {"model": [{"text": "aaa"}, {"text": "oh"}]}
    metrics = SUITES["texts"].metrics(task, rows, given, Evaluate(bootstrap=100), "test, 2 rows")
    assert metrics[0]["metric"] == "exact_match" and metrics[0]["model"]["value"] == 1.0
    assert "1 without an answer are left out" in metrics[0]["protocol"]
    assert SUITES["texts"].baselines(task, ROWS, rows)["copy source"] == [{"text": "say a"}, {"text": "thanks"}]
    assert SUITES["texts"].details(task, rows, given["model"])["worst"][0]["source"] == "say a"


def test_what_cannot_be_learned_or_asked_is_refused_with_the_row():
    task = made()
    with pytest.raises(DataError, match="training row 2: the assistant says nothing, so there is nothing to learn"):
        task.examples([ROWS[0], talk("say a")], targets=True, where="training row")
    with pytest.raises(DataError, match=r"validation row 1 \(id 5\): message 1 has the role 'bot'"):
        task.examples([{"id": 5, "messages": [{"role": "bot", "content": "x"}]}], targets=True, where="validation row")
    with pytest.raises(DataError, match="row 1: the user says nothing to answer"):
        task.prompt({"messages": [{"role": "assistant", "content": "x"}]}, "row 1")
    with pytest.raises(DataError, match="no training rows"):
        made(rows=[])
    with pytest.raises(RecipeError, match="task chat needs a decoder, and this is an encoder"):
        task.head(preset("bert-mini", vocab_size=99, context=64))
    refusing = made(
        template="{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    with pytest.raises(DataError, match="training row 1: messages: the model's chat template refuses them: no system"):
        refusing.examples(ROWS[2:], targets=True, where="training row")


def test_the_model_of_a_task_is_used_as_any_model():
    task = made()
    model = Model(build(task.model_config(), seed=0).eval(), task.tokenizer, formary={"task": "chat"})
    assert model.task.answers == "texts" and model.task.longest_answer == 64

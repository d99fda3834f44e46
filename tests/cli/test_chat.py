"""formary chat: what it says is what the model in Python says to the same messages; its commands do what they say."""

import contextlib
import json
import os
import select
import shutil
import signal
import sys

import pytest

import formary
from formary.hub import checkpoint
from formary.model.topologies import build
from formary.recipe.presets import preset

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def talker(finished, tmp_path_factory):
    """The tiny causal model with a chat template: each message and a space."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(finished.model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def endless(talker, tmp_path_factory):
    """A model with room for an answer of minutes, and no token that ends it."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    start = formary.load(talker)
    vocab_size = start.config.vocab_size
    network = build(preset("gpt-mini", vocab_size=vocab_size, context=50_000, size="1x32"), seed=0)
    checkpoint.save(folder, network)
    start.tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "generation_config.json").write_text('{"eos_token_id": []}', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(talker):
    return formary.load(talker)


@pytest.fixture
def chat(command, talker):
    """Say lines to the model: -> what it answered, the rest, the exit code."""

    def say(*lines, options=(), model=talker):
        options = options or ("--max-tokens", 3, "--temperature", 1)
        result = command("chat", model, *options, input="".join(f"{line}\n" for line in lines))
        return result.stdout, result.stderr, result.exit_code

    return say


def answer(model, *contents, seed=0, system=None, **options):
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)
    ]
    messages = ([{"role": "system", "content": system}] if system else []) + messages
    options = {"max_tokens": 3, "temperature": 1} | options
    return "".join(model.stream_chat(messages, seed=seed, **options))


def test_every_turn_is_answered_in_the_light_of_those_before(chat, model):
    first = answer(model, "the cat")
    second = answer(model, "the cat", first, "a dog", seed=1)
    said, notes, code = chat("the cat", "a dog")
    assert (said, code) == (f"{first}\n{second}\n", 0)
    assert notes.count("first after") == 2 and notes.count("tokens/s") == 2


def test_the_seed_of_the_command_line_is_the_first_answers(chat, model):
    said, _, _ = chat("the cat", options=("--max-tokens", 9, "--temperature", 2, "--seed", 7))
    assert said == answer(model, "the cat", seed=7, max_tokens=9, temperature=2) + "\n"


def test_an_instruction_can_be_given_at_the_start_and_changed(chat, model):
    options = ("--max-tokens", 3, "--temperature", 1, "--system", "on a mat")
    first = answer(model, "cat", system="on a mat")
    second = answer(model, "cat", first, "dog", system="his", seed=1)
    third = answer(model, "cat", first, "dog", second, "an", seed=2)
    assert chat("cat", "/system his", "dog", "/system", "an", options=options)[0] == f"{first}\n{second}\n{third}\n"


def test_a_line_that_ends_with_a_backslash_goes_on(chat, model):
    assert chat("the \\", "cat")[0] == answer(model, "the \ncat") + "\n"


def test_a_message_may_begin_with_a_slash(chat, model):
    assert chat("//a cat", "/quit")[0] == answer(model, "/a cat") + "\n"
    assert chat("/old/house flew")[0] == answer(model, "/old/house flew") + "\n"


def test_undo_takes_back_the_last_turn(chat, model):
    first = answer(model, "a")
    said, notes, _ = chat("a", "dog", "/undo", "cat")
    assert said.splitlines()[-1] == answer(model, "a", first, "cat", seed=2) and "taken back: dog" in notes


def test_retry_answers_the_same_again_with_another_seed(chat, model):
    options = ("--max-tokens", 6, "--temperature", 2)
    said, _, _ = chat("the cat", "/retry", options=options)
    expected = [answer(model, "the cat", seed=seed, max_tokens=6, temperature=2) for seed in (0, 1)]
    assert said == "\n".join(expected) + "\n" and expected[0] != expected[1]
    assert "the answer is the same" in chat("a", "/retry", options=("--max-tokens", 2, "--temperature", 0))[1]


def test_clear_forgets_all_but_the_instruction(chat, model):
    said, _, _ = chat("/system his", "cat", "/clear", "a dog")
    assert said.splitlines()[-1] == answer(model, "a dog", system="his", seed=1)


def test_what_is_saved_is_the_conversation_and_can_be_gone_on_with(chat, model, tmp_path):
    file = tmp_path / "talk.json"
    first = answer(model, "cat", system="his")
    _, notes, _ = chat("/system his", "cat", f"/save {file}")
    assert json.loads(file.read_text()) == [
        {"role": "system", "content": "his"},
        {"role": "user", "content": "cat"},
        {"role": "assistant", "content": first},
    ]
    assert f"3 messages written to {file}" in notes and os.listdir(tmp_path) == ["talk.json"]
    assert chat(f"/load {file}", "dog")[0] == answer(model, "cat", first, "dog", system="his") + "\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("{}", "list of messages"),
        ('[{"role": "user"}]', "message 1"),
        ('[{"role": "user", "content": "a"}, {"role": "king", "content": "b"}]', "message 2"),
        ('[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]', "message 2"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused_with_the_place(chat, tmp_path, content, says):
    file = tmp_path / "talk.json"
    if content is not None:
        file.write_text(content)
    _, notes, code = chat(f"/load {file}")
    assert code == 2 and f"error: {file}" in notes and says in notes


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/undoo", "did you mean 'undo'?"),
        ("/save", "name the file"),
        ("/load", "name the file"),
        ("/retry", "no message"),
        ("/undo", "nothing to take back"),
        ("/save a\0b", "name the file"),
        ("/save .", "is a folder"),
        ("/save /dev/null/talk.json", "could not be written"),
    ],
)
def test_a_command_that_cannot_be_followed_ends_a_script_with_code_2(chat, line, says):
    said, notes, code = chat(line, "the cat")
    assert (said, code) == ("", 2) and says in notes


def test_help_names_every_command(chat):
    notes = chat("/help")[1]
    for name in ("/system TEXT", "/retry", "/undo", "/clear", "/save FILE", "/load FILE", "/quit", "Ctrl-C"):
        assert name in notes


def test_the_oldest_turns_are_left_out_when_the_context_is_full(chat, model, tmp_path):
    lines = [f"{word} ran after" for word in ("one", "two", "old")]
    file = tmp_path / "talk.json"
    said, notes, code = chat(*lines, f"/save {file}")
    expected = [answer(model, line, seed=seed) for seed, line in enumerate(lines)]
    assert (said, code) == ("\n".join(expected) + "\n", 0)
    assert "the context of 32 tokens is full: the model no longer sees the oldest 2 messages" in notes
    assert "the oldest 4 messages (2 of them from now on)" in notes
    messages = json.loads(file.read_text())
    assert [message["content"] for message in messages[::2]] == lines  # nothing of it is lost


def test_a_message_longer_than_the_context_is_taken_back(chat):
    said, notes, code = chat("cat " * 20)
    assert (said, code) == ("", 2) and "shorten it" in notes and "context is 32" in notes


def test_without_a_chat_template_each_text_is_gone_on_from(chat, finished):
    plain = formary.load(finished.model)
    said, notes, code = chat("the cat", "a dog", model=finished.model)
    expected = [
        plain.generate(text, max_tokens=3, temperature=1, seed=seed).text
        for seed, text in enumerate(("the cat", "a dog"))
    ]
    assert (said, code) == ("\n".join(expected) + "\n", 0)
    assert "no chat template" in notes and "formary generate" in notes
    assert "no chat template" in chat("/system his", model=finished.model)[1]


def test_an_encoder_cannot_chat(chat, finished_runs):
    _, notes, code = chat("the cat", model=finished_runs("masked_lm").model)
    assert code == 2 and "does not write text" in notes


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of Unix")
def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(endless):
    import pty

    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
        os.execv(sys.executable, [sys.executable, "-m", "formary", "chat", str(endless), "--max-tokens", "40000"])
    shown = ""

    def until(text):
        nonlocal shown
        while text not in shown:
            ready, _, _ = select.select([terminal], [], [], 60)
            try:
                shown += os.read(terminal, 4096).decode(errors="replace") if ready else pytest.fail("nothing comes")
            except OSError:
                pytest.fail(f"it ended before {text!r} was shown: {shown}")
        shown = shown[shown.index(text) + len(text) :]

    try:
        until("> ")
        os.write(terminal, b"/undo\n")
        until("error: /undo: there is nothing to take back")  # in a terminal the conversation goes on
        until("> ")
        while "Ctrl-D or /quit leaves" not in shown:  # CPython misses one that comes right after the prompt is shown
            os.write(terminal, b"\x03")
            if select.select([terminal], [], [], 2)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
        until("Ctrl-D or /quit leaves")
        until("> ")
        os.write(terminal, b"the cat\n")
        until("the cat\r\n")
        shown = ""
        until(" ")  # of the answer
        os.write(terminal, b"\x03")
        until("stopped by Ctrl-C")
        until("> ")
        os.write(terminal, b"\x04")
        with contextlib.suppress(OSError):  # the end of the terminal
            while os.read(terminal, 4096):
                pass
        _, status = os.waitpid(child, 0)
        child = 0
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)

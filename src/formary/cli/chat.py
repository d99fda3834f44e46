"""`formary chat`: a conversation with a model in the terminal, streamed.

One engine serves the whole conversation: its prefix cache holds what was read before, so a turn costs what is new in
it. Answers go to standard output, all else to standard error; without a terminal each line of standard input is a turn.
"""

from __future__ import annotations

import importlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from formary.durable import naming, write_json
from formary.errors import DataError, FormaryError, RequestError, nearest

if TYPE_CHECKING:
    from formary.infer.engine import Event, Request
    from formary.infer.loaded import Model

Message = dict[str, str]  # role and content

_MAX_TOKENS = 512
_CACHED_CONTEXTS = 2  # what the prefix cache may hold: this conversation, and the one before /undo or /clear
_ROLES = ("system", "user", "assistant")
_COMMANDS = {
    "/system TEXT": "begin the conversation with this instruction; without TEXT, with none",
    "/retry": "answer the last message again, with another seed",
    "/undo": "take back the last message and its answer",
    "/clear": "begin anew; the instruction stays",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "go on with a conversation that was saved",
    "/help": "show this",
    "/quit": "leave, as Ctrl-D does",
}
_KEYS = "A line that ends with \\ goes on in the next. Ctrl-C stops an answer. To say something that begins with /, write //."
_CONTROLS = {code: "\ufffd" for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}


def chat(
    model: Annotated[str, typer.Argument(help="A model folder, a GGUF file, or a hub id.")],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="An instruction before the conversation.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="At most this many tokens for an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that sum to p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest one.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages what was said.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    seed: Annotated[int, typer.Option(help="Answer number i draws with seed + i.")] = 0,
) -> None:
    """Talk with a model; /help lists what else can be done. Without a chat template it goes on from what you type."""
    from formary.infer.loaded import load

    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
    }
    options = {name: value for name, value in options.items() if value is not None}
    Chat(load(model), options, name=model, system=system, seed=seed, interactive=sys.stdin.isatty()).run()


@dataclass(eq=False)
class Conversation:
    """Who said what, and from where on it is sent: what no longer fits the context is kept, but not read.

    Args:
        room: tokens to keep free for the answer.
    """

    model: Model
    room: int
    system: str | None = None
    turns: list[Message] = field(default_factory=list)  # of the user and the assistant
    sent_from: int = 0

    @property
    def messages(self) -> list[Message]:
        """All of it, the instruction first."""
        return self._instruction + self.turns

    @property
    def asked(self) -> int | None:
        """Where the user's last message stands among the turns."""
        return next((place for place in reversed(range(len(self.turns))) if self.turns[place]["role"] == "user"), None)

    def replace(self, messages: list[Message]) -> None:
        """Go on with other messages."""
        begins = bool(messages) and messages[0]["role"] == "system"
        self.system = messages[0]["content"] if begins else None
        self.turns, self.sent_from = messages[begins:], 0

    def cut(self, place: int) -> None:
        """Forget the turns from a place on."""
        del self.turns[place:]
        self.sent_from = 0 if self.sent_from >= place else self.sent_from

    def prompt(self) -> tuple[int, ...]:
        """What the model reads before it answers: the conversation, or without a chat template the last message.

        When the context is full, the oldest turns are left out until half of it is free, so that what stays need not be
        read anew at every turn that follows.

        Raises:
            RequestError: the last message alone does not fit, or the template refuses the messages.
        """
        if self.model.chat_template is None:
            return self.model.prompt_tokens(self.turns[-1]["content"])
        context, tokens = self.model.config.context, self._tokens()
        full = len(tokens) > context - self.room
        while full and len(tokens) > context // 2:
            later = [p for p, turn in enumerate(self.turns) if turn["role"] == "user" and p > self.sent_from]
            if not later:
                break
            self.sent_from = later[0]
            tokens = self._tokens()
        if len(tokens) >= context:
            raise RequestError(
                f"your message: with what the chat template adds it has {len(tokens)} tokens, and the model's context is "
                f"{context}; shorten it" + (" or the instruction (/system)" if self.system else "")
            )
        return tokens

    @property
    def _instruction(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _tokens(self) -> tuple[int, ...]:
        return self.model.chat_tokens(self._instruction + self.turns[self.sent_from :])


class Chat:
    """Reads turns and commands, and writes answers, until there are no more.

    Args:
        options: those of `Model.generate`.
        interactive: errors are told and the conversation goes on; otherwise they end it.
    """

    def __init__(
        self,
        model: Model,
        options: dict[str, Any],
        *,
        name: str = "the model",
        system: str | None = None,
        seed: int = 0,
        interactive: bool = False,
    ) -> None:
        from rich.console import Console

        from formary.infer.engine import Engine

        if not model.reads_text:
            raise RequestError(
                f"{name}: reads {model.config.embedder} and no text, so nobody can talk with it; use predict"
            )
        self.model, self.name, self.interactive = model, name, interactive
        context = model.config.context
        self.options = {"max_tokens": model.defaults.get("max_tokens", _MAX_TOKENS), **options}
        self.conversation = Conversation(model, room=min(self.options["max_tokens"], context // 4))
        if system:
            self._set_system(system)
        self.seed, self.answers = seed, 0
        self.engine = Engine(
            model.network, slots=1, text_decoder=model.text_decoder, prefix_cache_tokens=_CACHED_CONTEXTS * context
        )
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

    def run(self) -> None:
        """Until the end of input, Ctrl-D or /quit."""
        if self.model.chat_template is None:
            self._say(
                f"{self.name} has no chat template, so it was not trained to talk: it goes on from each text that you "
                "type, as `formary generate` does. Task chat trains a model to talk."
            )
        elif self.interactive:
            self._say(f"Talking with {self.name}; /help lists the commands, Ctrl-D leaves.")
        for text in self._inputs():
            try:
                if not self._obey(text):
                    return
            except FormaryError as error:
                if not self.interactive:
                    raise
                self._say(f"error: {error}")

    def _obey(self, text: str) -> bool:
        """Follow a command or answer a message; False to leave."""
        command = re.match(r"/([A-Za-z]+)(?:\s+(.*))?$", text.strip(), re.DOTALL)
        if command is None:
            if text.strip():
                self.conversation.turns.append({"role": "user", "content": text[1:] if text.startswith("//") else text})
                self._answer()
            return True
        word, argument = command[1].lower(), (command[2] or "").strip()
        if word == "quit":
            return False
        actions: dict[str, Callable[[str], None]] = {
            "system": self._set_system,
            "retry": self._retry,
            "undo": self._undo,
            "clear": self._clear,
            "save": self._save,
            "load": self._load,
            "help": self._help,
        }
        if word not in actions:
            hint = nearest(word, (*actions, "quit")) or "/help lists the commands"
            raise FormaryError(f"there is no command /{word}; {hint} (to send such a text write //{word})")
        actions[word](argument)
        return True

    def _answer(self) -> None:
        """Answer the last message; if that cannot be done the message is taken back."""
        conversation, before = self.conversation, self.conversation.sent_from
        try:
            prompt = conversation.prompt()
            left_out = conversation.sent_from - before
            if left_out > 0:
                self._say(
                    f"the context of {self.model.config.context} tokens is full: the model no longer sees the oldest "
                    f"{conversation.sent_from} messages ({left_out} of them from now on)"
                )
            request, _ = self.model.request(prompt, 1, {**self.options, "seed": self.seed + self.answers})
            written = self._write(request)
        except FormaryError:
            conversation.turns.pop()
            raise
        self.answers += 1
        if written.stopped and not written.text:
            conversation.turns.pop()
            self._say("stopped before the first word; the message is taken back")
            return
        conversation.turns.append({"role": "assistant", "content": written.text})
        self._say(written.summary)

    def _write(self, request: Request) -> Written:
        """Stream the answer to standard output."""
        from formary.infer.engine import NotFinite

        began = time.perf_counter()
        written = Written(prompt_tokens=len(request.prompt))
        self.engine.submit(request)
        with _interruptible() as pressed:
            try:
                while self.engine.busy and not written.stopped:
                    events = self.engine.step()
                    if any(event.finish == "error" for event in events):
                        raise NotFinite
                    written.add(events, time.perf_counter() - began)
                    sys.stdout.write("".join(event.text for event in events).translate(_CONTROLS))
                    sys.stdout.flush()
                    written.stopped = pressed() and written.finish is None
            finally:
                self.engine.cancel(request.id)
        sys.stdout.write("\n")
        sys.stdout.flush()
        return written

    # The commands ---------------------------------------------------------------------------------------------------

    def _set_system(self, text: str) -> None:
        if self.model.chat_template is None:
            raise RequestError("system: this model has no chat template, so it follows no instructions")
        self.conversation.system = text or None
        self.conversation.sent_from = 0

    def _retry(self, _: str) -> None:
        asked = self.conversation.asked
        if asked is None:
            raise FormaryError("/retry: there is no message to answer yet")
        self.conversation.cut(asked + 1)
        if not self.options.get("temperature", self.model.defaults.get("temperature")):
            self._say("without a --temperature above 0 the answer is the same")
        self._answer()

    def _undo(self, _: str) -> None:
        asked = self.conversation.asked
        if asked is None:
            raise FormaryError("/undo: there is nothing to take back")
        message = self.conversation.turns[asked]["content"]
        self.conversation.cut(asked)
        self._say(f"taken back: {message[:80]}")

    def _clear(self, _: str) -> None:
        self.conversation.cut(0)
        self._say("begun anew")

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        with naming(path):
            write_json(path, self.conversation.messages)
        self._say(f"{len(self.conversation.messages)} messages written to {path}")

    def _load(self, name: str) -> None:
        messages = read_messages(_path(name, "/load"))
        if messages and messages[0]["role"] == "system" and self.model.chat_template is None:
            raise RequestError("/load: the conversation has an instruction, and this model has no chat template")
        self.conversation.replace(messages)
        waits = bool(messages) and messages[-1]["role"] == "user"
        self._say(f"{len(messages)} messages read" + ("; /retry answers the last one" if waits else ""))

    def _help(self, _: str) -> None:
        self._say("\n".join([f"{name:14} {says}" for name, says in _COMMANDS.items()] + [_KEYS]))

    # The terminal ---------------------------------------------------------------------------------------------------

    def _inputs(self) -> Iterator[str]:
        """What was typed: lines, those that end with a backslash joined with the next."""
        if self.interactive:
            with suppress(ImportError):  # input() then has a history and cursor keys
                importlib.import_module("readline")
        lines: list[str] = []
        while True:
            try:
                line = self._line("... " if lines else "> ")
            except KeyboardInterrupt:
                self._say("\nCtrl-D or /quit leaves")
                lines = []
                continue
            if line is not None and line.endswith("\\"):
                lines.append(line[:-1])
                continue
            if line is not None or lines:
                yield "\n".join([*lines, line or ""])
            if line is None:
                return
            lines = []

    def _line(self, prompt: str) -> str | None:
        """One line without its end, None where there are no more."""
        if not self.interactive:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            print()
            return None

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim")


@dataclass
class Written:
    """An answer and how long it took, in seconds from when its message was sent."""

    prompt_tokens: int
    text: str = ""
    tokens: int = 0
    first_tokens: int = 0  # that came with the first
    cached_tokens: int = 0
    first_seconds: float = 0.0
    last_seconds: float = 0.0
    finish: str | None = None
    stopped: bool = False

    def add(self, events: list[Event], seconds: float) -> None:
        """Take what the engine wrote in a step that ended now."""
        if events and not self.tokens:
            self.first_seconds, self.cached_tokens, self.first_tokens = seconds, events[0].cached, len(events)
        if events:
            self.last_seconds, self.finish = seconds, events[-1].finish
        self.tokens += len(events)
        self.text += "".join(event.text for event in events)

    @property
    def summary(self) -> str:
        """Speed, time to the first token, and what was read for it, in a line."""
        parts = [f"{self.tokens} tokens"]
        if self.tokens > self.first_tokens:
            rate = (self.tokens - self.first_tokens) / max(self.last_seconds - self.first_seconds, 1e-9)
            parts.append(f"{rate:.1f} tokens/s")
        parts.append(f"first after {self.first_seconds:.2f} s")
        known = f", {self.cached_tokens} of them known" if self.cached_tokens else ""
        parts.append(f"{self.prompt_tokens} read{known}")
        if self.stopped:
            parts.append("stopped by Ctrl-C")
        elif self.finish == "length":
            parts.append("cut: --max-tokens or the context is reached")
        return " · ".join(parts)


def read_messages(path: Path) -> list[Message]:
    """A saved conversation.

    Raises:
        DataError: the file cannot be read, or is not a list of messages; the message says where.
    """
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error})") from error
    if not isinstance(messages, list):
        raise DataError(f"{path}: must hold a list of messages, such as /save writes")
    for place, message in enumerate(messages):
        whole = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not whole or message.get("role") not in _ROLES:
            raise DataError(
                f"{path} message {place + 1}: must have a role (system, user, assistant) and content, a text"
            )
        if message["role"] == "system" and place:
            raise DataError(f"{path} message {place + 1}: only the first may be the instruction (role system)")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _path(name: str, command: str) -> Path:
    if not name or "\0" in name:
        raise FormaryError(f"{command}: name the file, e.g. {command} talk.json")
    path = Path(name).expanduser()
    if path.is_dir():
        raise FormaryError(f"{command}: {path} is a folder; name a file in it, e.g. {path / 'talk.json'}")
    return path


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, so that no step of the engine is broken off; a second one breaks it off."""
    presses = 0

    def note(_number: int, _frame: object) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)

"""The `formary` command: one table of commands, and how errors and Ctrl-C are told to the user.

A command is a name, the module and function that hold it, and one line of help; its module is imported when it runs.
What a command does, and its arguments, are written in its own module.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from formary.errors import FormaryError
from formary.train.processes import end, silent


@dataclass(frozen=True)
class Command:
    """Where a command is written (module and function), and what the list of commands says about it."""

    module: str
    function: str
    says: str


COMMANDS: dict[str, dict[str, Command]] = {
    "Start": {
        "init": Command("formary.cli.init", "init", "Look at data and write a commented recipe for it"),
        "recipes": Command("formary.cli.recipes", "recipes", "List, show or copy the ready recipes and model presets"),
        "doctor": Command("formary.cli.doctor", "doctor", "Show what this machine can do and what is missing"),
        "selftest": Command("formary.cli.selftest", "selftest", "Try on this disk that no fault loses a training"),
        "plan": Command("formary.cli.plan", "plan", "Work out what a large training will need: memory, days, cost"),
    },
    "A run": {
        "run": Command("formary.cli.run", "run", "Do everything a recipe says, from raw data to the report"),
        "prepare": Command("formary.cli.run", "prepare", "Only read, clean, split and tokenise the data"),
        "train": Command("formary.cli.run", "train", "Only up to the trained model"),
        "evaluate": Command("formary.cli.run", "evaluate", "Measure a run's or any model, beside its baselines"),
        "top": Command("formary.cli.top", "top", "Watch runs live: curves, rate, time left, memory"),
        "tune": Command("formary.cli.tune", "tune", "Choose batch and learning rate for a recipe on this machine"),
        "search": Command("formary.cli.search", "search", "Try settings of a recipe and keep the best"),
        "report": Command("formary.cli.run", "report", "Only write the report of a run again"),
    },
    "A model": {
        "chat": Command("formary.cli.chat", "chat", "Talk with a model in the terminal"),
        "generate": Command("formary.cli.generate", "generate", "Let a model write, streamed to the terminal"),
        "serve": Command("formary.cli.serve", "serve", "Serve models: OpenAI-compatible API and playground"),
        "predict": Command("formary.cli.predict", "predict", "Let a model answer: labels, tags, spans, translations"),
        "recommend": Command("formary.cli.recommend", "recommend", "Recommend items to a user, from a history of them"),
        "compare": Command(
            "formary.cli.predict", "compare", "Say which of two models is better on data, or cannot tell"
        ),
        "bench": Command("formary.cli.bench", "bench", "Measure how fast a model runs on this machine"),
    },
}

INTERRUPTED = "interrupted; nothing half-written was left, the same command goes on where it stopped"


class Commands(TyperGroup):
    """The group of commands: lists them from the table, imports the one that runs, and words its errors."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, commands in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, command.says) for name, command in commands.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, placeholder, rest = super().resolve_command(ctx, args)
        if name is None or placeholder is None:
            return name, placeholder, rest
        return name, _load(name), rest

    def invoke(self, ctx: Any) -> Any:
        if silent():  # another process speaks
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a reader that has gone is noticed here, not at exit
            return result
        except FormaryError as error:
            stopped = error.exit_code == 130  # by the user: no error
            if not silent(error):
                print(error if stopped else f"error: {error}", file=sys.stderr)
            end(error.exit_code)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            if not silent():
                print(f"\n{INTERRUPTED}", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # As in `formary recipes | head -1`. What is still buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None


app = typer.Typer(
    name="formary",
    cls=Commands,
    help="Own a Transformer from raw data to a served model, on the machine you already have.",
    epilog="Begin with `formary init YOUR_DATA`, or with `formary recipes`. Each command explains itself with --help.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script."""
    app(prog_name="formary")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"formary {version('formary')}")
        raise typer.Exit()


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _placeholder() -> None:
    """Stands in the list of commands for a command whose module has not been imported."""


for _commands in COMMANDS.values():
    for _name, _command in _commands.items():
        app.command(_name, help=_command.says)(_placeholder)


def _load(name: str) -> Any:
    """The real command: its function with the arguments it declares."""
    command = next(commands[name] for commands in COMMANDS.values() if name in commands)
    function: Callable[..., Any] = getattr(importlib.import_module(command.module), command.function)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    alone.command(name, context_settings={"help_option_names": ["-h", "--help"]})(function)
    return typer.main.get_command(alone)

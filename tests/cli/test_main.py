"""The `formary` command: quick to start, lazy, and plain about errors."""

import io
import os
import subprocess
import sys
import types

import pytest
import typer
from typer.testing import CliRunner

from formary import errors
from formary.cli import main as cli
from formary.cli.main import COMMANDS, INTERRUPTED, app


def formary(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "formary", *arguments], capture_output=True, text=True, encoding="utf-8", check=False
    )


@pytest.fixture
def command(monkeypatch):
    """Put a function in place of `formary doctor`."""

    def replace(function):
        module = types.ModuleType("stand_in")
        module.doctor = function
        monkeypatch.setitem(sys.modules, "stand_in", module)
        monkeypatch.setitem(COMMANDS["Start"], "doctor", cli.Command("stand_in", "doctor", "stands in"))
        return CliRunner()

    return replace


def test_help_imports_nothing_heavy():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "formary", "--help"], capture_output=True, text=True, check=True
    )
    imported = {line.rsplit("|")[-1].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert "typer" in imported and not imported & {"torch", "pydantic", "pyarrow", "numpy", "rich"}


def test_help_lists_every_command_with_its_line():
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    for commands in COMMANDS.values():
        for name, command in commands.items():
            assert f"{name} {command.says}" in shown


def test_no_argument_shows_the_help():
    assert "Usage: formary" in formary().stdout + formary().stderr


@pytest.mark.parametrize("name", ["init", "recipes", "doctor"])
def test_each_command_explains_itself(name):
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0 and f"{name} [OPTIONS]" in result.output


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert formary("--version").stdout == f"formary {version('formary')}\n"


def test_a_misspelt_command_is_a_usage_error():
    result = formary("docter")
    assert result.returncode == 2 and "No such command 'docter'" in result.stderr


@pytest.mark.parametrize("kind", [errors.RecipeError, errors.DataError, errors.StorageError])
def test_an_error_of_ours_is_one_line_and_its_exit_code(command, kind):
    def doctor():
        raise kind("a.jsonl line 3: not JSON")

    result = command(doctor).invoke(app, ["doctor"])
    assert result.exit_code == 2
    assert result.stderr == "error: a.jsonl line 3: not JSON\n" and result.stdout == ""


def test_an_error_may_choose_its_exit_code(command):
    class Busy(errors.FormaryError):
        exit_code = 75

    def doctor():
        raise Busy("the run folder is in use")

    assert command(doctor).invoke(app, ["doctor"]).exit_code == 75


def test_any_other_error_keeps_its_traceback(command):
    def doctor():
        raise ZeroDivisionError("a defect")

    result = command(doctor).invoke(app, ["doctor"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_says_that_nothing_is_lost_and_exits_with_130(command):
    def doctor():
        raise KeyboardInterrupt

    result = command(doctor).invoke(app, ["doctor"])
    assert result.exit_code == 130 and INTERRUPTED in result.stderr


def test_ctrl_c_while_a_command_is_imported_is_told_the_same_way(monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupted)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 130


def test_the_commands_own_exit_code_passes_through(command):
    def doctor():
        raise typer.Exit(3)

    assert command(doctor).invoke(app, ["doctor"]).exit_code == 3


@pytest.mark.skipif(os.name == "nt", reason="pipes close differently")
def test_a_reader_that_goes_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        result = subprocess.run(
            [sys.executable, "-m", "formary", "recipes", "--json"], stdout=gone, stderr=subprocess.PIPE, check=False
        )
    assert result.stderr == b"" and result.returncode == 141


def test_a_command_declares_its_own_arguments(command):
    seen = io.StringIO()

    def doctor(word: str, times: int = 1):
        print(word * times, file=seen)

    result = command(doctor).invoke(app, ["doctor", "ab", "--times", "2"])
    assert result.exit_code == 0 and seen.getvalue() == "abab\n"

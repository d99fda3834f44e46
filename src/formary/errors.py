"""The errors a user can cause, each saying what is wrong, where, and what to do.

The command line prints them in one line and exits with code 2; Python callers catch `FormaryError`.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FormaryError(Exception):
    """Something the user can mend: the message says what, where and how."""

    exit_code = 2


class RecipeError(FormaryError):
    """The recipe is not valid: the message names the field."""


class DataError(FormaryError):
    """A data file cannot be used: the message names the file, and the line or row where known."""


class CheckpointError(FormaryError):
    """A checkpoint folder cannot be read, or holds something Formary refuses to open."""


class RequestError(FormaryError):
    """A model was asked for something it cannot do: the message names the argument."""


class MissingExtra(FormaryError):
    """An optional library is not installed: the message is the command that installs it."""

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs a library that is not installed: pip install "formary[{extra}]"')


class StorageError(FormaryError):
    """A file could not be written (disk full, no permission); nothing half-written is left behind."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence "did you mean ...?" for a misspelt name, or an empty string when nothing is close."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean '{matches[0]}'?" if matches else ""

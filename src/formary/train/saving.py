"""Saving without stalling: the tensors are copied at once, a thread writes them while training goes on.

At most one save is under way, what went wrong in the thread is raised at the next save or wait, and leaving the block
waits for the last one.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

from formary.train import checkpoint
from formary.train.checkpoint import Saved


class Saver:
    """Writes checkpoints into `folder` in the background and deletes those that need not stay, unless others do (`writes`)."""

    def __init__(self, folder: Path, *, keep: int, writes: bool = True) -> None:
        self.folder, self.keep, self.writes = folder, keep, writes
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, saved: Saved, *, also: Collection[int] = ()) -> None:
        """Copy what is to be saved and begin to write it; then all but the newest `keep` and those of `also` go.

        Raises:
            StorageError: the save before this one failed.
        """
        self.wait()
        if not self.writes:
            return
        copied = Saved(
            saved.step,
            {
                group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
                for group, tensors in saved.tensors.items()
            },
            saved.state,
        )
        self._thread = threading.Thread(target=self._write, args=(copied, frozenset(also)), name="formary-save")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being saved.

        Raises:
            StorageError: the last save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the thread, once, if anything has."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, saved: Saved, also: Collection[int]) -> None:
        try:
            checkpoint.save(self.folder, saved)
            checkpoint.prune(self.folder, keep=self.keep, also=also)
        except BaseException as error:  # raised again where training can end on it
            self._error = error

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:  # the first error is the one to tell
            self._thread.join()

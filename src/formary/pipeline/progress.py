"""A bar for work that takes a while: on a terminal only, gone when the work is done.

A console that is not interactive shows none: --json makes it so, and a file or a pipe is so by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from formary.tasks.protocol import Progress


@contextmanager
def bar(console: Console | None, says: str) -> Iterator[Progress]:
    """A bar that the yielded function moves; with no console, or one that is not interactive, it moves nothing."""
    if console is None or not console.is_interactive:
        yield lambda done, total: None
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("  {task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(says, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def share_bar(share: float, width: int) -> str:
    """A share of the whole as a line of blocks: ██████░░░░ 60 %."""
    full = round(max(0.0, min(share, 1.0)) * width)
    return f"{'█' * full}{'░' * (width - full)} {share:.0%}"

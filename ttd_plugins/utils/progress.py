"""Progress of long work: subtasks that report their steps, whoever displays them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_T = TypeVar("_T")
Advance = Callable[[int], None]
"""Called with the number of steps that were completed since the last call."""
Stage = Callable[[str, int], Advance]
"""Starts a subtask, called with its name and its number of steps; returns its :data:`Advance` callback."""


def no_progress(name: str, steps: int) -> Advance:
    """A :data:`Stage` that displays nothing."""
    return lambda done: None


def list_with_progress(items: Iterable[_T], advance: Advance) -> list[_T]:
    """Return the items as a list and report one step after each."""
    collected = []
    for item in items:
        collected.append(item)
        advance(1)
    return collected


@contextmanager
def progress_bars(
    *, stderr: bool = True, width: int = 28, keep_finished: int | None = None, terminal_only: bool = False
) -> Iterator[Callable[[str, int | None], Advance]]:
    """Yield a :data:`Stage` that displays one bar per subtask in the terminal.

    Args:
        stderr: whether bars go to standard error, which keeps standard output for results.
        width: characters reserved for names.
        keep_finished: number of newest bars that stay; older ones are removed when their subtask is finished. By
            default all stay.
        terminal_only: whether nothing is displayed where the output is not a terminal, instead of the final bars.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"{{task.description:<{width}}}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=stderr)
    bars = Progress(*columns, console=console, disable=terminal_only and not console.is_terminal)

    def stage(name: str, steps: int | None) -> Advance:
        # Not before: an error without any progress is then the only output.
        bars.start()
        if keep_finished is not None:
            for old in bars.tasks[: max(len(bars.tasks) - keep_finished, 0)]:
                if old.finished:
                    bars.remove_task(old.id)
        task: Any = bars.add_task(name, total=steps)
        return lambda done: bars.advance(task, done)

    try:
        yield stage
    finally:
        if bars.live.is_started:
            bars.stop()

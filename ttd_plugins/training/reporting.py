"""Callbacks by which a run reports its progress."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ttd_plugins.utils.progress import Advance, no_progress

_OLD_METHODS = {
    "started": "on_start",
    "stepped": "on_step",
    "logged": "on_log",
    "said": "on_message",
    "ended": "on_end",
}


class Reporter:
    """Callbacks of a run, called on the main process only; a subclass overrides those that it needs.

    Attributes:
        displays_messages: whether :meth:`on_message` displays them, so that logging handlers need not.
    """

    displays_messages: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in _OLD_METHODS.items():
            if old in vars(cls):
                warnings.warn(
                    f"Reporter.{old} is now Reporter.{new}; the old name goes with the next minor release",
                    FutureWarning,
                    stacklevel=2,
                )
                if new not in vars(cls):
                    setattr(cls, new, vars(cls)[old])

    def on_start(self, steps: int, done: int) -> None:
        """Called before the first step; ``done`` of the ``steps`` were taken by the run that is resumed."""

    def on_step(self, step: int, loss: float) -> None:
        """Called after each optimizer step; the loss is NaN where the step was skipped."""

    def on_log(self, metrics: Mapping[str, Any]) -> None:
        """Called after each line of the log and after each evaluation."""

    def stage(self, name: str, steps: int) -> Advance:
        """Start a subtask; returns an ``advance(n)`` callback."""
        return no_progress(name, steps)

    def on_message(self, sentence: str) -> None:
        """Called with a sentence that a person should read."""

    def on_end(self) -> None:
        """Called last, whether the run ended, stopped or failed."""

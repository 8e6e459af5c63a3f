"""Stopping a run by SIGTERM, SIGHUP or Ctrl-C at the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from ttd_plugins.errors import TTDError

ALWAYS = (signal.SIGTERM, signal.SIGINT)
"""Signals that stop a run even where the parent process ignores them, as a shell does for background jobs."""


class TrainingStoppedError(TTDError):
    """The run was stopped by a signal, and its state was saved.

    Attributes:
        status: the exit status for this signal: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """

    status: int = 130


class StopSignals:
    """Context manager that stores the first SIGTERM, SIGHUP or Ctrl-C; a second one acts at once.

    Attributes:
        received: number of the signal, or ``None``.
    """

    def __init__(self, on_message: Callable[[str], None]) -> None:
        self.received: int | None = None
        self._on_message = on_message
        self._handlers: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", None)):
                # nohup ignores SIGHUP, and so does the run then.
                if number is None or (number not in ALWAYS and signal.getsignal(number) is signal.SIG_IGN):
                    continue
                self._handlers[number] = signal.signal(number, self._receive)
            self._terminals = [descriptor for descriptor in (1, 2) if _is_terminal(descriptor)]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.received = number
        self._leave_closed_terminals()
        # A message that cannot be shown must not end the step. A stream that the signal interrupted within a write
        # refuses a second one with RuntimeError.
        with suppress(OSError, RuntimeError):
            self._on_message(f"{signal.Signals(number).name}: saving after this step; a second signal stops at once")

    def _leave_closed_terminals(self) -> None:
        """Discard output to terminals that are gone, where every write would be an error."""
        for descriptor in self._terminals:
            if not _is_terminal(descriptor):
                with suppress(OSError):
                    nothing = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nothing, descriptor)
                    os.close(nothing)


def _is_terminal(descriptor: int) -> bool:
    with suppress(OSError):
        return os.isatty(descriptor)
    return False

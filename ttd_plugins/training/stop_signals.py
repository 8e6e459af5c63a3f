"""Stopping a run by SIGTERM or Ctrl-C at the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from ttd_plugins.errors import TTDError


class TrainingStoppedError(TTDError):
    """The run was stopped by a signal, and its state was saved.

    Attributes:
        status: the exit status for this signal: 130 after Ctrl-C, 143 after SIGTERM.
    """

    status: int = 130


class StopSignals:
    """Context manager that stores the first SIGTERM or Ctrl-C; a second one acts at once.

    Attributes:
        received: number of the signal, or ``None``.
    """

    def __init__(self, on_message: Callable[[str], None]) -> None:
        self.received: int | None = None
        self._on_message = on_message
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.received = number
        self._on_message(f"{signal.Signals(number).name}: saving after this step; a second signal stops at once")

"""Worker processes of a loader: signals that they survive, and workers that are killed."""

from __future__ import annotations

import pickle
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

WAIT_SECONDS = 1.0
"""How long a failed read waits for the end of a worker that may have caused it."""


class WorkerKilledError(Exception):
    """A worker process ended without an exception of its own."""


def ignore_first_signals(worker: int) -> None:
    """Let a worker survive Ctrl-C and one SIGTERM or SIGHUP: they reach workers too, while the training still saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)):
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, once)


def read_from_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the items of a loader with workers.

    Raises:
        WorkerKilledError: a worker was killed. It is raised while the next item is read, and never in between.
    """
    items = iter(loader)
    _SIGNALS.install()
    while True:
        try:
            with _SIGNALS.reading():
                # Within, so that a worker that is killed after this check interrupts the read.
                _require_alive(items)
                try:
                    item = next(items)
                except StopIteration:
                    return
        # A killed worker is a RuntimeError of torch, or a broken pipe, socket or message that it was sending.
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            if str(error).startswith("DataLoader worker (pid") or _dead_worker(items, WAIT_SECONDS) is not None:
                raise WorkerKilledError(str(error) or type(error).__name__) from error
            raise
        yield item


def _require_alive(items: Any) -> None:
    dead = _dead_worker(items)
    if dead is not None:
        code = dead.exitcode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        raise WorkerKilledError(f"process {dead.pid} ended {how}")


def _dead_worker(items: Any, seconds: float = 0.0) -> Any:
    """A worker that did not end by itself, waiting up to ``seconds`` for one; ``None`` if there is none."""
    until = time.monotonic() + seconds
    while True:
        for worker in getattr(items, "_workers", []):
            if worker.exitcode not in (None, 0):
                return worker
        if time.monotonic() >= until:
            return None
        time.sleep(0.02)


class _ChildSignals:
    """Confines torch's handler of SIGCHLD to reads.

    torch raises the error about a killed worker from that handler, so at any line of the main thread: in the middle of
    a backward pass, or while a checkpoint is written. Within a read it must stay, since a read could wait forever.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._previous: Any = None

    def install(self) -> None:
        """Wrap the current handler, once; only the main thread can."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
            return
        current = signal.getsignal(signal.SIGCHLD)
        if current != self._handle and callable(current):
            self._previous = current
            signal.signal(signal.SIGCHLD, self._handle)

    def reading(self) -> _ChildSignals:
        return self

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        try:
            self._previous(number, frame)
        except RuntimeError:
            # The next read finds the dead worker by itself.
            if self._depth:
                raise


_SIGNALS = _ChildSignals()

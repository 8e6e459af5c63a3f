"""Importing a plugin without letting it print on standard output or change the state of the whole program."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch

from ttd_plugins.utils.torch_settings import matmul_precision

SLOW_SECONDS = 5.0
"""Seconds after which a plugin that is still being imported is named."""

_stdout_lock = threading.RLock()
_stdout_users = 0
_stdout: Any = None
_logger = logging.getLogger(__name__)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what Python code prints to standard error, so that a plugin cannot corrupt the output of a command.

    Blocks may overlap in several threads.
    """
    global _stdout, _stdout_users
    with _stdout_lock:
        if _stdout_users == 0:
            _stdout, sys.stdout = sys.stdout, sys.stderr
        _stdout_users += 1
    try:
        yield
    finally:
        with _stdout_lock:
            _stdout_users -= 1
            if _stdout_users == 0:
                sys.stdout, _stdout = _stdout, None


@contextmanager
def _file_descriptor_to_stderr() -> Iterator[None]:
    """The same for libraries in C and child processes, which write to the file descriptor."""
    try:
        sys.__stdout__.flush()  # type: ignore[union-attr]
        saved = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError, AttributeError):  # a program without these streams
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError, ValueError, AttributeError):
            sys.__stdout__.flush()  # type: ignore[union-attr]
        os.dup2(saved, 1)
        os.close(saved)


@contextmanager
def isolated_import(owner: str, report: Callable[[str], None], advice: str) -> Iterator[None]:
    """Import and register a plugin in this block.

    Printed text goes to standard error. Global state of torch, numpy, random, warnings, logging, signals, the working
    directory and the environment is restored. A plugin that takes long is named on standard error.

    Args:
        owner: the plugin, for messages.
        report: called with a sentence for each state that the plugin changed and that it should not.
        advice: what the user can do about a plugin that takes long.
    """
    timer = threading.Timer(SLOW_SECONDS, _name_slow_plugin, [owner, advice])
    timer.daemon = True
    with ExitStack() as stack:
        stack.enter_context(stdout_to_stderr())
        stack.enter_context(_file_descriptor_to_stderr())
        stack.enter_context(_restored_state(report))
        stack.callback(timer.cancel)
        timer.start()
        yield


def _name_slow_plugin(owner: str, advice: str) -> None:
    _logger.warning("%s is still being imported after %g seconds; %s", owner, SLOW_SECONDS, advice)


@contextmanager
def _restored_state(report: Callable[[str], None]) -> Iterator[None]:
    states = [state() for state in (_torch_state, _random_state, _warnings_state, _logging_state, _process_state)]
    try:
        yield
    finally:
        for restore in states:
            for what in restore():
                report(f"changes {what} when it is imported, which was undone; it should do so only in its own calls")


Restore = Callable[[], list[str]]
"""Restores a state, and returns what had changed and is worth a message."""


def _torch_state() -> Restore:
    getters: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "torch's default device": (torch.get_default_device, _set_default_device),
        "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
        "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
        "torch's precision of matrix products": (
            matmul_precision,
            torch.set_float32_matmul_precision,
        ),
        "torch's deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled,
            torch.use_deterministic_algorithms,
        ),
    }
    before = {name: get() for name, (get, _) in getters.items()}

    def restore() -> list[str]:
        changed = [name for name, (get, _) in getters.items() if get() != before[name]]
        for name in changed:
            getters[name][1](before[name])
        return changed

    return restore


def _set_default_device(device: torch.device) -> None:
    # None removes the mode that set_default_device adds.
    torch.set_default_device(None if device.type == "cpu" else device)


def _random_state() -> Restore:
    # Drawing random numbers is no fault, but must not change the numbers of the program.
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def restore() -> list[str]:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        return []

    return restore


def _warnings_state() -> Restore:
    filters, show = list(warnings.filters), warnings.showwarning

    def restore() -> list[str]:
        # Many libraries add filters for warnings of their own; this is undone without a message.
        if warnings.filters != filters:
            warnings.filters[:] = filters  # type: ignore[index]
            warnings._filters_mutated()  # type: ignore[attr-defined]
        warnings.showwarning = show
        return []

    return restore


def _logging_state() -> Restore:
    loggers = [logging.getLogger(), logging.getLogger("ttd_plugins")]
    before = [(one, one.level, list(one.handlers), list(one.filters), one.disabled, one.propagate) for one in loggers]
    disabled, factory, logger_class = (
        logging.root.manager.disable,
        logging.getLogRecordFactory(),
        logging.getLoggerClass(),
    )

    def restore() -> list[str]:
        changed = logging.root.manager.disable != disabled
        for logger, level, handlers, filters, off, propagate in before:
            now = (logger.level, logger.handlers, logger.filters, logger.disabled, logger.propagate)
            if now == (level, handlers, filters, off, propagate):
                continue
            changed = True
            logger.setLevel(level)
            logger.handlers[:], logger.filters[:] = handlers, filters
            logger.disabled, logger.propagate = off, propagate
        logging.disable(disabled)
        logging.setLogRecordFactory(factory)
        logging.setLoggerClass(logger_class)
        return ["the configuration of logging"] if changed else []

    return restore


def _process_state() -> Restore:
    environment, hook = dict(os.environ), sys.excepthook
    try:
        folder: str | None = os.getcwd()
    except OSError:
        folder = None
    main = threading.current_thread() is threading.main_thread()
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}

    def restore() -> list[str]:
        changed = []
        names = sorted(name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name))
        for name in names:
            if name in environment:
                os.environ[name] = environment[name]
            else:
                del os.environ[name]
        changed += [f"the environment variable {name}" for name in names]
        with suppress(OSError):
            if folder is not None and os.getcwd() != folder:
                os.chdir(folder)
                changed.append("the working directory")
        for number, handler in signals.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
                changed.append(f"the handler of {number.name}")
        if sys.excepthook is not hook:
            sys.excepthook = hook
            changed.append("sys.excepthook")
        return changed

    return restore

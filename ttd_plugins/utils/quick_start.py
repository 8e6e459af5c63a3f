"""A quicker start: no garbage collection while libraries are imported, and torch's compiler only if it is used.

An import creates many objects and no garbage, but Python's collector scans them all again and again. torchvision and
timm import ``torch._dynamo``, the machinery of ``torch.compile``: torchvision for one function that its operator
``roi_align`` calls, timm to exclude four methods of one model from compilation. Together they are nearly half of the
time that open_clip needs to be imported.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

COMPILER = "torch._dynamo"
_COMPILER_UTILS = f"{COMPILER}.utils"

_lock = threading.Lock()
_pauses = 0
_resume = False


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause Python's garbage collector within a ``with`` block; it resumes only if it was on before.

    The objects that exist at the end count as old: only a full collection scans them, not the next small one.
    """
    global _pauses, _resume
    with _lock:
        # Blocks of several threads may overlap; the last one that ends resumes.
        if _pauses == 0:
            _resume = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if _pauses == 0 and _resume:
                # Objects that the program froze itself stay frozen.
                if gc.get_freeze_count() == 0:
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()


class _DeferredUtils(ModuleType):
    """Stands in for ``torch._dynamo.utils`` while libraries are imported, and imports it when it is needed."""

    @staticmethod
    def is_compile_supported(device_type: str) -> Any:
        """Call the function of the same name, which imports the compiler."""
        return importlib.import_module(_COMPILER_UTILS).is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        # Another import, or a library that uses other names: the module itself from now on.
        if name.startswith("__"):
            raise AttributeError(name)
        _remove(self)
        return getattr(importlib.import_module(_COMPILER_UTILS), name)


def _deferred_disable(disable: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``torch.compiler.disable`` that decorates a function with ``disable`` when the function is called."""

    @functools.wraps(disable)
    def deferred(fn: Any = None, *args: Any, **kwargs: Any) -> Any:
        if COMPILER in sys.modules or not isinstance(fn, FunctionType):
            return disable(fn, *args, **kwargs)

        @functools.wraps(fn)
        def call(*inputs: Any, **named: Any) -> Any:
            # Without the compiler nothing is compiled, so there is nothing to exclude.
            function = disable(fn, *args, **kwargs) if COMPILER in sys.modules else fn
            return function(*inputs, **named)

        return call

    return deferred


@contextmanager
def compiler_deferred() -> Iterator[None]:
    """Let libraries be imported within a ``with`` block without ``torch._dynamo``, unless that is imported already.

    ``torchvision.ops.roi_align`` imports it when it is called, and functions under ``torch.compiler.disable`` are
    excluded from compilation once something is compiled. Nothing else changes, and nothing stays behind.
    """
    import torch

    if COMPILER in sys.modules:
        yield
        return
    placeholder, disable = _DeferredUtils(_COMPILER_UTILS), torch.compiler.disable
    sys.modules[_COMPILER_UTILS] = placeholder
    torch.compiler.disable = _deferred_disable(disable)
    try:
        yield
    finally:
        torch.compiler.disable = disable
        _remove(placeholder)


def _remove(placeholder: ModuleType) -> None:
    if sys.modules.get(_COMPILER_UTILS) is placeholder:
        del sys.modules[_COMPILER_UTILS]

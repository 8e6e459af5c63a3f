"""Broken copies of functions, to show that the checks of this suite notice them."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest


def mutant(function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """``function`` compiled again with ``old`` replaced by ``new`` in its source, where ``old`` stands once."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__name__} has {source.count(old)} of {old!r}; write the mutant anew"
    # A copy of the namespace, so that the module itself keeps the sound function.
    namespace = dict(vars(sys.modules[function.__module__]))
    exec(compile(source.replace(old, new), f"<mutant of {function.__name__}>", "exec"), namespace)
    return namespace[function.__name__]


def assert_caught(check: Callable[[], None]) -> None:
    """``check`` must fail now that something is broken: by an assertion of its own, not by a crash."""
    with pytest.raises(AssertionError):
        check()

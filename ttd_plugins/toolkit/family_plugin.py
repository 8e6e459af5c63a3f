"""The plugin module of an adapter in one line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from ttd_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from ttd_plugins.adapter import AdapterFamily


def family_plugin(module: str, family: str) -> Callable[[Callable[[AdapterFamily], None]], None]:
    """Return an implementation of the hook ``register_adapters`` that registers one family.

    Assign it to the name of the hook in the module that the entry point names::

        register_adapters = family_plugin("ttd_mini.family", "MiniFamily")

    Args:
        module: module of the family; it is imported when the hook is called, so that listing plugins stays cheap.
        family: name of the :class:`~ttd_plugins.adapter.AdapterFamily` in it.
    """

    @hookimpl
    def register_adapters(register: Callable[[AdapterFamily], None]) -> None:
        register(getattr(importlib.import_module(module), family)())

    return register_adapters

"""The hooks that a plugin may implement. ``docs/plugin-hooks.md`` describes each with an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from ttd_plugins.adapter import AdapterFamily
    from ttd_plugins.tags import TagExtractor

PROJECT_NAME = "ttd_plugins"

DEPRECATED_HOOKS = ("adapter_for_model",)
"""Hooks that a plugin may still implement, and that are ignored."""

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def register_adapters(register: Callable[[AdapterFamily], None]) -> None:
    """Call ``register(family)`` for every adapter family that the plugin brings."""


@hookspec(firstresult=True)
def adapter_for_model(model: nn.Module) -> str | None:  # type: ignore[empty-body]
    """Deprecated and ignored: :meth:`~ttd_plugins.adapter.AdapterFamily.claims` decides which family takes a model."""


@hookspec
def register_tag_extractors(register: Callable[[str, Callable[..., TagExtractor]], None]) -> None:
    """Call ``register(name, factory)`` for every tag extractor; ``factory(**options)`` builds one."""

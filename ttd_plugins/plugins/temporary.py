"""A plugin that is registered within a ``with`` block, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ttd_plugins.errors import PluginError
from ttd_plugins.plugins.discovery import get_registry
from ttd_plugins.plugins.listing import PluginInfo, plugin_info
from ttd_plugins.plugins.registry import Plugin


@contextmanager
def temporary_plugin(plugin: object, name: str | None = None) -> Iterator[PluginInfo]:
    """Register ``plugin`` within a ``with`` block, for tests.

    Args:
        plugin: a module, or any object whose methods are marked ``@hookimpl``.
        name: its name in messages and listings; by default its ``__name__`` or that of its class.

    Yields:
        The plugin's entry in :func:`~ttd_plugins.plugins.listing.list_plugins`.

    Raises:
        PluginError: the plugin cannot be registered (an unknown hook, an exception in a registration hook, a plugin
            that is registered already).
    """
    registry = get_registry()
    entry = Plugin(name or getattr(plugin, "__name__", None) or type(plugin).__name__)
    try:
        registry.register(entry, plugin)
    except PluginError as error:
        raise PluginError(f"{entry.owner} {error}") from error
    try:
        yield plugin_info(registry, entry)
    finally:
        registry.unregister(entry)

"""Discovery: plugins are found through the entry-point group ``ttd_plugins`` and loaded once, on first use.

Each plugin is loaded separately: one that cannot be imported, breaks the contract or raises is left out with a reason
(:func:`~ttd_plugins.plugins.listing.list_plugins`, and a :class:`~ttd_plugins.errors.PluginWarning`), and the others
keep working.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import threading
import warnings
from collections.abc import Callable
from functools import partial

import pluggy

from ttd_plugins._version import __version__
from ttd_plugins.errors import PluginError, PluginWarning, choices_sentence, one_sentence
from ttd_plugins.hookspecs import PROJECT_NAME
from ttd_plugins.plugins.isolation import isolated_import
from ttd_plugins.plugins.registry import (
    DENY_PLUGINS_VARIABLE,
    LOAD_PLUGINS_VARIABLE,
    OWN_DISTRIBUTION,
    Plugin,
    Registry,
)

DEFAULT_PLUGINS = ("ttd_plugins.tag_extractors.word_tags",)
"""Modules that are always loaded; all other plugins, ours included, come through entry points."""

ENTRY_POINT_GROUP = PROJECT_NAME

_lock = threading.RLock()
_loaded: Registry | None = None
_loading = False


def get_registry() -> Registry:
    """Return the registry of this process; load the plugins on the first call, with one PluginWarning per problem.

    Raises:
        PluginError: a plugin asked for plugins while they are being loaded.
    """
    global _loaded, _loading
    with _lock:
        if _loading:
            raise PluginError("plugins were requested while they are being loaded; request them on use instead")
        if _loaded is None:
            _loading = True
            try:
                registry = load_plugins()
            finally:
                _loading = False
            _loaded = registry
            for plugin in registry.plugins:
                for problem in [*registry.problems(plugin), *plugin.notes]:
                    warnings.warn(f"{plugin.owner}: {problem}", PluginWarning, stacklevel=3)
        return _loaded


def loaded_registry() -> Registry | None:
    """Return the registry if plugins were loaded already, without loading them."""
    return _loaded


def plugin_manager() -> pluggy.PluginManager:
    """Return the pluggy manager of the plugins, which are loaded if they were not."""
    return get_registry().manager


def load_plugins() -> Registry:
    """Return a new registry with the default plugins and the entry points that are selected and not denied."""
    registry = Registry()
    for module in DEFAULT_PLUGINS:
        _load_plugin(registry, Plugin(module, OWN_DISTRIBUTION, __version__), partial(importlib.import_module, module))
    for entry_point, plugin in _selected_entry_points(registry):
        _load_plugin(registry, plugin, entry_point.load)
    return registry


def _load_plugin(registry: Registry, plugin: Plugin, importer: Callable[[], object]) -> None:
    """Import and register one plugin; record on it whatever fails."""
    advice = f"to leave it out, set {DENY_PLUGINS_VARIABLE}={plugin.distribution or plugin.name}"
    with isolated_import(plugin.owner, plugin.notes.append, advice):
        try:
            imported = importer()
        # A module that calls sys.exit() on import must not end the caller's program.
        except (Exception, SystemExit) as error:
            plugin.discard(f"could not be imported: {type(error).__name__}: {one_sentence(error)}")
            registry.plugins.append(plugin)
            return
        try:
            registry.register(plugin, imported)
        except PluginError as error:
            plugin.discard(str(error))
            registry.plugins.append(plugin)


def _selected_entry_points(registry: Registry) -> list[tuple[importlib.metadata.EntryPoint, Plugin]]:
    """Return the entry points to load, in an order that does not depend on the installation."""
    found = []
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        distribution = entry_point.dist
        origin = (distribution.name, distribution.version) if distribution is not None else (None, None)
        found.append((entry_point, Plugin(entry_point.name, *origin)))
    # Our own first: otherwise another distribution could take the names of our plugins.
    found.sort(key=lambda pair: (pair[1].distribution != OWN_DISTRIBUTION, pair[1].name, pair[1].distribution or ""))
    registry.reserved = {plugin.name for _, plugin in found if plugin.distribution == OWN_DISTRIBUTION}
    denied = {_canonical(name) for name in _names(os.environ.get(DENY_PLUGINS_VARIABLE, ""))}
    for pair in list(found):
        if denied & _names_of(pair[1]):
            found.remove(pair)
            pair[1].denied = True
            registry.plugins.append(pair[1])
    selection = os.environ.get(LOAD_PLUGINS_VARIABLE)
    if selection is None:
        return found
    names = _names(selection)
    known = {
        known
        for plugin in [*(plugin for _, plugin in found), *registry.plugins]
        for known in (plugin.name, plugin.distribution)
        if known
    }
    for name in names:
        if _canonical(name) not in {_canonical(other) for other in (*known, *DEFAULT_PLUGINS)}:
            unknown = Plugin(name)
            unknown.discard(f"{LOAD_PLUGINS_VARIABLE}: {choices_sentence('plugin', name, known)}")
            registry.plugins.append(unknown)
    selected = {_canonical(name) for name in names}
    return [pair for pair in found if selected & _names_of(pair[1])]


def _names(variable: str) -> list[str]:
    return [name.strip() for name in variable.split(",") if name.strip()]


def _names_of(plugin: Plugin) -> set[str]:
    """The names by which the environment variables select or deny a plugin."""
    return {_canonical(name) for name in (plugin.name, plugin.distribution) if name}


def _canonical(name: str) -> str:
    # Distribution names compare as the packaging standard says; entry points are treated alike.
    return re.sub(r"[-_.]+", "-", name).lower()

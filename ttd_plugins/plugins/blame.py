"""Which plugin an exception comes from."""

from __future__ import annotations

import traceback

from ttd_plugins.errors import PluginError, one_sentence
from ttd_plugins.plugins.discovery import OWN_DISTRIBUTION, loaded_registry


def explain(error: BaseException) -> PluginError | None:
    """Return a one-sentence error that names the plugin from which an exception came, for the command line.

    The plugin that owns the innermost frame of the traceback is blamed. An exception of this distribution's own
    plugins is a bug, whose traceback should be seen in full.

    Returns:
        The error, or ``None`` if no frame belongs to a plugin of another distribution.
    """
    registry = loaded_registry()
    if registry is None:
        return None
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        for plugin in registry.plugins:
            registered = [type(family) for _, family in plugin.families] + [
                factory for _, factory in plugin.tag_extractors
            ]
            packages = {str(getattr(one, "__module__", "")).partition(".")[0] for one in registered}
            if package in packages and plugin.distribution != OWN_DISTRIBUTION:
                reason = f"{type(error).__name__}: {one_sentence(error)}"
                return PluginError(f"{plugin.owner} failed in {frame.f_code.co_qualname}: {reason}")
    return None

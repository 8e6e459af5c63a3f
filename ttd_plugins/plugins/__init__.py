"""Plugins: discovery, names of backbones, listings, and the two ways to an adapter, :func:`load` and :func:`wrap`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.plugins.blame import explain
from ttd_plugins.plugins.discovery import DEFAULT_PLUGINS, ENTRY_POINT_GROUP, plugin_manager
from ttd_plugins.plugins.listing import (
    BackboneInfo,
    FamilyInfo,
    PluginInfo,
    families,
    get_family,
    list_backbones,
    list_plugins,
    tag_extractors,
)
from ttd_plugins.plugins.loading import (
    ADAPTER_GUIDE,
    family_for_model,
    load,
    make_tag_extractor,
    register_source_opener,
    wrap,
)
from ttd_plugins.plugins.names import RANDOM_WEIGHTS, BackboneName, parse_name
from ttd_plugins.plugins.registry import DENY_PLUGINS_VARIABLE, LOAD_PLUGINS_VARIABLE, TagExtractorFactory
from ttd_plugins.plugins.temporary import temporary_plugin

__all__ = [
    "ADAPTER_GUIDE",
    "DEFAULT_PLUGINS",
    "DENY_PLUGINS_VARIABLE",
    "ENTRY_POINT_GROUP",
    "LOAD_PLUGINS_VARIABLE",
    "RANDOM_WEIGHTS",
    "BackboneInfo",
    "BackboneName",
    "FamilyInfo",
    "PluginInfo",
    "TagExtractorFactory",
    "explain",
    "families",
    "family_for_model",
    "get_family",
    "list_backbones",
    "list_plugins",
    "load",
    "make_tag_extractor",
    "parse_name",
    "plugin_manager",
    "tag_extractors",
    "temporary_plugin",
    "wrap",
]


def _open_source(name: str, options: Mapping[str, Any]) -> DenseAdapter | None:
    from ttd_plugins.backbone_sources import open_source

    return open_source(name, options)


# Here, so that load() opens runs and exports however it was imported.
register_source_opener(_open_source)

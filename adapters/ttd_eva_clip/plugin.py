"""The plugin of the family ``eva_clip``."""

from ttd_plugins.toolkit.family_plugin import family_plugin

register_adapters = family_plugin("ttd_eva_clip.family", "EvaCLIPFamily")

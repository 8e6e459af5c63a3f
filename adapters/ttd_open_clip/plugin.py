"""The plugin of the family ``open_clip``."""

from ttd_plugins.toolkit.family_plugin import family_plugin

register_adapters = family_plugin("ttd_open_clip.family", "OpenCLIPFamily")

"""The plugin of the family ``siglip``."""

from ttd_plugins.toolkit.family_plugin import family_plugin

register_adapters = family_plugin("ttd_siglip.family", "SiglipFamily")

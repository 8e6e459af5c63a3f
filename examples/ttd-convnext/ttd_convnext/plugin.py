"""The plugin of the family ``convnext``."""

from ttd_plugins.toolkit.family_plugin import family_plugin

register_adapters = family_plugin("ttd_convnext.family", "ConvNeXtFamily")

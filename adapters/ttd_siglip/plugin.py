"""The plugin of the family ``siglip``."""

from ttd_plugins.toolkit.family_plugin import family_claims, family_plugin

register_adapters = family_plugin("ttd_siglip.family", "SiglipFamily")
adapter_for_model = family_claims("ttd_siglip.family", "SiglipFamily")

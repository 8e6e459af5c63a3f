"""The plugin of the family ``openai_clip``."""

from ttd_plugins.toolkit.family_plugin import family_claims, family_plugin

register_adapters = family_plugin("ttd_openai_clip.family", "OpenAICLIPFamily")
adapter_for_model = family_claims("ttd_openai_clip.family", "OpenAICLIPFamily")

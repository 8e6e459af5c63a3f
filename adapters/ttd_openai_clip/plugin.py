"""The plugin of the family ``openai_clip``."""

from ttd_plugins.toolkit.family_plugin import family_plugin

register_adapters = family_plugin("ttd_openai_clip.family", "OpenAICLIPFamily")

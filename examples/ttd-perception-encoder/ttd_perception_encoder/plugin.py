"""The plugin of the family ``perception_encoder``."""

from ttd_plugins.toolkit.family_plugin import family_plugin

register_adapters = family_plugin("ttd_perception_encoder.family", "PerceptionEncoderFamily")

"""The family ``eva_clip``: models by name and as objects; open_clip and timm are imported only when they are needed."""

from __future__ import annotations

from ttd_eva_clip.adapter import EvaCLIPAdapter
from ttd_eva_clip.recognition import import_open_clip, is_eva_clip, unsupported_config_reason
from ttd_plugins.toolkit.open_clip_family import OpenCLIPModelFamily


class EvaCLIPFamily(OpenCLIPModelFamily):
    """EVA-CLIP models (EVA01 and EVA02) of open_clip and timm."""

    name = "eva_clip"
    summary = "EVA01 and EVA02 CLIP models of open_clip and timm"
    api_version = 1
    adapter_class = EvaCLIPAdapter
    tiny_module = "ttd_eva_clip.tiny"
    import_open_clip = staticmethod(import_open_clip)
    unsupported_config_reason = staticmethod(unsupported_config_reason)

    def claims(self, model: object) -> bool:
        """Whether ``model`` is a CLIP model around a timm EVA trunk without attentional pooling."""
        return is_eva_clip(model)

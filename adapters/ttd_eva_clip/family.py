"""The family ``eva_clip``: models by name and as objects; open_clip and timm are imported only when they are needed."""

from __future__ import annotations

from ttd_eva_clip.adapter import EvaCLIPAdapter
from ttd_plugins.toolkit.open_clip_family import OpenCLIPModelFamily


class EvaCLIPFamily(OpenCLIPModelFamily):
    """EVA-CLIP models (EVA01 and EVA02) of open_clip and timm."""

    summary = "EVA01 and EVA02 CLIP models of open_clip and timm"
    api_version = 1
    adapter_class = EvaCLIPAdapter

"""The family ``open_clip``: models by name and as objects; open_clip is imported only when it is needed."""

from __future__ import annotations

from typing import Any

from torch import nn

from ttd_open_clip import recognition
from ttd_open_clip.adapter import OpenCLIPAdapter
from ttd_open_clip.attention_pooled_adapter import OpenCLIPAttentionPooledAdapter
from ttd_open_clip.resnet_adapter import OpenCLIPResNetAdapter
from ttd_open_clip.trunk_adapter import OpenCLIPTrunkAdapter
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.toolkit.open_clip_adapter import OpenCLIPModelAdapter
from ttd_plugins.toolkit.open_clip_family import OpenCLIPModelFamily

ADAPTERS: dict[str | None, type[OpenCLIPModelAdapter]] = {
    "trunk": OpenCLIPTrunkAdapter,
    "resnet": OpenCLIPResNetAdapter,
    "attention_pooled": OpenCLIPAttentionPooledAdapter,
    "transformer": OpenCLIPAdapter,
    # Its constructor raises with the reason.
    None: OpenCLIPAdapter,
}


class OpenCLIPFamily(OpenCLIPModelFamily):
    """CLIP and CoCa models with open_clip's own vision transformers and ResNets, or convolutional trunks of timm."""

    summary = "open_clip's vision transformers (OpenAI, LAION, MetaCLIP, ...), CoCa, ResNets, ConvNeXt, MobileCLIP-S"
    api_version = 1
    adapter_class = OpenCLIPAdapter
    embedded = {"tiny": "tiny:load_tiny", "photo": "photo:load_photo"}  # noqa: RUF012

    def _adapt(self, model: nn.Module, **options: Any) -> DenseAdapter:
        return ADAPTERS[recognition.image_tower_kind(model)](model, **options)

    def unclaimed_reason(self, model: object) -> str | None:
        """Why a model of open_clip is not claimed, such as an image tower alone; ``None`` for other objects."""
        return recognition.unclaimed_reason(model)

    def _architecture(self, open_clip: Any, name: str, weights: str) -> str:
        """The architecture with the activation function that the pretrained tag was trained with.

        For weights trained with QuickGELU that is the ``-quickgelu`` twin, whose name is then in the description.
        open_clip itself only warns, and computes other features.
        """
        trained = open_clip.get_pretrained_cfg(name, weights).get("quick_gelu", False)
        twin = f"{name}-quickgelu"
        own = open_clip.get_model_config(name).get("quick_gelu", False)
        return twin if trained and not own and twin in open_clip.list_models() else name

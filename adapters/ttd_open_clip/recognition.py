"""Which models of open_clip this adapter supports, by attribute names alone, and the import of open_clip.

open_clip 3 uses ``nn.MultiheadAttention`` and open_clip 4 its own ``Attention`` with parameters of the same names; both
are supported. The original ``clip`` package uses the same names, but its blocks run with the sequence first; its models
belong to another family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.optional_library import import_library

VIT_PARTS = ("conv1", "class_embedding", "positional_embedding", "ln_post", "transformer")
BLOCK_PARTS = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2")


ATTENTIONAL_POOLING = (
    "its image tower pools with learned queries (attentional pooling, as CoCa does), so its patches have no place in "
    "the joint image-text space"
)


RESNET = "its image tower is a ResNet, and this family supports only vision transformers"


def import_open_clip() -> Any:
    """Return the module ``open_clip``, or raise MissingDependencyError."""
    install = "'ttd-plugins[open_clip]'"
    return import_library("open_clip", "open_clip backbones", distribution="open_clip_torch", install=install)


def claims(model: object) -> bool:
    """Whether ``model`` is a CLIP model around open_clip's own vision transformer, batch first."""
    visual = getattr(model, "visual", None)
    if visual is None or not all(hasattr(model, name) for name in ("encode_image", "encode_text", "logit_scale")):
        return False
    if not all(hasattr(visual, name) for name in VIT_PARTS):
        return False
    blocks = getattr(visual.transformer, "resblocks", None)
    if blocks is None or len(blocks) == 0 or not all(hasattr(blocks[-1], name) for name in BLOCK_PARTS):
        return False
    # open_clip 4 has no such attribute on the tower or its attention; it is always batch first.
    return bool(getattr(visual.transformer, "batch_first", True) and getattr(blocks[-1].attn, "batch_first", True))


def unsupported_reason(model: object) -> str | None:
    """Why ``model`` cannot be adapted, as the end of a sentence; ``None`` where it can."""
    visual = getattr(model, "visual", None)
    if visual is None:
        return "it has no image tower named visual"
    if hasattr(visual, "trunk"):
        return "its image tower is a timm trunk, and this family supports only open_clip's native vision transformers"
    if hasattr(visual, "attnpool") or hasattr(visual, "layer4"):
        return RESNET
    if not claims(model):
        return "it is not built like open_clip's native vision transformer (batch first, visual.transformer.resblocks)"
    if getattr(visual, "attn_pool", None) is not None:
        return ATTENTIONAL_POOLING
    if getattr(visual, "pool_type", "tok") not in ("tok", "avg"):
        return f"its image tower returns no pooled embedding (pool_type {visual.pool_type!r})"
    return text_tower.unpooled_reason(model)


def unclaimed_reason(model: object) -> str | None:
    """Why a model with open_clip's methods is not claimed, as the end of a sentence; ``None`` for other objects."""
    if all(hasattr(model, name) for name in VIT_PARTS):
        return "it is an image tower alone, and TTD needs both towers; pass the whole model"
    if claims(model) or not all(hasattr(model, name) for name in ("visual", "encode_image", "encode_text")):
        return None
    reason = unsupported_reason(model)
    if reason == RESNET:
        return (
            f"{reason}; load a vision transformer such as ViT-B-16, or the same ResNet with the original clip package, "
            "whose models the family 'openai_clip' supports"
        )
    return reason


def unsupported_config_reason(config: Mapping[str, Any]) -> str | None:
    """The same as :func:`unsupported_reason` for a ``model_cfg`` of open_clip, before anything is built."""
    vision = config.get("vision_cfg", {})
    if vision.get("timm_model_name"):
        return "its image tower is a timm trunk, and this family supports only open_clip's native vision transformers"
    if isinstance(vision.get("layers"), (list, tuple)):
        return RESNET
    if vision.get("attentional_pool"):
        return ATTENTIONAL_POOLING
    if vision.get("pool_type", "tok") not in ("tok", "avg"):
        return f"its image tower returns no pooled embedding (pool_type {vision['pool_type']!r})"
    return None

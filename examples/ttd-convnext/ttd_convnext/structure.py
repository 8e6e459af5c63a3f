"""What makes a model a ConvNeXt CLIP, and what in it cannot be served; by attribute names alone, nothing is imported.

A timm ConvNeXt has ``stem`` and ``stages``, where vision transformers have ``patch_embed`` and ``blocks``, and its
blocks begin with a depthwise convolution, ``conv_dw``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLIP_PARTS = ("encode_image", "encode_text", "logit_scale")
TRUNK_PARTS = ("stem", "stages", "norm_pre", "head", "feature_info", "forward_features", "forward_head")
BLOCK_PARTS = ("conv_dw", "norm", "mlp")


def is_convnext_clip(model: object) -> bool:
    """Whether ``model`` is a CLIP model of open_clip's around a timm ConvNeXt trunk."""
    trunk: Any = getattr(getattr(model, "visual", None), "trunk", None)
    if trunk is None or not all(hasattr(model, name) for name in CLIP_PARTS):
        return False
    if not all(hasattr(trunk, name) for name in TRUNK_PARTS) or len(trunk.stages) == 0:
        return False
    blocks = getattr(trunk.stages[-1], "blocks", None)
    return blocks is not None and len(blocks) > 0 and all(hasattr(blocks[-1], name) for name in BLOCK_PARTS)


def refusal_of_model(model: Any) -> str | None:
    """Why ``model`` cannot be adapted, as the end of a sentence; ``None`` where it can."""
    if not is_convnext_clip(model):
        return "its image tower is not built like timm's ConvNeXt (visual.trunk with stem, stages and head)"
    if hasattr(model.visual.head, "pool"):
        return "its image tower pools by attention (visual.head.pool), and only pooling in the trunk is served"
    if model.visual.trunk.head.global_pool.is_identity():
        return "its image tower does not pool"
    return None


def refusal_of_config(config: Mapping[str, Any]) -> str | None:
    """The same for an open_clip configuration, before anything is built."""
    vision = config.get("vision_cfg", {})
    name = vision.get("timm_model_name") or ""
    if "convnext" not in name:
        return f"its image tower is {f'the timm trunk {name}' if name else 'no timm trunk'}, and no ConvNeXt"
    if vision.get("timm_pool") in ("abs_attn", "rot_attn"):
        return "its image tower pools by attention, and only pooling in the trunk is served"
    return None

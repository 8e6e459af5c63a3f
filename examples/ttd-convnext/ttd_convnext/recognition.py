"""Which ConvNeXt CLIP models this adapter supports, by attribute names alone, and the import of open_clip.

A timm ConvNeXt has ``stem`` and ``stages`` where vision transformers have ``patch_embed`` and ``blocks``, and its
blocks begin with a depthwise convolution, ``conv_dw``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttd_plugins.toolkit.optional_library import import_library

CLIP_PARTS = ("encode_image", "encode_text", "logit_scale")
TRUNK_PARTS = ("stem", "stages", "norm_pre", "head", "feature_info", "forward_features", "forward_head")
BLOCK_PARTS = ("conv_dw", "norm", "mlp")


def import_open_clip() -> Any:
    """Return the module ``open_clip``, or raise MissingDependencyError."""
    name = "open_clip_torch"
    return import_library("open_clip", "ConvNeXt backbones", distribution=name, install=name)


def claims(model: object) -> bool:
    """Whether ``model`` is a CLIP model of open_clip's around a timm ConvNeXt trunk."""
    trunk: Any = getattr(getattr(model, "visual", None), "trunk", None)
    if trunk is None or not all(hasattr(model, name) for name in CLIP_PARTS):
        return False
    if not all(hasattr(trunk, name) for name in TRUNK_PARTS) or len(trunk.stages) == 0:
        return False
    blocks = getattr(trunk.stages[-1], "blocks", None)
    return blocks is not None and len(blocks) > 0 and all(hasattr(blocks[-1], name) for name in BLOCK_PARTS)


def unsupported_reason(model: Any) -> str | None:
    """Why ``model`` cannot be adapted, as the end of a sentence; ``None`` where it can."""
    if not claims(model):
        return "its image tower is not built like timm's ConvNeXt (visual.trunk with stem, stages and head)"
    if hasattr(model.visual.head, "pool"):
        return (
            "its image tower pools by attention (visual.head.pool), and this family supports only pooling in the trunk"
        )
    if model.visual.trunk.head.global_pool.is_identity():
        return "its image tower does not pool"
    return None


def unsupported_config_reason(config: Mapping[str, Any]) -> str | None:
    """The same for a ``model_cfg`` of open_clip, before anything is built."""
    vision = config.get("vision_cfg", {})
    name = vision.get("timm_model_name") or ""
    if "convnext" not in name:
        return f"its image tower is {f'the timm trunk {name}' if name else 'no timm trunk'}, and no ConvNeXt"
    if vision.get("timm_pool") in ("abs_attn", "rot_attn"):
        return "its image tower pools by attention, and this family supports only pooling in the trunk"
    return None

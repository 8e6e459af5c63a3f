"""Which EVA-CLIP models this adapter supports, by attribute names alone, and the import of open_clip.

timm's class ``Eva`` differs from its ``VisionTransformer`` by ``rope`` and by the attention's ``num_prefix_tokens``.
The class also serves towers that pool with learned queries (Perception Encoder), which this family does not claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.optional_library import import_library

TRUNK_PARTS = ("patch_embed", "cls_token", "pos_embed", "rope", "norm_pre", "blocks", "norm", "fc_norm", "head")
BLOCK_PARTS = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
ATTENTION_PARTS = ("num_heads", "num_prefix_tokens", "qkv", "q_norm", "k_norm", "norm", "proj")
POOLS = ("token", "avg")


def import_open_clip() -> Any:
    """Return the module ``open_clip``, or raise MissingDependencyError."""
    install = "'ttd-plugins[eva_clip]'"
    return import_library("open_clip", "EVA-CLIP backbones", distribution="open_clip_torch", install=install)


def claims(model: object) -> bool:
    """Whether ``model`` is a CLIP model around a timm EVA trunk without attentional pooling."""
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    if trunk is None or not all(hasattr(model, name) for name in ("encode_image", "encode_text", "logit_scale")):
        return False
    if not all(hasattr(trunk, name) for name in TRUNK_PARTS) or getattr(trunk, "attn_pool", None) is not None:
        return False
    blocks = trunk.blocks
    if len(blocks) == 0 or not all(hasattr(blocks[-1], name) for name in BLOCK_PARTS):
        return False
    attention = blocks[-1].attn
    # A LoRA layer around the attention module stores it under this name.
    attention = getattr(attention, "base_layer", attention)
    return all(hasattr(attention, name) for name in ATTENTION_PARTS)


def unsupported_reason(model: object) -> str | None:
    """Why ``model`` cannot be adapted, as the end of a sentence; ``None`` where it can."""
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    if trunk is None:
        return "it has no timm trunk named visual.trunk, and this family supports only EVA trunks"
    if getattr(trunk, "attn_pool", None) is not None:
        return (
            "its image tower pools with learned queries (attentional pooling), so its patches have no place in the "
            "joint image-text space"
        )
    if not claims(model):
        return "its image tower is not built like timm's Eva (visual.trunk with rope, norm_pre, blocks, norm and head)"
    if trunk.global_pool not in POOLS:
        return _pool_reason(trunk.global_pool)
    if trunk.global_pool == "token" and trunk.cls_token is None:
        return "its image tower pools at a class token that it does not have"
    if hasattr(getattr(model.visual, "head", None), "pool"):  # type: ignore[attr-defined]
        return "its image tower pools in a head of its own (visual.head.pool), where patches have no counterpart"
    return text_tower.unpooled_reason(model)


def unsupported_config_reason(config: Mapping[str, Any]) -> str | None:
    """The same as :func:`unsupported_reason` for a ``model_cfg`` of open_clip, before anything is built."""
    vision = config.get("vision_cfg", {})
    name = vision.get("timm_model_name") or ""
    if not name:
        return "its image tower is no timm trunk, and this family supports only EVA trunks"
    if not name.startswith("eva"):
        return f"its image tower is timm's {name}, and this family supports only EVA trunks"
    pool = vision.get("timm_pool", "avg")
    if pool not in POOLS:
        return _pool_reason(pool)
    return None


def _pool_reason(pool: str) -> str:
    return f"its image tower pools by {pool or 'nothing'!r}, and this family supports only {' and '.join(POOLS)}"

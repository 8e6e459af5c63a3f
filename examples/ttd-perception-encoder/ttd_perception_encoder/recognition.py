"""Which models this adapter supports, by attribute names alone, and the import of open_clip.

The image tower of Perception Encoder is timm's class ``Eva`` (rotary positions, ``rope``) with a pooling head
(``attn_pool``), in which one learned query (``latent``) attends to all tokens. SigLIP's towers have the same head but
no rotary positions, and EVA-CLIP's have rotary positions but no such head, so no family claims the other's models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.optional_library import import_library

CLIP_PARTS = ("encode_image", "encode_text", "logit_scale")
TRUNK_PARTS = ("patch_embed", "cls_token", "pos_embed", "rope", "norm_pre", "blocks", "norm", "fc_norm", "head")
POOL_PARTS = ("latent", "q", "kv", "q_norm", "k_norm", "proj", "norm", "mlp")


def import_open_clip() -> Any:
    """Return the module ``open_clip``, or raise MissingDependencyError."""
    name = "open_clip_torch"
    return import_library("open_clip", "Perception Encoder backbones", distribution=name, install=name)


def claims(model: object) -> bool:
    """Whether ``model`` is a CLIP model around a timm ``Eva`` trunk with a pooling head."""
    trunk: Any = getattr(getattr(model, "visual", None), "trunk", None)
    if trunk is None or not all(hasattr(model, name) for name in CLIP_PARTS):
        return False
    pool = getattr(trunk, "attn_pool", None)
    return all(hasattr(trunk, name) for name in TRUNK_PARTS) and all(hasattr(pool, name) for name in POOL_PARTS)


def unsupported_reason(model: Any) -> str | None:
    """Why ``model`` cannot be adapted, as the end of a sentence; ``None`` where it can."""
    if not claims(model):
        return "its image tower is not built like Perception Encoder's (visual.trunk with rope and attn_pool)"
    trunk = model.visual.trunk
    pool = trunk.attn_pool
    if getattr(trunk, "rope_mixed", False) or (
        trunk.rope is not None and getattr(trunk.rope, "feat_shape", None) is None
    ):
        return "its rotary positions are not those of Perception Encoder, one embedding of a fixed grid for all blocks"
    if pool.latent.shape[1] != 1:
        return f"its pooling head has {pool.latent.shape[1]} queries, and this family supports one"
    if getattr(pool, "pos_embed", None) is not None:
        return "its pooling head adds position embeddings of its own, which fit one image size only"
    if hasattr(getattr(model.visual, "head", None), "pool"):
        return "its image tower pools a second time, in visual.head.pool"
    return text_tower.unpooled_reason(model)


def unsupported_config_reason(config: Mapping[str, Any]) -> str | None:
    """The same for a ``model_cfg`` of open_clip, before anything is built."""
    vision = config.get("vision_cfg", {})
    name = vision.get("timm_model_name") or ""
    if not name.startswith("vit_pe_core"):
        tower = f"timm's {name}" if name else "no timm trunk"
        return f"its image tower is {tower}, and this family supports only Perception Encoder (vit_pe_core_*)"
    if vision.get("timm_pool") != "map":
        return f"its image tower pools by {vision.get('timm_pool')!r}, and this family supports only 'map'"
    return None

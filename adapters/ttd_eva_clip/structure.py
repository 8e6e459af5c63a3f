"""What makes a model an EVA-CLIP, and what in it cannot be served; by attribute names alone, nothing is imported.

timm's class ``Eva`` is told from its ``VisionTransformer`` by ``rope`` and by what its attention knows of prefix
tokens. The class also carries towers that pool with learned queries (Perception Encoder); those are not claimed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRUNK_PARTS = ("patch_embed", "cls_token", "pos_embed", "rope", "norm_pre", "blocks", "norm", "fc_norm", "head")
BLOCK_PARTS = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
ATTENTION_PARTS = ("num_heads", "num_prefix_tokens", "qkv", "q_norm", "k_norm", "norm", "proj")
POOLS = ("token", "avg")
CUSTOM_POOLS = ("abs_attn", "rot_attn")


def is_eva_clip(model: object) -> bool:
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
    # A LoRA layer around the whole attention module keeps it under this name.
    attention = getattr(attention, "base_layer", attention)
    return all(hasattr(attention, name) for name in ATTENTION_PARTS)


def refusal_of_model(model: object) -> str | None:
    """Why ``model`` cannot be adapted, as the end of a sentence; ``None`` where it can."""
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    if trunk is None:
        return "it has no timm trunk named visual.trunk, and only EVA trunks are served here"
    if getattr(trunk, "attn_pool", None) is not None:
        return (
            "its image tower pools with learned queries (attentional pooling), so its patches have no place in the "
            "joint image-text space"
        )
    if not is_eva_clip(model):
        return "its image tower is not built like timm's Eva (visual.trunk with rope, norm_pre, blocks, norm and head)"
    if trunk.global_pool not in POOLS:
        return f"its image tower pools by {trunk.global_pool or 'nothing'!r}, and only {' and '.join(POOLS)} are served"
    if trunk.global_pool == "token" and trunk.cls_token is None:
        return "its image tower pools at a class token that it does not have"
    if hasattr(getattr(model.visual, "head", None), "pool"):  # type: ignore[attr-defined]
        return "its image tower pools in a head of its own (visual.head.pool), where patches have no place"
    text = getattr(model, "text", model)
    pool = getattr(text, "pool_type", getattr(model, "text_pool_type", None))
    if pool == "none" and getattr(text, "cls_emb", None) is None:
        return "its text tower gives no pooled embedding (pool_type 'none')"
    return None


def refusal_of_config(config: Mapping[str, Any]) -> str | None:
    """The same as :func:`refusal_of_model` for an open_clip configuration, before anything is built."""
    vision = config.get("vision_cfg", {})
    name = vision.get("timm_model_name") or ""
    if not name:
        return "its image tower is no timm trunk, and only EVA trunks are served here"
    if not name.startswith("eva"):
        return f"its image tower is timm's {name}, and only EVA trunks are served here"
    pool = vision.get("timm_pool", "avg")
    if pool not in POOLS:
        return f"its image tower pools by {pool or 'nothing'!r}, and only {' and '.join(POOLS)} are served"
    return None

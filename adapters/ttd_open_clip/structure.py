"""What makes a model open_clip's, and what in it cannot be served; by attribute names alone, nothing is imported.

open_clip 3 uses ``nn.MultiheadAttention`` and open_clip 4 its own ``Attention`` with parameters of the same names;
both are taken. The original ``clip`` package has the same names too, but runs its blocks with the sequence first:
its models belong to another family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VIT_PARTS = ("conv1", "class_embedding", "positional_embedding", "ln_post", "transformer")
BLOCK_PARTS = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2")


def is_native_vit_clip(model: object) -> bool:
    """Whether ``model`` is a CLIP model around open_clip's own vision transformer, batch first."""
    visual = getattr(model, "visual", None)
    if visual is None or not all(hasattr(model, name) for name in ("encode_image", "encode_text", "logit_scale")):
        return False
    if not all(hasattr(visual, name) for name in VIT_PARTS):
        return False
    blocks = getattr(visual.transformer, "resblocks", None)
    if blocks is None or len(blocks) == 0 or not all(hasattr(blocks[-1], name) for name in BLOCK_PARTS):
        return False
    # open_clip 4 has no such attribute on the tower nor on its attention: it is always batch first.
    return bool(getattr(visual.transformer, "batch_first", True) and getattr(blocks[-1].attn, "batch_first", True))


def refusal_of_model(model: object) -> str | None:
    """Why ``model`` cannot be adapted, as the end of a sentence; ``None`` where it can."""
    visual = getattr(model, "visual", None)
    if visual is None:
        return "it has no image tower named visual"
    if hasattr(visual, "trunk"):
        return "its image tower is a timm trunk, and only open_clip's native vision transformers are served here"
    if hasattr(visual, "attnpool") or hasattr(visual, "layer4"):
        return "its image tower is a ResNet, and only vision transformers are served here"
    if not is_native_vit_clip(model):
        return "it is not built like open_clip's native vision transformer (batch first, visual.transformer.resblocks)"
    if getattr(visual, "attn_pool", None) is not None:
        return (
            "its image tower pools with learned queries (attentional pooling, as CoCa does), so its patches have no "
            "place in the joint image-text space"
        )
    if getattr(visual, "pool_type", "tok") not in ("tok", "avg"):
        return f"its image tower gives no pooled embedding (pool_type {visual.pool_type!r})"
    text = getattr(model, "text", model)
    pool = getattr(text, "pool_type", getattr(model, "text_pool_type", None))
    if pool == "none" and getattr(text, "cls_emb", None) is None:
        return "its text tower gives no pooled embedding (pool_type 'none')"
    return None


def refusal_of_config(config: Mapping[str, Any]) -> str | None:
    """The same as :func:`refusal_of_model` for an open_clip configuration, before anything is built."""
    vision = config.get("vision_cfg", {})
    if vision.get("timm_model_name"):
        return "its image tower is a timm trunk, and only open_clip's native vision transformers are served here"
    if isinstance(vision.get("layers"), (list, tuple)):
        return "its image tower is a ResNet, and only vision transformers are served here"
    if vision.get("attentional_pool"):
        return (
            "its image tower pools with learned queries (attentional pooling, as CoCa does), so its patches have no "
            "place in the joint image-text space"
        )
    if vision.get("pool_type", "tok") not in ("tok", "avg"):
        return f"its image tower gives no pooled embedding (pool_type {vision['pool_type']!r})"
    return None

"""Which SigLIP models this family supports, by attribute names alone, and the imports of the libraries.

A SigLIP image tower is recognised by its pooling head: one learned probe attends to all patches, and the output is in
the joint space, with no class token and no projection. transformers calls the probe ``head.probe``, timm (in models of
open_clip) ``attn_pool.latent``. timm's EVA trunks can have the same head, but they have rotary positions (``rope``) and
belong to another family; so do open_clip's native towers, whose ``attn_pool`` has ``query`` instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttd_plugins.toolkit.optional_library import import_library

NAFLEX = (
    "it is a NaFlex tower, whose input is a list of patches with a mask and not pixels [B, 3, height, width]; use a "
    "fixed-resolution SigLIP 2 instead, such as google/siglip2-base-patch16-224 or ViT-B-16-SigLIP2"
)
HEAD_PARTS = ("probe", "attention", "layernorm", "mlp")
POOL_PARTS = ("latent", "kv", "proj")


def import_transformers() -> Any:
    """Return the module ``transformers``, or raise MissingDependencyError."""
    needed_by = "the SigLIP models of its hub, and siglip:tiny,"
    return import_library("transformers", needed_by, distribution="transformers", install="'ttd-plugins[siglip]'")


def import_open_clip() -> Any:
    """Return the module ``open_clip``, or raise MissingDependencyError."""
    needed_by = "the SigLIP architectures of open_clip"
    return import_library("open_clip", needed_by, distribution="open_clip_torch", install="'ttd-plugins[siglip]'")


def _has(module: object, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def is_transformers_siglip(model: object) -> bool:
    """Whether ``model`` is built like transformers' ``SiglipModel`` (or ``Siglip2Model``)."""
    vision = getattr(model, "vision_model", None)
    return (
        _has(model, "text_model", "get_image_features", "get_text_features", "logit_scale")
        and _has(vision, "embeddings", "encoder", "post_layernorm", "head")
        and _has(vision.head, *HEAD_PARTS)  # type: ignore[union-attr]
    )


def is_timm_siglip(model: object) -> bool:
    """Whether ``model`` is built like open_clip's around a timm vision transformer with attention pooling."""
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    if not _has(model, "encode_image", "encode_text", "logit_scale") or not _has(trunk, "blocks", "norm", "attn_pool"):
        return False
    # A NaFlex trunk has an attribute rope too; it is claimed, so that the error can name the reason.
    return _has(trunk.attn_pool, *POOL_PARTS) and (  # type: ignore[union-attr]
        hasattr(trunk, "embeds") or not hasattr(trunk, "rope")
    )


def claims(model: object) -> bool:
    """Whether ``model`` is a SigLIP model of either library."""
    return is_transformers_siglip(model) or is_timm_siglip(model)


def unclaimed_reason(model: object) -> str | None:
    """Why one tower of transformers' ``SiglipModel`` is not claimed; ``None`` for other objects."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in ("siglip_vision_model", "siglip_text_model", "siglip2_vision_model", "siglip2_text_model"):
        return "it is one tower alone, and TTD needs both; pass a SiglipModel"
    return None


def unsupported_reason(model: Any) -> str | None:
    """Why ``model`` cannot be adapted, as the end of a sentence; ``None`` where it can."""
    if is_transformers_siglip(model):
        vision = model.vision_model
        if not hasattr(vision.embeddings.patch_embedding, "kernel_size"):
            return NAFLEX
        return None
    if is_timm_siglip(model):
        return _unsupported_trunk_reason(model.visual.trunk)
    if getattr(getattr(model, "vision_model", None), "use_head", True) is False:
        return "its image tower was built without the pooling head, so its patches are not in the joint space"
    return "it is built neither like transformers' SiglipModel nor like open_clip's SigLIP models around a timm trunk"


def _unsupported_trunk_reason(trunk: Any) -> str | None:
    if hasattr(trunk, "embeds"):
        return NAFLEX
    if getattr(trunk, "num_prefix_tokens", 0):
        return "its trunk has class or register tokens, which SigLIP towers do not have"
    if not hasattr(getattr(trunk.patch_embed, "proj", None), "kernel_size"):
        return "its patches are not embedded by one convolution"
    if getattr(trunk.attn_pool, "pos_embed", None) is not None:
        return "its pooling head adds position embeddings of its own, which fit one image size only"
    return None


def unsupported_config_reason(config: Mapping[str, Any]) -> str | None:
    """The same for a ``model_cfg`` of open_clip, before anything is built."""
    vision = config.get("vision_cfg", {})
    name = vision.get("timm_model_name")
    if not name:
        return "its image tower is no timm trunk; open_clip's native towers belong to the family open_clip"
    if vision.get("timm_pool") != "map":
        return f"its timm trunk pools by {vision.get('timm_pool')!r} and not by attention with a learned probe (map)"
    if "naflex" in name:
        return NAFLEX
    if "siglip" not in name:
        return f"its trunk {name} is not one of SigLIP's vision transformers"
    return None


def unsupported_transformers_config_reason(config: Mapping[str, Any]) -> str | None:
    """The same for the ``config.json`` of a transformers model."""
    kind = config.get("model_type")
    if kind == "siglip2":
        return NAFLEX
    if kind != "siglip":
        return f"its config.json describes a {kind!r} model and not a 'siglip' model with both towers"
    if config.get("vision_config", {}).get("vision_use_head", True) is False:
        return "its image tower has no pooling head, so its patches are not in the joint space"
    return None

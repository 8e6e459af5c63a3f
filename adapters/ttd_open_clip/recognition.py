"""Which models of open_clip this family supports, by attribute names, and the import of open_clip.

The image towers are open_clip's own vision transformer, its own ResNet, and a convolutional trunk of timm that averages
its last feature map. open_clip 3 uses ``nn.MultiheadAttention`` and open_clip 4 its own ``Attention`` with parameters
of the same names; both are supported. Trunks of timm must be from TRUNK_MODULES. The original ``clip`` package uses the
same names, but its blocks run with the sequence first; its models belong to another family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.modified_resnet import is_modified_resnet
from ttd_plugins.toolkit.optional_library import import_library

CLIP_PARTS = ("encode_image", "encode_text", "logit_scale")
VIT_PARTS = ("conv1", "class_embedding", "positional_embedding", "ln_post", "transformer")
BLOCK_PARTS = ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2")
TRUNK_PARTS = ("forward_features", "forward_head", "feature_info")
AVERAGES = ("avg", "fast", "fastavg")
TRUNK_MODULES = (
    "byobnet", "convmixer", "convnext", "csatv2", "cspnet", "cspnext", "davit", "densenet", "dla", "dpn", "edgenext",
    "efficientnet", "efficientvit_mit", "efficientvit_msra", "fasternet", "fastvit", "focalnet", "ghostnet",
    "hardcorenas", "hgnet", "hrnet", "inception_next", "lcnetv2", "lowformer", "metaformer", "mobilenetv3", "mobilevit",
    "nextvit", "nfnet", "rdnet", "regnet", "repghost", "res2net", "resnest", "resnet", "resnetv2", "rexnet", "senet",
    "sknet", "starnet", "tresnet", "vovnet", "xception_aligned",
)  # fmt: skip
"""Modules of timm whose trunks average a map ``[B, C, height / stride, width / stride]`` at every input size."""

SUPPORTED = (
    "this family supports open_clip's own vision transformers and ResNets, and convolutional trunks that average"
)
ImageTower = Literal["transformer", "attention_pooled", "resnet", "trunk"]


def import_open_clip() -> Any:
    """Return the module ``open_clip``, or raise MissingDependencyError."""
    install = "'ttd-plugins[open_clip]'"
    return import_library("open_clip", "open_clip backbones", distribution="open_clip_torch", install=install)


def claims(model: object) -> bool:
    """Whether ``model`` is a CLIP model around one of the kinds of image towers."""
    return image_tower_kind(model) is not None


def image_tower_kind(model: object) -> ImageTower | None:
    """The kind of image tower of a CLIP model; ``None`` for every object of another family."""
    if not all(hasattr(model, name) for name in CLIP_PARTS):
        return None
    if has_trunk(model):
        return "trunk"
    visual = getattr(model, "visual", None)
    if _has_vit(model):
        return "transformer" if getattr(visual, "attn_pool", None) is None else "attention_pooled"
    return "resnet" if is_modified_resnet(visual) and hasattr(visual, "act1") and _batch_first_text(model) else None


def has_trunk(model: object) -> bool:
    """Whether the image tower is a trunk of timm with feature maps ``[B, C, H, W]`` and one pooling layer."""
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    if trunk is None or not all(hasattr(trunk, name) for name in TRUNK_PARTS):
        return False
    library, _, module = type(trunk).__module__.rpartition(".")
    if library == "timm.models" and module not in TRUNK_MODULES:
        return False
    return _pooling(trunk) is not None and getattr(trunk, "output_fmt", "NCHW") == "NCHW"


def unsupported_reason(model: object) -> str | None:
    """Why ``model`` cannot be adapted, as the end of a sentence; ``None`` where it can."""
    visual: Any = getattr(model, "visual", None)
    if visual is None:
        return "it has no image tower named visual"
    if hasattr(visual, "trunk"):
        return _unsupported_trunk_reason(model) or text_tower.unpooled_reason(model)
    if not claims(model):
        return (
            "it is not built like open_clip's own vision transformer (batch first, visual.transformer.resblocks) or "
            "ResNet (visual.attnpool, visual.act1)"
        )
    if getattr(visual, "pool_type", "tok") not in ("tok", "avg"):
        return f"its image tower returns no pooled embedding (pool_type {visual.pool_type!r})"
    return text_tower.unpooled_reason(model)


def unclaimed_reason(model: object) -> str | None:
    """Why a model with open_clip's methods is not claimed, as the end of a sentence; ``None`` for other objects."""
    if all(hasattr(model, name) for name in VIT_PARTS):
        return "it is an image tower alone, and TTD needs both towers; pass the whole model"
    if claims(model) or not all(hasattr(model, name) for name in ("visual", "encode_image", "encode_text")):
        return None
    return unsupported_reason(model)


def unsupported_config_reason(config: Mapping[str, Any]) -> str | None:
    """The same as :func:`unsupported_reason` for a ``model_cfg`` of open_clip, before anything is built."""
    vision = config.get("vision_cfg", {})
    name = vision.get("timm_model_name")
    if name:
        from timm.models import is_model_in_modules

        if not is_model_in_modules(str(name).partition(".")[0], TRUNK_MODULES):
            return f"its image tower is the timm trunk {name}, and {SUPPORTED}"
        if vision.get("timm_pool") not in (None, "", *AVERAGES):
            return f"its image tower pools by {vision['timm_pool']}, and {SUPPORTED}"
        return None
    if isinstance(vision.get("attentional_pool"), str):
        return (
            f"its image tower pools with two poolers ({vision['attentional_pool']}), for which open_clip returns no "
            "pooled embedding [B, D]"
        )
    if vision.get("pool_type", "tok") not in ("tok", "avg"):
        return f"its image tower returns no pooled embedding (pool_type {vision['pool_type']!r})"
    return None


def _batch_first_text(model: object) -> bool:
    """Whether the text tower is not one of the original ``clip`` package, whose blocks run with the sequence first."""
    blocks: Any = getattr(getattr(text_tower.text_module(model), "transformer", None), "resblocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or len(blocks) == 0:
        return True
    return bool(hasattr(blocks[-1], "ls_1") and getattr(blocks[-1].attn, "batch_first", True))


def _has_vit(model: object) -> bool:
    visual: Any = getattr(model, "visual", None)
    if not all(hasattr(visual, name) for name in VIT_PARTS):
        return False
    blocks = getattr(visual.transformer, "resblocks", None)
    if blocks is None or len(blocks) == 0 or not all(hasattr(blocks[-1], name) for name in BLOCK_PARTS):
        return False
    # open_clip 4 has no such attribute on the tower or its attention; it is always batch first.
    return bool(getattr(visual.transformer, "batch_first", True) and getattr(blocks[-1].attn, "batch_first", True))


def _pooling(trunk: Any) -> Any:
    """The pooling layer of a trunk, or ``None`` where it has none."""
    for owner in (trunk, getattr(trunk, "head", None)):
        pool = getattr(owner, "global_pool", None)
        if isinstance(pool, nn.Module) and hasattr(pool, "pool_type"):
            return pool
    return None


def _unsupported_trunk_reason(model: Any) -> str | None:
    if not has_trunk(model):
        return (
            f"its image tower is a timm trunk without feature maps [B, C, H, W] and one pooling layer, and {SUPPORTED}"
        )
    if hasattr(getattr(model.visual, "head", None), "pool"):
        return f"its image tower pools by attention (visual.head.pool), and {SUPPORTED}"
    kind = _pooling(model.visual.trunk).pool_type
    if not kind:
        return "its image tower does not pool"
    return None if kind in AVERAGES else f"its image tower pools by {kind}, and {SUPPORTED}"

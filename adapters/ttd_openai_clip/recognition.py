"""Which library built a CLIP model, by attribute names alone, and the import of transformers.

From transformers: ``CLIPModel`` and ``MetaClip2Model``; ``ChineseCLIPModel`` and ``AltCLIPModel``, whose text towers
mask padding; and ``AlignModel``. From the original ``clip`` package: ``CLIP`` with a vision transformer or with a
modified ResNet. Models of open_clip share most names with the original. They differ in their blocks: the original's run
with the sequence first and have an attribute ``attn_mask``; open_clip's have layer scales ``ls_1`` and ``ls_2`` and no
``attn_mask``. The text tower is checked too, because both packages have ResNets with an ``attnpool``.
"""

from __future__ import annotations

from typing import Any, Literal

from ttd_plugins.toolkit.modified_resnet import is_modified_resnet
from ttd_plugins.toolkit.optional_library import import_library
from ttd_plugins.toolkit.transformers_blocks import ATTENTION_PARTS

Container = Literal["transformers", "masked_text", "align", "original_vit", "original_resnet"]

MODEL_TYPES = {
    "clip": "CLIP",
    "metaclip_2": "MetaClip2",
    "chinese_clip": "ChineseCLIP",
    "altclip": "AltCLIP",
    "align": "Align",
}
"""Supported values of ``config.model_type``, and the prefix of their classes in transformers."""
CAUSAL_TEXT, MASKED_TEXT = ("clip", "metaclip_2"), ("chinese_clip", "altclip")
ONE_TOWER = {
    f"{kind}_{tower}_model": kind
    for kind in ("clip", "metaclip_2", "chinese_clip", "align")
    for tower in ("vision", "text")
}
ALIGN_PARTS = ("vision_model", "text_model", "text_projection", "temperature")

TRANSFORMERS_PARTS = ("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale")
TRANSFORMERS_VISION = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
TRANSFORMERS_EMBEDDINGS = ("class_embedding", "patch_embedding", "position_embedding")
TRANSFORMERS_LAYER = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
ORIGINAL_PARTS = ("visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection",
                  "logit_scale", "encode_image", "encode_text")  # fmt: skip
ORIGINAL_BLOCK = ("ln_1", "attn", "ln_2", "mlp", "attn_mask")
ORIGINAL_VIT = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "ln_post", "input_resolution")


def import_transformers() -> Any:
    """Return the module ``transformers``, or raise MissingDependencyError."""
    return import_library(
        "transformers",
        "openai_clip backbones by name",
        distribution="transformers",
        install="'ttd-plugins[openai_clip]'",
        # The package imports its parts late, so a broken one shows when a class is accessed.
        attributes=("CLIPConfig", "CLIPModel"),
    )


def container(model: object) -> Container | None:
    """The kind of object that ``model`` is; ``None`` for every object of another family."""
    kind = transformers_kind(model)
    if kind is not None:
        return kind
    if not (_has(model, ORIGINAL_PARTS) and _runs_sequence_first(getattr(model, "transformer", None))):
        return None
    visual = getattr(model, "visual", None)
    if _has(visual, ORIGINAL_VIT) and _runs_sequence_first(getattr(visual, "transformer", None)):
        return "original_vit"
    if is_modified_resnet(visual) and hasattr(visual, "input_resolution"):
        return "original_resnet"
    return None


def model_type(model: object) -> str:
    """``config.model_type`` of a model; ``"clip"`` where it has no configuration."""
    return str(getattr(getattr(model, "config", None), "model_type", "clip"))


def transformers_kind(model: object) -> Container | None:
    """The kind of a model of transformers, of version 4 or 5; ``None`` for every other object.

    Many models have the same image tower, so the text tower is checked too. ``config.model_type`` decides where the
    structure cannot: MetaCLIP 2 has another rule for the end token than CLIP.
    """
    if model_type(model) == "align" and _has(model, ALIGN_PARTS):
        vision, text = getattr(model, "vision_model", None), getattr(model, "text_model", None)
        parts = _has(vision, ("embeddings", "encoder", "pooler")) and _has(text, ("embeddings", "encoder"))
        return "align" if parts and _filled(getattr(vision.encoder, "blocks", None)) else None  # type: ignore[union-attr]
    if not _has(model, TRANSFORMERS_PARTS) or not _has_clip_vision(getattr(model, "vision_model", None)):
        return None
    text = getattr(model, "text_model", None)
    if model_type(model) in MASKED_TEXT:
        return "masked_text" if _has(getattr(text, "roberta", text), ("embeddings", "encoder")) else None
    causal = _has(text, ("embeddings", "encoder", "final_layer_norm"))
    return "transformers" if causal and model_type(model) in CAUSAL_TEXT else None


def _has_clip_vision(vision: Any) -> bool:
    """Whether an image tower is built as that of transformers' ``CLIPModel``."""
    if not _has(vision, TRANSFORMERS_VISION) or not _has(vision.embeddings, TRANSFORMERS_EMBEDDINGS):
        return False
    layers: Any = getattr(vision.encoder, "layers", None)
    return _filled(layers) and _has(layers[-1], TRANSFORMERS_LAYER) and _has(layers[-1].self_attn, ATTENTION_PARTS)


def unclaimed_reason(model: object) -> str | None:
    """Why a model that resembles one of these is not claimed; ``None`` for other objects."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in ONE_TOWER:
        return f"it is one tower alone, and TTD needs both; pass a {MODEL_TYPES[ONE_TOWER[kind]]}Model"
    if container(model) is None and _has(model, TRANSFORMERS_PARTS) and kind not in (None, "clip"):
        return f"its config.model_type is {kind!r}, and this family supports {', '.join(MODEL_TYPES)}"
    return None


def _runs_sequence_first(transformer: Any) -> bool:
    """Whether a transformer is the original package's: masks stored in its blocks, no layer scale, sequence first."""
    blocks: Any = getattr(transformer, "resblocks", None)
    if not _filled(blocks) or getattr(transformer, "batch_first", False):
        return False
    block = blocks[-1]
    return (
        _has(block, ORIGINAL_BLOCK)
        and not hasattr(block, "ls_1")
        and hasattr(block.attn, "num_heads")
        and not getattr(block.attn, "batch_first", False)
    )


def _filled(blocks: Any) -> bool:
    return blocks is not None and hasattr(blocks, "__len__") and len(blocks) > 0


def _has(module: Any, names: tuple[str, ...]) -> bool:
    return module is not None and all(hasattr(module, name) for name in names)

"""Which library built a CLIP model of OpenAI, by attribute names alone, and the import of transformers.

Three kinds of objects are supported: transformers' ``CLIPModel``, and the original ``clip`` package's ``CLIP`` with a
vision transformer or with a modified ResNet. Models of open_clip share most names with the original. They differ in
their blocks: the original's run with the sequence first and have an attribute ``attn_mask``; open_clip's have layer
scales ``ls_1`` and ``ls_2`` and no ``attn_mask``. The text tower is checked too, because both packages have ResNets
with an ``attnpool``.
"""

from __future__ import annotations

from typing import Any, Literal

from ttd_plugins.toolkit.modified_resnet import is_modified_resnet
from ttd_plugins.toolkit.optional_library import import_library
from ttd_plugins.toolkit.transformers_blocks import ATTENTION_PARTS

Container = Literal["transformers", "original_vit", "original_resnet"]

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
    if is_transformers_clip(model):
        return "transformers"
    if not (_has(model, ORIGINAL_PARTS) and _runs_sequence_first(getattr(model, "transformer", None))):
        return None
    visual = getattr(model, "visual", None)
    if _has(visual, ORIGINAL_VIT) and _runs_sequence_first(getattr(visual, "transformer", None)):
        return "original_vit"
    if is_modified_resnet(visual) and hasattr(visual, "input_resolution"):
        return "original_resnet"
    return None


def is_transformers_clip(model: object) -> bool:
    """Whether ``model`` is built as transformers' ``CLIPModel``, of version 4 or 5.

    Other models have the same image tower. ``config.model_type`` is ``"clip"`` for CLIP itself; MetaCLIP 2 (another
    rule for the end token), Chinese CLIP and AltCLIP (other text towers) have other types.
    """
    if not _has(model, TRANSFORMERS_PARTS):
        return False
    vision, text = getattr(model, "vision_model", None), getattr(model, "text_model", None)
    if not (_has(vision, TRANSFORMERS_VISION) and _has(text, ("embeddings", "encoder", "final_layer_norm"))):
        return False
    if not _has(getattr(vision, "embeddings", None), TRANSFORMERS_EMBEDDINGS):
        return False
    layers: Any = getattr(getattr(vision, "encoder", None), "layers", None)
    if not _filled(layers) or not _has(layers[-1], TRANSFORMERS_LAYER):
        return False
    if not _has(layers[-1].self_attn, ATTENTION_PARTS):
        return False
    return getattr(getattr(model, "config", None), "model_type", "clip") == "clip"


def unclaimed_reason(model: object) -> str | None:
    """Why a model that resembles transformers' ``CLIPModel`` is not claimed; ``None`` for other objects."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in ("clip_vision_model", "clip_text_model"):
        return "it is one tower alone, and TTD needs both; pass a CLIPModel"
    if container(model) is None and _has(model, TRANSFORMERS_PARTS) and kind not in (None, "clip"):
        return f"its config.model_type is {kind!r} and not 'clip', so its towers differ from those of a CLIPModel"
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

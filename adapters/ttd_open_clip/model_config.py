"""The ``model_cfg`` of open_clip that a model was built from, read from its modules.

Settings that cannot be read keep open_clip's defaults, so a caller must compare embeddings.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.modified_resnet import resnet_layers

DEFAULT_EPS = 1e-5


def read_config(model: Any, embedding_width: int) -> dict[str, Any] | None:
    """Keyword arguments of ``CLIP`` or ``CustomTextCLIP``; ``None`` for blocks, trunks or text towers of other kinds.

    Args:
        model: the model.
        embedding_width: width of its image embeddings.
    """
    visual, text = model.visual, text_tower.text_module(model)
    if not text_tower.is_native(model):
        return None
    decoder = getattr(model, "text_decoder", None)
    blocks = [*_blocks(text), *(_blocks(visual) if hasattr(visual, "transformer") else [])]
    if any(type(block).__name__ != "ResidualAttentionBlock" for block in blocks):
        return None
    vision_cfg = _vision_config(visual)
    if vision_cfg is None:
        return None
    projection = text.text_projection
    width = int(text.token_embedding.embedding_dim)
    text_cfg = _tower(text.transformer, width) | {
        "heads": _heads(text),
        "context_length": int(text.context_length),
        "vocab_size": int(text.token_embedding.num_embeddings),
        "pool_type": text_tower.pool_type(model) or "argmax",
        "no_causal_mask": getattr(text, "attn_mask", None) is None,
        "embed_cls": getattr(text, "cls_emb", None) is not None,
        "pad_id": int(getattr(text, "pad_id", 0)),
        "proj_type": "none" if projection is None else "linear",
        "proj_bias": isinstance(projection, nn.Linear) and projection.bias is not None,
        "final_ln_after_pool": bool(getattr(text, "final_ln_after_pool", False)),
        "norm_kwargs": _norm(text.ln_final),
    }
    if text_cfg["pool_type"] == "eos":
        text_cfg["eos_id"] = text_tower.end_id(model)
    config: dict[str, Any] = {"embed_dim": embedding_width, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    activations = [block.mlp.gelu for block in blocks]
    if any(type(activation).__name__ == "QuickGELU" for activation in activations):
        config["quick_gelu"] = True
    if hasattr(model, "text"):
        config["custom_text"] = True
    if decoder is not None:
        # CoCa, whose forward needs the tokens of both towers.
        config["multimodal_cfg"] = _decoder_config(decoder)
        vision_cfg["output_tokens"] = text_cfg["output_tokens"] = True
    if getattr(model, "logit_bias", None) is not None:
        # The value is in the weights; the setting only makes open_clip create the parameter.
        config["init_logit_bias"] = 0.0
    if model.logit_scale.ndim:
        config["nonscalar_logit_scale"] = True
    return config


def _vision_config(visual: Any) -> dict[str, Any] | None:
    """``vision_cfg`` of an image tower of any kind."""
    if hasattr(visual, "trunk"):
        return _trunk_config(visual)
    return _resnet_config(visual) if hasattr(visual, "attnpool") else _transformer_config(visual)


def _resnet_config(visual: Any) -> dict[str, Any]:
    """``vision_cfg`` of open_clip's own ResNet."""
    width = int(visual.conv3.out_channels)
    return {
        "layers": [len(layer) for layer in resnet_layers(visual)],
        "width": width,
        "head_width": 32 * width // int(visual.attnpool.num_heads),
        "image_size": int(visual.image_size),
        "patch_size": None,
    }


def _decoder_config(decoder: Any) -> dict[str, Any]:
    """``multimodal_cfg`` of CoCa's caption decoder."""
    block = decoder.resblocks[0]
    width = int(decoder.ln_final.normalized_shape[0])
    return {
        "layers": len(decoder.resblocks),
        "width": width,
        "heads": int(block.attn.num_heads),
        "context_length": int(decoder.context_length),
        "mlp_ratio": block.mlp.c_fc.out_features / width,
        "ls_init_value": None if getattr(block.ls_1, "gamma", None) is None else 1e-5,
    }


def _transformer_config(visual: Any) -> dict[str, Any]:
    """``vision_cfg`` of open_clip's own vision transformer."""
    pool = getattr(visual, "attn_pool", None)
    pooler: dict[str, Any] = {}
    if pool is not None:
        pooler = {
            "attentional_pool": True,
            "attn_pooler_queries": len(pool.query),
            "attn_pooler_heads": int(pool.attn.num_heads),
        }
    return (
        pooler
        | _tower(visual.transformer, int(visual.conv1.out_channels))
        | {
            "head_width": int(visual.conv1.out_channels) // _heads(visual),
            "patch_size": _side(visual.conv1.kernel_size),
            "image_size": _side(visual.image_size),
            "pool_type": getattr(visual, "pool_type", "tok"),
            "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
            "final_ln_after_pool": bool(getattr(visual, "final_ln_after_pool", False)),
            "norm_kwargs": _norm(visual.ln_post),
        }
    )


def _trunk_config(visual: Any) -> dict[str, Any] | None:
    """``vision_cfg`` of a trunk of timm, which only its name describes; ``None`` for a trunk without a name."""
    name = (getattr(visual.trunk, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        return None
    linear, mlp = getattr(visual.head, "proj", None), getattr(visual.head, "mlp", None)
    last = linear if linear is not None else getattr(mlp, "fc2", None)
    projection: str | None
    if last is not None:
        projection = "linear" if linear is not None else "mlp"
    else:
        # None makes the last layer of the trunk the projection; "none" leaves the trunk without one.
        projection = None if getattr(visual.trunk, "num_classes", 0) else "none"
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": projection,
        "timm_proj_bias": getattr(last, "bias", None) is not None,
        "image_size": _side(visual.image_size),
    }


def _blocks(tower: Any) -> list[Any]:
    return list(tower.transformer.resblocks)


def _heads(tower: Any) -> int:
    return int(_blocks(tower)[0].attn.num_heads)


def _side(size: Any) -> Any:
    height, width = size
    return int(height) if height == width else [int(height), int(width)]


def _norm(norm: Any) -> dict[str, float] | None:
    return {"eps": float(norm.eps)} if norm.eps != DEFAULT_EPS else None


def _tower(transformer: Any, width: int) -> dict[str, Any]:
    """Settings that both towers have."""
    block = transformer.resblocks[0]
    scale = getattr(block.ls_1, "gamma", None)
    approximate = getattr(block.mlp.gelu, "approximate", "none")
    return {
        "layers": len(transformer.resblocks),
        "width": width,
        "mlp_ratio": block.mlp.c_fc.out_features / width,
        "ls_init_value": None if scale is None else 1e-5,
        "act_kwargs": None if approximate == "none" else {"approximate": approximate},
    }

"""Tiny EVA-CLIP models of every block kind, and the last block written out by hand."""

from __future__ import annotations

import inspect
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor

EMBED, WIDTH, PATCH, IMAGE, CONTEXT, VOCABULARY = 24, 32, 8, 32, 12, 64
GRID = IMAGE // PATCH
BASE, POST, FUSED = "eva02_base_patch16_clip_224", "eva02_enormous_patch14_clip_224", "eva_giant_patch14_224"

# Block kinds of the published models, then what else timm's class can be asked for.
KINDS: dict[str, dict[str, Any]] = {
    "eva02_base": {"model_name": BASE},
    "eva02_enormous": {"model_name": POST, "mlp_ratio": 2.0},
    "eva01_giant": {"model_name": FUSED, "mlp_ratio": 2.0},
}
VARIANTS: dict[str, dict[str, Any]] = KINDS | {
    "layer_scale": {"model_name": BASE, "init_values": 0.5},
    "layer_scale_fused": {"model_name": FUSED, "mlp_ratio": 2.0, "init_values": 0.5},
    "average": {"model_name": BASE, "global_pool": "avg"},
    "average_post_norm": {"model_name": POST, "global_pool": "avg"},
    "average_without_class_token": {"model_name": BASE, "global_pool": "avg", "class_token": False},
    "registers": {"model_name": BASE, "num_reg_tokens": 2},
    "registers_without_positions": {"model_name": FUSED, "num_reg_tokens": 2, "no_embed_class": True},
    "no_absolute_positions": {"model_name": BASE, "use_abs_pos_emb": False},
    "mixed_rope": {"model_name": BASE, "rope_type": "mixed"},
    "dynamic_size": {"model_name": BASE, "dynamic_img_size": True},
    "pre_norm": {"model_name": FUSED, "use_pre_transformer_norm": True},
    "no_bias": {"model_name": FUSED, "qkv_bias": False},
    "rope_attention": {"model_name": BASE, "attn_type": "rope", "qkv_fused": True, "rope_rotate_half": True},
    "packed_swiglu": {"model_name": BASE, "scale_mlp": False},
    "query_key_norm": {"model_name": BASE, "qk_norm": True},
}
EVA_OPTIONS = inspect.signature(timm.models.eva.Eva).parameters
if "qk_norm" not in EVA_OPTIONS:  # timm before 1.0.30
    del VARIANTS["query_key_norm"]


def trunk_options(trunk: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of ``timm.create_model`` for a small EVA trunk."""
    small = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
    return small | {"global_pool": "token", "num_classes": EMBED} | (trunk or KINDS["eva02_base"])


def eva_clip(
    trunk: dict[str, Any] | None = None, *, text: dict[str, Any] | None = None, seed: int = 0, **options: Any
) -> Any:
    """A random EVA-CLIP in evaluation mode, no weight or bias at a special initial value."""
    torch.manual_seed(seed)
    text_cfg = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2}
    placeholder = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160}
    model = open_clip.CustomTextCLIP(
        embed_dim=EMBED, vision_cfg=placeholder, text_cfg=text_cfg | (text or {}), **options
    )
    model.visual.trunk = timm.create_model(**trunk_options(trunk))
    size = model.visual.trunk.patch_embed.img_size
    model.visual.image_size = tuple(size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def before_last_block(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens that enter the last block and its rotary embedding, by the library's own parts."""
    trunk = model.visual.trunk
    x, rope = trunk._pos_embed(trunk.patch_embed(images))
    x = trunk.norm_pre(x)
    for index, block in enumerate(list(trunk.blocks)[:-1]):
        x = block(x, rope=rope[index] if trunk.rope_mixed else rope)
    return x, rope[-1] if rope is not None and trunk.rope_mixed else rope


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding by the formula, pairs of neighbours, one complex number each."""
    sin, cos = rope.chunk(2, dim=-1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos[:, ::2], sin[:, ::2])
    return torch.view_as_real(pairs * turn).flatten(-2)


def reference_dense(model: Any, images: Tensor, attention: str, residual: bool, ffn: bool, std: float = 5.0) -> Tensor:
    """Dense features ``[B, H, W, D]`` by plain formulas for the three published block kinds, head by head."""
    trunk = model.visual.trunk
    block, prefix = trunk.blocks[-1], trunk.num_prefix_tokens
    attn = block.attn
    post_norm = type(block).__name__ == "EvaBlockPostNorm"
    x, rope = before_last_block(model, images)
    inside = x if post_norm else block.norm1(x)
    width, heads = x.shape[-1], attn.num_heads
    if attn.qkv is None:
        q = inside @ attn.q_proj.weight.T + attn.q_proj.bias
        k = inside @ attn.k_proj.weight.T
        v = inside @ attn.v_proj.weight.T + attn.v_proj.bias
    else:
        weight = attn.qkv.weight
        q = inside @ weight[:width].T + attn.q_bias
        k = inside @ weight[width : 2 * width].T
        v = inside @ weight[2 * width :].T + attn.v_bias
    rows, columns = images.shape[2] // PATCH, images.shape[3] // PATCH
    mixed = torch.zeros_like(v)
    side = width // heads
    for head in range(heads):
        part = slice(head * side, (head + 1) * side)
        qh, kh, vh = q[..., part], k[..., part], v[..., part]
        if rope is not None:
            qh, kh = (torch.cat([t[:, :prefix], rotate(t[:, prefix:], rope)], dim=1) for t in (qh, kh))
        similar = {"qq": [qh @ qh.mT], "kk": [kh @ kh.mT], "plain": [qh @ kh.mT], "qq+kk": [qh @ qh.mT, kh @ kh.mT]}
        if attention == "value":
            mixed[..., part] = vh
        elif attention == "kk+window":
            scores = kh @ kh.mT / side**0.5
            for a in range(rows * columns):
                for b in range(rows * columns):
                    squared = (a // columns - b // columns) ** 2 + (a % columns - b % columns) ** 2
                    scores[:, prefix + a, prefix + b] += torch.exp(torch.tensor(-squared / (2 * std**2)))
            mixed[..., part] = scores.softmax(-1) @ vh
        else:
            mixed[..., part] = sum((s / side**0.5).softmax(-1) @ vh for s in similar[attention])
    branch = attn.norm(mixed) @ attn.proj.weight.T + attn.proj.bias
    if post_norm:
        branch = block.norm1(branch)
    elif block.gamma_1 is not None:
        branch = branch * block.gamma_1
    out = branch + x if residual else branch
    if ffn:
        mlp = block.mlp
        inside = out if post_norm else block.norm2(out)
        if hasattr(mlp, "fc1_g"):
            hidden = torch.nn.functional.silu(mlp.fc1_g(inside)) * mlp.fc1_x(inside)
        else:
            hidden = torch.nn.functional.gelu(mlp.fc1(inside))
        after = mlp.fc2(mlp.norm(hidden))
        if post_norm:
            after = block.norm2(after)
        elif block.gamma_2 is not None:
            after = after * block.gamma_2
        out = out + after
    out = trunk.fc_norm(trunk.norm(out[:, prefix:])) @ trunk.head.weight.T + trunk.head.bias
    return out.reshape(len(images), rows, columns, -1)

"""The last block of open_clip's vision transformer, run once for the class token as trained and for dense features."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.toolkit.attention import attention_dropout
from ttd_plugins.toolkit.attention import is_plain_attention as is_plain_multihead
from ttd_plugins.toolkit.dense import DenseMode, diagonal_mask, gaussian_window


def is_plain_attention(attention: nn.Module) -> bool:
    """Whether a module is self-attention whose whole computation its projections and head count describe.

    True for ``nn.MultiheadAttention`` itself and for open_clip's ``Attention`` with none of its extras.
    """
    if type(attention) is nn.MultiheadAttention:
        return is_plain_multihead(attention)
    if type(attention).__module__.split(".")[0] != "open_clip" or getattr(attention, "in_proj_weight", None) is None:
        return False
    norms = [getattr(attention, name, None) for name in ("ln_q", "ln_k", "ln_inner")]
    return all(norm is None or isinstance(norm, nn.Identity) for norm in norms) and all(
        getattr(attention, name, None) is None for name in ("logit_scale", "head_scale")
    )


def refusal_by_hand(attention: nn.Module) -> str | None:
    """Why queries, keys and values of ``attention`` cannot be had by hand; ``None`` where they can.

    Slicing ``in_proj_weight`` of a wrapper (peft's own ``lora.MultiheadAttention``, for one) gives the base weights,
    so what the wrapper adds would be lost without a word.
    """
    if is_plain_attention(attention) or hasattr(attention, "project_qkv"):
        return None
    kind = type(attention)
    return (
        f"the last block's attention is {kind.__module__}.{kind.__qualname__}, whose queries and keys cannot be had "
        "without losing what it adds to them"
    )


def require_by_hand(attention: nn.Module, mode: DenseMode) -> None:
    """Raise UnsupportedModelError if ``mode`` cannot be taken with this attention module."""
    reason = refusal_by_hand(attention) if mode.by_hand else None
    if reason is not None:
        raise UnsupportedModelError(
            f"dense mode {mode.name!r} cannot be used: {reason}; use one of the value modes (maskclip, value_only)"
        )


def last_block(block: Any, x: Tensor, mode: DenseMode, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Run the last block once, for the class token as trained and for the patches as ``mode`` says.

    Args:
        block: open_clip's residual attention block, plain or custom.
        x: ``[B, 1 + P, W]``, the class token first.
        mode: how patches are computed.
        grid: rows and columns, P in all.

    Returns:
        Class token ``[B, W]`` and patches ``[B, P, W]``, before the final LayerNorm.
    """
    if mode.by_hand:
        branch = _by_hand_branch(block, x, mode, grid)
    else:
        mask = diagonal_mask(x.shape[1], x) if mode.attention == "value" else None
        if mode.residual and mode.ffn:
            out = block(x, attn_mask=mask)
            return out[:, 0], out[:, 1:]
        branch = _finish_branch(block, _attend(block, block.ln_1(x), mask))
    trained = x + branch if mode.residual and mode.ffn else x[:, :1] + branch[:, :1]
    trained = trained + block.ls_2(block.mlp(block.ln_2(trained)))
    if mode.residual and mode.ffn:
        return trained[:, 0], trained[:, 1:]
    patches = branch[:, 1:]
    if mode.residual:
        patches = patches + x[:, 1:]
    if mode.ffn:
        patches = patches + block.ls_2(block.mlp(block.ln_2(patches)))
    return trained[:, 0], patches


def _attend(block: Any, normed: Tensor, mask: Tensor | None) -> Tensor:
    if hasattr(block, "attention"):
        return block.attention(q_x=normed, attn_mask=mask)
    return block.attn(normed, attn_mask=mask)


def _finish_branch(block: Any, attended: Tensor) -> Tensor:
    if hasattr(block, "ln_attn"):
        attended = block.ln_attn(attended)
    return block.ls_1(attended)


def _by_hand_branch(block: Any, x: Tensor, mode: DenseMode, grid: tuple[int, int]) -> Tensor:
    """The attention branch ``[B, 1 + P, W]`` from queries, keys and values: row 0 as trained, the others by mode."""
    attention = block.attn
    require_by_hand(attention, mode)
    normed = block.ln_1(x)
    ours = hasattr(attention, "project_qkv")
    if ours:
        q, k, v = attention.project_qkv(normed)
    else:
        q, k, v = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    attend = partial(F.scaled_dot_product_attention, dropout_p=attention_dropout(attention))
    class_token = attend(q[:, :, :1], k, v)
    if mode.attention == "kk+window":
        patches = attend(k[:, :, 1:], k, v, attn_mask=gaussian_window(grid, mode.window_std, q))
    elif mode.attention == "qq+kk":
        patches = attend(q[:, :, 1:], q, v) + attend(k[:, :, 1:], k, v)
    else:
        both = q if mode.attention == "qq" else k
        patches = attend(both[:, :, 1:], both, v)
    context = torch.cat([class_token, patches], dim=2).transpose(1, 2).flatten(2)
    out = attention.project_out(context) if ours else attention.out_proj(context)
    return _finish_branch(block, out)

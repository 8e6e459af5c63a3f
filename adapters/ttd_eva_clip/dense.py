"""The last block of an EVA trunk, run once for the prefix tokens as trained and for dense features."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.toolkit.attention import attention_dropout
from ttd_plugins.toolkit.dense import DenseMode, diagonal_mask, gaussian_window


def bias_is_added_outside(attention: Any) -> bool:
    """Whether an attention module multiplies by ``qkv.weight`` itself instead of calling ``qkv``.

    timm does so where the fused projection has its biases apart (``q_bias``, ``v_bias``); a LoRA layer in the place of
    ``qkv`` is then passed over without a word.
    """
    return bool(
        getattr(attention, "qkv", None) is not None
        and getattr(attention, "q_bias", None) is not None
        and not getattr(attention, "qkv_bias_separate", False)
    )


def fused_projection(attention: Any) -> tuple[Tensor, Tensor]:
    """Weight ``[3 E, E]`` and bias ``[3 E]`` of a projection whose biases are apart."""
    return attention.qkv.weight, torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def rotary_embedding(trunk: Any, grid: tuple[int, int]) -> Tensor | None:
    """Rotary position embedding of a grid, as ``trunk`` has it after ``set_input_size``, without changing the trunk.

    Returns:
        ``[P, 2 * side of a head]``, with a leading axis for the blocks where each has its own; ``None`` without RoPE.
    """
    rope = trunk.rope
    if rope is None:
        return None
    own = getattr(rope, "feat_shape", None)
    if own is not None and tuple(own) == tuple(grid):
        return rope.get_embed()
    if own is None or getattr(trunk, "rope_mixed", False):
        return rope.get_embed(shape=grid)
    # A module with a cache ignores the shape that it is asked for, so a copy gets the grid; it has no parameters.
    twin = copy.deepcopy(rope)
    twin.update_feat_shape(grid)
    return twin.get_embed()


def queries_keys_values(attention: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, N, side]`` of ``x`` ``[B, N, W]``, normed and rotated as trained."""
    base = inner(attention)
    if hasattr(attention, "project_qkv"):
        parts = attention.project_qkv(x)
    elif base.qkv is None:
        parts = (base.q_proj(x), base.k_proj(x), base.v_proj(x))
    elif bias_is_added_outside(base):
        parts = F.linear(x, *fused_projection(base)).chunk(3, dim=-1)
    elif getattr(base, "q_bias", None) is not None:
        parts = (base.qkv(x) + fused_projection(base)[1]).chunk(3, dim=-1)
    else:
        parts = base.qkv(x).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (base.num_heads, -1)).transpose(1, 2) for t in parts)
    q, k = base.q_norm(q), base.k_norm(k)
    return (q, k, v) if rope is None else (_rotated(base, q, rope).type_as(v), _rotated(base, k, rope).type_as(v), v)


def _rotated(base: Any, x: Tensor, rope: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    prefix = base.num_prefix_tokens
    options = {"half": True} if getattr(base, "rotate_half", False) else {}
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **options)], dim=2)


def finish_attention(attention: Any, mixed: Tensor, x: Tensor) -> Tensor:
    """What follows the mixed values ``[B, heads, N, side]``: inner norm, gate by the input ``x``, output projection."""
    base = inner(attention)
    out = base.norm(mixed.transpose(1, 2).flatten(2))
    gate = getattr(base, "gate", None)
    if gate is not None:
        out = out * gate(x).sigmoid()
    out = attention.project_out(out) if hasattr(attention, "project_out") else base.proj(out)
    return base.proj_drop(out)


def inner(attention: Any) -> Any:
    """The library's attention module, out of a layer around it."""
    return attention.get_base_layer() if hasattr(attention, "project_qkv") else attention


def refusal_by_hand(attention: Any) -> str | None:
    """Why queries, keys and values of ``attention`` cannot be had by hand; ``None`` where they can."""
    if hasattr(attention, "project_qkv"):
        return None
    kind = type(attention)
    if kind.__module__.split(".")[0] != "timm":
        return (
            f"the last block's attention is {kind.__module__}.{kind.__qualname__}, whose queries and keys cannot be "
            "had without losing what it adds to them"
        )
    if bias_is_added_outside(attention) and type(attention.qkv) is not nn.Linear:
        return (
            f"the last block's qkv is a {type(attention.qkv).__qualname__} that the attention does not call (it "
            "multiplies by qkv.weight), so what that adds is lost"
        )
    if getattr(attention, "num_kv_groups", 1) != 1:
        return "the last block's heads share their keys (grouped-query attention)"
    return None


def require_by_hand(attention: Any, mode: DenseMode) -> None:
    """Raise UnsupportedModelError if ``mode`` cannot be taken with this attention module."""
    reason = refusal_by_hand(attention) if mode.by_hand else None
    if reason is not None:
        raise UnsupportedModelError(
            f"dense mode {mode.name!r} cannot be used: {reason}; use one of the value modes (maskclip, value_only)"
        )


def last_block(
    block: Any, x: Tensor, rope: Tensor | None, mode: DenseMode, grid: tuple[int, int], prefix: int
) -> tuple[Tensor, Tensor]:
    """Run the last block once, for the prefix tokens as trained and for the patches as ``mode`` says.

    Args:
        block: timm's ``EvaBlock`` or ``EvaBlockPostNorm``.
        x: ``[B, prefix + P, W]``, class and register tokens first.
        rope: rotary position embedding of the patches, or ``None``.
        mode: how patches are computed.
        grid: rows and columns, P in all.
        prefix: how many tokens are no patches.

    Returns:
        Prefix tokens ``[B, prefix, W]`` and patches ``[B, P, W]``, before the final norm.
    """
    if mode.by_hand:
        branch = _finish_branch(block, _by_hand(block.attn, _input(block, x), rope, mode, grid, prefix))
    else:
        mask = value_mask(x, prefix) if mode.attention == "value" else None
        if mode.residual and mode.ffn:
            out = block(x, rope=rope, attn_mask=mask)
            return out[:, :prefix], out[:, prefix:]
        branch = _finish_branch(block, block.attn(_input(block, x), rope=rope, attn_mask=mask))
    trained = x[:, :prefix] + branch[:, :prefix]
    patches = branch[:, prefix:] + x[:, prefix:] if mode.residual else branch[:, prefix:]
    trained = trained + _ffn(block, trained)
    return trained, patches + _ffn(block, patches) if mode.ffn else patches


def value_mask(x: Tensor, prefix: int) -> Tensor:
    """Additive mask ``[N, N]`` under which each patch of ``x`` ``[B, N, W]`` sees itself alone, prefix tokens all."""
    mask = diagonal_mask(x.shape[1], x)
    mask[0, 1:] = float("-inf")
    mask[:prefix] = 0
    return mask


def _is_pre_norm(block: Any) -> bool:
    return hasattr(block, "gamma_1")


def _input(block: Any, x: Tensor) -> Tensor:
    return block.norm1(x) if _is_pre_norm(block) else x


def _finish_branch(block: Any, attended: Tensor) -> Tensor:
    if not _is_pre_norm(block):
        attended = block.norm1(attended)
    elif block.gamma_1 is not None:
        attended = block.gamma_1 * attended
    return block.drop_path1(attended)


def _ffn(block: Any, x: Tensor) -> Tensor:
    if not _is_pre_norm(block):
        return block.drop_path2(block.norm2(block.mlp(x)))
    out = block.mlp(block.norm2(x))
    gamma = getattr(block, "gamma_2", None)
    return block.drop_path2(out if gamma is None else gamma * out)


def _by_hand(
    attention: Any, x: Tensor, rope: Tensor | None, mode: DenseMode, grid: tuple[int, int], prefix: int
) -> Tensor:
    """Attention output ``[B, prefix + P, W]`` from queries, keys and values: the prefix as trained, patches by mode."""
    require_by_hand(attention, mode)
    q, k, v = queries_keys_values(attention, x, rope)
    dropout = attention_dropout(inner(attention))

    def attend(queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, v, attn_mask=mask, dropout_p=dropout)

    if mode.attention == "kk+window":
        window = F.pad(gaussian_window(grid, mode.window_std, q)[:, 1:], (prefix, 0))
        patches = attend(k[:, :, prefix:], k, window)
    elif mode.attention == "qq+kk":
        patches = attend(q[:, :, prefix:], q) + attend(k[:, :, prefix:], k)
    else:
        both = q if mode.attention == "qq" else k
        patches = attend(both[:, :, prefix:], both)
    mixed = torch.cat([attend(q[:, :, :prefix], k), patches], dim=2)
    return finish_attention(attention, mixed, x)

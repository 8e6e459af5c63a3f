"""The last block of an EVA trunk, run once for the prefix tokens as trained and for dense features."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.toolkit import last_block as parts
from ttd_plugins.toolkit.attention import attention_dropout, has_hooks, split_heads
from ttd_plugins.toolkit.dense_modes import DenseMode, diagonal_mask


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


def queries_keys_values(
    attention: Any, x: Tensor, rope: Tensor | None, asking: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, N, side]`` of ``x`` ``[B, N, W]``, normed and rotated as trained.

    With ``asking``, the prefix tokens of ``x``, queries are of these alone; prefix tokens are not rotated.
    """
    base = inner(attention)
    parts: Any
    some = x if asking is None else asking
    if hasattr(attention, "project_qkv"):
        parts = attention.project_qkv(x) if asking is None else attention.project_some(asking, x)
    elif base.qkv is None:
        parts = (base.q_proj(some), base.k_proj(x), base.v_proj(x))
    elif bias_is_added_outside(base):
        parts = _fused(x, asking, *fused_projection(base))
    elif getattr(base, "q_bias", None) is not None:
        parts = (base.qkv(x) + fused_projection(base)[1]).chunk(3, dim=-1)
    elif type(base.qkv) is nn.Linear and not has_hooks(base.qkv):
        parts = _fused(x, asking, base.qkv.weight, base.qkv.bias)
    else:
        parts = base.qkv(x).chunk(3, dim=-1)
    q, k, v = (split_heads(t, base.num_heads) for t in parts)
    q, k = base.q_norm(q[:, :, : some.shape[1]]), base.k_norm(k)
    if rope is None:
        return q, k, v
    return (_rotated(base, q, rope) if asking is None else q).type_as(v), _rotated(base, k, rope).type_as(v), v


def _fused(x: Tensor, asking: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    if asking is None:
        return F.linear(x, weight, bias).chunk(3, dim=-1)
    parts = [weight.shape[0] // 3, weight.shape[0] - weight.shape[0] // 3]
    (for_q, for_kv), biases = weight.split(parts), (None, None) if bias is None else bias.split(parts)
    return F.linear(asking, for_q, biases[0]), *F.linear(x, for_kv, biases[1]).chunk(2, dim=-1)


def _rotated(base: Any, x: Tensor, rope: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    prefix = base.num_prefix_tokens
    options = {"half": True} if getattr(base, "rotate_half", False) else {}
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **options)], dim=2)


def finish_attention(attention: Any, mixed: Tensor, x: Tensor) -> Tensor:
    """What follows the mixed values ``[B, N, W]``: inner norm, gate by the input ``x``, output projection."""
    base = inner(attention)
    out = base.norm(mixed)
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
    block: Any,
    x: Tensor,
    rope: Tensor | None,
    mode: DenseMode,
    grid: tuple[int, int],
    prefix: int,
    averaged: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the last block once, as trained for what is pooled and as ``mode`` says for the patches.

    Args:
        block: timm's ``EvaBlock`` or ``EvaBlockPostNorm``.
        x: ``[B, prefix + P, W]``, class and register tokens first.
        rope: rotary position embedding of the patches, or ``None``.
        mode: how patches are computed.
        grid: rows and columns, P in all.
        prefix: how many tokens are no patches.
        averaged: whether the pooled embedding averages the patches.

    Returns:
        Prefix tokens ``[B, prefix, W]``, or patches as trained ``[B, P, W]`` where ``averaged``; and patches by mode
        ``[B, P, W]``; all before the final norm.
    """
    plain = mode.attention == "plain" and mode.residual and mode.ffn
    if mode.by_hand:
        require_by_hand(block.attn, mode)
    elif plain or refusal_by_hand(block.attn) is not None or has_hooks(block, block.attn):
        trained, patches = _whole(block, x, rope, mode, prefix)
        if averaged:
            trained = patches if plain else block(x, rope)[:, prefix:]
        return trained, patches
    return parts.last_block(_parts(block, rope), x, mode, grid, prefix, averaged)


def _parts(block: Any, rope: Tensor | None) -> parts.BlockParts:
    attention = block.attn
    return parts.BlockParts(
        norm=lambda x: _input(block, x),
        project=lambda asking, x: queries_keys_values(attention, x, rope, None if asking is x else asking),
        finish=lambda mixed, normed: _finish_branch(block, finish_attention(attention, mixed, normed)),
        feed_forward=lambda tokens: _ffn(block, tokens),
        dropout=attention_dropout(inner(attention)),
    )


def _whole(block: Any, x: Tensor, rope: Tensor | None, mode: DenseMode, prefix: int) -> tuple[Tensor, Tensor]:
    """Prefix tokens and patches by calls of the block's own attention, the value modes with a mask."""
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

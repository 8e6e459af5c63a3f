"""Blocks of timm's EVA trunks: queries, keys and values, rotary embeddings, and the last block of the dense modes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttd_plugins.toolkit.attention import (
    attention_dropout,
    has_hooks,
    opaque_attention_reason,
    split_heads,
    split_projection,
)
from ttd_plugins.toolkit.dense_modes import DenseMode
from ttd_plugins.toolkit.last_block import BlockCalls, BlockParts, last_block, last_block_with_mask


def bias_is_added_outside(attention: Any) -> bool:
    """Whether an attention module multiplies by ``qkv.weight`` itself instead of calling ``qkv``.

    timm does so where the biases (``q_bias``, ``v_bias``) are not part of the fused projection. A LoRA layer that
    replaces ``qkv`` is then silently ignored.
    """
    return bool(
        getattr(attention, "qkv", None) is not None
        and getattr(attention, "q_bias", None) is not None
        and not getattr(attention, "qkv_bias_separate", False)
    )


def fused_projection(attention: Any) -> tuple[Tensor, Tensor]:
    """Weight ``[3 E, E]`` and bias ``[3 E]`` of a fused projection with separate biases."""
    return attention.qkv.weight, torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def rotary_embedding(trunk: Any, grid: tuple[int, int]) -> Tensor | None:
    """Rotary position embedding for a grid, as after timm's ``set_input_size``, without changing the trunk.

    Returns:
        ``[P, 2 * width of a head]``, with a leading axis for the blocks where each has its own; ``None`` without RoPE.
    """
    rope = trunk.rope
    if rope is None:
        return None
    own = getattr(rope, "feat_shape", None)
    if own is not None and tuple(own) == tuple(grid):
        return rope.get_embed()
    if own is None or getattr(trunk, "rope_mixed", False):
        return rope.get_embed(shape=grid)
    # A module with a cache ignores the argument shape, so a copy is resized; it has no parameters.
    twin = copy.deepcopy(rope)
    twin.update_feat_shape(grid)
    return twin.get_embed()


def queries_keys_values(
    attention: Any, x: Tensor, rope: Tensor | None, query_tokens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, heads, N, W / heads]`` of ``x`` ``[B, N, W]``, normed and rotated as trained.

    With ``query_tokens``, the prefix tokens of ``x``, only these have queries. Prefix tokens are not rotated.
    """
    base = inner(attention)
    parts: Any
    queried = x if query_tokens is None else query_tokens
    if hasattr(attention, "project_qkv"):
        parts = attention.project_qkv(x) if query_tokens is None else attention.project_with_queries(query_tokens, x)
    elif base.qkv is None:
        parts = (base.q_proj(queried), base.k_proj(x), base.v_proj(x))
    elif bias_is_added_outside(base):
        parts = _fused(x, query_tokens, *fused_projection(base))
    elif getattr(base, "q_bias", None) is not None:
        parts = (base.qkv(x) + fused_projection(base)[1]).chunk(3, dim=-1)
    elif type(base.qkv) is nn.Linear and not has_hooks(base.qkv):
        parts = _fused(x, query_tokens, base.qkv.weight, base.qkv.bias)
    else:
        parts = base.qkv(x).chunk(3, dim=-1)
    q, k, v = (split_heads(t, base.num_heads) for t in parts)
    q, k = base.q_norm(q[:, :, : queried.shape[1]]), base.k_norm(k)
    if rope is None:
        return q, k, v
    return (_rotated(base, q, rope) if query_tokens is None else q).type_as(v), _rotated(base, k, rope).type_as(v), v


def _fused(x: Tensor, query_tokens: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    if query_tokens is None:
        return F.linear(x, weight, bias).chunk(3, dim=-1)
    return split_projection(weight, bias, query_tokens, x)


def _rotated(base: Any, x: Tensor, rope: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    prefix = base.num_prefix_tokens
    options = {"half": True} if getattr(base, "rotate_half", False) else {}
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **options)], dim=2)


def finish_attention(attention: Any, mixed: Tensor, x: Tensor) -> Tensor:
    """Inner norm, gate by the input ``x`` and output projection of mixed values ``[B, N, W]``."""
    base = inner(attention)
    out = base.norm(mixed)
    gate = getattr(base, "gate", None)
    if gate is not None:
        out = out * gate(x).sigmoid()
    out = attention.project_out(out) if hasattr(attention, "project_out") else base.proj(out)
    return base.proj_drop(out)


def inner(attention: Any) -> Any:
    """timm's attention module, without a LoRA layer of the toolkit around it."""
    return attention.get_base_layer() if hasattr(attention, "project_qkv") else attention


def opaque_qkv_reason(attention: Any) -> str | None:
    """Why queries and keys of ``attention`` cannot be computed by hand, as the end of a sentence, or ``None``."""
    if hasattr(attention, "project_qkv"):
        return None
    if type(attention).__module__.split(".")[0] != "timm":
        return opaque_attention_reason(attention)
    if bias_is_added_outside(attention) and type(attention.qkv) is not nn.Linear:
        return (
            f"the last block's qkv is a {type(attention.qkv).__qualname__} that the attention does not call (it "
            "multiplies by qkv.weight), so what that layer adds is lost"
        )
    if getattr(attention, "num_kv_groups", 1) != 1:
        return "the last block's heads share their keys (grouped-query attention)"
    return None


def run_last_block(
    block: Any,
    x: Tensor,
    rope: Tensor | None,
    mode: DenseMode,
    grid: tuple[int, int],
    prefix: int,
    averaged: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`ttd_plugins.toolkit.last_block.last_block` for timm's ``EvaBlock`` or ``EvaBlockPostNorm``.

    Args:
        block: the block.
        x: ``[B, prefix + P, W]``, class and register tokens first.
        rope: rotary position embedding of the patches, or ``None``.
        mode: how patches are computed.
        grid: rows and columns, P in all.
        prefix: number of class and register tokens.
        averaged: whether the pooled embedding averages the patches.
    """
    attention = block.attn
    in_parts = opaque_qkv_reason(attention) is None and not has_hooks(block, attention)
    if mode.needs_explicit_qkv or (in_parts and not mode.is_block_unchanged):
        return last_block(_parts(block, rope), x, mode, grid, prefix, averaged)
    calls = BlockCalls(
        attention_branch=lambda tokens, mask: _finish_branch(
            block, attention(_input(block, tokens), rope=rope, attn_mask=mask)
        ),
        feed_forward=lambda tokens: _ffn(block, tokens),
        block=lambda tokens, mask: block(tokens, rope=rope, attn_mask=mask),
    )
    return last_block_with_mask(calls, x, mode, prefix, averaged)


def _parts(block: Any, rope: Tensor | None) -> BlockParts:
    attention = block.attn

    def project(query_tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return queries_keys_values(attention, x, rope, None if query_tokens is x else query_tokens)

    return BlockParts(
        norm=lambda x: _input(block, x),
        project=project,
        finish=lambda mixed, normed: _finish_branch(block, finish_attention(attention, mixed, normed)),
        feed_forward=lambda tokens: _ffn(block, tokens),
        dropout=attention_dropout(inner(attention)),
    )


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

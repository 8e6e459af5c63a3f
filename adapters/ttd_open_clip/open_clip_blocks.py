"""The last block of open_clip's vision transformer: in parts, or through its own attention with a mask."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ttd_plugins.toolkit import attention as toolkit_attention
from ttd_plugins.toolkit.dense_modes import DenseMode
from ttd_plugins.toolkit.last_block import BlockCalls, last_block, last_block_with_mask
from ttd_plugins.toolkit.residual_blocks import attention_branch, block_parts, feed_forward, runs_in_parts


def is_plain_attention(attention: nn.Module) -> bool:
    """Whether a module is self-attention that its projections and head count describe completely.

    True for ``nn.MultiheadAttention`` itself and for open_clip's ``Attention`` with none of its extras.
    """
    if type(attention) is nn.MultiheadAttention:
        return toolkit_attention.is_plain_attention(attention)
    if type(attention).__module__.split(".")[0] != "open_clip" or getattr(attention, "in_proj_weight", None) is None:
        return False
    norms = [getattr(attention, name, None) for name in ("ln_q", "ln_k", "ln_inner")]
    return all(norm is None or isinstance(norm, nn.Identity) for norm in norms) and all(
        getattr(attention, name, None) is None for name in ("logit_scale", "head_scale")
    )


def opaque_qkv_reason(attention: nn.Module) -> str | None:
    """Why queries and keys of ``attention`` cannot be computed by hand; ``None`` where they can."""
    if is_plain_attention(attention) or hasattr(attention, "project_qkv"):
        return None
    return toolkit_attention.opaque_attention_reason(attention)


def run_last_block(
    block: Any, x: Tensor, mode: DenseMode, grid: tuple[int, int], averaged: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`ttd_plugins.toolkit.last_block.last_block` for a block of open_clip, plain or custom.

    Args:
        block: the block.
        x: ``[B, 1 + P, W]``, the class token first.
        mode: how patches are computed.
        grid: rows and columns, P in all.
        averaged: whether the pooled embedding averages the patches.
    """
    if mode.needs_explicit_qkv or (runs_in_parts(block, is_plain_attention) and not mode.is_block_unchanged):
        return last_block(block_parts(block), x, mode, grid, averaged=averaged)
    calls = BlockCalls(
        attention_branch=lambda tokens, mask: attention_branch(block, _attend(block, block.ln_1(tokens), mask)),
        feed_forward=partial(feed_forward, block),
        block=lambda tokens, mask: block(tokens, attn_mask=mask),
    )
    return last_block_with_mask(calls, x, mode, averaged=averaged)


def _attend(block: Any, normed: Tensor, mask: Tensor | None) -> Tensor:
    if hasattr(block, "attention"):
        return block.attention(q_x=normed, attn_mask=mask)
    return block.attn(normed, attn_mask=mask)

"""The last block of open_clip's vision transformer, run once for what is pooled and for dense features."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.toolkit import last_block as parts
from ttd_plugins.toolkit.attention import attention_dropout, has_hooks, project_out, project_some
from ttd_plugins.toolkit.attention import is_plain_attention as is_plain_multihead
from ttd_plugins.toolkit.dense_modes import DenseMode, diagonal_mask


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


def in_parts(block: Any) -> bool:
    """Whether the block may be run part by part: nothing in it is wrapped unknown, and nobody watches its calls."""
    attention = block.attn
    return (is_plain_attention(attention) or hasattr(attention, "project_qkv")) and not has_hooks(block, attention)


def last_block(
    block: Any, x: Tensor, mode: DenseMode, grid: tuple[int, int], averaged: bool = False
) -> tuple[Tensor, Tensor]:
    """Run the last block once, as trained for what is pooled and as ``mode`` says for the patches.

    Args:
        block: open_clip's residual attention block, plain or custom.
        x: ``[B, 1 + P, W]``, the class token first.
        mode: how patches are computed.
        grid: rows and columns, P in all.
        averaged: whether the pooled embedding averages the patches.

    Returns:
        The class token ``[B, W]``, or patches as trained ``[B, P, W]`` where ``averaged``; and patches by mode
        ``[B, P, W]``; all before the final LayerNorm.
    """
    plain = mode.attention == "plain" and mode.residual and mode.ffn
    if mode.by_hand:
        require_by_hand(block.attn, mode)
    elif plain or not in_parts(block):
        trained, patches = _whole(block, x, mode)
        if averaged:
            trained = patches if plain else block(x)[:, 1:]
        return trained, patches
    trained, patches = parts.last_block(_parts(block), x, mode, grid, averaged=averaged)
    return (trained if averaged else trained[:, 0]), patches


def _parts(block: Any) -> parts.BlockParts:
    attention = block.attn
    return parts.BlockParts(
        norm=block.ln_1,
        project=partial(project_some, attention),
        finish=lambda mixed, _: _finish_branch(block, project_out(attention, mixed)),
        feed_forward=lambda tokens: block.ls_2(block.mlp(block.ln_2(tokens))),
        dropout=attention_dropout(attention),
    )


def _whole(block: Any, x: Tensor, mode: DenseMode) -> tuple[Tensor, Tensor]:
    """Class token and patches by calls of the block's own attention, the value modes with a mask."""
    mask = diagonal_mask(x.shape[1], x) if mode.attention == "value" else None
    if mode.residual and mode.ffn:
        out = block(x, attn_mask=mask)
        return out[:, 0], out[:, 1:]
    branch = _finish_branch(block, _attend(block, block.ln_1(x), mask))
    trained = x[:, :1] + branch[:, :1]
    trained = trained + block.ls_2(block.mlp(block.ln_2(trained)))
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

"""The last block of a transformer, computed for no more tokens than are used.

In a vision transformer the block computes the tokens that are pooled, as trained, and the patches of a dense mode. In
the value modes a patch attends to itself alone, so its attention output is its own value: it needs neither a query nor
a row of attention weights, and a class token needs one query. Where the pooled embedding averages the patches, the
patches as trained and those of the mode share the norm, the projections and the calls of the output projection and the
MLP.

In a text tower the block computes only the token that is pooled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.packed_texts import PackedTexts
from ttd_plugins.toolkit.dense_modes import DenseMode, diagonal_mask, gaussian_window


@dataclass(frozen=True)
class BlockParts:
    """A residual block in parts. Each part calls modules, so that LoRA and other wrappers are included.

    Attributes:
        norm: the norm before attention; the identity in a post-norm block.
        project: query tokens ``[B, M, W]`` (the first M tokens) and all tokens ``[B, L, W]`` to queries
            ``[B, heads, M, W / heads]``, keys and values ``[B, heads, L, W / heads]``.
        finish: mixed values ``[B, N, W]`` and the normed tokens at the same positions to the attention branch before
            the residual connection: inner norms, output projection, layer scale.
        feed_forward: tokens to the second branch before the residual connection: norm, MLP, layer scale.
        dropout: dropout probability of the attention weights; a patch's own value is never dropped.
    """

    norm: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    finish: Callable[[Tensor, Tensor], Tensor]
    feed_forward: Callable[[Tensor], Tensor]
    dropout: float = 0.0


@dataclass(frozen=True)
class BlockCalls:
    """A residual block whose attention is called as one module, because something wraps it or has hooks on it.

    Attributes:
        attention_branch: tokens ``[B, N, W]`` and an additive mask ``[N, N]`` or ``None`` to the attention branch
            before the residual connection, ``[B, N, W]``.
        feed_forward: as in :class:`BlockParts`.
        block: the same arguments to the output of the whole block; ``None`` where the block takes no mask.
    """

    attention_branch: Callable[[Tensor, Tensor | None], Tensor]
    feed_forward: Callable[[Tensor], Tensor]
    block: Callable[[Tensor, Tensor | None], Tensor] | None = None


def last_block(
    parts: BlockParts, x: Tensor, mode: DenseMode, grid: tuple[int, int], prefix: int = 1, averaged: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens as trained for the pooled embedding, and patches by the dense mode, both before the final norm.

    Args:
        parts: the block.
        x: ``[B, prefix + P, W]``, class and register tokens first.
        mode: how patches are computed.
        grid: rows and columns, P in all.
        prefix: number of class and register tokens.
        averaged: whether the pooled embedding averages the patches.

    Returns:
        Prefix tokens ``[B, prefix, W]``, or patches as trained ``[B, P, W]`` where ``averaged``; and patches by mode
        ``[B, P, W]``.
    """
    normed = parts.norm(x)
    one_query = mode.attention == "value" and not averaged
    q, k, v = parts.project(normed[:, :prefix] if one_query else normed, normed)
    mixed = _mixed_values(q, k, v, mode, grid, prefix, averaged, parts.dropout).transpose(1, 2).flatten(2)
    if averaged:
        # From here on the patches are there twice: as trained, and by the mode.
        x, normed = (torch.cat([t[:, prefix:]] * 2, dim=1) for t in (x, normed))
        prefix = x.shape[1] // 2
    branch = parts.finish(mixed, normed)
    if mode.residual and mode.ffn:
        out = x + branch
        out = out + parts.feed_forward(out)
        return out[:, :prefix], out[:, prefix:]
    return _residuals(x, branch, parts.feed_forward, mode, prefix)


def last_block_with_mask(
    calls: BlockCalls, x: Tensor, mode: DenseMode, prefix: int = 1, averaged: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`last_block` by calls of the block's own attention, with a mask in the value modes.

    Modes that need explicit queries and keys cannot be computed this way.
    """
    mask = diagonal_mask(x.shape[1], x, prefix) if mode.attention == "value" else None
    if mode.residual and mode.ffn and calls.block is not None:
        out = calls.block(x, mask)
        trained, patches = out[:, :prefix], out[:, prefix:]
    else:
        branch = calls.attention_branch(x, mask)
        trained, patches = _residuals(x, branch, calls.feed_forward, mode, prefix)
    if averaged and calls.block is not None:
        trained = patches if mode.is_block_unchanged else calls.block(x, None)[:, prefix:]
    return trained, patches


def last_block_at(parts: BlockParts, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    """Output tokens ``[N, W]`` at one position per row: keys and values of all tokens, one query, one token in the MLP.

    Args:
        parts: the block.
        x: ``[N, L, W]``.
        positions: int64 ``[N]``.
        mask: additive ``[L, L]``, or ``None`` where each token attends to all.
    """
    rows = torch.arange(len(x), device=x.device)
    normed = parts.norm(x)
    query_tokens = normed[rows, positions][:, None]
    q, k, v = parts.project(query_tokens, normed)
    mask_rows = None if mask is None else mask[positions][:, None, None].to(q.dtype)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_rows, dropout_p=parts.dropout)
    out = x[rows, positions] + parts.finish(mixed.transpose(1, 2).flatten(2), query_tokens)[:, 0]
    return out + parts.feed_forward(out)


def last_block_of_packed_texts(parts: BlockParts, x: Tensor, packed: PackedTexts, mask: Tensor) -> Tensor:
    """Output tokens ``[N, W]`` at the pooled token of each text, as :func:`last_block_at`.

    Args:
        parts: the block.
        x: tokens ``[R, L, W]``.
        packed: the texts in these rows.
        mask: additive ``[R, L, L]``.
    """
    normed = parts.norm(x)
    query_tokens = packed.pooled(normed)[None]
    q, k, v = parts.project(query_tokens, normed)
    # Queries of the texts of a row, [R, heads, M, W / heads]; unused slots are dropped below.
    q = q[0].index_select(1, packed.slot_text.flatten()).unflatten(1, packed.slot_text.shape).transpose(0, 1)
    mask_rows = mask.flatten(0, 1).index_select(0, packed.slot_token.flatten()).unflatten(0, packed.slot_text.shape)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_rows[:, None].to(q.dtype), dropout_p=parts.dropout)
    mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, packed.text_slot)[None]
    out = packed.pooled(x) + parts.finish(mixed, query_tokens)[0]
    return out + parts.feed_forward(out)


def _residuals(
    x: Tensor, branch: Tensor, feed_forward: Callable[[Tensor], Tensor], mode: DenseMode, prefix: int
) -> tuple[Tensor, Tensor]:
    """Residual connections and FFN after the attention branch: prefix tokens as trained, patches by the mode."""
    trained = x[:, :prefix] + branch[:, :prefix]
    trained = trained + feed_forward(trained)
    patches = branch[:, prefix:]
    if mode.residual:
        patches = patches + x[:, prefix:]
    if mode.ffn:
        patches = patches + feed_forward(patches)
    return trained, patches


def _mixed_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: DenseMode,
    grid: tuple[int, int],
    prefix: int,
    averaged: bool,
    dropout: float,
) -> Tensor:
    """Mixed values per head: first those of the pooled tokens, as trained, then those of the patches by the mode."""
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout)
    if mode.attention == "plain" and not averaged:
        return attend(q, k, v)
    trained = attend(q[:, :, prefix:] if averaged else q[:, :, :prefix], k, v) if averaged or prefix else v[:, :, :0]
    if mode.attention == "plain":
        patches = trained
    elif mode.attention == "value":
        patches = v[:, :, prefix:]
    elif mode.attention == "kk+window":
        window = F.pad(gaussian_window(grid, mode.window_std, q)[:, 1:], (prefix, 0))
        patches = attend(k[:, :, prefix:], k, v, attn_mask=window)
    elif mode.attention == "qq+kk":
        patches = attend(q[:, :, prefix:], q, v) + attend(k[:, :, prefix:], k, v)
    else:
        both = q if mode.attention == "qq" else k
        patches = attend(both[:, :, prefix:], both, v)
    return torch.cat([trained, patches], dim=2)

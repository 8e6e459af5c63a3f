"""The last block of a transformer, run for no more tokens than are used.

Of a vision transformer: once for what is pooled, as trained, and for the patches of a dense mode.

Under the mask of the value modes a patch attends to itself alone, so that its attention is its own value: it needs
neither a query nor a row of attention, and a class token needs one query. Where the pooled embedding averages the
patches, both kinds of patches share the norm, the projections and the calls of the output projection and of the MLP.
Of a text tower: for the one token that is pooled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.toolkit.dense_modes import DenseMode, gaussian_window


@dataclass(frozen=True)
class BlockParts:
    """A residual block in parts, each called as a module so that LoRA and other wrappers are included.

    Attributes:
        norm: the norm before attention; nothing in a post-norm block.
        project: the tokens that ask, ``[B, M, W]``, being the first M of all, and all ``[B, L, W]`` to queries
            ``[B, heads, M, side]``, keys and values ``[B, heads, L, side]``.
        finish: mixed values ``[B, N, W]`` and the normed tokens that they are of to the branch before the skip: inner
            norms, output projection, layer scale.
        feed_forward: tokens to the second branch before the skip: norm, MLP, layer scale.
        dropout: probability with which attention weights are dropped; a patch's own value is never dropped.
    """

    norm: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    finish: Callable[[Tensor, Tensor], Tensor]
    feed_forward: Callable[[Tensor], Tensor]
    dropout: float = 0.0


def last_block(
    parts: BlockParts, x: Tensor, mode: DenseMode, grid: tuple[int, int], prefix: int = 1, averaged: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens as trained for the pooled embedding, and patches as the mode says, before the final norm.

    Args:
        parts: the block.
        x: ``[B, prefix + P, W]``, class and register tokens first.
        mode: how patches are computed.
        grid: rows and columns, P in all.
        prefix: how many tokens are no patches.
        averaged: whether the pooled embedding averages the patches.

    Returns:
        ``[B, prefix, W]``, or ``[B, P, W]`` where ``averaged``; and patches ``[B, P, W]``.
    """
    normed = parts.norm(x)
    one_query = mode.attention == "value" and not averaged
    q, k, v = parts.project(normed[:, :prefix] if one_query else normed, normed)
    mixed = _mixed_values(q, k, v, mode, grid, prefix, averaged, parts.dropout).transpose(1, 2).flatten(2)
    if averaged:
        # The patches come twice from here on: as trained, and as the mode says.
        x, normed = (torch.cat([t[:, prefix:]] * 2, dim=1) for t in (x, normed))
        prefix = x.shape[1] // 2
    branch = parts.finish(mixed, normed)
    if mode.residual and mode.ffn:
        out = x + branch
        out = out + parts.feed_forward(out)
        return out[:, :prefix], out[:, prefix:]
    trained = x[:, :prefix] + branch[:, :prefix]
    trained = trained + parts.feed_forward(trained)
    patches = branch[:, prefix:]
    if mode.residual:
        patches = patches + x[:, prefix:]
    if mode.ffn:
        patches = patches + parts.feed_forward(patches)
    return trained, patches


def last_block_at(parts: BlockParts, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    """Tokens ``[N, W]`` at one position each: keys and values of all tokens, one query, one token in the MLP.

    Args:
        parts: the block.
        x: ``[N, L, W]``.
        positions: int64 ``[N]``.
        mask: additive ``[L, L]``, or ``None`` where each token sees all.
    """
    rows = torch.arange(len(x), device=x.device)
    normed = parts.norm(x)
    asking = normed[rows, positions][:, None]
    q, k, v = parts.project(asking, normed)
    seen = None if mask is None else mask[positions][:, None, None].to(q.dtype)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=parts.dropout)
    out = x[rows, positions] + parts.finish(mixed.transpose(1, 2).flatten(2), asking)[:, 0]
    return out + parts.feed_forward(out)


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
    """Mixed values per head, first of the tokens that are pooled, as trained, then of the patches by mode."""
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

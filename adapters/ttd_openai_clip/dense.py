"""The last block of a vision transformer, run once for the class token as trained and for dense features.

transformers and the original package call its parts by different names and lay tokens out differently, so a container
describes its last block as a :class:`Block`, batch first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ttd_plugins.toolkit.dense import DenseMode, gaussian_window


@dataclass(frozen=True)
class Block:
    """A pre-norm block in parts, each called as a module so that LoRA and other wrappers are included.

    Attributes:
        attention_norm: the norm before attention.
        branch: normed tokens ``[B, 1 + P, W]``, the mode and the grid to the output of attention: row 0 as trained,
            the others as the mode says.
        feed_forward: the norm before the MLP and the MLP, without the skip.
    """

    attention_norm: Callable[[Tensor], Tensor]
    branch: Callable[[Tensor, DenseMode, tuple[int, int]], Tensor]
    feed_forward: Callable[[Tensor], Tensor]


def last_block(block: Block, x: Tensor, mode: DenseMode, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Class token ``[B, W]`` and patches ``[B, P, W]`` after the block, before the final LayerNorm.

    Args:
        block: the block.
        x: ``[B, 1 + P, W]``, the class token first.
        mode: how patches are computed.
        grid: rows and columns, P in all.
    """
    branch = block.branch(block.attention_norm(x), mode, grid)
    if mode.residual and mode.ffn:
        out = x + branch
        out = out + block.feed_forward(out)
        return out[:, 0], out[:, 1:]
    trained = x[:, :1] + branch[:, :1]
    trained = trained + block.feed_forward(trained)
    patches = branch[:, 1:]
    if mode.residual:
        patches = patches + x[:, 1:]
    if mode.ffn:
        patches = patches + block.feed_forward(patches)
    return trained[:, 0], patches


def mix(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, dropout: float, mode: DenseMode, grid: tuple[int, int]
) -> Tensor:
    """Mixed values ``[B, 1 + P, W]``: of the class token as trained, of the patches as the mode says.

    Args:
        q, k, v: queries, keys and values ``[B, 1 + P, W]``, the class token first.
        heads: number of heads, each of which has its part of W.
        dropout: probability with which attention weights are dropped; a patch's own value is never dropped.
        mode: how patches are mixed.
        grid: rows and columns, P in all.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout)
    if mode.attention == "plain":
        return attend(q, k, v).transpose(1, 2).flatten(2)
    class_token = attend(q[:, :, :1], k, v)
    if mode.attention == "value":
        patches = v[:, :, 1:]
    elif mode.attention == "kk+window":
        patches = attend(k[:, :, 1:], k, v, attn_mask=gaussian_window(grid, mode.window_std, q))
    elif mode.attention == "qq+kk":
        patches = attend(q[:, :, 1:], q, v) + attend(k[:, :, 1:], k, v)
    else:
        both = q if mode.attention == "qq" else k
        patches = attend(both[:, :, 1:], both, v)
    return torch.cat([class_token, patches], dim=2).transpose(1, 2).flatten(2)

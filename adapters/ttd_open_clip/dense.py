"""Dense features from the last block of a vision transformer: three independent choices and the published presets.

``attention`` says what the patches of the last block mix, ``residual`` whether the skip around attention stays, and
``ffn`` whether the feed-forward network, with its own skip, stays. Everything after the block (final LayerNorm and
projection) is the backbone's own. The class token always runs as it was trained, so one pass of the block gives the
pooled embedding as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttd_plugins.errors import InputError, UnsupportedModelError, choices_sentence

AttentionKind = Literal["value", "plain", "qq", "kk", "qq+kk", "kk+window"]
"""``value``: each patch attends to itself alone; ``plain``: softmax(q k) as trained; ``qq``, ``kk``: softmax of query
(key) with query (key); ``qq+kk``: the sum of both softmaxes; ``kk+window``: kk with a Gaussian bonus for neighbours."""


@dataclass(frozen=True)
class DenseMode:
    """How the last block makes dense features.

    Attributes:
        attention: what a patch of the last block mixes.
        residual: whether the block's input is added to the attention's output.
        ffn: whether the feed-forward network of the block follows.
        window_std: standard deviation in patches of the window of ``"kk+window"``.
    """

    attention: AttentionKind = "value"
    residual: bool = True
    ffn: bool = True
    window_std: float = 5.0

    def __post_init__(self) -> None:
        if self.attention not in get_args(AttentionKind):
            raise InputError(choices_sentence("dense attention", str(self.attention), get_args(AttentionKind)))
        if not self.window_std > 0:
            raise InputError(f"window_std must be a positive number of patches, not {self.window_std}")

    @property
    def by_hand(self) -> bool:
        """Whether queries, keys and values are needed one by one, outside the attention module's own forward."""
        return self.attention not in ("value", "plain")

    @property
    def name(self) -> str:
        """The preset's name, or the choices spelt out, such as ``"qq,residual"``."""
        for name, mode in PRESETS.items():
            if mode == self:
                return name
        attention = f"{self.attention}({self.window_std:g})" if self.attention == "kk+window" else self.attention
        return ",".join([attention, *(["residual"] if self.residual else []), *(["ffn"] if self.ffn else [])])


PRESETS: dict[str, DenseMode] = {
    "maskclip": DenseMode("value", residual=True, ffn=True),
    "value_only": DenseMode("value", residual=False, ffn=False),
    "clearclip": DenseMode("qq", residual=False, ffn=False),
    "sclip": DenseMode("qq+kk", residual=True, ffn=True),
    "naclip": DenseMode("kk+window", residual=False, ffn=False),
    "plain": DenseMode("plain", residual=True, ffn=True),
}
"""Published modes: ``maskclip`` MaskCLIP (arXiv 2112.01071) and TCL (2212.00785), the one that TTD (2404.00384)
trains; ``clearclip`` ClearCLIP (2407.12442); ``sclip`` SCLIP (2312.01597); ``naclip`` NACLIP (2404.08181), window of
std 5 patches; ``plain`` the tokens as trained. ``value_only`` is the value path without skip and FFN."""


def dense_mode(dense: str | DenseMode) -> DenseMode:
    """Return the mode that a preset's name or a mode means.

    Raises:
        InputError: no preset has that name.
    """
    if isinstance(dense, DenseMode):
        return dense
    if dense not in PRESETS:
        raise InputError(choices_sentence("dense mode", str(dense), PRESETS))
    return PRESETS[dense]


def is_plain_attention(attention: nn.Module) -> bool:
    """Whether a module is self-attention whose whole computation its projections and head count describe.

    True for ``nn.MultiheadAttention`` itself and for open_clip's ``Attention`` with none of its extras.
    """
    if type(attention) is nn.MultiheadAttention:
        return bool(attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn)
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


def diagonal_mask(tokens: int, like: Tensor) -> Tensor:
    """Additive mask ``[tokens, tokens]`` under which each patch sees itself alone and the class token sees all.

    It is 0 on the diagonal and in row 0, and -inf elsewhere.
    """
    mask = torch.full((tokens, tokens), float("-inf"), dtype=like.dtype, device=like.device)
    mask.fill_diagonal_(0)
    mask[0] = 0
    return mask


def gaussian_window(grid: tuple[int, int], std: float, like: Tensor) -> Tensor:
    """NACLIP's additive bonus for near patches, ``exp(-distance**2 / (2 std**2))``, ``[P, 1 + P]``.

    Distances are in patches. Column 0, the class token, has no place in the grid and gets none.
    """
    rows, columns = (torch.arange(side, device=like.device, dtype=torch.float32) for side in grid)
    row_part = torch.exp(-((rows[:, None] - rows[None]) ** 2) / (2 * std**2))
    column_part = torch.exp(-((columns[:, None] - columns[None]) ** 2) / (2 * std**2))
    return F.pad(torch.kron(row_part, column_part), (1, 0)).to(like.dtype)


def run_blocks(transformer: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function(*arguments)``, checkpointed where the tower says so and is being trained."""
    if getattr(transformer, "grad_checkpointing", False) and transformer.training and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


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


def attention_dropout(attention: Any) -> float:
    """Probability with which attention weights are dropped in the module's present mode."""
    if not attention.training:
        return 0.0
    return float(attention.attn_drop.p if hasattr(attention, "attn_drop") else attention.dropout)

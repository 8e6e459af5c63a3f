"""Facts about attention modules and blocks that several libraries share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def is_plain_attention(attention: nn.Module) -> bool:
    """Whether a module is ``nn.MultiheadAttention`` that its projections and head count describe completely."""
    return type(attention) is nn.MultiheadAttention and bool(
        attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn
    )


def attention_dropout(attention: Any) -> float:
    """Probability with which attention weights are dropped in the module's present mode."""
    if not attention.training:
        return 0.0
    return float(attention.attn_drop.p if hasattr(attention, "attn_drop") else attention.dropout)


def run_blocks(transformer: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function(*arguments)``, checkpointed where the tower says so and is being trained."""
    if getattr(transformer, "grad_checkpointing", False) and transformer.training and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody watches these modules' own calls, as sharding does, so that they must be called whole."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, L, W]`` to ``[B, heads, L, W / heads]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def project_some(attention: Any, asking: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of some tokens, keys and values of all, by a fused input projection; LoRA of ours is included.

    Args:
        attention: ``nn.MultiheadAttention`` or a module with its ``in_proj_weight``, ``in_proj_bias`` and
            ``num_heads``; or our LoRA layer around one.
        asking: tokens ``[B, M, W]``; ``x`` itself where all tokens ask.
        x: tokens ``[B, L, W]``.

    Returns:
        ``[B, heads, M, side]`` and twice ``[B, heads, L, side]``.
    """
    ours = hasattr(attention, "project_qkv")
    if asking is x:
        q, k, v = attention.project_qkv(x) if ours else _fused(attention, x)
    elif ours:
        q, k, v = attention.project_some(asking, x)
    else:
        width = x.shape[-1]
        weights = attention.in_proj_weight.split([width, 2 * width])
        bias = attention.in_proj_bias
        biases = (None, None) if bias is None else bias.split([width, 2 * width])
        q = F.linear(asking, weights[0], biases[0])
        k, v = F.linear(x, weights[1], biases[1]).chunk(2, dim=-1)
    return split_heads(q, attention.num_heads), split_heads(k, attention.num_heads), split_heads(v, attention.num_heads)


def _fused(attention: Any, x: Tensor) -> tuple[Tensor, ...]:
    return F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)


def project_out(attention: Any, mixed: Tensor) -> Tensor:
    """Output projection of mixed values ``[B, L, W]``; LoRA of ours is included."""
    return attention.project_out(mixed) if hasattr(attention, "project_out") else attention.out_proj(mixed)

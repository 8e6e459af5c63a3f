"""Attention modules that several libraries share: recognition, projections by hand, activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttd_plugins.utils.deprecation import renamed_names


def is_plain_attention(attention: nn.Module) -> bool:
    """Whether a module is ``nn.MultiheadAttention`` that its projections and head count describe completely."""
    return type(attention) is nn.MultiheadAttention and bool(
        attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn
    )


def opaque_attention_reason(attention: nn.Module) -> str:
    """Why queries and keys of the last block's attention cannot be computed by hand, as the end of a sentence.

    Slicing ``in_proj_weight`` of a wrapper (such as peft's own ``lora.MultiheadAttention``) returns the base weights,
    so what the wrapper adds would be lost silently.
    """
    kind = type(attention)
    return (
        f"the last block's attention is {kind.__module__}.{kind.__qualname__}, whose queries and keys cannot be "
        "computed without losing what it adds to them"
    )


def attention_dropout(attention: Any) -> float:
    """Dropout probability of the attention weights in the module's present mode, 0 in evaluation mode."""
    if not attention.training:
        return 0.0
    return float(attention.attn_drop.p if hasattr(attention, "attn_drop") else attention.dropout)


def is_checkpointed(tower: Any) -> bool:
    """Whether a module's activation checkpointing is switched on and acts now."""
    switch = getattr(tower, "grad_checkpointing", False) or getattr(tower, "gradient_checkpointing", False)
    return bool(switch and tower.training and torch.is_grad_enabled())


def call_checkpointed(tower: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function(*arguments)``, with activation checkpointing where the tower's switch is on."""
    if is_checkpointed(tower):
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


def has_hooks(*modules: nn.Module) -> bool:
    """Whether a module has forward hooks (sharding registers some), so that it must be called as a module."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, L, W]`` to ``[B, heads, L, W / heads]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def project_with_queries(attention: Any, query_tokens: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of some tokens, keys and values of all tokens, by a fused input projection, LoRA of the toolkit included.

    Args:
        attention: ``nn.MultiheadAttention``, a module with its ``in_proj_weight``, ``in_proj_bias`` and ``num_heads``,
            or the toolkit's LoRA layer around one.
        query_tokens: ``[B, M, W]``; pass ``x`` itself for queries of all tokens.
        x: ``[B, L, W]``.

    Returns:
        Queries ``[B, heads, M, W / heads]``, keys and values ``[B, heads, L, W / heads]``.
    """
    has_own_lora = hasattr(attention, "project_qkv")
    if query_tokens is x:
        if has_own_lora:
            parts = attention.project_qkv(x)
        else:
            parts = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    elif has_own_lora:
        parts = attention.project_with_queries(query_tokens, x)
    else:
        parts = split_projection(attention.in_proj_weight, attention.in_proj_bias, query_tokens, x)
    q, k, v = (split_heads(part, attention.num_heads) for part in parts)
    return q, k, v


def split_projection(
    weight: Tensor, bias: Tensor | None, query_tokens: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[..., M, E]`` of ``query_tokens``, keys and values ``[..., L, E]`` of ``x`` by a fused projection.

    Args:
        weight: ``[3 E, W]``: rows of queries, keys, values.
        bias: ``[3 E]`` or ``None``.
        query_tokens: ``[..., M, W]``.
        x: ``[..., L, W]``.
    """
    sizes = [weight.shape[0] // 3, weight.shape[0] - weight.shape[0] // 3]
    (for_q, for_kv), biases = weight.split(sizes), (None, None) if bias is None else bias.split(sizes)
    k, v = F.linear(x, for_kv, biases[1]).chunk(2, dim=-1)
    return F.linear(query_tokens, for_q, biases[0]), k, v


def project_out(attention: Any, mixed: Tensor) -> Tensor:
    """Output projection of mixed values ``[B, L, W]``, LoRA of the toolkit included."""
    return attention.project_out(mixed) if hasattr(attention, "project_out") else attention.out_proj(mixed)


if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, {"run_blocks": "call_checkpointed", "project_some": "project_with_queries"})

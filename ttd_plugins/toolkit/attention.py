"""Facts about attention modules and blocks that several libraries share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
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

"""LoRA for EVA attention whose biases are not part of its fused projection; needs peft.

There timm's attention multiplies by ``qkv.weight`` and never calls ``qkv``, so a LoRA layer that replaces ``qkv`` would
have no effect. This layer wraps the whole attention module instead.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ttd_eva_clip.eva_blocks import bias_is_added_outside, finish_attention, fused_projection, queries_keys_values
from ttd_plugins.toolkit.attention import attention_dropout
from ttd_plugins.toolkit.attention_lora import LoRASelfAttention


class LoRAEvaAttention(LoRASelfAttention):
    """LoRA on the queries, keys, values and output of timm's ``EvaAttention`` with separate biases."""

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether ``module`` is EVA attention that multiplies by ``qkv.weight`` itself, of one width throughout."""
        if not bias_is_added_outside(module):
            return False
        attention: Any = module
        width = attention.qkv.in_features
        return bool(attention.qkv.out_features == 3 * width and attention.proj.in_features == width)

    @staticmethod
    def in_projection(module: Any) -> tuple[Tensor, Tensor | None]:
        """Weight ``[3 E, E]`` and bias ``[3 E]`` of the fused input projection: queries, keys, values."""
        return fused_projection(module)

    @staticmethod
    def out_projection(module: Any) -> nn.Linear:
        """The output projection."""
        return module.proj

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Self-attention over ``[B, N, E]``, with the signature of timm's attention.

        Args:
            x: tokens, class and register tokens first.
            rope: rotary position embedding of the patches, or ``None``.
            attn_mask: as in ``scaled_dot_product_attention``, or ``None``.
            is_causal: as in ``scaled_dot_product_attention``.
        """
        q, k, v = queries_keys_values(self, x, rope)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=attention_dropout(self), is_causal=is_causal
        )
        return finish_attention(self, mixed.transpose(1, 2).flatten(2), x)

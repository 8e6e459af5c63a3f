"""LoRA for open_clip's own attention module; needs peft. The toolkit has the layer for ``nn.MultiheadAttention``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttd_open_clip.open_clip_blocks import is_plain_attention
from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.toolkit.attention_lora import LoRASelfAttention


class LoRAOpenClipAttention(LoRASelfAttention):
    """LoRA for open_clip's own ``Attention`` (custom blocks, and every block of open_clip 4)."""

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether ``module`` is open_clip's attention with none of its extras."""
        return is_plain_attention(module)

    def forward(
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Self-attention over ``[N, L, E]`` with an additive mask ``[L, L]`` or ``[N * heads, L, L]``.

        Raises:
            UnsupportedModelError: keys or values from another tensor, or a boolean mask (whose meaning differs between
                versions of open_clip).
        """
        if any(other is not None and other is not x for other in (k_x, v_x)):
            raise UnsupportedModelError("attention under LoRA: keys and values must be x itself (self-attention)")
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            raise UnsupportedModelError("attention under LoRA: pass an additive mask, not a boolean one")
        return self.attend(x, attn_mask.to(x.dtype) if attn_mask is not None else None)

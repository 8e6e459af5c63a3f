"""Small Perception Encoders: with and without a class token, and with a projection of open_clip's own."""

from __future__ import annotations

from typing import Any

import open_clip
import timm
import torch
from torch import Tensor, nn
from ttd_perception_encoder.tiny import EMBEDDING, PLACEHOLDER, SIDE, TEXT, TRUNK

KINDS: dict[str, dict[str, Any]] = {
    "class_token": {},
    "no_class_token": {"class_token": False},  # as in PE-Core-bigG
    "registers": {"num_reg_tokens": 2, "no_embed_class": True},
    "fewer_heads": {"attn_pool_num_heads": 1, "rope_grid_offset": 0.0},
}


def perception_encoder(kind: str = "class_token", *, projection: bool = False, seed: int = 0) -> Any:
    """A random model in evaluation mode, no weight at its initial value; ``projection`` adds one after the trunk."""
    torch.manual_seed(seed)
    model: Any = open_clip.CustomTextCLIP(embed_dim=EMBEDDING, vision_cfg=PLACEHOLDER, text_cfg=TEXT)
    width = 0 if projection else EMBEDDING
    model.visual.trunk = timm.create_model(**(TRUNK | KINDS[kind]), num_classes=width)
    model.visual.image_size = (SIDE, SIDE)
    if projection:
        model.visual.head.proj = nn.Linear(TRUNK["embed_dim"], EMBEDDING, bias=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pixels(count: int = 2, height: int = SIDE, width: int = SIDE, seed: int = 1) -> Tensor:
    """Random images ``[count, 3, height, width]``."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))

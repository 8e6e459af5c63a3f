"""Small ConvNeXt CLIP models with every head that open_clip can build."""

from __future__ import annotations

from typing import Any

import open_clip
import timm
import torch
from torch import Tensor

WIDTH, CHANNELS, SIDE = 20, 40, 96
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
PROJECTIONS = {"linear": "linear", "mlp": "mlp", "trunk": None}


def trunk(**options: Any) -> Any:
    small = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, CHANNELS), "ls_init_value": 0.8, "num_classes": 0}
    return timm.create_model("convnext_tiny", **(small | options))


def convnext_clip(head: str = "linear", *, custom_text: bool = False, seed: int = 0, **options: Any) -> Any:
    """A random model in evaluation mode whose projection is ``head``: linear, an MLP, or the trunk's own last layer."""
    torch.manual_seed(seed)
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    vision = {
        "timm_model_name": "test_convnext",
        "timm_pool": "avg",
        "timm_proj": PROJECTIONS[head],
        "image_size": SIDE,
    }
    model: Any = kind(embed_dim=WIDTH, vision_cfg=vision, text_cfg=TEXT)
    model.visual.trunk = trunk(num_classes=WIDTH if head == "trunk" else 0, **options)
    if head == "linear":
        model.visual.head.proj = torch.nn.Linear(CHANNELS, WIDTH, bias=False)
    elif head == "mlp":
        model.visual.head.mlp = timm.layers.Mlp(CHANNELS, 2 * WIDTH, WIDTH, bias=(True, False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pixels(count: int = 2, height: int = SIDE, width: int = SIDE, seed: int = 1) -> Tensor:
    """Random images ``[count, 3, height, width]``."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))

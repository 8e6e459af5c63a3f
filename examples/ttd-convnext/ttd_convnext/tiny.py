"""``convnext:tiny``: a small model of the architecture, with random weights only, for tests without a network."""

from __future__ import annotations

from typing import Any

from torch import nn

from ttd_plugins.toolkit.open_clip_models import set_preprocessing

STRIDE, SIDE, WIDTH, CONTEXT = 32, 128, 48, 32

# open_clip passes only a name to timm, so a placeholder trunk is built by name and then replaced.
PLACEHOLDER = "test_convnext"
TRUNK: dict[str, Any] = {
    "model_name": "convnext_tiny",
    "depths": (1, 1, 2, 1),
    "dims": (24, 32, 48, 64),
    # With the default layer scale of 1e-6 only the residual connections would contribute.
    "ls_init_value": 1.0,
    "num_classes": 0,
}


def build_tiny() -> nn.Module:
    """Build an ``open_clip.CLIP`` around a small timm ConvNeXt, float32, in evaluation mode, on the CPU."""
    import open_clip
    import timm

    vision = {"timm_model_name": PLACEHOLDER, "timm_pool": "", "timm_proj": "linear", "image_size": SIDE}
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model: Any = open_clip.CLIP(embed_dim=WIDTH, vision_cfg=vision, text_cfg=text)
    model.visual.trunk = timm.create_model(**TRUNK)
    model.visual.image_size = (SIDE, SIDE)
    set_preprocessing(open_clip, model, {})
    return model.eval()

"""``perception_encoder:tiny``: a small model of the architecture, with random weights only, for tests offline."""

from __future__ import annotations

from typing import Any

from torch import nn

from ttd_plugins.toolkit.open_clip_models import set_preprocessing

SIDE, PATCH, EMBEDDING, CONTEXT = 64, 16, 48, 32
TRUNK: dict[str, Any] = {
    "model_name": "vit_pe_core_base_patch16_224",
    "img_size": SIDE,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "attn_pool_num_heads": 4,
    # Rotary positions are stretched over the grid of the training, which is that of SIDE.
    "ref_feat_shape": (SIDE // PATCH, SIDE // PATCH),
}
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
PREPROCESSING = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "resize_mode": "squash"}

# open_clip passes only a name to timm, so another small trunk is built by name and then replaced.
PLACEHOLDER = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160}


def build_tiny() -> nn.Module:
    """Build an ``open_clip.CustomTextCLIP`` around a small trunk, float32, in evaluation mode, on the CPU."""
    import open_clip
    import timm

    model: Any = open_clip.CustomTextCLIP(embed_dim=EMBEDDING, vision_cfg=PLACEHOLDER, text_cfg=TEXT)
    # timm starts the last layer near zero, where all embeddings would be nearly equal.
    model.visual.trunk = timm.create_model(**TRUNK, num_classes=EMBEDDING, head_init_scale=1.0)
    model.visual.image_size = (SIDE, SIDE)
    set_preprocessing(open_clip, model, PREPROCESSING)
    return model.eval()

"""Small open_clip models around convolutional trunks of timm, with every head that open_clip can build."""

from __future__ import annotations

from typing import Any

import open_clip
import timm
import torch
from torch import Tensor

WIDTH, SIDE, CONTEXT = 20, 96, 12
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
HEADS = {"linear": "linear", "mlp": "mlp", "trunk": None}
TRUNKS: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext": ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 40), "ls_init_value": 0.8}),
    "efficientnet": ("test_efficientnet", {}),
    "mobileclip": (
        "fastvit_mci1",
        {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128), "layer_scale_init_value": 0.3},
    ),
}
"""timm's name and options of each kind of trunk: LayerNorm after the average; batch normalisation; and both batch
normalisation and attention."""
STRIDE = 32


def trunk_clip(
    kind: str = "convnext", head: str = "linear", *, custom_text: bool = False, seed: int = 0, **options: Any
) -> Any:
    """A random model in evaluation mode whose projection is ``head``; no weight or statistic is at its initial value.

    Args:
        kind: the trunk, a key of ``TRUNKS``.
        head: ``linear`` or ``mlp`` of open_clip, or ``trunk``, the last layer of the trunk.
        custom_text: whether the model is a ``CustomTextCLIP``.
        seed: seed of the weights.
        options: further options of ``timm.create_model``.
    """
    torch.manual_seed(seed)
    cls = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    placeholder = {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": HEADS[head], "image_size": SIDE}
    model: Any = cls(embed_dim=WIDTH, vision_cfg=placeholder, text_cfg=TEXT)
    name, small = TRUNKS[kind]
    # open_clip passes only a name to timm, so a trunk with other sizes is put into the model.
    model.visual.trunk = timm.create_model(name, **({"num_classes": WIDTH if head == "trunk" else 0} | small | options))
    channels = model.visual.trunk.head_hidden_size
    if head == "linear":
        model.visual.head.proj = torch.nn.Linear(channels, WIDTH, bias=False)
    elif head == "mlp":
        model.visual.head.mlp = timm.layers.Mlp(channels, 2 * WIDTH, WIDTH, bias=(True, False))
    return shaken(model)


def shaken(model: Any) -> Any:
    """The model in evaluation mode, noise added to weights and statistics, so that no part has no effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.mul_(torch.rand_like(buffer) + 0.5)
    return model.eval()


def pixels(count: int = 2, height: int = SIDE, width: int = SIDE, seed: int = 1) -> Tensor:
    """Random images ``[count, 3, height, width]``."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))

"""Where the positions of a trunk's feature map lie in the image, and how the map is resampled onto the patches.

A strided convolution with an odd kernel and symmetric padding centres its outputs on every second input, not between
two of them. After all strides (ResNet, EfficientNet, FastViT) a position lies half a patch above and left of the centre
of its patch; with the padding of TensorFlow (``tf_efficientnet_*``) half a patch below and right of it. Kernels as wide
as their stride (ConvNeXt) keep to the centres.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STRIDED = (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)


def position_shift(trunk: nn.Module) -> float:
    """How far positions lie from the centres of their patches, in patches: down and right where positive.

    The mean over the strided layers of the trunk, which agree with each other but for shortcuts; from -0.5 to 0.5.
    """
    shifts = [_layer_shift(layer) for layer in trunk.modules() if isinstance(layer, STRIDED)]
    found = [shift for shift in shifts if shift is not None]
    return sum(found) / len(found) if found else 0.0


def _layer_shift(layer: Any) -> float | None:
    """The shift of one layer in patches of its own; ``None`` without a stride."""
    kernel, stride, padding = (_first(value) for value in (layer.kernel_size, layer.stride, layer.padding))
    if stride == 1:
        return None
    dilated = _first(getattr(layer, "dilation", 1)) * (kernel - 1)
    if padding == "same" or type(layer).__name__.endswith("Same"):
        padding = max(dilated + 1 - stride, 0) // 2
    # The outputs centre on input stride * i + dilated / 2 - padding, and patches on stride * i + (stride - 1) / 2.
    # Summed over strides that are powers of it, the difference in pixels is this times nearly the whole stride.
    return float((dilated / 2 - padding - (stride - 1) / 2) / (stride - 1))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) else value


def at_centres(features: Tensor, shift: float) -> Tensor:
    """A feature map ``[B, C, H, W]`` at the centres of its patches, by linear interpolation; its edges are repeated.

    Args:
        features: the map.
        shift: see :func:`position_shift`.
    """
    weight = abs(shift)
    for axis in (2, 3):
        size = features.shape[axis]
        # Positions that lie too far down need a part of the position above, and the other way round.
        other = torch.arange(size, device=features.device) - (1 if shift > 0 else -1)
        neighbours = features.index_select(axis, other.clamp(0, size - 1))
        features = torch.lerp(features, neighbours, weight)
    return features

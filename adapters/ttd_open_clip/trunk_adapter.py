"""The adapter for open_clip models whose image tower is a convolutional trunk of timm that averages its last map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ttd_open_clip.base_adapter import OpenCLIPBaseAdapter
from ttd_plugins.adapter import Calibration, ImageFeatures
from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.dense_modes import HeadMode
from ttd_plugins.toolkit.lora_targets import base_layer

# At a cosine of 0.25 the probability is 0.5, as in TCL. `ttd calibrate` fits one to a model.
DEFAULT_CALIBRATION = Calibration(scale=10.0, shift=-2.5)


class OpenCLIPTrunkAdapter(OpenCLIPBaseAdapter):
    """``open_clip.CLIP`` or ``CustomTextCLIP`` whose ``visual.trunk`` is a ConvNeXt, EfficientNet, FastViT or similar.

    The trunk computes a feature map of 1/stride of the input's height and width, averages it, and maps the average to
    the joint space by a head: norms and linear layers of the trunk and of open_clip. A patch feature is the output of
    the same head for one position of the map, as if the map were that position alone. Where the head is linear, the
    mean over the map is the pooled embedding. Where a norm or an activation comes after the average (ConvNeXt,
    MobileNetV3), it is not.

    After padded strides (unlike ConvNeXt's), the pixels that a position depends on are centred up to half a patch
    beside its patch. Interpolating the map at the centres gained nothing with EfficientNet-Lite0 on photographs.

    Stochastic depth and batch normalisation act in train mode as in the library. The engine keeps batch normalisation
    with frozen weights (under LoRA) in evaluation mode.
    """

    image_tower = "trunk"
    modes = {"head": HeadMode()}  # noqa: RUF012
    default_mode = "head"
    resamplings = ("library",)
    export_failure = "it passes only the name of a trunk on to timm, and the trunk with this name is another one"

    def _default_calibration(self) -> Calibration:
        return DEFAULT_CALIBRATION

    @property
    def _patch_size(self) -> tuple[int, int]:
        features = self._visual.trunk.feature_info
        stride = int(getattr(features, "info", features)[-1]["reduction"])
        return stride, stride

    @property
    def _grid(self) -> tuple[int, int]:
        (height, width), (rows, columns) = self._visual.image_size, self._patch_size
        return int(height) // rows, int(width) // columns

    def _embedding_widths(self) -> tuple[int, int | None]:
        head = [base_layer(module) for module in self._visual.head.modules()]
        widths = [layer.out_features for layer in head if isinstance(layer, nn.Linear)]
        if not widths:
            trunk = self._visual.trunk
            widths = [int(trunk.num_classes or getattr(trunk, "head_hidden_size", None) or trunk.num_features)]
        return int(widths[-1]), text_tower.embedding_width(self.model)

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        trunk = self._visual.trunk
        features = trunk.forward_features(pixels.to(next(trunk.parameters()).dtype))
        if tuple(features.shape[2:]) != grid:
            raise UnsupportedModelError(
                f"the trunk of {self.description.name} computes a map of {' x '.join(map(str, features.shape[2:]))} "
                f"positions for images of {pixels.shape[2]} x {pixels.shape[3]} pixels, not the {grid[0]} x {grid[1]} "
                "of its stride; it has no patches of a fixed size"
            )
        embedding = self._head(features) if pooled else None
        positions = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1], 1, 1)
        with _running_averages(trunk):
            patches = self._head(positions).reshape(len(pixels), *grid, -1)
        return ImageFeatures(patches, embedding)

    def _head(self, features: Tensor) -> Tensor:
        """Embeddings ``[N, D]`` of feature maps ``[N, C, H, W]``, by the library's own pooling, norm and projection."""
        return self._visual.head(self._visual.trunk.forward_head(features))

    def _image_targets(self) -> list[str]:
        """Linear layers and 1 x 1 convolutions.

        Depthwise convolutions are left out: each of their kernels is a matrix of one row, which has no low-rank update.
        So are the gates of squeeze-and-excitation.
        """
        return [name for name, module in self._visual.named_modules(prefix="visual") if _is_pointwise(name, module)]


@contextmanager
def _running_averages(trunk: nn.Module) -> Iterator[None]:
    """Let batch normalisation use its running averages within a ``with`` block.

    In train mode a norm in the head would otherwise take statistics over positions, and count them as images.
    """
    norms = [m for m in trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


def _is_pointwise(name: str, module: nn.Module) -> bool:
    """Whether a module maps the channels of each position alone, LoRA around it disregarded."""
    parts = name.split(".")
    if "base_layer" in parts or any(part.startswith("lora_") for part in parts) or "se" in parts:
        return False
    layer = base_layer(module)
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)

"""The adapter for CLIP models whose image tower is a timm ConvNeXt: no class token, and no attention to replace."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ttd_convnext import recognition
from ttd_plugins.adapter import Calibration, ImageFeatures, Tower
from ttd_plugins.toolkit import text_tower
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.open_clip_adapter import OpenCLIPModelAdapter

# At a cosine of 0.25 the probability is 0.5, as in TCL. No published ConvNeXt was measured; `ttd calibrate` fits one.
DEFAULT_CALIBRATION = Calibration(scale=10.0, shift=-2.5)


@dataclass(frozen=True)
class HeadMode:
    """The only dense mode: the head of the tower at each position of the feature map."""

    name: str = "head"


class ConvNeXtAdapter(OpenCLIPModelAdapter):
    """``open_clip.CLIP`` or ``CustomTextCLIP`` whose ``visual.trunk`` is a timm ``ConvNeXt``.

    The tower computes a feature map of 1/32 of the input's height and width, averages it, and maps the average to the
    joint space by a head (LayerNorm, then one linear layer or an MLP). A patch feature is the output of the same head
    for one position of the map, as if the map were that position alone. Because the LayerNorm comes after the average,
    the pooled embedding is not the mean of the patch features.

    Stochastic depth acts in train mode, as in the library.
    """

    family = "convnext"
    modes = {"head": HeadMode()}  # noqa: RUF012
    default_mode = "head"
    export_failure = (
        "it passes only a trunk's name on to timm, and none of its own architectures has a trunk like this one"
    )
    recognition = recognition

    def _default_calibration(self) -> Calibration:
        return DEFAULT_CALIBRATION

    @property
    def _patch_size(self) -> tuple[int, int]:
        stride = int(self._visual.trunk.feature_info[-1]["reduction"])
        return stride, stride

    @property
    def _grid(self) -> tuple[int, int]:
        (height, width), (rows, columns) = self._visual.image_size, self._patch_size
        return int(height) // rows, int(width) // columns

    def _embedding_widths(self) -> tuple[int, int | None]:
        heads = (self._visual.trunk.head, self._visual.head)
        layers = [base_layer(module) for head in heads for module in head.modules()]
        widths = [layer.out_features for layer in layers if isinstance(layer, nn.Linear)]
        return int(widths[-1] if widths else self._visual.trunk.num_features), text_tower.embedding_width(self.model)

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        trunk = self._visual.trunk
        features = trunk.forward_features(pixels.to(next(trunk.stem.parameters()).dtype))
        positions = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1], 1, 1)
        patches = self._head(positions).reshape(len(pixels), *grid, -1)
        return ImageFeatures(patches, self._head(features) if pooled else None)

    def _head(self, features: Tensor) -> Tensor:
        """Embeddings ``[N, D]`` of feature maps ``[N, C, H, W]``, by the library's own pooling, norm and projection."""
        return self._visual.head(self._visual.trunk.forward_head(features))

    def lora_targets(self, tower: Tower) -> list[str]:
        """Both pointwise layers of the MLP in every block of the image tower; attention and MLP in the text tower.

        The depthwise convolutions are left out: each of their kernels is a matrix of one row, which has no low-rank
        update.
        """
        if tower == "text":
            return text_tower.lora_targets(self.model)
        return [
            f"visual.trunk.stages.{stage}.blocks.{block}.mlp.{layer}"
            for stage, part in enumerate(self._visual.trunk.stages)
            for block in range(len(part.blocks))
            for layer in ("fc1", "fc2")
        ]

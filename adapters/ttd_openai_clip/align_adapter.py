"""The adapter for transformers' ``AlignModel`` (ALIGN, arXiv 2102.05918)."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, nn

from ttd_openai_clip.masked_text import MaskedTextAdapter
from ttd_openai_clip.preprocessing import crop_size
from ttd_openai_clip.recognition import import_transformers
from ttd_plugins.adapter import ImageFeatures, Tower
from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.toolkit.dense_modes import HeadMode
from ttd_plugins.toolkit.lora_targets import base_layer
from ttd_plugins.toolkit.transforms import Normalisation

TRAINED_SIDE = 289
"""Pixels of the side that ALIGN was trained at; ``config.image_size`` is that of EfficientNet-B7's own training."""
HALF = (0.5, 0.5, 0.5)
ALIGN_NORMALISATION = Normalisation(HALF, HALF, "bilinear")
"""The published preprocessing scales pixels to [-1, 1]."""


class AlignAdapter(MaskedTextAdapter):
    """transformers' ``AlignModel``: an EfficientNet whose averaged last feature map is the pooled embedding.

    A patch feature is one position of that map, so the mean of the patch features is the pooled embedding. Batch
    normalisation acts in train mode as in the library; the engine keeps it in evaluation mode under LoRA.
    """

    modes = {"head": HeadMode()}  # noqa: RUF012
    default_mode = "head"
    resamplings = ("library",)
    processor_class = "EfficientNetImageProcessor"
    _import_transformers = staticmethod(import_transformers)
    tower_prefixes = {"image": ("vision_model.",), "text": ("text_model.", "text_projection.")}  # noqa: RUF012

    def _unsupported_reason(self, model: Any) -> str | None:
        if model.vision_model.config.pooling_type != "mean":
            return "its image tower pools by maximum, so no average of patches is in the joint space"
        return super()._unsupported_reason(model)

    @property
    def _default_normalisation(self) -> Normalisation:
        return ALIGN_NORMALISATION

    def _embedding_widths(self) -> tuple[int, int]:
        blocks = self._vision.encoder.blocks
        text: Any = base_layer(self.model.text_projection)
        return int(blocks[-1].projection.project_bn.num_features), int(text.out_features)

    @property
    def _patch_size(self) -> tuple[int, int]:
        stride = 2 * prod(self._vision.config.strides)
        return stride, stride

    @property
    def _input_size(self) -> tuple[int, int]:
        """Height and width in pixels of the library's own input."""
        side = min(int(self._vision.config.image_size), TRAINED_SIDE)
        return crop_size(self._preprocess) or (side, side)

    @property
    def _grid(self) -> tuple[int, int]:
        (height, width), (rows, columns) = self._input_size, self._patch_size
        return height // rows, width // columns

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image of ``height`` by ``width`` pixels.

        The library's own input size (289 pixels) is valid too, although it is not a multiple of the stride.

        Raises:
            ImageSizeError: a side is not a positive multiple of the stride.
        """
        return self._grid if (height, width) == self._input_size else super().patch_grid(height, width)

    def _encode_image(self, pixels: Tensor, grid: tuple[int, int], pooled: bool) -> ImageFeatures:
        vision = self._vision
        x = vision.embeddings(pixels.to(vision.embeddings.convolution.weight.dtype))
        for block in vision.encoder.blocks:
            x = block(x)
        if tuple(x.shape[2:]) != grid:
            raise UnsupportedModelError(
                f"the image tower of {self.description.name} computes a map of {' x '.join(map(str, x.shape[2:]))} "
                f"positions for images of {pixels.shape[2]} x {pixels.shape[3]} pixels, not {grid[0]} x {grid[1]}"
            )
        return ImageFeatures(x.permute(0, 2, 3, 1), vision.pooler(x).flatten(1) if pooled else None)

    def logit_scale(self) -> Tensor:
        """The reciprocal of the model's temperature, a scalar tensor."""
        temperature: Tensor = self.model.temperature
        return 1 / temperature.reshape(())

    def _processor_sizes(self) -> dict[str, Any]:
        height, width = self._input_size
        # Images are 346 pixels wide before the published crop of 289. include_top would divide by std once more.
        resized = {"height": round(height * 346 / TRAINED_SIDE), "width": round(width * 346 / TRAINED_SIDE)}
        crop = {"height": height, "width": width}
        return {"size": resized, "crop_size": crop, "do_center_crop": True, "include_top": False}

    def lora_targets(self, tower: Tower) -> list[str]:
        """Convolutions of kernel 1 of every image block, and the linear layers of every text block.

        Depthwise convolutions have no low-rank update; gates of squeeze-and-excitation are left out.
        """
        if tower == "text":
            return self._text_targets()
        targets = []
        for name, module in self._vision.encoder.blocks.named_modules(prefix="vision_model.encoder.blocks"):
            is_pointwise = name.endswith((".expand_conv", ".project_conv"))
            if is_pointwise and isinstance(base_layer(module), nn.Conv2d):
                targets.append(name)
        return targets

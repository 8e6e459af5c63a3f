"""How pixels are normalised, and the published evaluation preprocessing of OpenAI's models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ttd_plugins.adapter import ImageTransform
from ttd_plugins.data.images import to_rgb
from ttd_plugins.errors import InputError
from ttd_plugins.toolkit.transforms import (
    FILTERS,
    OPENAI_NORMALISATION,
    Normalisation,
    callable_transform,
    image_processor,
    normalisation_from,
    normalised_pixels,
    read_compose,
    three_channels,
)

ADVICE = (
    "pass transformers' CLIPImageProcessor, the one that clip.load returns, another torchvision Compose with a "
    "Normalize in it, or a mapping with mean and std"
)


@dataclass(frozen=True)
class ShortestSideCrop:
    """The published preprocessing: resize the shorter side to ``size``, crop the centre, normalise."""

    size: tuple[int, int]
    normalisation: Normalisation

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 pixels ``[3, height, width]`` of an image of any mode."""
        height, width = self.size
        short, shortest = max(height, width), min(image.size)
        # The longer side is truncated to an integer, as in torchvision; the shorter one is exact.
        columns, rows = (int(short * side / shortest) for side in image.size)
        resized = to_rgb(image).resize((columns, rows), FILTERS[self.normalisation.interpolation])
        left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
        return normalised_pixels(resized.crop((left, top, left + width, top + height)), self.normalisation)


def read_normalisation(preprocess: Any, default: Normalisation = OPENAI_NORMALISATION) -> Normalisation:
    """How ``preprocess`` normalises; ``default`` where it does not say.

    Args:
        preprocess: an image processor of transformers (or a processor with one), a torchvision ``Compose`` with a
            ``Normalize`` in it, a mapping with ``mean`` and ``std`` (or ``image_mean`` and ``image_std``, as in
            ``preprocessor_config.json``), or ``None``.
        default: mean, std and filter that the model was trained with.

    Raises:
        InputError: it is none of these, or its mean and std are not for values in [0, 1].
    """
    preprocess = image_processor(preprocess)
    if preprocess is None:
        found: Mapping[str, Any] = {}
    elif isinstance(preprocess, Mapping):
        found = preprocess
    elif hasattr(preprocess, "image_mean"):
        names = ("image_mean", "image_std", "resample", "do_rescale", "do_normalize", "rescale_factor",
                 "rescale_offset", "include_top")  # fmt: skip
        found = {name: getattr(preprocess, name, None) for name in names}
    else:
        found = read_compose(preprocess, ADVICE)
    if found.get("include_top"):
        raise InputError(
            "the given image processor divides normalised pixels by their std once more, for ImageNet's classifier; "
            "pass one with include_top=False"
        )
    # EfficientNet's processor scales to [-1, 1]: 2 / 255 as the factor, and an offset of -1.
    shifted = bool(found.get("rescale_offset"))
    factor = 255 * float(found.get("rescale_factor") or 1 / 255) / (2 if shifted else 1)
    if found.get("do_rescale") is False or abs(factor - 1) > 1e-6:
        raise InputError(
            "the given image processor does not scale pixels from 0..255 to 0..1, as mean and std need; pass one with "
            "do_rescale and rescale_factor 1/255 (or 1/127.5 with rescale_offset)"
        )
    if found.get("do_normalize") is False:
        found = {"mean": 0.0, "std": 1.0, "resample": found.get("resample"), "rescale_offset": shifted}
    settings = {
        "mean": _first(found, "mean", "image_mean"),
        "std": _first(found, "std", "image_std"),
        "interpolation": _first(found, "interpolation", "resample"),
    }
    read = normalisation_from({k: v for k, v in settings.items() if v is not None}, default)
    if not shifted:
        return read
    # (2 u - 1 - mean) / std of a pixel u in [0, 1] is (u - (1 + mean) / 2) / (std / 2).
    mean, std = (1 + torch.tensor(read.mean)) / 2, torch.tensor(read.std) / 2
    return Normalisation(three_channels(mean.tolist()), three_channels(std.tolist()), read.interpolation)


def crop_size(preprocess: Any) -> tuple[int, int] | None:
    """Height and width that an image processor crops images to; ``None`` where it does not crop."""
    processor = image_processor(preprocess)
    size = getattr(processor, "crop_size", None)
    if not size or not getattr(processor, "do_center_crop", False):
        return None
    return int(size["height"]), int(size["width"])


def native_transform(preprocess: Any, size: tuple[int, int], normalisation: Normalisation) -> ImageTransform:
    """The caller's own preprocessing, or the published one where there is none."""
    preprocess = image_processor(preprocess)
    return ShortestSideCrop(size, normalisation) if preprocess is None else callable_transform(preprocess)


def _first(found: Mapping[str, Any], *keys: str) -> Any:
    return next((found[key] for key in keys if found.get(key) is not None), None)

"""How pixels are normalised, and the evaluation preprocessing that OpenAI's models were published with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ttd_plugins.adapter import ImageTransform
from ttd_plugins.errors import InputError
from ttd_plugins.toolkit.transforms import FILTERS, NativeTransform, Normalisation, three_channels, to_rgb

OPENAI = Normalisation(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), interpolation="bicubic"
)
"""The normalisation that all of OpenAI's CLIP models were trained with."""


@dataclass(frozen=True)
class ShortestSideCrop:
    """The published preprocessing: resize the shorter side to ``size``, crop the centre, normalise."""

    size: tuple[int, int]
    normalisation: Normalisation

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 pixels ``[3, height, width]`` of an image of any mode."""
        height, width = self.size
        short, shortest = max(height, width), min(image.size)
        # The longer side is cut to a whole number, as torchvision does; the shorter one is exact.
        columns, rows = (int(short * side / shortest) for side in image.size)
        resized = to_rgb(image).resize((columns, rows), FILTERS[self.normalisation.interpolation])
        left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
        pixels = torch.from_numpy(np.array(resized.crop((left, top, left + width, top + height))))
        pixels = pixels.permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.normalisation.mean, self.normalisation.std))
        return (pixels - mean) / std


@dataclass(frozen=True)
class ImageProcessorCall:
    """transformers' image processor, called for one image."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 pixels ``[3, height, width]``."""
        return torch.as_tensor(self.processor(images=image, return_tensors="pt")["pixel_values"][0]).float()


def image_processor(preprocess: Any) -> Any:
    """The image processor inside a transformers processor; anything else as it is."""
    inner = getattr(preprocess, "image_processor", None)
    return preprocess if inner is None else inner


def read_normalisation(preprocess: Any) -> Normalisation:
    """How ``preprocess`` normalises; OpenAI's mean, std and filter for what it leaves unsaid.

    Args:
        preprocess: an image processor of transformers (or a processor with one), a torchvision ``Compose`` with a
            ``Normalize`` in it, a mapping with ``mean`` and ``std`` (or ``image_mean`` and ``image_std``, as in
            ``preprocessor_config.json``), or ``None``.

    Raises:
        InputError: it is none of these, or pixels are scaled in a way that is not mean and std of values in [0, 1].
    """
    preprocess = image_processor(preprocess)
    if preprocess is None:
        found: Mapping[str, Any] = {}
    elif isinstance(preprocess, Mapping):
        found = preprocess
    elif hasattr(preprocess, "image_mean"):
        names = ("image_mean", "image_std", "resample", "do_rescale", "do_normalize", "rescale_factor")
        found = {name: getattr(preprocess, name, None) for name in names}
    else:
        found = _read_compose(preprocess)
    if found.get("do_rescale") is False or abs(255 * float(found.get("rescale_factor") or 1 / 255) - 1) > 1e-6:
        raise InputError(
            "the image processor given does not scale pixels from 0..255 to 0..1, which mean and std are meant for; "
            "give one with do_rescale and rescale_factor 1/255"
        )
    if found.get("do_normalize") is False:
        found = {"mean": 0.0, "std": 1.0, "resample": found.get("resample")}
    resample = _first(found, "interpolation", "resample", default="bicubic")
    return Normalisation(
        mean=three_channels(_first(found, "mean", "image_mean", default=OPENAI.mean)),
        std=three_channels(_first(found, "std", "image_std", default=OPENAI.std)),
        interpolation="bilinear" if getattr(resample, "value", resample) in ("bilinear", 2) else "bicubic",
    )


def native_transform(preprocess: Any, size: tuple[int, int], normalisation: Normalisation) -> ImageTransform:
    """The caller's own preprocessing, or the published one where they only said how to normalise."""
    preprocess = image_processor(preprocess)
    if preprocess is None or isinstance(preprocess, Mapping):
        return ShortestSideCrop(size, normalisation)
    return NativeTransform(ImageProcessorCall(preprocess) if hasattr(preprocess, "image_mean") else preprocess)


def _first(found: Mapping[str, Any], *keys: str, default: Any) -> Any:
    return next((found[key] for key in keys if found.get(key) is not None), default)


def _read_compose(preprocess: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for step in getattr(preprocess, "transforms", [preprocess]):
        if hasattr(step, "mean") and hasattr(step, "std"):
            found.update(mean=step.mean, std=step.std)
        if hasattr(step, "interpolation"):
            found["interpolation"] = getattr(step.interpolation, "value", step.interpolation)
    if "mean" not in found:
        raise InputError(
            "the preprocess given does not say how it normalises: pass transformers' CLIPImageProcessor, the one that "
            "clip.load gives, another torchvision Compose with a Normalize in it, or a mapping with mean and std"
        )
    return found

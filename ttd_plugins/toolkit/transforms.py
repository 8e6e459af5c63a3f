"""From a PIL image of any mode to normalised pixels; plain classes, so that data-loader workers can be sent one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ttd_plugins.errors import InputError

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Normalisation:
    """What a backbone wants of its pixels: mean and std of RGB in [0, 1], and the name of a resampling filter."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    16-bit greys are scaled to 8 bits, where ``convert`` alone would clip nearly all of them to white.

    Raises:
        InputError: the image holds floating-point values, whose range nothing tells.
    """
    if image.mode == "F":
        raise InputError("an image of floating-point values (mode F) has no known range; scale it to 8-bit RGB first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 0xFFFF):
            raise InputError("an image of 32-bit integers (mode I) has no known range; scale it to 8-bit RGB first")
        image = Image.fromarray((values // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True)
class DenseTransform:
    """Resize the whole image to ``size`` (height, width), antialiased and without a crop, then normalise."""

    size: tuple[int, int]
    normalisation: Normalisation

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 pixels ``[3, height, width]``."""
        height, width = self.size
        # PIL widens the filter's support when it shrinks an image, which is antialiasing.
        resized = to_rgb(image).resize((width, height), FILTERS[self.normalisation.interpolation])
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.normalisation.mean, self.normalisation.std))
        return (pixels - mean) / std


@dataclass(frozen=True)
class NativeTransform:
    """The backbone's own preprocessing, given RGB."""

    preprocess: Callable[[Image.Image], Any]

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 pixels ``[3, height, width]``."""
        return self.preprocess(to_rgb(image))


def three_channels(values: Any) -> tuple[float, float, float]:
    """Three numbers, one a channel, from three or from one.

    Raises:
        InputError: there are other than three.
    """
    numbers = [float(value) for value in (values if isinstance(values, (list, tuple)) else [values] * 3)]
    if len(numbers) != 3:
        raise InputError(f"mean and std of the preprocessing must have 3 numbers each, not {len(numbers)}")
    return numbers[0], numbers[1], numbers[2]


def read_normalisation(visual: Any, preprocess: Any, default: Normalisation, advice: str) -> Normalisation:
    """Find out how pixels are normalised.

    The ``preprocess`` that the caller gives decides (a torchvision ``Compose`` with a ``Normalize`` in it, or a
    mapping with ``mean``, ``std`` and ``interpolation``), then the mapping ``visual.preprocess_cfg``, then
    ``visual.image_mean`` and ``visual.image_std``, then ``default``.

    Raises:
        InputError: ``preprocess`` is neither, or it does not normalise; the message says ``advice``.
    """
    found = dict(getattr(visual, "preprocess_cfg", None) or {})
    for key, attribute in (("mean", "image_mean"), ("std", "image_std")):
        if key not in found and getattr(visual, attribute, None) is not None:
            found[key] = getattr(visual, attribute)
    if isinstance(preprocess, Mapping):
        found.update({key: value for key, value in preprocess.items() if value is not None})
    elif preprocess is not None:
        found.update(_read_compose(preprocess, advice))
    return Normalisation(
        mean=three_channels(found.get("mean", default.mean)),
        std=three_channels(found.get("std", default.std)),
        interpolation="bilinear" if found.get("interpolation", default.interpolation) == "bilinear" else "bicubic",
    )


def _read_compose(preprocess: Any, advice: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for step in getattr(preprocess, "transforms", [preprocess]):
        if hasattr(step, "mean") and hasattr(step, "std"):
            found.update(mean=step.mean, std=step.std)
        if hasattr(step, "interpolation"):
            found["interpolation"] = getattr(step.interpolation, "value", step.interpolation)
    if "mean" not in found:
        raise InputError(
            f"the preprocess given does not say how it normalises: pass {advice}, another torchvision Compose with a "
            "Normalize in it, or a mapping with mean and std"
        )
    return found

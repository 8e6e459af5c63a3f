"""Preprocessing of PIL images of any mode to normalised pixels; the classes can be pickled for data-loader workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ttd_plugins.data.images import to_rgb
from ttd_plugins.errors import InputError

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
BILINEAR = ("bilinear", int(Image.Resampling.BILINEAR))
"""How torchvision, open_clip and PIL (in image processors of transformers) say bilinear."""


@dataclass(frozen=True)
class Normalisation:
    """How a backbone's pixels are prepared: mean and std of RGB in [0, 1], and the name of the resampling filter."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


OPENAI_NORMALISATION = Normalisation(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic"
)
"""The normalisation of OpenAI's CLIP, which is open_clip's default."""


def normalised_pixels(image: Image.Image, normalisation: Normalisation) -> Tensor:
    """Float32 pixels ``[3, height, width]`` of an RGB image, scaled to [0, 1] and normalised by mean and std."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (normalisation.mean, normalisation.std))
    return (pixels - mean) / std


@dataclass(frozen=True)
class DenseTransform:
    """Resize the whole image to ``size`` (height, width), antialiased and without a crop, then normalise."""

    size: tuple[int, int]
    normalisation: Normalisation

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 pixels ``[3, height, width]``."""
        height, width = self.size
        # PIL antialiases: it widens the filter's support when it shrinks an image.
        resized = to_rgb(image).resize((width, height), FILTERS[self.normalisation.interpolation])
        return normalised_pixels(resized, self.normalisation)


@dataclass(frozen=True)
class NativeTransform:
    """The backbone's own preprocessing, called with an RGB image."""

    preprocess: Callable[[Image.Image], Any]

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 pixels ``[3, height, width]``."""
        return self.preprocess(to_rgb(image))


@dataclass(frozen=True)
class ProcessorTransform:
    """An image processor of transformers as a function of one image."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        """Return float32 pixels ``[3, height, width]``."""
        return torch.as_tensor(self.processor(images=image, return_tensors="pt")["pixel_values"][0]).float()


def image_processor(preprocess: Any) -> Any:
    """The image processor inside a transformers processor; anything else unchanged."""
    inner = getattr(preprocess, "image_processor", None)
    return preprocess if inner is None else inner


def callable_transform(preprocess: Any) -> NativeTransform:
    """The caller's preprocessing, a callable or an image processor of transformers, as a transform of any image."""
    return NativeTransform(ProcessorTransform(preprocess) if hasattr(preprocess, "image_mean") else preprocess)


def three_channels(values: Any) -> tuple[float, float, float]:
    """Three numbers, one per channel, from three or from one.

    Raises:
        InputError: ``values`` is a sequence of another length.
    """
    numbers = [float(value) for value in (values if isinstance(values, (list, tuple)) else [values] * 3)]
    if len(numbers) != 3:
        raise InputError(f"mean and std of the preprocessing must have 3 numbers each, not {len(numbers)}")
    return numbers[0], numbers[1], numbers[2]


def normalisation_from(settings: Mapping[str, Any], default: Normalisation) -> Normalisation:
    """Build a normalisation from ``mean``, ``std`` and ``interpolation``; ``default`` fills in what is absent.

    Raises:
        InputError: mean or std has neither one nor three numbers.
    """
    interpolation = settings.get("interpolation", default.interpolation)
    return Normalisation(
        mean=three_channels(settings.get("mean", default.mean)),
        std=three_channels(settings.get("std", default.std)),
        interpolation="bilinear" if getattr(interpolation, "value", interpolation) in BILINEAR else "bicubic",
    )


def read_normalisation(visual: Any, preprocess: Any, default: Normalisation, advice: str) -> Normalisation:
    """Find out how pixels are normalised.

    Sources in order of precedence: the caller's ``preprocess`` (a torchvision ``Compose`` with a ``Normalize``, or a
    mapping with ``mean``, ``std`` and ``interpolation``), the mapping ``visual.preprocess_cfg``, the attributes
    ``visual.image_mean`` and ``visual.image_std``, ``default``.

    Raises:
        InputError: ``preprocess`` is neither, or it does not normalise; the message contains ``advice``.
    """
    found = dict(getattr(visual, "preprocess_cfg", None) or {})
    for key, attribute in (("mean", "image_mean"), ("std", "image_std")):
        if key not in found and getattr(visual, attribute, None) is not None:
            found[key] = getattr(visual, attribute)
    if isinstance(preprocess, Mapping):
        found.update({key: value for key, value in preprocess.items() if value is not None})
    elif preprocess is not None:
        advice = f"pass {advice}, another torchvision Compose with a Normalize in it, or a mapping with mean and std"
        found.update(read_compose(preprocess, advice))
    return normalisation_from(found, default)


def read_compose(preprocess: Any, advice: str) -> dict[str, Any]:
    """``mean``, ``std`` and ``interpolation`` of a torchvision ``Compose``.

    Raises:
        InputError: it has no ``Normalize``; the message ends with ``advice``.
    """
    found: dict[str, Any] = {}
    for step in getattr(preprocess, "transforms", [preprocess]):
        if hasattr(step, "mean") and hasattr(step, "std"):
            found.update(mean=step.mean, std=step.std)
        if hasattr(step, "interpolation"):
            found["interpolation"] = getattr(step.interpolation, "value", step.interpolation)
    if "mean" not in found:
        raise InputError(f"the given preprocess does not say how it normalises: {advice}")
    return found

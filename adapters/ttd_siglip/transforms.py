"""How a SigLIP model says that pixels are normalised, and its own preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image
from torch import Tensor

from ttd_plugins.errors import InputError
from ttd_plugins.toolkit.transforms import Normalisation, three_channels

HALF = (0.5, 0.5, 0.5)
PIL_BILINEAR = 2
ADVICE = (
    "pass the model's image processor or processor from transformers, open_clip's preprocess_val, or a mapping with "
    "mean and std"
)


def image_processor(preprocess: Any) -> Any:
    """The image processor inside a transformers processor, or what was given."""
    return getattr(preprocess, "image_processor", preprocess)


def read_normalisation(preprocess: Any, own: Mapping[str, Any] | None = None) -> Normalisation:
    """Find out how pixels are normalised.

    What the caller gives as ``preprocess`` decides (an image processor of transformers, a torchvision ``Compose`` with
    a ``Normalize`` in it, or a mapping), then what the model says itself (``own``, open_clip's ``preprocess_cfg``),
    then what every SigLIP was trained with: mean and std of one half, bicubic.

    Raises:
        InputError: ``preprocess`` is neither, or it does not normalise.
    """
    found = {key: value for key, value in dict(own or {}).items() if value is not None}
    if isinstance(preprocess, Mapping):
        found.update({key: value for key, value in preprocess.items() if value is not None})
    elif preprocess is not None:
        found.update(_read(image_processor(preprocess)))
    interpolation = getattr(found.get("interpolation"), "value", found.get("interpolation"))
    return Normalisation(
        mean=three_channels(found.get("mean", HALF)),
        std=three_channels(found.get("std", HALF)),
        interpolation="bilinear" if interpolation in ("bilinear", PIL_BILINEAR) else "bicubic",
    )


def _read(preprocess: Any) -> dict[str, Any]:
    if hasattr(preprocess, "image_mean") and hasattr(preprocess, "image_std"):
        return {
            "mean": preprocess.image_mean,
            "std": preprocess.image_std,
            "interpolation": getattr(preprocess, "resample", None),
        }
    found: dict[str, Any] = {}
    for step in getattr(preprocess, "transforms", [preprocess]):
        if hasattr(step, "mean") and hasattr(step, "std"):
            found.update(mean=step.mean, std=step.std)
        if hasattr(step, "interpolation"):
            found["interpolation"] = step.interpolation
    if "mean" not in found:
        raise InputError(f"the preprocess given does not say how it normalises: {ADVICE}")
    return found


@dataclass(frozen=True)
class ProcessorTransform:
    """An image processor of transformers as a function of one picture."""

    processor: Any

    def __call__(self, image: Image) -> Tensor:
        """Return float32 pixels ``[3, height, width]``."""
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

"""How a SigLIP model's pixels are normalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttd_plugins.toolkit.transforms import Normalisation, image_processor, normalisation_from, read_compose

HALF = (0.5, 0.5, 0.5)
SIGLIP_NORMALISATION = Normalisation(HALF, HALF, "bicubic")
"""The normalisation that every published SigLIP was trained with."""
ADVICE = (
    "pass the model's image processor or processor from transformers, open_clip's preprocess_val, or a mapping with "
    "mean and std"
)


def read_normalisation(preprocess: Any, own: Mapping[str, Any] | None = None) -> Normalisation:
    """Find out how pixels are normalised.

    Sources in order of precedence: the caller's ``preprocess`` (an image processor of transformers, a torchvision
    ``Compose`` with a ``Normalize``, or a mapping), the model's own settings ``own`` (open_clip's ``preprocess_cfg``),
    and :data:`SIGLIP_NORMALISATION`.

    Raises:
        InputError: ``preprocess`` is none of these, or it does not normalise.
    """
    found = dict(own or {})
    if isinstance(preprocess, Mapping):
        found.update({key: value for key, value in preprocess.items() if value is not None})
    elif preprocess is not None:
        found.update(_read(image_processor(preprocess)))
    return normalisation_from({key: value for key, value in found.items() if value is not None}, SIGLIP_NORMALISATION)


def _read(preprocess: Any) -> dict[str, Any]:
    if hasattr(preprocess, "image_mean") and hasattr(preprocess, "image_std"):
        resample = getattr(preprocess, "resample", None)
        return {"mean": preprocess.image_mean, "std": preprocess.image_std, "interpolation": resample}
    return read_compose(preprocess, ADVICE)

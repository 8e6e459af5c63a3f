"""How open_clip says that pixels are normalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttd_plugins.errors import InputError
from ttd_plugins.toolkit.transforms import Normalisation, three_channels


def read_normalisation(visual: Any, preprocess: Any) -> Normalisation:
    """Find out how pixels are normalised.

    The ``preprocess`` that the caller gives decides (a torchvision ``Compose`` with a ``Normalize`` in it, or a
    mapping such as ``open_clip``'s preprocessing configuration), then ``visual.preprocess_cfg``, then
    ``visual.image_mean`` and ``visual.image_std``, then open_clip's own default, OpenAI's mean and std.

    Raises:
        InputError: ``preprocess`` is neither, or it does not normalise.
    """
    from ttd_open_clip.library import import_open_clip

    found = dict(getattr(visual, "preprocess_cfg", None) or {})
    for key, attribute in (("mean", "image_mean"), ("std", "image_std")):
        if key not in found and getattr(visual, attribute, None) is not None:
            found[key] = getattr(visual, attribute)
    if isinstance(preprocess, Mapping):
        found.update({key: value for key, value in preprocess.items() if value is not None})
    elif preprocess is not None:
        found.update(_read_compose(preprocess))
    open_clip = import_open_clip()
    return Normalisation(
        mean=three_channels(found.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=three_channels(found.get("std", open_clip.OPENAI_DATASET_STD)),
        interpolation="bilinear" if found.get("interpolation") == "bilinear" else "bicubic",
    )


def _read_compose(preprocess: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for step in getattr(preprocess, "transforms", [preprocess]):
        if hasattr(step, "mean") and hasattr(step, "std"):
            found.update(mean=step.mean, std=step.std)
        if hasattr(step, "interpolation"):
            found["interpolation"] = getattr(step.interpolation, "value", step.interpolation)
    if "mean" not in found:
        raise InputError(
            "the preprocess given does not say how it normalises: pass open_clip's preprocess_val, another torchvision "
            "Compose with a Normalize in it, or a mapping with mean and std"
        )
    return found

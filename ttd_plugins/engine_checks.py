"""Checks of the engine's inputs.

Types and shapes are checked in every call, at no cost. Values are checked once, with the first batch, because reading
them synchronises with the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.errors import InputError, InputWarning, TagExtractionError
from ttd_plugins.tags import TagExtractor
from ttd_plugins.utils import wrapped_models

NORMALISED_LIMIT = 30.0
"""Absolute value that no normalised pixel reaches; those of 0..255 do."""
SATURATED, SATURATED_SHARE = 4.6, 0.95
"""A logit of 4.6 is a probability of 0.99; so many of the cosines may not be above it."""
NEVER = -9.2
"""A logit of -9.2 is a probability of 0.0001; at least one cosine must be above it."""


def require_adapter(backbone: object, who: str) -> DenseAdapter:
    """Return ``backbone`` if it is an adapter.

    Raises:
        InputError: it is something else; the message says how to get an adapter of it.
    """
    if isinstance(backbone, DenseAdapter):
        return backbone
    what = wrapped_models.class_name(backbone)
    if isinstance(backbone, str):
        advice = f"pass load({backbone!r})"
    elif isinstance(getattr(backbone, "backbone", None), DenseAdapter):
        advice = "pass its attribute backbone"
    elif isinstance(backbone, nn.Module) and any(isinstance(part, DenseAdapter) for part in backbone.modules()):
        advice = f"pass the adapter inside it; compile, shard or distribute {who} instead"
    elif isinstance(backbone, nn.Module):
        advice = "pass wrap(model, tokenizer=tokenizer), or load('family:model@weights')"
    else:
        advice = "pass the result of wrap() or load()"
    raise InputError(f"{who} takes an adapter as its backbone, not an object of class {what}; {advice}")


def require_extractor(extractor: object) -> TagExtractor:
    """Return ``extractor`` if it is callable and not a class.

    Raises:
        InputError: it is something else.
    """
    if isinstance(extractor, type) or not callable(extractor):
        what = f"the class {extractor.__qualname__}" if isinstance(extractor, type) else repr(extractor)
        raise InputError(
            f"extractor is the name of a tag extractor, such as 'words', or an object that maps a list of captions to "
            f"lists of tags, not {what}"
        )
    return extractor  # type: ignore[return-value]


def check_images(images: Any, adapter: DenseAdapter) -> Tensor:
    """Return ``images`` if they are a batch of floating-point pixels on the device of the backbone.

    Raises:
        InputError: they are something else; the message says what to do.
    """
    transform = "transform each image by dense_transform() of the backbone and stack the results"
    if isinstance(images, Mapping):
        names = ", ".join(map(repr, list(images)[:4]))
        raise InputError(
            f"images must be a tensor [B, 3, height, width], not a mapping with the keys {names}; pass the value of one"
        )
    if isinstance(images, list | tuple) and images and all(isinstance(image, Tensor) for image in images):
        raise InputError(f"images must be one tensor, not a {type(images).__name__} of them; pass torch.stack(images)")
    if not isinstance(images, Tensor):
        what = wrapped_models.class_name(images)
        raise InputError(f"images must be a tensor [B, 3, height, width], not an object of class {what}; {transform}")
    if images.ndim == 3:
        raise InputError(
            f"images must have shape [B, 3, height, width], not {list(images.shape)}; for one image pass images[None] "
            "and a list with its caption"
        )
    if images.ndim != 4 or (len(images) and images.shape[1] != 3):
        channels_last = images.ndim == 4 and images.shape[3] == 3
        advice = "pass images.permute(0, 3, 1, 2)" if channels_last else transform
        raise InputError(f"images must have shape [B, 3, height, width], not {list(images.shape)}; {advice}")
    if not images.is_floating_point():
        dtype = str(images.dtype).removeprefix("torch.")
        raise InputError(f"images must be floating-point pixels, normalised for the backbone, not {dtype}; {transform}")
    device = adapter.device
    if images.device != device and "meta" not in (images.device.type, device.type):
        raise InputError(f"the images are on {images.device} and the backbone is on {device}; move one of them")
    return images


def check_captions(captions: Any, images: Tensor) -> Sequence[str]:
    """Return ``captions`` if they are a sequence with one string for each image.

    Raises:
        InputError: they are something else, or there is no image.
    """
    if isinstance(captions, str):
        raise InputError("captions must be a list with one string for each image, not a single string")
    if isinstance(captions, Mapping | set | frozenset | Tensor) or not hasattr(captions, "__len__"):
        what = wrapped_models.class_name(captions)
        raise InputError(f"captions must be a list with one string for each image, not an object of class {what}")
    if len(captions) != len(images):
        raise InputError(f"{len(images)} images came with {len(captions)} captions; pass one caption per image")
    if not len(images):
        raise InputError("the batch is empty; pass at least one image and caption")
    captions = captions if isinstance(captions, list | tuple) else list(captions)
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            five = isinstance(caption, list | tuple)
            advice = "; repeat the image for each of its captions and pass groups" if five else ""
            raise InputError(f"caption {number} is a {type(caption).__name__}, not a string{advice}")
    return captions


def check_tags(tags: Any, captions: Sequence[str]) -> Sequence[Sequence[str]]:
    """Return the caller's ``tags`` if they are one list of strings for each caption.

    Raises:
        InputError: they are something else.
    """
    if isinstance(tags, str | Mapping) or not hasattr(tags, "__len__"):
        raise InputError("tags must be a list of tags for each caption; write [[tag, ...], ...]")
    if len(tags) != len(captions):
        raise InputError(f"{len(captions)} captions came with {len(tags)} lists of tags; pass one list per caption")
    problem = _tags_problem(tags)
    if problem is not None:
        raise InputError(f"tags must be a list of tags for each caption, and {problem}; write [[tag, ...], ...]")
    return tags  # type: ignore[no-any-return]


def check_extracted(tags: Any, captions: Sequence[str], extractor: object) -> Sequence[Sequence[str]]:
    """Return the result of a tag extractor if it is one list of strings for each caption.

    Raises:
        TagExtractionError: it is something else.
    """
    name = getattr(extractor, "name", type(extractor).__name__)
    if not isinstance(tags, list | tuple):
        raise TagExtractionError(
            f"tag extractor {name!r} returned a {type(tags).__name__}, not a list for each caption"
        )
    if len(tags) != len(captions):
        raise TagExtractionError(f"tag extractor {name!r} returned {len(tags)} lists for {len(captions)} captions")
    problem = _tags_problem(tags)
    if problem is not None:
        raise TagExtractionError(f"tag extractor {name!r} did not return a list of strings for each caption: {problem}")
    return tags


def _tags_problem(tags: Sequence[Any]) -> str | None:
    """Return what is wrong with the first wrong item of lists of tags, or ``None``."""
    for number, names in enumerate(tags):
        if isinstance(names, str):
            return f"item {number} is not a list but one string, {names!r}"
        if not isinstance(names, Sequence | set | frozenset):
            return f"item {number} is a {type(names).__name__}"
        for tag in names:
            if not isinstance(tag, str):
                return f"item {number} has a {type(tag).__name__}, not only strings"
    return None


def check_groups(groups: Any, images: Tensor) -> list[Hashable]:
    """Return a list with the hashable id of each pair's image.

    Args:
        groups: strings, integers or other hashable ids, as a sequence, an array or a tensor.
        images: the images of the batch.

    Raises:
        InputError: there are not as many ids as images, or one is missing or not hashable.
    """
    if isinstance(groups, str | bytes | Mapping | set | frozenset) or not hasattr(groups, "__len__"):
        what = wrapped_models.class_name(groups)
        raise InputError(f"groups must be a list with the id of each pair's image, not an object of class {what}")
    # Arrays and tensors have ids of their own types, which are not equal to Python's or not hashable by value.
    ids = list(groups.tolist()) if hasattr(groups, "tolist") else list(groups)
    ids = [one.item() if hasattr(one, "item") and getattr(one, "ndim", 1) == 0 else one for one in ids]
    if len(ids) != len(images):
        raise InputError(f"{len(images)} images came with {len(ids)} groups; pass one group per image")
    for number, one in enumerate(ids):
        if one is None or one != one:
            raise InputError(f"group {number} is {one!r}; every pair needs the id of its image")
        try:
            hash(one)
        except TypeError:
            raise InputError(
                f"group {number} is a {type(one).__name__}; the id of an image is a string, an integer or another "
                "hashable value"
            ) from None
    return ids


# Values of the first batch -------------------------------------------------------------------------------------------


@torch.no_grad()
def check_pixels(images: Tensor, adapter: DenseAdapter) -> None:
    """Check the range of the pixels of a first batch; synchronises with the device.

    Raises:
        InputError: the pixels are far outside the range of normalised ones, as those of 0..255 are.
    """
    if images.device.type == "meta":
        return
    values = torch.nan_to_num(images.detach().float(), posinf=0.0, neginf=0.0)
    low, high = torch.stack([values.amin(), values.amax()]).tolist()
    description = adapter.description
    darkest = min(-mean / std for mean, std in zip(description.mean, description.std, strict=True))
    brightest = max((1 - mean) / std for mean, std in zip(description.mean, description.std, strict=True))
    expected = (
        f"{description.name} takes (pixel - mean) / std of pixels in [0, 1], from {darkest:.2g} to {brightest:.2g}; "
        "use its dense_transform()"
    )
    found = f"the pixels of the first batch are from {low:.4g} to {high:.4g}"
    if max(-low, high) > max(NORMALISED_LIMIT, 4 * max(-darkest, brightest)):
        raise InputError(f"{found}, and {expected}")
    # Photographs have dark pixels, which are negative once they are normalised.
    if darkest < -0.5 and low >= 0 and high <= 1 and high - low > 0.5:
        warnings.warn(f"{found}, as if they were not normalised, and {expected}", InputWarning, stacklevel=4)


def check_precision(adapter: DenseAdapter) -> None:
    """Warn before the first step if weights in half precision are trained."""
    lora = {id(parameter) for parameter in adapter.lora_parameters()}
    for name, parameter in adapter.model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16) and id(parameter) not in lora:
            kind = str(parameter.dtype).removeprefix("torch.")
            harm = "overflows to NaN in the first steps" if parameter.dtype == torch.float16 else "loses small steps"
            warnings.warn(
                f"{name} is trained in {kind}, which {harm}; load the model in float32 and train under torch.autocast, "
                "or tune by LoRA, which stays in float32",
                InputWarning,
                stacklevel=4,
            )
            return


@torch.no_grad()
def check_calibration(calibration: Calibration, maps: Sequence[Tensor], name: str) -> None:
    """Warn if a calibration maps nearly all cosines of a first batch to 1, or all to 0; synchronises with the device.

    Args:
        calibration: the map from cosine to probability.
        maps: cosines of any shape.
        name: name of the backbone, for the message.
    """
    cosines = torch.cat([one.detach().flatten() for one in maps])
    if not cosines.numel() or cosines.device.type == "meta":
        return
    logits = calibration.logit(cosines)
    low, high, share, most = torch.stack(
        [cosines.amin(), cosines.amax(), (logits > SATURATED).to(cosines.dtype).mean(), logits.amax()]
    ).tolist()
    if share < SATURATED_SHARE and not most < NEVER:
        return
    found = f"{share:.0%} of them above 0.99" if share >= SATURATED_SHARE else "none of them above 0.0001"
    warnings.warn(
        f"the calibration of {name}, sigmoid({calibration.scale:.4g} * cosine + {calibration.shift:.4g}), turns the "
        f"cosines of the first batch, from {low:.2g} to {high:.2g}, into saturated probabilities, {found}; fit one "
        "(ttd_plugins.calibration.fit_calibration, or `ttd calibrate`), or pass calibration=Calibration()",
        InputWarning,
        stacklevel=4,
    )

"""One class for each pixel of one image, by class names; memory does not depend on their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttd_plugins.adapter import Calibration, DenseAdapter
from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.datasets.reader import ClassNames
from ttd_plugins.evaluation.dense_inference import (
    DenseFeatures,
    activate,
    class_embeddings,
    dense_features,
    resize_maps,
    templates_by_name,
)
from ttd_plugins.evaluation.pamr import affinity, pamr
from ttd_plugins.evaluation.protocol_options import PLANE, Background, DenseOptions, SegmentProtocol, TemplateSet
from ttd_plugins.utils.progress import Stage, no_progress

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUND = "background"
"""Name of index 0, and of the class that it stands for where the list of names has one."""
MAX_CLASSES = 65_535
CHUNK_VALUES = 8 << 20
"""Values of the maps that are in memory at once; a chunk is at least one map."""
MAX_INPUT_PIXELS = 1 << 24
"""Pixels of the input of the network."""
_TEXTS = 512


@dataclass(frozen=True)
class ClassResult:
    """What a segmentation says about one class.

    Attributes:
        index: its value in the mask; 0 is the background.
        name: its name.
        texts: the texts that were compared with the image; empty for a background plane.
        pixels: number of its pixels.
        share: fraction of the image's pixels.
        mean_probability: mean calibrated probability over its own pixels; ``None`` without pixels or texts.
        max_probability: highest calibrated probability of any pixel, which is the paper's pixel score before
            refinement; ``None`` without texts.
    """

    index: int
    name: str
    texts: tuple[str, ...]
    pixels: int
    share: float
    mean_probability: float | None
    max_probability: float | None


@dataclass(frozen=True)
class ClassTexts:
    """Embeddings of the names that are compared with images, with the class of each.

    Attributes:
        names: name of each index of a mask; index 0 is the background.
        texts: texts of each index.
        embeddings: L2-normalised ``[N, D]``.
        owners: int64 ``[N]``, the index that each embedding stands for, ascending except for index 0 at the end.
        plane: the constant background plane, or ``None``.
    """

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    embeddings: Tensor
    owners: Tensor
    plane: float | None


def encode_names(
    adapter: DenseAdapter,
    names: Sequence[str],
    templates: TemplateSet | Sequence[str] = "none",
    advance: Any = None,
) -> Tensor:
    """Return ensembles over templates, L2-normalised ``[N, D]``, in chunks of texts.

    Args:
        adapter: the backbone.
        names: N names.
        templates: a named set, or prompt templates with ``{}`` for the name.
        advance: called with the number of names done since the last call.
    """
    prompts = templates_by_name(templates) if isinstance(templates, str) else tuple(templates)
    step = max(_TEXTS // len(prompts), 1)
    parts = []
    for start in range(0, len(names), step):
        parts.append(class_embeddings(adapter, names[start : start + step], prompts))
        if advance is not None:
            advance(len(parts[-1]))
    return torch.cat(parts) if parts else class_embeddings(adapter, [], prompts)


def encode_classes(
    adapter: DenseAdapter,
    classes: Sequence[ClassNames],
    options: SegmentProtocol,
    prompts: Sequence[str] | None = None,
    stage: Stage | None = None,
) -> ClassTexts:
    """Encode class names for :func:`segment_image`; one result serves many images.

    A class named background is index 0 where the options add a background; otherwise index 0 remains unused.

    Args:
        adapter: the backbone, in evaluation mode.
        classes: the classes.
        options: options of the segmentation.
        prompts: prompt templates with ``{}`` for the name, instead of those of the options.
        stage: starts a subtask, for a progress bar.

    Raises:
        InputError: there are too many classes, or none is left beside the background.
    """
    if options.background not in get_args(Background):
        raise InputError(choices_sentence("background", options.background, get_args(Background)))
    if len(classes) > MAX_CLASSES:
        raise InputError(f"a mask stores at most {MAX_CLASSES:,} classes, not {len(classes):,}")
    own = next((one for one in classes if one.name.casefold() == BACKGROUND), None)
    plane = options.background == "constant" or (options.background == "auto" and own is not None)
    words = options.background == "words"
    if own is not None and (plane or words):
        classes = [one for one in classes if one is not own]
    if not classes:
        raise InputError("the only name is the background; name something else too")
    texts = [one.texts if options.aliases else one.texts[:1] for one in classes]
    taken = {text.casefold() for item in texts for text in item}
    behind = tuple(word for word in options.background_words if word.casefold() not in taken) if words else ()
    flat = [text for item in texts for text in item] + list(behind)
    owners = [index for index, item in enumerate(texts, 1) for _ in item] + [0] * len(behind)
    advance = (stage or no_progress)("class names", len(flat))
    with torch.no_grad():
        embeddings = encode_names(adapter, flat, options.templates if prompts is None else prompts, advance)
    return ClassTexts(
        (BACKGROUND, *(one.name for one in classes)),
        (behind, *map(tuple, texts)),
        embeddings,
        torch.tensor(owners, device=embeddings.device),
        (PLANE if options.threshold is None else options.threshold) if plane else None,
    )


@torch.no_grad()
def segment_image(
    adapter: DenseAdapter, image: Image, names: ClassTexts, options: SegmentProtocol
) -> tuple[NDArray[np.int32], list[ClassResult]]:
    """Assign a class to each pixel of one image, at its own size.

    The label maps are those of :func:`ttd_plugins.evaluation.protocols.evaluate_segment`. Maps are computed, refined
    and enlarged in chunks, so that memory does not grow with the number of names and time grows linearly.

    Args:
        adapter: the backbone, in evaluation mode.
        image: an RGB image.
        names: the encoded names.
        options: options of the segmentation.

    Returns:
        int32 ``[height, width]`` of indices into ``names.names``, and the result of each index.

    Raises:
        InputError: the image would be encoded with more than :data:`MAX_INPUT_PIXELS` pixels.
    """
    check_input_size(adapter, image, options.dense)
    calibration = options.calibration or adapter.description.calibration
    features = dense_features(adapter, image, options.dense)
    size = (image.height, image.width)
    label = torch.zeros(size, dtype=torch.int32, device=features.image.device)
    best = torch.full(size, -torch.inf if names.plane is None else names.plane, device=label.device)
    # The probability of the best class, where the score that is compared is another value.
    own = options.activation == "probability"
    chance = best if own else torch.zeros_like(best)
    highest = torch.zeros(len(names.names), device=label.device)
    refine = _Refinement(features, options.dense)
    owners = names.owners.to(torch.int32)
    largest = max(size[0] * size[1], features.image[0].numel() if options.dense.refine else 0)
    step = max(CHUNK_VALUES // largest, 1)
    for start in range(0, len(names.embeddings), step):
        cosines = features.maps(names.embeddings[start : start + step])
        found = owners[start : start + step]
        probability = calibration.probability(cosines)
        highest.scatter_reduce_(0, found.long(), probability.flatten(1).amax(1), reduce="amax")
        scores = activate(cosines, options.activation, calibration)
        value, index = resize_maps(refine(scores), size).max(0)
        better = value > best
        best = torch.where(better, value, best)
        label = torch.where(better, found[index], label)
        if own:
            chance = best
        else:
            enlarged = resize_maps(refine(probability), size).gather(0, index[None])[0]
            chance = torch.where(better, enlarged, chance)
    flat = label.flatten().long()
    pixels = torch.bincount(flat, minlength=len(names.names))
    total = torch.zeros(len(names.names), dtype=torch.float64, device=flat.device)
    total.scatter_add_(0, flat, chance.flatten().double())
    count, mean, top = pixels.tolist(), (total / pixels.clamp_min(1)).tolist(), highest.tolist()
    results = [
        ClassResult(
            index,
            names.names[index],
            names.texts[index],
            count[index],
            count[index] / label.numel(),
            mean[index] if count[index] and names.texts[index] else None,
            top[index] if names.texts[index] else None,
        )
        for index in range(len(names.names))
    ]
    return label.cpu().numpy(), results


def check_input_size(adapter: DenseAdapter, image: Image, options: DenseOptions) -> None:
    """Check that the input of the network at the largest scale has at most :data:`MAX_INPUT_PIXELS` pixels.

    Raises:
        InputError: it has more, as a long strip may have with ``resize="short"``.
    """
    height, width = options.input_size(adapter, image.width, image.height, max(options.scales))
    if height * width > MAX_INPUT_PIXELS:
        raise InputError(
            f"an image of {image.width} x {image.height} pixels would be encoded at {width} x {height}, more than "
            f"{MAX_INPUT_PIXELS:,} pixels; use a smaller size, or the resize square"
        )


class _Refinement:
    """PAMR of one image for many chunks of maps, with its affinity computed once; the identity without PAMR."""

    def __init__(self, features: DenseFeatures, options: DenseOptions) -> None:
        self.image, self.options = features.image, options
        self.weights = affinity(features.image.float(), options.dilations) if options.refine else None

    def __call__(self, maps: Tensor) -> Tensor:
        if self.weights is None:
            return maps
        maps = resize_maps(maps, (int(self.image.shape[-2]), int(self.image.shape[-1])))
        options = self.options
        return pamr(maps, self.image, iterations=options.iterations, dilations=options.dilations, weights=self.weights)


def with_calibration(options: SegmentProtocol, adapter: DenseAdapter) -> tuple[SegmentProtocol, bool]:
    """Return options with the calibration that is used, and whether it was fitted to pairs."""
    own = options.calibration
    fitted = adapter.description.calibrated if own is None else own != Calibration()
    return replace(options, calibration=own or adapter.description.calibration), fitted

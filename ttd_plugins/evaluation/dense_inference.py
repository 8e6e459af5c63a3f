"""Dense inference: cosine maps averaged over scales, flips and windows; class embeddings; label maps.

The paper (arXiv 2404.00384) segments at 448 pixels with scales 1, 0.5, 1.5 and 2, horizontal flip, PAMR, the 80 prompt
templates of ImageNet and a constant background plane. Each of these is an option.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ttd_plugins.adapter import Calibration, DenseAdapter, image_features, image_pixels
from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.pamr import pamr
from ttd_plugins.evaluation.protocol_options import DenseOptions, MapActivation
from ttd_plugins.method import similarity
from ttd_plugins.method.text_embeddings import encode_texts
from ttd_plugins.options import Resampling
from ttd_plugins.utils.deprecation import RenamedAttribute

if TYPE_CHECKING:
    from PIL.Image import Image


@cache
def imagenet_templates() -> tuple[str, ...]:
    """Return the 80 prompt templates of ImageNet (Radford et al., 2021), ``{}`` standing for the class name."""
    text = resources.files("ttd_plugins.evaluation").joinpath("imagenet_templates.json").read_text("utf-8")
    return tuple(json.loads(text))


TEMPLATE_SETS = ("imagenet", "photo", "none")


def templates_by_name(name: str) -> tuple[str, ...]:
    """Return the templates ``"imagenet"`` (80), ``"photo"`` ("a photo of a {}.") or ``"none"`` (the bare name).

    Raises:
        InputError: the name is unknown.
    """
    if name == "imagenet":
        return imagenet_templates()
    if name not in TEMPLATE_SETS:
        raise InputError(choices_sentence("templates", name, TEMPLATE_SETS))
    return ("a photo of a {}.",) if name == "photo" else ("{}",)


@torch.no_grad()
def class_embeddings(
    adapter: DenseAdapter, names: Sequence[str], templates: Sequence[str] = ("{}",), batch_size: int = 512
) -> Tensor:
    """Return ensembles over templates: for each name the normalised mean of the normalised embeddings of its texts.

    Args:
        adapter: the backbone.
        names: C names.
        templates: prompt templates with ``{}`` for the name.
        batch_size: texts per batch.

    Returns:
        ``[C, D]`` in at least float32.
    """
    texts = [template.replace("{}", name) for name in names for template in templates]
    parts = [encode_texts(adapter, texts[start : start + batch_size])[0] for start in range(0, len(texts), batch_size)]
    if not parts:
        return encode_texts(adapter, [])[0]
    return similarity.normalize(torch.cat(parts).reshape(len(names), len(templates), -1).mean(1))


@dataclass
class DenseFeatures:
    """Features of one image over scales and flips.

    Attributes:
        patches: for each view the normalised patch features ``[P, D]`` in the image's own orientation, and their grid
            (rows, columns).
        pooled: the normalised mean of the normalised pooled embeddings, ``[D]``, or ``None``.
        grid: the finest grid.
        image: RGB in [0, 1] at the size of scale one, ``[3, h, w]``, where PAMR refines.
    """

    patches: list[tuple[Tensor, tuple[int, int]]]
    pooled: Tensor | None
    grid: tuple[int, int]
    image: Tensor

    picture = RenamedAttribute("image")

    def maps(self, texts: Tensor) -> Tensor:
        """Return the mean cosines ``[K, H, W]`` of K normalised embeddings ``[K, D]`` on the finest grid."""
        total = torch.zeros(len(texts), *self.grid, device=texts.device)
        for patches, grid in self.patches:
            maps = (texts.to(patches) @ patches.T).reshape(1, len(texts), *grid)
            total += resize_maps(maps[0], self.grid)
        return total / len(self.patches)


@torch.no_grad()
def dense_features(
    adapter: DenseAdapter, image: Image, options: DenseOptions | None = None, *, pooled: bool = False
) -> DenseFeatures:
    """Return the patch features of one image at every scale, flip and window of ``options``.

    Args:
        adapter: the backbone, in evaluation mode.
        image: an RGB image.
        options: options of dense inference.
        pooled: whether to compute the pooled embedding too, which is always that of the whole image.
    """
    options = options or DenseOptions()
    with resampling(adapter, options.positions):
        return _dense_features(adapter, image, options, pooled)


@contextmanager
def resampling(adapter: DenseAdapter, positions: Resampling | None) -> Iterator[None]:
    """Let an adapter resample its position embeddings as ``positions`` says within a ``with`` block.

    ``None`` changes nothing, and neither does a value that the adapter does not support: a convolutional tower has no
    position embeddings. The description states the resampling in use.
    """
    before = adapter.positions
    if positions is not None and positions in adapter.resamplings:
        adapter.positions = positions
    try:
        yield
    finally:
        if adapter.positions != before:
            adapter.positions = before


def _dense_features(adapter: DenseAdapter, image: Image, options: DenseOptions, pooled: bool) -> DenseFeatures:
    collected: list[tuple[Tensor, tuple[int, int]]] = []
    embeddings: list[Tensor] = []
    for scale in options.scales:
        size = options.input_size(adapter, image.width, image.height, scale)
        pixels = image_pixels(adapter, image, size).to(adapter.device)
        views = torch.stack([pixels, pixels.flip(-1)] if options.flip else [pixels])
        patches, of_views = _encode_views(adapter, views, options, pooled)
        embeddings += of_views
        for mirrored, view in enumerate(patches):
            view = view.flip(1) if mirrored else view
            collected.append((view.flatten(0, 1), (view.shape[0], view.shape[1])))
    base = image_pixels(adapter, image, options.input_size(adapter, image.width, image.height))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (adapter.description.mean, adapter.description.std))
    return DenseFeatures(
        collected,
        similarity.normalize(torch.stack(embeddings).mean(0)) if embeddings else None,
        max((grid for _, grid in collected), key=lambda grid: grid[0] * grid[1]),
        (base.float() * std + mean).clamp(0, 1).to(adapter.device),
    )


def _encode_views(
    adapter: DenseAdapter, views: Tensor, options: DenseOptions, pooled: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return normalised patch features ``[H, W, D]`` and pooled embeddings ``[D]`` of views of the same size."""
    height, width = views.shape[-2:]
    windows = list(_windows(adapter, height, width, options))
    if len(windows) == 1:
        features = image_features(adapter, views, pooled=pooled)
        embeddings = [] if features.pooled is None else list(similarity.normalize(features.pooled))
        return list(similarity.normalize(features.patches)), embeddings
    embeddings = []
    if pooled:
        found = image_features(adapter, views, pooled=True).pooled
        assert found is not None
        embeddings = list(similarity.normalize(found))
    rows, columns = adapter.description.patch_size
    total: Tensor | None = None
    count = torch.zeros(height // rows, width // columns, 1, device=views.device)
    # All windows have the same size, so several windows of both orientations make a batch.
    per_batch = max(options.batch // len(views), 1)
    for start in range(0, len(windows), per_batch):
        some = windows[start : start + per_batch]
        crops = torch.cat([views[..., top : top + side, left : left + across] for top, left, side, across in some])
        patches = similarity.normalize(image_features(adapter, crops, pooled=False).patches)
        if total is None:
            total = patches.new_zeros(len(views), *count.shape[:2], patches.shape[-1])
        for (top, left, side, across), of_window in zip(some, patches.split(len(views)), strict=True):
            area = (slice(top // rows, (top + side) // rows), slice(left // columns, (left + across) // columns))
            total[(slice(None), *area)] += of_window
            count[area] += 1
    assert total is not None
    # Overlapping windows average their cosines, so the mean of the features is not normalised again.
    return list(total / count), embeddings


def _windows(
    adapter: DenseAdapter, height: int, width: int, options: DenseOptions
) -> Iterator[tuple[int, int, int, int]]:
    """Yield top, left, height and width of the windows, on whole patches; the last windows end at the border."""
    sides: list[tuple[list[int], int]] = []
    for length, patch in zip((height, width), adapter.description.patch_size, strict=True):
        side = length if options.window is None else min(max(round(options.window / patch), 1) * patch, length)
        step = max(round((options.stride or side // 2) / patch), 1) * patch
        if step > side:
            raise InputError(
                f"a stride of {options.stride} pixels leaves gaps between windows of {options.window} pixels; use a "
                "smaller stride"
            )
        # Symmetric positions, so that an image and its mirror image have the same windows.
        count = -(-(length - side) // step) + 1
        starts = [round(i * (length - side) / max(count - 1, 1) / patch) * patch for i in range(count)]
        mirrored = [length - side - start for start in starts]
        sides.append((sorted({*starts, *mirrored}), side))
    for top in sides[0][0]:
        for left in sides[1][0]:
            yield top, left, sides[0][1], sides[1][1]


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps ``[K, H, W]`` to ``[K, height, width]`` bilinearly (``align_corners=False``)."""
    if tuple(maps.shape[-2:]) == tuple(size) or not len(maps):
        return maps if len(maps) else maps.new_zeros(0, *size)
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def activate(cosines: Tensor, activation: MapActivation, calibration: Calibration) -> Tensor:
    """Map cosines ``[K, H, W]`` to calibrated probabilities, or to min-max over each map, or leave them unchanged.

    Raises:
        InputError: the activation is unknown.
    """
    if activation == "probability":
        return calibration.probability(cosines)
    if activation == "minmax":
        return similarity.minmax_normalize(cosines.flatten(1)).reshape(cosines.shape)
    if activation != "cosine":
        raise InputError(choices_sentence("activation", activation, get_args(MapActivation)))
    return cosines


def refine_maps(maps: Tensor, features: DenseFeatures, options: DenseOptions, chunk: int = 32) -> Tensor:
    """Refine maps ``[K, H, W]`` with PAMR at the size of scale one, ``chunk`` maps at a time, if the options say so."""
    if not options.refine:
        return maps
    size = (int(features.image.shape[-2]), int(features.image.shape[-1]))
    parts = [
        pamr(
            resize_maps(maps[start : start + chunk], size),
            features.image,
            iterations=options.iterations,
            dilations=options.dilations,
        )
        for start in range(0, len(maps), chunk)
    ]
    return torch.cat(parts) if parts else maps


def label_map(
    maps: Tensor,
    classes: Tensor,
    size: tuple[int, int],
    *,
    background: float | None = None,
    background_class: int = 0,
    chunk: int = 16,
) -> NDArray[np.int64]:
    """Return the class of every pixel at the size of the mask.

    Maps are upsampled in chunks, so that memory does not depend on the number of classes.

    Args:
        maps: ``[K, H, W]``, one for each name.
        classes: int64 ``[K]``, class index of each name; the score of a class is the highest of its names.
        size: (height, width) of the mask.
        background: the constant background plane, or ``None`` without such a plane.
        background_class: class index of the plane, and of all pixels if there are no maps.
        chunk: number of maps that are upsampled at once.

    Returns:
        int64 ``[height, width]``.
    """
    best = torch.full(size, -torch.inf if background is None else background, device=maps.device)
    label = torch.full(size, background_class, dtype=torch.int64, device=maps.device)
    class_of = classes.to(maps.device)
    for start in range(0, len(maps), chunk):
        value, index = resize_maps(maps[start : start + chunk], size).max(0)
        better = value > best
        best = torch.where(better, value, best)
        label = torch.where(better, class_of[start : start + chunk][index], label)
    return label.cpu().numpy()

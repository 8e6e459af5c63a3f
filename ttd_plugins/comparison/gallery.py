"""The gallery of a comparison: which test images are shown, and the maps of each backbone for them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.comparison.data_interface import Sample
from ttd_plugins.comparison.results import Arm, GalleryImage, TagView, View
from ttd_plugins.engine import TTD
from ttd_plugins.evaluation.metrics import mask_overlap, upsample_map
from ttd_plugins.evaluation.scene_protocol import CAPTION_MAP_THRESHOLD
from ttd_plugins.utils.number_format import format_number

CANDIDATES = 96
"""Test images from which the gallery is chosen."""
SHOWN_SIDE = 384
"""Longest side of a gallery image in pixels, so that the report stays small."""

Views = Mapping[str, Sequence[Mapping[Arm, View]]]
"""Name of the backbone to one mapping per sample from arm to view."""


def compute_view(ttd: TTD, sample: Sample) -> View:
    """Compute the maps of an image and its caption at the backbone's preferred input size.

    The IoU is that of the caption's map, above 0.40, with the union of the masks, at the size of the masks.
    """
    maps = ttd.maps(_resized(sample.image, ttd.backbone.description.image_size), sample.caption)
    caption, tags, position = sample.caption.lower(), [], 0
    rows = zip(maps.tags, maps.probabilities, maps.selected, maps.tag_maps_normalized, strict=True)
    for text, score, selected, heat in rows:
        match = re.search(rf"(?<!\w){re.escape(text.lower())}(?!\w)", caption[position:])
        start = -1 if match is None else position + match.start()
        tags.append(TagView(text, start, float(score), bool(selected), heat.astype(np.float32)))
        position = position if match is None else position + match.end()
    iou = None
    if sample.truth:
        union = np.logical_or.reduce(list(sample.truth.values()))
        lit = upsample_map(maps.caption_map_normalized, *union.shape) > CAPTION_MAP_THRESHOLD
        valid = np.ones_like(union) if sample.valid is None else sample.valid
        if ((lit | union) & valid).any():
            iou = mask_overlap(lit, union, valid).iou
    return View(maps.caption_map_normalized.astype(np.float32), tags, iou, bool(maps.truncated), maps.calibrated)


def choose_gallery(samples: Sequence[Sample], views: Views, count: int) -> list[GalleryImage]:
    """Choose ``count`` images, evenly spaced in the ranking by gain, so that the best and the worst are included.

    The gain is the Caption IoU after TTD minus that of the control, averaged over backbones; where there is no control,
    minus that before. Without trained arms, images are ranked by Caption IoU itself. Images without masks are not
    ranked, and shown in their order.
    """
    if not count or not views:
        return []
    ranking = _ranking(samples, views)
    if not ranking:
        return [_gallery_image(samples[index], index, views, "") for index in range(min(count, len(samples)))]
    places = sorted(set(np.linspace(0, len(ranking) - 1, min(count, len(ranking))).round().astype(int).tolist()))
    if count == 1:
        places = [len(ranking) - 1]
    arms = _arms(views)
    average = ", mean over backbones" if len(views) > 1 else ""
    quantity = _quantity(arms)
    chosen = []
    for place in places:
        value, index = ranking[place]
        rank = "largest" if place == 0 else "smallest" if place == len(ranking) - 1 else f"rank {place + 1} by"
        why = f"{rank} {quantity} of {len(ranking)} images: {format_number(value, sign=True)}{average}"
        chosen.append(_gallery_image(samples[index], index, views, why))
    return chosen


def gallery_rule(samples: Sequence[Sample], views: Views, count: int) -> str:
    """Say how :func:`choose_gallery` chooses; "" if it chooses nothing."""
    if not count or not views or not samples:
        return ""
    ranking = _ranking(samples, views)
    if not ranking:
        shown = min(count, len(samples))
        return f"Shown are the first {shown} of {len(samples)} candidates; without masks, images are not ranked."
    arms = _arms(views)
    average = ", averaged over backbones" if len(views) > 1 else ""
    seed = " of the first seed" if "after" in arms else ""
    first, last = ("largest", "smallest") if "after" in arms else ("highest", "lowest")
    shown = min(count, len(ranking))
    chosen = (
        f"Shown are {shown} evenly spaced ranks, from the {first} to the {last}, so that failures are included."
        if shown > 1
        else f"Shown is the {last}."
    )
    return (
        f"Candidates are the {len(ranking)} images at the start of the test set whose caption names two or more things "
        f"with known regions. They are ranked by the {_quantity(arms)}{seed}{average}. {chosen}"
    )


def _arms(views: Views) -> set[Arm]:
    return {arm for of_backbone in views.values() for by_arm in of_backbone for arm in by_arm}


def _quantity(arms: Collection[Arm]) -> str:
    """What images are ranked by."""
    if "after" not in arms:
        return "Caption IoU"
    return f"gain in Caption IoU (after TTD minus {'control' if 'control' in arms else 'before'})"


def _gallery_image(sample: Sample, index: int, views: Views, why: str) -> GalleryImage:
    return GalleryImage(
        key=sample.key,
        image=_shrunk(sample.image),
        caption=sample.caption,
        truth=_shrunk_masks(sample),
        views={name: of_backbone[index] for name, of_backbone in views.items()},
        why=why,
        absent=tuple(sample.absent),
        labels=_labels(sample, [of_backbone[index] for of_backbone in views.values()]),
    )


def _labels(sample: Sample, views: Iterable[Mapping[Arm, View]]) -> dict[str, bool | None] | None:
    """Labels of every tag of the views by the protocol; ``None`` if the data have no annotations."""
    if sample.caption_truth is None:
        return None
    tags = list(dict.fromkeys(tag.text for by_arm in views for view in by_arm.values() for tag in view.tags))
    return dict(zip(tags, sample.caption_truth.labels(tags), strict=True))


def _ranking(samples: Sequence[Sample], views: Views) -> list[tuple[float, int]]:
    """Pairs of value and index of the sample, the largest value first; samples without a value are left out."""
    ranking: list[tuple[float, int]] = []
    for index in range(len(samples)):
        values = []
        for of_backbone in views.values():
            by_arm = of_backbone[index]
            last = by_arm["after" if "after" in by_arm else "before"].iou
            first = by_arm["control" if "control" in by_arm else "before"].iou if "after" in by_arm else 0.0
            if last is not None and first is not None:
                values.append(last - first)
        if values:
            ranking.append((float(np.mean(values)), index))
    return sorted(ranking, key=lambda item: (-item[0], item[1]))


def _resized(image: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """The whole image at (height, width), bicubic."""
    whole, (height, width) = Image.fromarray(image), size
    return whole if whole.size == (width, height) else whole.resize((width, height), Image.Resampling.BICUBIC)


def _shrunk(image: Any) -> Any:
    height, width = image.shape[:2]
    factor = SHOWN_SIDE / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _shrunk_masks(sample: Sample) -> dict[str, Any]:
    height, width = _shrunk(sample.image).shape[:2]
    return {
        tag: np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST), dtype=bool)
        for tag, mask in sample.truth.items()
    }

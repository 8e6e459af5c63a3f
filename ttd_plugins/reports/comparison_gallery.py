"""The gallery of a comparison as plain data for the template: captions, maps, scores, true regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ttd_plugins.comparison.results import ARMS, Arm, Comparison, GalleryImage, TagView, View
from ttd_plugins.errors import InputError
from ttd_plugins.reports.comparison_charts import ARM_LABELS
from ttd_plugins.reports.comparison_findings import TIE
from ttd_plugins.reports.formatting import capitalised, number, plural
from ttd_plugins.reports.heat_overlay import heat_layer_uri, image_uri, png_data_uri

IMAGE_SIDE = 480
OUTLINE_SIDE = 200
OUTLINE_SCALE = 2
SCENE_BACKBONES = 4
"""Backbones whose maps stand below the tiles; the gallery shows all."""
POOR_IOU = 0.5
"""Below this Caption IoU an image counts as a failure."""
KINDS = {True: "true", False: "absent", None: "other"}
"""Name of each label in the page."""
CAPTION, UNION = "caption", "union"


def gallery_view(comparison: Comparison) -> dict[str, Any]:
    """Everything that the gallery's template shows.

    Raises:
        InputError: a map, a mask or an image has a wrong shape or value.
        MissingDependencyError: there is an image, and matplotlib is not installed.
    """
    names = [backbone.name for backbone in comparison.backbones]
    images = [image_view(n, image, names) for n, image in enumerate(comparison.gallery, start=1)]
    arms = {arm for image in comparison.gallery for views in image.views.values() for arm in views}
    return {
        "images": images,
        "has_truth": any(image.truth for image in comparison.gallery),
        "has_absent": any(image["has_absent"] for image in images),
        "calibrated": all(
            view.calibrated for one in comparison.gallery for views in one.views.values() for view in views.values()
        ),
        "has_control": {"control", "after"} <= arms,
        "rule": comparison.gallery_rule,
    }


def scene_view(gallery: dict[str, Any] | None) -> dict[str, Any] | None:
    """The image that stands below the tiles: the middle one of the gallery, neither its best nor its worst.

    With several backbones the first :data:`SCENE_BACKBONES` are shown, before and after TTD.

    Args:
        gallery: the result of :func:`gallery_view`.
    """
    images = [image for image in gallery["images"] if image["cards"]] if gallery else []
    if not images:
        return None
    image = images[(len(images) - 1) // 2]
    several = len(image["cards"]) > 1
    return {
        "image": image,
        "cards": [
            {**card, "frames": [frame for frame in card["frames"] if not several or frame["arm"] != "control"]}
            for card in image["cards"][:SCENE_BACKBONES]
        ],
        "left_out": max(len(image["cards"]) - SCENE_BACKBONES, 0),
        "middle": len(images) > 2,
        "ranked": bool(image["why"]),
    }


def image_view(number_of_image: int, image: GalleryImage, names: Sequence[str]) -> dict[str, Any]:
    """What a template shows of one image: caption, tags, and for each backbone of ``names`` a card with its maps.

    Raises:
        InputError, MissingDependencyError: as :func:`gallery_view`.
    """
    tags = _all_tags(image)
    labels = {text: _label(text, image) for text, _ in tags}
    kinds = {text: KINDS[label] for text, label in labels.items()}
    height, width = image.image.shape[:2]
    return {
        "number": number_of_image,
        "key": image.key,
        "uri": image_uri(image.image, IMAGE_SIDE),
        "ratio": f"{width} / {height}",
        "why": capitalised(image.why),
        "badges": _badges(image),
        "caption": _caption_pieces(image.caption, tags, kinds),
        "true_tags": ", ".join(image.truth),
        "has_absent": False in labels.values(),
        "truncated": any(view.truncated for views in image.views.values() for view in views.values()),
        "choices": [{"map": str(n), "text": text, "kind": kinds[text]} for n, (text, _) in enumerate(tags)],
        "outlines": _outlines(image, tags),
        "cards": [
            _card(n, name, image.views[name], tags, labels) for n, name in enumerate(names) if name in image.views
        ],
    }


def _all_tags(image: GalleryImage) -> list[tuple[str, int]]:
    """Text and place of every tag that some backbone has, in the caption's order."""
    found = {
        (tag.text, tag.start): None for views in image.views.values() for view in views.values() for tag in view.tags
    }
    return sorted(found, key=lambda tag: (tag[1] < 0, tag[1]))


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _label(text: str, image: GalleryImage) -> bool | None:
    """Whether the tag is true by the protocol of tag selection; ``None`` if unknown."""
    if image.labels is not None:
        return image.labels.get(text)
    if _folded(text) in map(_folded, image.truth):
        return True
    return False if _folded(text) in map(_folded, image.absent) else None


def _caption_pieces(caption: str, tags: Sequence[tuple[str, int]], kinds: Mapping[str, str]) -> list[tuple[str, str]]:
    """The caption in pieces, each with its kind of tag or ""."""
    pieces, end = [], 0
    for text, start in tags:
        if start >= end and start + len(text) <= len(caption):
            pieces += [(caption[end:start], ""), (caption[start : start + len(text)], kinds[text])]
            end = start + len(text)
    return [piece for piece in [*pieces, (caption[end:], "")] if piece[0]]


def _baseline(views: Mapping[Arm, View]) -> Arm:
    return "control" if "control" in views else "before"


def _iou_change(views: Mapping[Arm, View]) -> float | None:
    """Caption IoU after minus control (minus before without a control); ``None`` if either is unknown."""
    if "after" not in views or _baseline(views) not in views:
        return None
    first, last = views[_baseline(views)].iou, views["after"].iou
    return None if first is None or last is None else last - first


def _badges(image: GalleryImage) -> list[tuple[str, str]]:
    """Kind and words: on how many backbones Caption IoU rises and falls, and on how many it is poor."""
    last = [views.get("after") or views.get("before") for views in image.views.values()]
    ious = [view.iou for view in last if view is not None and view.iou is not None]
    if not ious:
        return []
    changes = [value for views in image.views.values() if (value := _iou_change(views)) is not None]
    better = sum(value >= TIE for value in changes)
    worse = sum(value <= -TIE for value in changes)
    poor = sum(iou < POOR_IOU for iou in ious)
    if len(image.views) == 1:
        against = {"control": "the control", "before": "before"}[_baseline(next(iter(image.views.values())))]
        badges = [("better", "▲ Improved")] if better else [("worse", f"▼ Worse than {against}")] if worse else []
        badges += [("same", "No change")] if changes and not better and not worse else []
        return badges + ([("worse", f"Failure: IoU below {POOR_IOU}")] if poor else [])
    of = f"of {len(ious)}"
    badges = [("better", f"▲ better on {better} {of}")] if better else []
    badges += [("worse", f"▼ worse on {worse} {of}")] if worse else []
    return badges + ([("same", f"failure on {poor} {of}: IoU below {POOR_IOU}")] if poor else [])


def _card(
    number_of_backbone: int,
    name: str,
    views: Mapping[Arm, View],
    tags: Sequence[tuple[str, int]],
    labels: Mapping[str, bool | None],
) -> dict[str, Any]:
    """One backbone's maps and scores of one image."""
    arms = [arm for arm in ARMS if arm in views]
    found = {arm: {(tag.text, tag.start): tag for tag in reversed(views[arm].tags)} for arm in arms}
    return {
        "number": number_of_backbone,
        "name": name,
        "arms": arms,
        "frames": [_frame(name, arm, views, tags, found[arm]) for arm in arms],
        "rows": [
            {
                "map": str(n),
                "text": tag[0],
                "kind": KINDS[labels[tag[0]]],
                "cells": [(arm, _verdict(found[arm].get(tag), labels[tag[0]])) for arm in arms],
            }
            for n, tag in enumerate(tags)
        ],
    }


def _verdict(tag: TagView | None, label: bool | None) -> dict[str, Any] | None:
    """Score and selection of a tag; ``right`` is ``None`` where the truth is unknown."""
    if tag is None:
        return None
    right = None if label is None else tag.selected == label
    word = "selected" if tag.selected else "rejected"
    return {
        "score": f"{tag.score:.2f}",
        "selected": tag.selected,
        "right": right,
        "words": f"wrongly {word}" if right is False else word,
    }


def _frame(
    name: str,
    arm: Arm,
    views: Mapping[Arm, View],
    tags: Sequence[tuple[str, int]],
    found: Mapping[tuple[str, int], TagView],
) -> dict[str, Any]:
    """The maps of one backbone and arm: the caption's, the union of the selected tags', and each tag's."""
    view, label = views[arm], ARM_LABELS[arm]
    iou = "" if view.iou is None else f"IoU {number(view.iou)}"
    change = _iou_change(views) if arm == "after" else None
    layers = [(CAPTION, view.caption, f"{label}: map of the caption by {name}{', ' + iou if iou else ''}")]
    notes = [_note(CAPTION, iou, change=change, against=_baseline(views))]
    selected = [tag.heat for tag in view.tags if tag.selected]
    if selected:
        union = np.maximum.reduce(selected)
        layers.append((UNION, union, f"{label}: union of the maps of the selected tags by {name}"))
    notes.append(_note(UNION, words=f"{plural(len(selected), 'tag')} selected" if selected else "no tag selected"))
    for n, tag in enumerate(tags):
        one = found.get(tag)
        if one is None:
            notes.append(_note(str(n), words="not a candidate here"))
            continue
        word = "selected" if one.selected else "rejected"
        layers.append((str(n), one.heat, f"{label}: map of “{tag[0]}” by {name}, score {one.score:.2f}, {word}"))
        notes.append(_note(str(n), f"{one.score:.2f}", word))
    return {
        "arm": arm,
        "label": label,
        "layers": [{"map": key, "uri": heat_layer_uri(heat), "label": text} for key, heat, text in layers],
        "notes": notes,
    }


def _note(
    key: str, strong: str = "", words: str = "", *, change: float | None = None, against: str = ""
) -> dict[str, Any]:
    """What stands below a frame while the map ``key`` is shown."""
    return {"map": key, "strong": strong, "words": words, "change": change, "against": against}


# True regions ---------------------------------------------------------------------------------------------------------


def _outlines(image: GalleryImage, tags: Sequence[tuple[str, int]]) -> dict[str, str]:
    """For each map the CSS image of the outline of its true region, or ``none``."""
    shape = image.image.shape[:2]
    for tag, region in image.truth.items():
        if region.shape != shape:
            raise InputError(
                f"image {image.key!r}: the mask of {tag!r} is {list(region.shape)}, but the image is {list(shape)}"
            )
    whole = f"url({_outline_uri(np.logical_or.reduce(list(image.truth.values())))})" if image.truth else "none"
    outlines = {CAPTION: whole, UNION: whole}
    regions = {_folded(tag): region for tag, region in image.truth.items()}
    for n, (text, _) in enumerate(tags):
        own = regions.get(_folded(text))
        outlines[str(n)] = "none" if own is None else f"url({_outline_uri(own)})"
    return outlines


def _outline_uri(region: NDArray[np.bool_]) -> str:
    """The border of a region, drawn at a size that stays a thin line on the page."""
    height, width = region.shape
    scale = min(OUTLINE_SIDE / max(height, width), 1.0)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return png_data_uri(
        region_outline(np.asarray(Image.fromarray(region).resize(size, Image.Resampling.NEAREST), bool))
    )


def region_outline(region: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """White line with a dark rim along a region's border, as RGBA ``[2 height, 2 width, 4]``; clear elsewhere."""
    large = region.repeat(OUTLINE_SCALE, 0).repeat(OUTLINE_SCALE, 1)
    line, rim = large & ~_shrunk(large), ~large & ~_shrunk(~large)
    drawn = np.zeros((*large.shape, 4), np.uint8)
    drawn[rim] = (0, 0, 0, 150)
    drawn[line] = (255, 255, 255, 255)
    return drawn


def _shrunk(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The region without its border pixels; the edge of the image is no border."""
    padded = np.pad(region, 1, mode="edge")
    return region & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]

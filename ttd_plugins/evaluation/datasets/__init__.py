"""Readers of annotated data sets, one class per data set. Each checks the layout before any computation.

:data:`SEGMENTATION` has the readers of segmentation data sets by name, and :data:`CAPTIONS` those of captions with true
tags and masks. A custom reader subclasses :class:`SegmentationData` or :class:`CaptionData`; protocols accept it as is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.datasets.annotation_files import DatasetError
from ttd_plugins.evaluation.datasets.coco_captions import CocoCaptions
from ttd_plugins.evaluation.datasets.reader import (
    CaptionData,
    CaptionedImage,
    CaptionTruth,
    ClassNames,
    SegmentationData,
)
from ttd_plugins.evaluation.datasets.segmentation import (
    ADE20K,
    Cityscapes,
    CocoObject,
    CocoPanoptic,
    CocoStuff,
    PascalContext59,
    PascalContext60,
    PascalVOC,
)
from ttd_plugins.evaluation.datasets.tag_mask import TagMask

SEGMENTATION: dict[str, type[SegmentationData]] = {
    "voc": PascalVOC,
    "coco_object": CocoObject,
    "context59": PascalContext59,
    "context60": PascalContext60,
    "ade20k": ADE20K,
    "cityscapes": Cityscapes,
    "coco_stuff": CocoStuff,
    "coco_panoptic": CocoPanoptic,
}
CAPTIONS: dict[str, type[CaptionData]] = {"cc3m_tagmask": TagMask, "coco_captions": CocoCaptions}

__all__ = [
    "ADE20K",
    "CAPTIONS",
    "SEGMENTATION",
    "CaptionData",
    "CaptionTruth",
    "CaptionedImage",
    "Cityscapes",
    "ClassNames",
    "CocoCaptions",
    "CocoObject",
    "CocoPanoptic",
    "CocoStuff",
    "DatasetError",
    "PascalContext59",
    "PascalContext60",
    "PascalVOC",
    "SegmentationData",
    "TagMask",
    "open_captions",
    "open_named",
    "open_segmentation",
]


def open_segmentation(name: str, root: Path | str, **options: Any) -> SegmentationData:
    """Open a segmentation data set by its name in :data:`SEGMENTATION`.

    Args:
        name: name of the data set.
        root: its folder.
        **options: options of the reader, such as ``split`` and ``limit``.

    Raises:
        InputError: the name or an option is unknown.
        DatasetError: the layout is wrong.
    """
    return _open(SEGMENTATION, "segmentation data set", name, root, options)


def open_captions(name: str, root: Path | str, **options: Any) -> CaptionData:
    """Open a captioned data set by its name in :data:`CAPTIONS`; see :func:`open_segmentation`."""
    return _open(CAPTIONS, "captioned data set", name, root, options)


def open_named(
    spec: str, *, captioned: bool, split: str | None = None, limit: int | None = None
) -> CaptionData | SegmentationData:
    """Open a data set by name and folder.

    Args:
        spec: ``"NAME:FOLDER"``, such as ``"coco_captions:photos/"``.
        captioned: whether captions are needed (:data:`CAPTIONS`) or segmentation masks (:data:`SEGMENTATION`).
        split, limit: options of the reader; ``None`` means its default.

    Raises:
        InputError: the name or the split is unknown, or the folder is missing in ``spec``.
        DatasetError: the layout is wrong; the message names the path.
    """
    name, _, root = spec.partition(":")
    options = {key: value for key, value in (("split", split), ("limit", limit)) if value is not None}
    if name in (CAPTIONS if captioned else SEGMENTATION) and not root:
        raise InputError(f"the data set {spec!r} needs a folder; write {name}:FOLDER")
    return open_captions(name, root, **options) if captioned else open_segmentation(name, root, **options)


def _open(known: dict[str, Any], kind: str, name: str, root: Path | str, options: dict[str, Any]) -> Any:
    if name not in known:
        raise InputError(choices_sentence(kind, name, known))
    try:
        return known[name](root, **options)
    except TypeError as error:
        raise InputError(f"the {kind} {name!r} does not accept these options: {error}") from error

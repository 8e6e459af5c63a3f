"""Readers of annotated data sets, one class a layout; each refuses a wrong layout before anything is computed.

Segmentation: :data:`SEGMENTATION` by name. Captions with true tags and their masks: :data:`CAPTIONS` by name. A
reader of one's own subclasses :class:`SegmentationData` or :class:`CaptionData` and is handed to a protocol as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.datasets.coco_captions import CocoCaptions
from ttd_plugins.evaluation.datasets.reader import (
    CaptionData,
    CaptionedImage,
    CaptionTruth,
    ClassNames,
    DatasetError,
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
    "open_segmentation",
]


def open_segmentation(name: str, root: Path | str, **options: Any) -> SegmentationData:
    """A reader of :data:`SEGMENTATION` by name.

    Raises:
        InputError: the name or an option is unknown.
        DatasetError: the layout is wrong.
    """
    return _open(SEGMENTATION, "segmentation data set", name, root, options)


def open_captions(name: str, root: Path | str, **options: Any) -> CaptionData:
    """A reader of :data:`CAPTIONS` by name; see :func:`open_segmentation`."""
    return _open(CAPTIONS, "captioned data set", name, root, options)


def _open(known: dict[str, Any], kind: str, name: str, root: Path | str, options: dict[str, Any]) -> Any:
    if name not in known:
        raise InputError(choices_sentence(kind, name, known))
    try:
        return known[name](root, **options)
    except TypeError as error:
        raise InputError(f"the {kind} {name!r} cannot be opened so: {error}") from error

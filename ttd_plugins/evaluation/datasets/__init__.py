"""Readers of annotated data sets, one class per data set. Each checks the layout before any computation.

:data:`SEGMENTATION` has the readers of segmentation data sets by name, :data:`LABELS` those of multi-label
classification, and :data:`CAPTIONS` those of captions with true tags and masks. A custom reader subclasses
:class:`SegmentationData`, :class:`LabelData` or :class:`CaptionData`; protocols accept it as is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.datasets.annotation_files import DatasetError
from ttd_plugins.evaluation.datasets.coco_captions import CocoCaptions
from ttd_plugins.evaluation.datasets.image_labels import CocoLabels, MaskLabels, NusWide, Voc2007, Voc2012
from ttd_plugins.evaluation.datasets.label_table import LabelTable
from ttd_plugins.evaluation.datasets.plain_pairs import PlainPairs
from ttd_plugins.evaluation.datasets.reader import (
    CaptionData,
    CaptionedImage,
    CaptionTruth,
    ClassNames,
    LabelData,
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
from ttd_plugins.evaluation.datasets.segmentation_folder import SegmentationFolder
from ttd_plugins.evaluation.datasets.selected_classes import SelectedLabels, SelectedSegmentation
from ttd_plugins.evaluation.datasets.tag_mask import TagMask

Kind = Literal["captions", "segmentation", "labels", "pairs"]

SEGMENTATION: dict[str, type[SegmentationData]] = {
    "voc": PascalVOC,
    "coco_object": CocoObject,
    "context59": PascalContext59,
    "context60": PascalContext60,
    "ade20k": ADE20K,
    "cityscapes": Cityscapes,
    "coco_stuff": CocoStuff,
    "coco_panoptic": CocoPanoptic,
    "folder": SegmentationFolder,
}
LABELS: dict[str, type[LabelData]] = {
    "voc2007": Voc2007,
    "voc2012": Voc2012,
    "coco": CocoLabels,
    "nus_wide": NusWide,
    "table": LabelTable,
}
"""Readers of labels. Every name of :data:`SEGMENTATION` works too: an image shows the classes of its pixels."""
CAPTIONS: dict[str, type[CaptionData]] = {"cc3m_tagmask": TagMask, "coco_captions": CocoCaptions}

__all__ = [
    "ADE20K",
    "CAPTIONS",
    "LABELS",
    "SEGMENTATION",
    "CaptionData",
    "CaptionTruth",
    "CaptionedImage",
    "Cityscapes",
    "ClassNames",
    "CocoCaptions",
    "CocoLabels",
    "CocoObject",
    "CocoPanoptic",
    "CocoStuff",
    "DatasetError",
    "LabelData",
    "LabelTable",
    "MaskLabels",
    "NusWide",
    "PascalContext59",
    "PascalContext60",
    "PascalVOC",
    "PlainPairs",
    "SegmentationData",
    "SegmentationFolder",
    "SelectedLabels",
    "SelectedSegmentation",
    "TagMask",
    "Voc2007",
    "Voc2012",
    "open_captions",
    "open_labels",
    "open_named",
    "open_segmentation",
]


def open_segmentation(
    name: str, root: Path | str, *, classes: str | os.PathLike[str] | None = None, **options: Any
) -> SegmentationData:
    """Open a segmentation data set by its name in :data:`SEGMENTATION`.

    Args:
        name: name of the data set.
        root: its folder.
        classes: a list of classes that are drawn from the data set's own (:class:`SelectedSegmentation`); for a
            ``folder`` without a list of its own, that list.
        **options: options of the reader, such as ``split`` and ``limit``.

    Raises:
        InputError: the name or an option is unknown.
        DatasetError: the layout is wrong.
    """
    if name == "folder" and classes is not None and not SegmentationFolder.has_list(root):
        options, classes = {"class_list": classes, **options}, None
    data: SegmentationData = _open(SEGMENTATION, "segmentation data set", name, root, options)
    return data if classes is None else SelectedSegmentation(data, classes)


def open_labels(
    name: str, root: Path | str, *, classes: str | os.PathLike[str] | None = None, **options: Any
) -> LabelData:
    """Open a data set of multi-label classification by its name in :data:`LABELS` or :data:`SEGMENTATION`.

    Args:
        name: name of the data set.
        root: its folder, or for ``table`` the table.
        classes: a list of classes that are drawn from the data set's own (:class:`SelectedLabels`); for ``table``, and
            for a ``folder`` without a list of its own, the list of its classes.
        **options: options of the reader, such as ``split`` and ``limit``.

    Raises:
        InputError: the name or an option is unknown.
        DatasetError: the layout is wrong.
    """
    if name in SEGMENTATION:
        if name == "folder" and classes is not None and not SegmentationFolder.has_list(root):
            options, classes = {"class_list": classes, **options}, None
        data: LabelData = MaskLabels(_open(SEGMENTATION, "segmentation data set", name, root, options))
    else:
        if name == "table" and classes is not None:
            options, classes = {"class_list": classes, **options}, None
        if name not in LABELS:
            raise InputError(choices_sentence("data set of labels", name, [*LABELS, *SEGMENTATION], 20))
        data = _open(LABELS, "data set of labels", name, root, options)
    return data if classes is None else SelectedLabels(data, classes)


def open_captions(name: str, root: Path | str, **options: Any) -> CaptionData:
    """Open a captioned data set by its name in :data:`CAPTIONS`; see :func:`open_segmentation`."""
    return _open(CAPTIONS, "captioned data set", name, root, options)


def open_named(spec: str, *, kind: Kind | None = None, captioned: bool | None = None, **options: Any) -> Any:
    """Open a data set by name and folder.

    Args:
        spec: ``"NAME:FOLDER"``, such as ``"coco_captions:photos/"``; for pairs whatever
            :func:`ttd_plugins.data.open_pairs` accepts, also after ``"pairs:"``.
        kind: what is needed: captions with masks, masks, labels, or plain pairs.
        captioned: earlier form of ``kind``: captions with masks, or masks.
        **options: options of the reader, such as ``split``, ``limit`` and ``classes``; ``None`` means its default.

    Raises:
        InputError: the name or the split is unknown, or the folder is missing in ``spec``.
        DatasetError: the layout is wrong; the message names the path.
    """
    given = {key: value for key, value in options.items() if value is not None}
    kind = kind or ("captions" if captioned else "segmentation")
    if kind == "pairs":
        return PlainPairs(spec.removeprefix("pairs:"), **given)
    name, _, root = spec.partition(":")
    known: dict[str, tuple[frozenset[str], Callable[..., Any]]] = {
        "captions": (frozenset(CAPTIONS), open_captions),
        "segmentation": (frozenset(SEGMENTATION), open_segmentation),
        "labels": (frozenset(LABELS) | frozenset(SEGMENTATION), open_labels),
    }
    names, function = known[kind]
    if name in names and not root:
        raise InputError(f"the data set {spec!r} needs a folder; write {name}:FOLDER")
    return function(name, root, **given)


def _open(known: dict[str, Any], kind: str, name: str, root: Path | str, options: dict[str, Any]) -> Any:
    if name not in known:
        raise InputError(choices_sentence(kind, name, known))
    try:
        return known[name](root, **options)
    except TypeError as error:
        raise InputError(f"the {kind} {name!r} does not accept these options: {error}") from error

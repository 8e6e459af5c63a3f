"""Readers of segmentation data sets: standard downloads, layouts of mmsegmentation's converters, and TTD's repackaging.

The paper's authors repackaged data sets as ``SPLIT/image``, ``SPLIT/mask`` and ``SPLIT/xml`` with files of equal stems.
Their README shows these folders but not the format of the files. The readers assume that masks contain the ids of the
standard download, or class indices, or both if they cannot be confused. The image-level tags in ``xml`` are not needed,
since every class is a candidate on every image.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.data.image_paths import with_slashes
from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.datasets.annotation_files import (
    DatasetError,
    existing_root,
    first_folder,
    has_mode,
    image_names,
    image_size,
    lookup_table,
    map_indices,
    read_indices,
    read_json,
    unique_keys,
)
from ttd_plugins.evaluation.datasets.coco_instances import CocoInstances, image_of, images_of, not_coco
from ttd_plugins.evaluation.datasets.reader import ClassNames, Progress, SegmentationData, class_names
from ttd_plugins.evaluation.metrics import IGNORE
from ttd_plugins.utils.user_files import reason_of

Pairs = dict[str, tuple[Path, Path]]
_SPLITS = {"val": ("val", "validation"), "train": ("train", "training"), "trainval": ("trainval",), "test": ("test",)}


class MaskFiles(SegmentationData):
    """A data set with one image file and one mask file for each key.

    Args:
        root: the folder of the download, or the folder above or below it that is named after the data set.
        split: ``"val"`` or ``"train"``.
        limit: number of images, from the start; by default all.

    Raises:
        DatasetError: the layout is not found, or the split is empty.
    """

    def __init__(self, root: Path | str, split: str = "val", limit: int | None = None) -> None:
        if split not in _SPLITS:
            raise InputError(choices_sentence("split", split, _SPLITS))
        if limit is not None and limit < 1:
            raise InputError(f"limit must be at least 1, not {limit}")
        self.root, self.split, self.limit = existing_root(root, self.name), split, limit
        self.layout = ""
        repackaged = self._repackaged()
        self._pairs = self.find() if repackaged is None else repackaged
        if not self._pairs:
            raise DatasetError(f"the split {split!r} of {self.name} in {str(self.root)!r} has no images")
        if limit is not None:
            self._pairs = dict(list(self._pairs.items())[:limit])

    @abstractmethod
    def find(self) -> Pairs:
        """Return image and mask file of each key in the standard layout, and set :attr:`layout`."""

    @abstractmethod
    def ids(self, mask: Path) -> Mapping[int, int]:
        """Return the class index of each pixel value that a mask file may contain."""

    def keys(self) -> Sequence[str]:
        return list(self._pairs)

    def image_path(self, key: str) -> Path:
        return self._pairs[key][0]

    def mask_path(self, key: str) -> Path:
        """Return the mask file of an image."""
        return self._pairs[key][1]

    def labels(self, key: str) -> NDArray[np.uint8]:
        path = self.mask_path(key)
        return map_indices(self._values(path), self._table(path), path, self.name)

    def check(self, keys: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        # The cheap check of all files first.
        for image, mask in self._pairs.values():
            for kind, path in (("image", image), ("mask", mask)):
                if not os.path.exists(path):
                    raise DatasetError(f"the {kind} {str(path)!r} of {self.name} is missing")
        for key in self._pairs if keys is None else keys:
            image, mask = self._pairs[key]
            size, labels = image_size(image), self.labels(key)
            if labels.shape != size:
                raise DatasetError(
                    f"the mask {str(mask)!r} is {labels.shape[1]} x {labels.shape[0]} pixels, but its image "
                    f"{str(image)!r} is {size[1]} x {size[0]}"
                )
            if progress is not None:
                progress(1)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"split": self.split, "layout": self.layout, "limit": self.limit}

    # Helpers of the readers below -------------------------------------------------------------------------------------

    def _values(self, path: Path) -> NDArray[np.int64]:
        return read_indices(path)

    def _table(self, path: Path) -> NDArray[np.int16]:
        ids = tuple(sorted(self.ids(path).items()))
        if ids not in self._tables:
            self._tables[ids] = lookup_table(dict(ids))
        return self._tables[ids]

    @cached_property
    def _tables(self) -> dict[tuple[tuple[int, int], ...], NDArray[np.int16]]:
        return {}

    def _repackaged(self) -> Pairs | None:
        for split in _SPLITS[self.split]:
            folder = self.root / split
            if (folder / "image").is_dir() and (folder / "mask").is_dir():
                self.layout = "repackaged"
                return self._by_stem(folder / "image", folder / "mask")
        return None

    def _by_stem(self, images: Path, masks: Path, suffix: str = ".png", image_suffix: str = "") -> Pairs:
        """Return each image of a folder and its subfolders with the mask of the same path without suffix.

        Raises:
            DatasetError: two images have the same mask.
        """
        pairs: Pairs = {}
        for name in image_names(images):
            stem = str(PurePosixPath(name).with_suffix(""))
            if not stem.endswith(image_suffix):
                continue
            key = stem.removesuffix(image_suffix)
            if key in pairs:
                raise DatasetError(
                    f"the images {str(pairs[key][0])!r} and {str(images / name)!r} of {self.name} have the same mask, "
                    f"{str(masks / f'{key}{suffix}')!r}; rename or remove one of them"
                )
            pairs[key] = (images / name, masks / f"{key}{suffix}")
        return pairs

    def _listed(self, file: Path, images: Path, masks: Path) -> Pairs:
        """Return image and mask file of each key in a list of ``ImageSets``, with one key per line."""
        try:
            keys = [line.split()[0] for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else "it is not UTF-8"
            raise DatasetError(
                f"the list {str(file)!r} of the split {self.split!r} of {self.name} cannot be read: {reason}"
            ) from error
        return {key: (images / f"{key}.jpg", masks / f"{key}.png") for key in keys}

    def _need(self, folder: Path | None, what: str, *tried: str) -> Path:
        if folder is None:
            raise DatasetError(f"{self.name} in {str(self.root)!r} has no {what}; looked for {', '.join(tried)}")
        return folder

    def _folder(self, what: str, *tried: str) -> Path:
        return self._need(first_folder(self.root, *tried), what, *tried)


def voc_palette() -> NDArray[np.uint8]:
    """Return Pascal VOC's palette, uint8 ``[256, 3]``: the bits of an index go to red, green and blue in turn."""
    palette = np.zeros((256, 3), np.uint8)
    for index in range(256):
        value = index
        for bit in range(7, -1, -1):
            for channel in range(3):
                palette[index, channel] |= (value >> channel & 1) << bit
            value >>= 3
    return palette


class PascalVOC(MaskFiles):
    """PASCAL VOC 2012: ``JPEGImages``, ``SegmentationClass`` and ``ImageSets/Segmentation/SPLIT.txt``.

    Masks are palette PNGs: 0 is background, 1 to 20 are the classes, 255 is the void border. RGB masks in the colours
    of the palette are accepted too.
    """

    name = "voc"
    classes = class_names("voc")
    background = 0

    def find(self) -> Pairs:
        base = self._folder("VOC2012", "VOCdevkit/VOC2012", "VOC2012", ".")
        self.layout = "VOC2012"
        return self._listed(
            base / "ImageSets" / "Segmentation" / f"{self.split}.txt", base / "JPEGImages", base / "SegmentationClass"
        )

    def ids(self, mask: Path) -> Mapping[int, int]:
        return {**{index: index for index in range(21)}, 255: IGNORE}

    def _values(self, path: Path) -> NDArray[np.int64]:
        values = read_indices(path)
        if has_mode(path, "RGB"):
            colours = voc_palette().astype(np.int64)
            codes = colours[:, 0] + 256 * colours[:, 1] + 65536 * colours[:, 2]
            order = np.argsort(codes)
            nearest = np.minimum(np.searchsorted(codes[order], values), 255)
            index = order[nearest]
            # A colour outside the palette is not an index, however small its code.
            values = np.where(codes[index] == values, index, np.maximum(values, 256))
        return values


class PascalContext60(MaskFiles):
    """Pascal Context with background: 60 classes.

    ``JPEGImages``, ``SegmentationClassContext`` and ``ImageSets/SegmentationContext/SPLIT.txt`` of VOC2010, as
    mmsegmentation's converter writes them: 0 is background, 1 to 59 are the classes, in the alphabetical order of their
    ids among the 459 original ones.
    """

    name = "context60"
    classes = class_names("context")
    background: int | None = 0

    def find(self) -> Pairs:
        base = self._folder("VOC2010", "VOCdevkit/VOC2010", "VOC2010", ".")
        self.layout = "VOC2010"
        return self._listed(
            base / "ImageSets" / "SegmentationContext" / f"{self.split}.txt",
            base / "JPEGImages",
            base / "SegmentationClassContext",
        )

    def ids(self, mask: Path) -> Mapping[int, int]:
        return {**{index: index for index in range(60)}, 255: IGNORE}


class PascalContext59(PascalContext60):
    """Pascal Context without background: the masks of :class:`PascalContext60`; 0 is void, labels are minus one."""

    name = "context59"
    classes = class_names("context")[1:]
    background = None

    def ids(self, mask: Path) -> Mapping[int, int]:
        return {0: IGNORE, **{index: index - 1 for index in range(1, 60)}, 255: IGNORE}


class ADE20K(MaskFiles):
    """ADE20K scene parsing (``ADEChallengeData2016``): ``images/validation`` and ``annotations/validation``.

    0 is everything else, and void; labels 1 to 150 are reduced by one.
    """

    name = "ade20k"
    classes = class_names("ade20k")

    def find(self) -> Pairs:
        split = {"val": "validation", "train": "training"}.get(self.split, self.split)
        images = self._folder("images", f"ADEChallengeData2016/images/{split}", f"images/{split}")
        base = images.parents[1]
        self.layout = "ADEChallengeData2016"
        masks = base / "annotations" / split
        self._need(masks if masks.is_dir() else None, "masks", str(masks))
        return self._by_stem(images, masks)

    def ids(self, mask: Path) -> Mapping[int, int]:
        return {0: IGNORE, **{index: index - 1 for index in range(1, 151)}, 255: IGNORE}


_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class Cityscapes(MaskFiles):
    """Cityscapes: ``leftImg8bit/SPLIT/CITY`` and ``gtFine/SPLIT/CITY``, in one folder or in the download's two folders.

    Masks are ``*_gtFine_labelTrainIds.png`` (0 to 18, 255 void) if cityscapesScripts has written them, and otherwise
    ``*_gtFine_labelIds.png`` (0 to 33, of which 19 are evaluated).
    """

    name = "cityscapes"
    classes = class_names("cityscapes")
    _IMAGE, _TRAIN, _RAW = "_leftImg8bit", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"

    def find(self) -> Pairs:
        split = self.split
        images = self._folder(
            "images", f"leftImg8bit/{split}", f"leftImg8bit_trainvaltest/leftImg8bit/{split}",
        )  # fmt: skip
        masks = self._folder("masks", f"gtFine/{split}", f"gtFine_trainvaltest/gtFine/{split}")
        self.layout = "Cityscapes"
        paths = sorted(images.glob(f"*/*{self._IMAGE}.png"))
        stems = [path.stem.removesuffix(self._IMAGE) for path in paths]
        keys = unique_keys([f"{p.parent.name}/{stem}.png" for p, stem in zip(paths, stems, strict=True)], short=True)
        pairs: Pairs = {}
        for key, path, stem in zip(keys, paths, stems, strict=True):
            converted = masks / path.parent.name / f"{stem}{self._TRAIN}"
            raw = masks / path.parent.name / f"{stem}{self._RAW}"
            pairs[key] = (path, converted if os.path.isfile(converted) else raw)
        return pairs

    def ids(self, mask: Path) -> Mapping[int, int]:
        if mask.name.endswith("_labelIds.png"):
            raw = dict.fromkeys(range(34), IGNORE) | {255: IGNORE}
            return raw | {value: index for index, value in enumerate(_CITYSCAPES_IDS)}
        return {**{index: index for index in range(19)}, 255: IGNORE}


class _CocoPixelMaps(MaskFiles):
    """Base of COCO-Stuff and COCO-Object: their folders, and pixel maps of several converters."""

    _CONVERTED: ClassVar[str]
    _YEARS = ("2017", "2014")

    def _images(self) -> tuple[Path, str]:
        tried = [f"{place}{self.split}{year}" for year in self._YEARS for place in ("images/", "")]
        folder = self._folder("images", *tried)
        return folder, folder.name

    def _pixel_maps(self) -> Pairs | None:
        """Return image and mask files: converted masks, or the pixel maps of the download."""
        images, split = self._images()
        for place in ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017", "."):
            masks = self.root / place / split
            if not masks.is_dir():
                continue
            for suffix, layout in ((self._CONVERTED, "converted"), (".png", "stuffthingmaps")):
                if any(p.name.endswith(suffix) and ("TrainIds" in p.name) == ("TrainIds" in suffix)
                       for p in masks.iterdir()):  # fmt: skip
                    self.layout = layout
                    return self._by_stem(images, masks, suffix)
        return None


class CocoStuff(_CocoPixelMaps):
    """COCO-Stuff 164k: 171 classes.

    ``annotations/val2017/*_labelTrainIds.png`` of mmsegmentation's converter (0 to 170), or the download's pixel maps
    ``stuffthingmaps_trainval2017/val2017/*.png``, whose values are the category ids 1 to 182 minus one. In both, 255 is
    void.
    """

    name = "coco_stuff"
    classes = class_names("coco_stuff")
    _CONVERTED = "_labelTrainIds.png"

    def find(self) -> Pairs:
        pairs = self._pixel_maps()
        if pairs is None:
            raise DatasetError(
                f"coco_stuff in {str(self.root)!r} has no pixel maps; looked for annotations/{self.split}2017/*.png "
                f"and stuffthingmaps_trainval2017/{self.split}2017/*.png"
            )
        return pairs

    def ids(self, mask: Path) -> Mapping[int, int]:
        if self.layout == "stuffthingmaps":
            return {int(names.id or 0) - 1: index for index, names in enumerate(self.classes)} | {255: IGNORE}
        return {**{index: index for index in range(171)}, 255: IGNORE}


class CocoObject(_CocoPixelMaps):
    """COCO-Object: the 80 things of COCO, and everything else as background.

    Masks are ``annotations/val2017/*_instanceTrainIds.png`` of GroupViT's converter (0 background, 1 to 80); or the
    pixel maps of COCO-Stuff, where stuff and unlabelled pixels become background, as in that converter; or
    ``annotations/instances_val2017.json`` with polygons and RLE, where smaller instances cover larger ones and all
    cover crowds. A folder of ``images`` with ``instances.json`` next to it is read like the last, for any split.
    """

    name = "coco_object"
    classes = class_names("coco_object")
    background = 0
    _CONVERTED = "_instanceTrainIds.png"

    def find(self) -> Pairs:
        images, file = self.root / "images", self.root / "instances.json"
        if not os.path.exists(file):
            pairs = self._pixel_maps()
            if pairs is not None:
                return pairs
            images, split = self._images()
            file = self.root / "annotations" / f"instances_{split}.json"
        if not os.path.exists(file):
            raise DatasetError(
                f"coco_object in {str(self.root)!r} has neither pixel maps nor {str(file)!r}; also looked for "
                f"annotations/{split}/*{self._CONVERTED} and stuffthingmaps_trainval2017/{split}/*.png"
            )
        self.layout = "instances"
        self._instances = CocoInstances(file)
        names = sorted(self._instances.numbers)
        keys = unique_keys([name.replace("\\", "/") for name in names])
        self._numbers = {key: self._instances.numbers[name] for key, name in zip(keys, names, strict=True)}
        return {key: (images / with_slashes(images, name), file) for key, name in zip(keys, names, strict=True)}

    def ids(self, mask: Path) -> Mapping[int, int]:
        if self.layout == "stuffthingmaps":
            stuff = dict.fromkeys(range(91, 182), 0)
            things = {int(names.id or 0) - 1: index for index, names in enumerate(self.classes) if index}
            return {**stuff, **things, 255: 0}
        return {**{index: index for index in range(81)}, 255: IGNORE}

    def labels(self, key: str) -> NDArray[np.uint8]:
        if self.layout != "instances":
            return super().labels(key)
        index = {int(names.id): i for i, names in enumerate(self.classes) if names.id is not None}
        return self._instances.paint(self._numbers[key], self.image_path(key), index)


class CocoPanoptic(MaskFiles):
    """COCO panoptic categories as one class per pixel: 133 classes.

    Either ``images`` with ``semantic_masks/STEM.png``, whose values are category ids (0 unlabelled and void), and
    ``categories.json`` next to them; or the download: ``SPLIT2017``, ``annotations/panoptic_SPLIT2017.json`` and the
    segment-id PNGs in ``annotations/panoptic_SPLIT2017`` or ``panoptic_SPLIT2017``.
    """

    name = "coco_panoptic"
    classes = class_names("coco_panoptic")

    def find(self) -> Pairs:
        self._segments: dict[Path, dict[int, int]] = {}
        self._known: frozenset[int] | None = None
        if (self.root / "semantic_masks").is_dir():
            self.layout = "semantic_masks"
            images = self._folder("images", "images")
            listed = self.root / "categories.json"
            if os.path.exists(listed):
                self._check_categories(listed)
            return self._by_stem(images, self.root / "semantic_masks")
        split = f"{self.split}2017"
        file = self.root / "annotations" / f"panoptic_{split}.json"
        if not os.path.exists(file):
            raise DatasetError(
                f"coco_panoptic in {str(self.root)!r} has neither semantic_masks nor annotations/panoptic_{split}.json"
            )
        self.layout = "panoptic"
        images = self._folder("images", f"images/{split}", split)
        masks = self._folder("masks", f"annotations/panoptic_{split}", f"panoptic_{split}")
        return self._panoptic(file, images, masks)

    def _check_categories(self, file: Path) -> None:
        known = {names.id: names.name for names in self.classes}
        content = read_json(file)
        try:
            wrong = [c for c in content if known.get(c["id"]) != c["name"]]
        except (KeyError, TypeError) as error:
            raise DatasetError(f"the file {str(file)!r} must be a list of categories with id and name") from error
        if wrong:
            raise DatasetError(f"the file {str(file)!r} lists {wrong[0]}, which is not a COCO panoptic category")

    def _panoptic(self, file: Path, images: Path, masks: Path) -> Pairs:
        content = read_json(file)
        _, names, ids = images_of(file, content)
        found: dict[int, Path] = {}
        try:
            for annotation in content["annotations"]:
                place = image_of(file, annotation, ids)
                mask = masks / str(annotation["file_name"])
                if place in found:
                    raise DatasetError(f"the file {str(file)!r} has two annotations of the image {names[place]!r}")
                found[place] = mask
                self._segments[mask] = {int(s["id"]): int(s["category_id"]) for s in annotation["segments_info"]}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, DatasetError):
                raise
            raise not_coco(file, "panoptic ", error) from error
        missing = [name for place, name in enumerate(names) if place not in found]
        if missing:
            raise DatasetError(
                f"the file {str(file)!r} has no annotation of {len(missing)} of its images, such as {missing[0]!r}"
            )
        keys = unique_keys([name.replace("\\", "/") for name in names])
        pairs = {keys[place]: (images / with_slashes(images, names[place]), mask) for place, mask in found.items()}
        return dict(sorted(pairs.items()))

    def ids(self, mask: Path) -> Mapping[int, int]:
        known = {int(names.id or 0): index for index, names in enumerate(self.classes)}
        return {0: IGNORE, **known, 255: IGNORE}

    def _values(self, path: Path) -> NDArray[np.int64]:
        values = read_indices(path)
        if self.layout != "panoptic":
            return values
        segments = self._segments[path] | {0: 0}
        distinct, inverse = np.unique(values, return_inverse=True)
        unknown = [int(value) for value in distinct if int(value) not in segments]
        if unknown:
            raise DatasetError(
                f"the mask {str(path)!r} contains the segment id {unknown[0]}, which its JSON does not list"
            )
        return np.array([segments[int(value)] for value in distinct], np.int64)[inverse].reshape(values.shape)


__all__ = [
    "ADE20K",
    "Cityscapes",
    "ClassNames",
    "CocoInstances",
    "CocoObject",
    "CocoPanoptic",
    "CocoStuff",
    "MaskFiles",
    "PascalContext59",
    "PascalContext60",
    "PascalVOC",
    "voc_palette",
]

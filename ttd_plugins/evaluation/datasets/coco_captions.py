"""COCO captions with masks: a caption's true tags are the classes that it names and its image shows."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.data.image_paths import with_slashes
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets.annotation_files import (
    DatasetError,
    existing_root,
    first_folder,
    image_size,
    read_json,
    unique_keys,
)
from ttd_plugins.evaluation.datasets.coco_instances import CocoInstances, image_of, images_of, not_coco
from ttd_plugins.evaluation.datasets.reader import CaptionData, CaptionedImage, CaptionTruth, Progress, class_names
from ttd_plugins.evaluation.datasets.segmentation import CocoPanoptic
from ttd_plugins.evaluation.metrics import IGNORE
from ttd_plugins.evaluation.true_tags import Vocabulary, coco_vocabulary


class CocoCaptions(CaptionData):
    """COCO captions with COCO's masks.

    Files: ``captions.json`` with ``images``, and ``semantic_masks`` with ``categories.json`` or ``instances.json``; or
    the download: ``annotations/captions_SPLIT2017.json``, ``annotations/panoptic_SPLIT2017.json`` with its PNGs or
    ``annotations/instances_SPLIT2017.json``, and ``SPLIT2017``. If both kinds of masks exist, dense masks are used.

    With dense masks, unlabelled pixels are ignored. With instances, whatever is not annotated counts as not shown,
    crowds count as shown, and a word for one of the 53 stuff classes has an unknown label.

    Args:
        root: the folder.
        split: ``"val"`` or ``"train"``, for the download's layout.
        limit: number of images, from the start; by default all.
        vocabulary: which phrases name which classes; by default ``coco_synonyms.json``.
        min_pixels: smallest number of pixels for which a class counts as shown.

    Raises:
        DatasetError: the layout is not found, or no image has a caption.
    """

    name = "coco_captions"

    def __init__(
        self,
        root: Path | str,
        split: str = "val",
        limit: int | None = None,
        *,
        vocabulary: Vocabulary | None = None,
        min_pixels: int = 1,
    ) -> None:
        if limit is not None and limit < 1:
            raise InputError(f"limit must be at least 1, not {limit}")
        self.root, self.split, self.limit, self.min_pixels = existing_root(root, self.name), split, limit, min_pixels
        self.vocabulary = vocabulary or coco_vocabulary()
        file = next(
            (
                f
                for f in (self.root / "captions.json", self.root / f"annotations/captions_{split}2017.json")
                if os.path.exists(f)
            ),
            None,
        )
        if file is None:
            raise DatasetError(
                f"coco_captions in {str(self.root)!r} has neither captions.json nor "
                f"annotations/captions_{split}2017.json"
            )
        folder = first_folder(self.root, "images", f"images/{split}2017", f"{split}2017")
        if file.parent.name == "annotations":
            folder = first_folder(self.root, f"images/{split}2017", f"{split}2017")
        if folder is None:
            raise DatasetError(
                f"coco_captions in {str(self.root)!r} has no images; looked for the folders images and {split}2017"
            )
        self._images = folder
        self._keys_of_masks: dict[Path, str] | None = None
        self._numbers_of_names: dict[str, Hashable] | None = None
        self._read_captions(file)
        self._dense, self._instances = self._annotations(file)
        listed = None if self._dense is not None else set(self._listed_instances.categories.values())
        self.classes = tuple(c for c in class_names("coco_panoptic") if listed is None or c.name in listed)

    def _read_captions(self, file: Path) -> None:
        content = read_json(file)
        captions: dict[str, list[str]] = {}
        try:
            _, names, ids = images_of(file, content)
            for annotation in _in_order(content["annotations"]):
                name = with_slashes(self._images, names[image_of(file, annotation, ids)])
                text = annotation["caption"]
                if not isinstance(text, str):
                    raise TypeError(f"the caption of annotation {annotation.get('id')} is not a text")
                captions.setdefault(name, []).append(" ".join(text.split()))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, DatasetError):
                raise
            raise not_coco(file, "captions ", error) from error
        if not captions:
            raise DatasetError(f"the file {str(file)!r} has no caption of any of its images")
        # Keys do not depend on the limit, so that results of a part belong to results of the whole.
        used = list(zip(unique_keys(sorted(captions)), sorted(captions), strict=True))[: self.limit]
        self._captions = {key: captions[name] for key, name in used}
        self._files = dict(used)

    def _annotations(self, captions: Path) -> tuple[CocoPanoptic | None, CocoInstances | None]:
        dense = (self.root / "semantic_masks").is_dir()
        if captions.parent.name == "annotations":
            dense = (captions.parent / f"panoptic_{self.split}2017.json").is_file()
        if dense:
            return CocoPanoptic(self.root, self.split), None
        instances = captions.with_name(captions.name.replace("captions", "instances", 1))
        if not os.path.exists(instances):
            raise DatasetError(
                f"coco_captions in {str(self.root)!r} has captions but no masks; looked for semantic_masks, "
                f"{str(instances)!r} and annotations/panoptic_{self.split}2017.json"
            )
        return None, CocoInstances(instances)

    def keys(self) -> Sequence[str]:
        return list(self._captions)

    def image_path(self, key: str) -> Path:
        return self._images / self._files[key]

    def check(self, keys: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        for key in self._captions:
            if not os.path.exists(self.image_path(key)):
                raise DatasetError(f"the image {str(self.image_path(key))!r} of coco_captions is missing")
            if self._instances is not None:
                if self._number(key) is None:
                    raise DatasetError(
                        f"{str(self._instances.file)!r} does not list {self._files[key]!r}, which has captions"
                    )
            else:
                assert self._dense is not None
                if self.image_path(key) not in self._dense_keys:
                    raise DatasetError(f"the image {str(self.image_path(key))!r} has captions but no mask")
                mask = self._dense.mask_path(self._dense_keys[self.image_path(key)])
                if not os.path.exists(mask):
                    raise DatasetError(f"the mask {str(mask)!r} is missing")
        # Sizes of the masks that read() decodes, whichever classes the captions name.
        for key in self._captions if keys is None else keys:
            size, (height, width) = image_size(self.image_path(key)), self._shape(key)
            if (height, width) != size:
                source = self._listed_instances.file if self._dense is None else self._mask_path(key)
                raise DatasetError(
                    f"{str(source)!r} states {width} x {height} pixels for the image {str(self.image_path(key))!r}, "
                    f"which is {size[1]} x {size[0]}"
                )
            if progress is not None:
                progress(1)

    @property
    def _listed_instances(self) -> CocoInstances:
        assert self._instances is not None
        return self._instances

    def _shape(self, key: str) -> tuple[int, int]:
        masks, _ = self._masks(key)
        if masks:
            height, width = next(iter(masks.values())).shape
            return int(height), int(width)
        if self._instances is not None:
            # The size that the file states was compared with the image's.
            return image_size(self.image_path(key))
        height, width = self._labels(key).shape
        return int(height), int(width)

    @property
    def _dense_keys(self) -> dict[Path, str]:
        """Key of each image in the data set of dense masks."""
        if self._keys_of_masks is None:
            assert self._dense is not None
            self._keys_of_masks = {self._dense.image_path(key): key for key in self._dense.keys()}  # noqa: SIM118
        return self._keys_of_masks

    def _mask_path(self, key: str) -> Path:
        assert self._dense is not None
        return self._dense.mask_path(self._dense_keys[self.image_path(key)])

    def _labels(self, key: str) -> NDArray[np.uint8]:
        assert self._dense is not None
        return self._dense.labels(self._dense_keys[self.image_path(key)])

    def _number(self, key: str) -> Hashable | None:
        """Return the id of an image in the file of instances."""
        instances, name = self._listed_instances, self._files[key]
        if self._numbers_of_names is None:
            self._numbers_of_names = {
                with_slashes(self._images, other): number for other, number in instances.numbers.items()
            }
        return self._numbers_of_names.get(name)

    def _masks(self, key: str) -> tuple[dict[str, NDArray[np.bool_]], NDArray[np.bool_] | None]:
        """Return the mask of each class that an image shows, and which pixels are labelled."""
        if self._dense is not None:
            labels = self._labels(key)
            classes = [int(i) for i in np.unique(labels) if i != IGNORE]
            masks = {self._dense.classes[index].name: labels == index for index in classes}
            valid: NDArray[np.bool_] | None = labels != IGNORE
        else:
            assert self._instances is not None
            masks, valid = {}, None
            number = self._number(key)
            assert number is not None
            for category, _, _, mask in self._instances.masks(number, self.image_path(key)):
                name = self._instances.categories[category]
                masks[name] = masks[name] | mask if name in masks else mask
        return {name: mask for name, mask in masks.items() if int(mask.sum()) >= self.min_pixels}, valid

    def read(self, key: str) -> CaptionedImage:
        shown, valid = self._masks(key)
        known = (
            {names.name for names in self._dense.classes}
            if self._dense is not None
            else set(self._listed_instances.categories.values())
        )
        masks: dict[str, NDArray[np.bool_]] = {}
        captions = []
        for caption in self._captions[key]:
            mentions = self.vocabulary.mentions(caption)
            true: list[bool | None] = []
            for mention in mentions:
                here = [name for name in mention.classes if name in shown]
                if here:
                    masks[mention.text] = np.any([shown[name] for name in here], axis=0)
                # The annotations do not say whether a class that they leave out is shown.
                annotated = all(name in known for name in mention.classes)
                true.append(True if here else False if annotated else None)
            captions.append(CaptionTruth(caption, tuple(mentions), tuple(true)))
        named = frozenset(shown) & {item.name for item in self.classes}
        return CaptionedImage(key, self.image_path(key), tuple(captions), masks, valid, named)

    def describe(self) -> dict[str, Any]:
        annotations = "dense masks" if self._dense is not None else "instances"
        return super().describe() | {
            "split": self.split,
            "limit": self.limit,
            "annotations": annotations,
            "min_pixels": self.min_pixels,
        }


def _in_order(annotations: Any) -> list[Any]:
    """Return annotations by their ids, or in the order of the file if an id is no number."""
    if not isinstance(annotations, list):
        raise TypeError("'annotations' is not a list")
    try:
        return sorted(annotations, key=lambda annotation: int(annotation["id"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return annotations

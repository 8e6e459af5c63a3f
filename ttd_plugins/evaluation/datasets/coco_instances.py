"""Instances in COCO's JSON format: masks by image, upright."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.data.coco import ImageIds
from ttd_plugins.data.images import turn_upright
from ttd_plugins.evaluation.datasets.annotation_files import DatasetError, read_json, stored_image
from ttd_plugins.evaluation.datasets.coco_masks import annotation_mask


def images_of(file: Path, content: Any) -> tuple[list[Hashable], list[str], ImageIds]:
    """Return id and file name of each of the ``images`` of a COCO file, and its ids for matching annotations.

    Raises:
        DatasetError: the file has another form, or two images have one id.
    """
    try:
        images = content["images"]
        names = [info["file_name"] for info in images]
        if not all(isinstance(name, str) and name for name in names):
            raise TypeError("the file_name of an image is not a text")
        numbers = [info["id"] for info in images]
        return numbers, names, ImageIds(numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise not_coco(file, "", error) from error


def image_of(file: Path, annotation: Any, ids: ImageIds) -> int:
    """Return the index of the image that an annotation refers to.

    Raises:
        DatasetError: there is no such image; the message names the annotation.
    """
    try:
        place = ids.place(annotation["image_id"])
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"an annotation in {str(file)!r} has no valid image_id ({_reason(error)})") from error
    if place is None:
        raise DatasetError(
            f"annotation {annotation.get('id')} in {str(file)!r} refers to the image {annotation['image_id']!r}, which "
            "'images' does not list; remove the annotation or add its image"
        )
    return place


def not_coco(file: Path, kind: str, error: Exception) -> DatasetError:
    """Return the error that a file is not a COCO file of a kind, such as ``"captions "``."""
    return DatasetError(f"the file {str(file)!r} is not a COCO {kind}file ({_reason(error)})")


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


class CocoInstances:
    """Instances of COCO's JSON format, by image.

    Polygons and run-length encodings are in the pixels of the stored image, as for the COCO API. If the image has an
    EXIF orientation, masks are turned with it; if the file states the size of the upright image, and it differs from
    the stored one, they are upright already.

    Args:
        file: ``instances_SPLIT.json``.

    Attributes:
        images: entry of each image by its id.
        numbers: id of each image by its file name.
        categories: names by id.

    Raises:
        DatasetError: the file is missing or has another format, an image occurs twice, or an annotation refers to an
            image that is not listed.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        content = read_json(file)
        try:
            ids, names, matching = images_of(file, content)
            self.images: dict[Hashable, dict[str, Any]] = dict(zip(ids, content["images"], strict=True))
            self.categories: dict[int, str] = {int(c["id"]): str(c["name"]) for c in content["categories"]}
            self.annotations: dict[Hashable, list[dict[str, Any]]] = {number: [] for number in ids}
            annotations: Sequence[Any] = content["annotations"]
            if not isinstance(annotations, list):
                raise TypeError("'annotations' is not a list")
        except DatasetError as error:
            raise DatasetError(str(error).replace("a COCO file", "a COCO instances file")) from error
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise not_coco(file, "instances ", error) from error
        if not annotations:
            raise DatasetError(f"the file {str(file)!r} has no annotation, so that nothing can be measured")
        for annotation in annotations:
            self.annotations[ids[image_of(file, annotation, matching)]].append(annotation)
        self.numbers = dict(zip(names, ids, strict=True))
        if len(self.numbers) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise DatasetError(f"the file {str(file)!r} lists the image {twice!r} twice")

    def size(self, number: Hashable) -> tuple[int, int]:
        """Return height and width of an image as the file states them.

        Raises:
            DatasetError: it states none.
        """
        info = self.images[number]
        try:
            height, width = int(info["height"]), int(info["width"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DatasetError(
                f"{str(self.file)!r} states no valid height and width of the image {info.get('file_name')!r}"
            ) from error
        if min(height, width) < 1:
            raise DatasetError(f"{str(self.file)!r} states a size of {width} x {height} for {info.get('file_name')!r}")
        return height, width

    def masks(self, number: Hashable, image: Path) -> list[tuple[int, float, bool, NDArray[np.bool_]]]:
        """Return category id, area in pixels, whether it is a crowd, and upright mask of each instance of an image.

        Args:
            number: id of the image.
            image: its file.

        Raises:
            DatasetError: a segmentation cannot be decoded, a category is unknown, or the image has another size.
        """
        found = []
        height, width = self.size(number)
        stored, orientation = stored_image(image)
        upright = stored[::-1] if orientation >= 5 else stored
        if (height, width) not in (stored, upright):
            raise DatasetError(
                f"{str(self.file)!r} states {width} x {height} pixels for the image {str(image)!r}, which is "
                f"{upright[1]} x {upright[0]}"
            )
        if (height, width) != stored:
            orientation = 1
        for annotation in self.annotations[number]:
            try:
                category = int(annotation["category_id"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise DatasetError(
                    f"annotation {annotation.get('id')} in {str(self.file)!r} has no valid category_id"
                ) from error
            if category not in self.categories:
                raise DatasetError(
                    f"annotation {annotation.get('id')} in {str(self.file)!r} has the category id {category}, which "
                    "the file does not list"
                )
            try:
                mask = annotation_mask(annotation["segmentation"], height, width)
            except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
                raise DatasetError(
                    f"the segmentation of annotation {annotation.get('id')} in {str(self.file)!r} cannot be decoded: "
                    f"{_reason(error)}"
                ) from error
            mask = turn_upright(mask, orientation)
            found.append((category, float(mask.sum()), bool(annotation.get("iscrowd", 0)), mask))
        return found

    def paint(self, number: Hashable, image: Path, index: Mapping[int, int]) -> NDArray[np.uint8]:
        """Return the class indices of an upright image, uint8 ``[height, width]``, 0 outside instances.

        Smaller instances cover larger ones, and all cover crowds.

        Args:
            number: id of the image.
            image: its file.
            index: class index of each category id.
        """
        masks = self.masks(number, image)
        (height, width), orientation = stored_image(image)
        labels = np.zeros((width, height) if orientation >= 5 else (height, width), np.uint8)
        for category, _, _, mask in sorted(masks, key=lambda item: (not item[2], -item[1])):
            if category not in index:
                raise DatasetError(
                    f"{str(self.file)!r} contains the category id {category}, which is not a category of coco_object"
                )
            labels[mask] = index[category]
        return labels

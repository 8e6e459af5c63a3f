"""Base classes of readers of annotated data sets, and the checks before any computation."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.evaluation.datasets.annotation_files import DatasetError, image_size
from ttd_plugins.evaluation.metrics import IGNORE
from ttd_plugins.evaluation.true_tags import label_candidates

Progress = Callable[[int], None]

UNKNOWN = -1
"""Label of a class of which the annotations do not say whether the image shows it."""


@dataclass(frozen=True)
class ClassNames:
    """A class of a data set with its texts.

    Attributes:
        name: the data set's name of the class.
        texts: texts for prompt templates: the name in plain English, then the usual aliases.
        id: the data set's id of the class, if it has one.
    """

    name: str
    texts: tuple[str, ...]
    id: int | None = None


@cache
def class_names(key: str) -> tuple[ClassNames, ...]:
    """Return a list of classes from ``classes.json``, in the order of their indices."""
    text = resources.files("ttd_plugins.evaluation.datasets").joinpath("classes.json").read_text(encoding="utf-8")
    return tuple(ClassNames(item["name"], tuple(item["texts"]), item.get("id")) for item in json.loads(text)[key])


class AnnotatedImages(ABC):
    """Images of a data set by their keys.

    Attributes:
        name: name of the data set, for results.
        root: its folder or file.
    """

    name: str
    root: Path

    @abstractmethod
    def keys(self) -> Sequence[str]:
        """Return the distinct keys of the images, in a fixed order."""

    @abstractmethod
    def image_path(self, key: str) -> Path:
        """Return the file of an image."""

    def __len__(self) -> int:
        return len(self.keys())

    def describe(self) -> dict[str, Any]:
        """Return what identifies the data: the reader, its folder and size."""
        return {"name": self.name, "reader": type(self).__name__, "root": str(self.root), "images": len(self)}


class SegmentationData(AnnotatedImages):
    """Images with a class for each pixel.

    Attributes:
        name: name of the data set, for results.
        root: its folder.
        classes: the C classes in the order of their indices.
        background: index of the class for everything else, or ``None`` if there is no such class.
    """

    classes: tuple[ClassNames, ...]
    background: int | None = None

    @abstractmethod
    def labels(self, key: str) -> NDArray[np.uint8]:
        """Return the class indices of an image.

        Returns:
            uint8 ``[height, width]``; pixels without a label are :data:`~ttd_plugins.evaluation.metrics.IGNORE`.

        Raises:
            DatasetError: the mask cannot be read, or contains an unknown id.
        """

    @abstractmethod
    def check(self, keys: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        """Check all files that ``keys`` (all by default) need: they exist, sizes agree, ids are known.

        Raises:
            DatasetError: a file is wrong; the message names the first one.
        """

    def require_truth(self) -> None:
        """Check that some pixel of some image has a class; it stops at the first one.

        Raises:
            DatasetError: there is none, so that nothing can be measured.
        """
        for key in self.keys():
            if (self.labels(key) != IGNORE).any():
                return
        raise DatasetError(
            f"no pixel of the {len(self)} images of {self.name} in {str(self.root)!r} has a class; check that masks "
            "and images belong together"
        )


class LabelData(AnnotatedImages):
    """Images with labels: for each class whether the image shows it.

    Attributes:
        name: name of the data set, for results.
        root: its folder or file.
        classes: the C classes in the order of their indices.
    """

    classes: tuple[ClassNames, ...]

    @abstractmethod
    def labels(self, key: str) -> NDArray[np.int8]:
        """Return the labels of an image.

        Returns:
            int8 ``[C]``: 1 shown, 0 not shown, :data:`UNKNOWN` if the annotations do not say.

        Raises:
            DatasetError: the annotations cannot be read.
        """

    def check(self, keys: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        """Check that the images and labels of ``keys`` (all by default) can be read.

        Raises:
            DatasetError: a file is wrong; the message names the first one.
        """
        for key in self.keys() if keys is None else keys:
            image_size(self.image_path(key))
            self.labels(key)
            if progress is not None:
                progress(1)

    def require_truth(self) -> None:
        """Check that some image shows a class; it stops at the first one.

        Raises:
            DatasetError: there is none, so that nothing can be measured.
        """
        for key in self.keys():
            if (self.labels(key) == 1).any():
                return
        raise DatasetError(
            f"none of the {len(self)} images of {self.name} in {str(self.root)!r} has a label; check that labels and "
            "images belong together"
        )

    def describe(self) -> dict[str, Any]:
        """Return what identifies the data: the reader, its folder, its size and number of classes."""
        return super().describe() | {"class_count": len(self.classes)}


@dataclass(frozen=True)
class CaptionTruth:
    """A caption with its mentions of classes, and whether the image shows them.

    Attributes:
        caption: the text.
        mentions: the mentions (:class:`ttd_plugins.evaluation.true_tags.Mention`).
        true: for each mention whether the image shows it; ``None`` if the annotations do not say.
    """

    caption: str
    mentions: tuple[Any, ...]
    true: tuple[bool | None, ...]

    def true_tags(self) -> list[str]:
        """Return the distinct texts of the mentions that the image shows, in order."""
        shown = [m.text for m, verdict in zip(self.mentions, self.true, strict=True) if verdict]
        return list(dict.fromkeys(shown))

    def labels(self, candidates: Sequence[str]) -> list[bool | None]:
        """Return for each candidate tag whether it is true, ``None`` if unknown.

        This is the only labelling of tags: protocols, comparisons and reports use it.
        """
        return label_candidates(self.caption, candidates, self.mentions, self.true)


@dataclass(frozen=True)
class CaptionedImage:
    """An image with its captions and the masks of their true tags.

    Attributes:
        key: key of the image.
        path: its file.
        captions: at least one caption.
        masks: for each true tag of any caption, by its text, a mask: bool ``[height, width]``.
        valid: bool ``[height, width]``, false for unlabelled pixels; ``None`` if all pixels are labelled.
        shown: names of the data set's classes that the image shows, mentioned or not.
    """

    key: str
    path: Path
    captions: tuple[CaptionTruth, ...]
    masks: Mapping[str, NDArray[np.bool_]]
    valid: NDArray[np.bool_] | None = None
    shown: frozenset[str] = frozenset()


class CaptionData(AnnotatedImages):
    """Images with captions, the captions' true tags, and their masks.

    Attributes:
        name: name of the data set, for results.
        root: its folder.
        classes: all classes with image-level labels; empty if there are none.
    """

    classes: tuple[ClassNames, ...] = ()

    @abstractmethod
    def read(self, key: str) -> CaptionedImage:
        """Return captions, true tags and masks of an image.

        Raises:
            DatasetError: an annotation is missing or invalid.
        """

    def check(self, keys: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        """Read all annotations that ``keys`` (all by default) need, and check that masks and images have equal sizes.

        Raises:
            DatasetError: a file is wrong; the message names the first one.
        """
        for key in self.keys() if keys is None else keys:
            path = self.image_path(key)
            size = image_size(path)
            found = self.read(key)
            for tag, mask in found.masks.items():
                if mask.shape != size:
                    raise DatasetError(
                        f"the mask of {tag!r} in {str(self.root)!r} is {mask.shape[1]} x {mask.shape[0]} pixels, but "
                        f"its image {str(path)!r} is {size[1]} x {size[0]}"
                    )
            if progress is not None:
                progress(1)

    def require_truth(self) -> None:
        """Check that some caption has a true tag with a mask; it stops at the first one.

        Raises:
            DatasetError: there is none, so that nothing can be measured.
        """
        for key in self.keys():
            item = self.read(key)
            if any(item.masks[tag].any() for truth in item.captions for tag in truth.true_tags()):
                return
        raise DatasetError(
            f"no caption of the {len(self)} images of {self.name} in {str(self.root)!r} names anything that its image "
            "shows; check that annotations and images belong together, and that captions are English"
        )

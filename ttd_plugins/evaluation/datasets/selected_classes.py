"""Other classes for a data set: its own ones merged, renamed or left out, by a list of classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.errors import InputError, listed
from ttd_plugins.evaluation.datasets.class_lists import BACKGROUND, ListedClass, assign_sources, open_classes
from ttd_plugins.evaluation.datasets.reader import (
    UNKNOWN,
    AnnotatedImages,
    ClassNames,
    LabelData,
    Progress,
    SegmentationData,
)
from ttd_plugins.evaluation.metrics import IGNORE
from ttd_plugins.tags import fold

Data = TypeVar("Data", SegmentationData, LabelData)


class _Selected(AnnotatedImages, Generic[Data]):
    """The images of another data set, with the classes of a list."""

    data: Data
    spec: str
    classes: tuple[ClassNames, ...]

    def _select(self, data: Data, spec: str | os.PathLike[str]) -> tuple[tuple[ListedClass, ...], dict[int, int]]:
        """Store data set and list; return the list's classes, and the index of the one that takes each own class.

        Raises:
            InputError: no class of the list is one of the data set.
        """
        self.data, self.spec = data, os.fspath(spec)
        self.name, self.root = data.name, data.root
        classes = tuple(item for item in open_classes(spec) if not item.ignored)
        own = [item.name for item in data.classes]
        taken = assign_sources(classes, own)
        if not taken:
            raise InputError(
                f"no class of the list {self.spec!r} is a class of {data.name}, which has {listed(own)}; name its "
                "classes, or add a column from to the list"
            )
        return classes, taken

    def keys(self) -> Sequence[str]:
        return self.data.keys()

    def image_path(self, key: str) -> Path:
        return self.data.image_path(key)

    def check(self, keys: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        self.data.check(keys, progress)

    def describe(self) -> dict[str, Any]:
        return self.data.describe() | {"selected_classes": self.spec, "class_count": len(self.classes)}


class SelectedSegmentation(_Selected[SegmentationData], SegmentationData):
    """A segmentation data set with the classes of a list.

    A class of the list takes the data set's classes of its names or aliases, or those of its column ``from``; see
    :func:`~ttd_plugins.evaluation.datasets.class_lists.assign_sources`. Pixels of classes that no class takes become
    ``background`` if the list has a class of that name, and otherwise have no label.

    Args:
        data: the data set.
        spec: the list: a name, or a file.

    Raises:
        InputError: there is no such list, or it has no class of the data set.
        DatasetError: the file is not a list of classes.
    """

    def __init__(self, data: SegmentationData, spec: str | os.PathLike[str]) -> None:
        listed_classes, taken = self._select(data, spec)
        if len(listed_classes) > IGNORE:
            raise InputError(f"the list {self.spec!r} has {len(listed_classes)} classes, more than {IGNORE}")
        self.classes = tuple(item.names for item in listed_classes)
        self.background = next((i for i, item in enumerate(self.classes) if fold(item.name) == BACKGROUND), None)
        rest = IGNORE if self.background is None else self.background
        self._table = np.full(256, rest, np.uint8)
        self._table[IGNORE] = IGNORE
        for source, index in taken.items():
            self._table[source] = index

    def labels(self, key: str) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = self._table[self.data.labels(key)]
        return found


class SelectedLabels(_Selected[LabelData], LabelData):
    """A data set of labels with the classes of a list, as for :class:`SelectedSegmentation`.

    An image shows a class if it shows one of those that the class takes. A class named ``background`` is left out.

    Args:
        data: the data set.
        spec: the list: a name, or a file.

    Raises:
        InputError: there is no such list, or it has no class of the data set.
        DatasetError: the file is not a list of classes.
    """

    def __init__(self, data: LabelData, spec: str | os.PathLike[str]) -> None:
        listed_classes, taken = self._select(data, spec)
        kept = [index for index, item in enumerate(listed_classes) if fold(item.name) != BACKGROUND]
        self.classes = tuple(listed_classes[index].names for index in kept)
        self._sources = [[source for source, owner in taken.items() if owner == index] for index in kept]

    def labels(self, key: str) -> NDArray[np.int8]:
        own = self.data.labels(key)
        return np.array([_any(own[sources]) for sources in self._sources], np.int8)


def _any(labels: NDArray[np.int8]) -> int:
    """Return the label of a class from those of the classes that it takes."""
    return 1 if (labels == 1).any() else UNKNOWN if (labels == UNKNOWN).any() else 0

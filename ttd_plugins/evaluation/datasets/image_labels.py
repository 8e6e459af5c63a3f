"""Readers of multi-label classification: PASCAL VOC, COCO instances, NUS-WIDE, and labels from masks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.data.caption_parsing import decode_text
from ttd_plugins.data.image_paths import with_slashes
from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets.annotation_files import DatasetError, existing_root, first_folder, unique_keys
from ttd_plugins.evaluation.datasets.class_lists import listed_class
from ttd_plugins.evaluation.datasets.coco_instances import CocoInstances
from ttd_plugins.evaluation.datasets.reader import (
    UNKNOWN,
    ClassNames,
    LabelData,
    Progress,
    SegmentationData,
    class_names,
)
from ttd_plugins.evaluation.metrics import IGNORE
from ttd_plugins.utils.user_files import read_regular


class StoredLabels(LabelData):
    """Labels in memory: an image file and a row of labels for each key.

    Attributes:
        files: the image file of each key.
        rows: int8 ``[N, C]``, in the order of ``files``.
    """

    files: dict[str, Path]
    rows: NDArray[np.int8]

    def keys(self) -> Sequence[str]:
        return list(self.files)

    def image_path(self, key: str) -> Path:
        return self.files[key]

    def labels(self, key: str) -> NDArray[np.int8]:
        row: NDArray[np.int8] = self.rows[self._places[key]]
        return row

    def _store(self, files: dict[str, Path], rows: NDArray[np.int8]) -> None:
        """Store files and labels, and check that there are some."""
        if not files:
            raise DatasetError(f"{self.name} in {str(self.root)!r} has no images")
        self.files, self.rows = files, rows
        self._places = {key: place for place, key in enumerate(files)}

    def check(self, keys: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        # The cheap check of all files first.
        for path in self.files.values():
            if not os.path.exists(path):
                raise DatasetError(f"the image {str(path)!r} of {self.name} is missing")
        super().check(keys, progress)


def _limit(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    return limit


def _lines(file: Path, title: str) -> list[str]:
    """Return the lines of a text file that are not blank.

    Raises:
        DatasetError: the file is missing, or not UTF-8.
    """
    try:
        text = decode_text(read_regular(file, f"the {title} {str(file)!r}"))
    except InputError as error:
        raise DatasetError(str(error)) from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"the {title} {str(file)!r} is not UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


class VocMain(StoredLabels):
    """PASCAL VOC's classification task: ``JPEGImages`` and ``ImageSets/Main/CLASS_SPLIT.txt`` of each of 20 classes.

    A line has the name of an image and 1 (shown), -1 (not shown), or 0: only difficult instances, so that it has no
    label, as in the official evaluation.

    Args:
        root: the folder of the download, or one above or below that is named after it.
        split: ``"test"`` for 2007 and ``"val"`` for 2012 by default; or another list of the download.
        limit: number of images, from the start; by default all.

    Raises:
        DatasetError: the layout is not found, or the lists have another form or differ in their images.
    """

    year: ClassVar[str]
    default_split: ClassVar[str]
    classes = class_names("voc")[1:]

    def __init__(self, root: Path | str, split: str | None = None, limit: int | None = None) -> None:
        self.root, self.split, self.limit = existing_root(root, self.name), split or self.default_split, _limit(limit)
        base = first_folder(self.root, f"VOCdevkit/VOC{self.year}", f"VOC{self.year}", ".")
        if base is None or not (base / "ImageSets" / "Main").is_dir():
            raise DatasetError(
                f"{self.name} in {str(self.root)!r} has no ImageSets/Main; looked in VOCdevkit/VOC{self.year}, "
                f"VOC{self.year} and the folder itself"
            )
        images: list[str] = []
        columns = []
        for item in self.classes:
            file = base / "ImageSets" / "Main" / f"{item.name}_{self.split}.txt"
            names, column = self._column(file)
            if images and names != images:
                raise DatasetError(f"the list {str(file)!r} has other images than those of the other classes")
            images = names
            columns.append(column[:limit])
        self._store({name: base / "JPEGImages" / f"{name}.jpg" for name in images[:limit]}, np.stack(columns, axis=1))

    def _column(self, file: Path) -> tuple[list[str], NDArray[np.int8]]:
        names, column = [], []
        for line in _lines(file, "list"):
            name, *value = line.split()
            if value not in (["1"], ["-1"], ["0"]):
                raise DatasetError(f"the line {line!r} of {str(file)!r} is not the name of an image and 1, 0 or -1")
            names.append(name)
            column.append({"1": 1, "-1": 0, "0": UNKNOWN}[value[0]])
        if len(set(names)) < len(names):
            raise DatasetError(f"the list {str(file)!r} has an image twice")
        return names, np.array(column, np.int8)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"split": self.split, "limit": self.limit}


class Voc2007(VocMain):
    __doc__ = VocMain.__doc__
    name, year, default_split = "voc2007", "2007", "test"


class Voc2012(VocMain):
    __doc__ = VocMain.__doc__
    name, year, default_split = "voc2012", "2012", "val"


class CocoLabels(StoredLabels):
    """Image-level labels of COCO instances: a class is shown if the image has an instance or a crowd of it.

    ``images`` with ``instances.json`` beside it, or the download's ``annotations/instances_SPLIT.json`` of 2017 or 2014
    with its images. The classes are the categories of the file, so a file of one's own in this format works too. An
    image without an annotation shows no class.

    Args:
        root: the folder.
        split: ``"val"`` or ``"train"``, for the download's layout.
        limit: number of images, from the start; by default all.

    Raises:
        DatasetError: the layout is not found, or the file has another format.
    """

    name = "coco"

    def __init__(self, root: Path | str, split: str = "val", limit: int | None = None) -> None:
        self.root, self.split, self.limit = existing_root(root, self.name), split, _limit(limit)
        file, images = self._find()
        instances = CocoInstances(file)
        ids = sorted(instances.categories)
        known = {item.name: item for item in class_names("coco_object")}
        self.classes = tuple(_with_aliases(instances.categories[number], number, known) for number in ids)
        if len({item.name for item in self.classes}) < len(ids):
            raise DatasetError(f"the file {str(file)!r} has two categories of one name; give each its own")
        place = {number: index for index, number in enumerate(ids)}
        names = sorted(instances.numbers)
        keys = unique_keys([name.replace("\\", "/") for name in names])
        rows = np.zeros((len(names), len(ids)), np.int8)
        for row, name in zip(rows, names, strict=True):
            for annotation in instances.annotations[instances.numbers[name]]:
                row[self._class_of(file, annotation, place)] = 1
        paths = (images / with_slashes(images, name) for name in names)
        self._store(dict(list(zip(keys, paths, strict=True))[:limit]), rows[:limit])

    def _class_of(self, file: Path, annotation: dict[str, Any], place: dict[int, int]) -> int:
        number = annotation.get("category_id")
        try:
            return place[int(number)]  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise DatasetError(
                f"annotation {annotation.get('id')} in {str(file)!r} has the category id {number!r}, which the file "
                "does not list"
            ) from None

    def _find(self) -> tuple[Path, Path]:
        """Return the file of instances, and the folder of their images."""
        annotations = self.root / "annotations"
        names = [f"{self.split}{year}" for year in ("2017", "2014")]
        found = next((name for name in names if os.path.exists(annotations / f"instances_{name}.json")), None)
        if os.path.exists(self.root / "instances.json"):
            file, tried = self.root / "instances.json", ["images"]
        elif found is not None:
            file, tried = annotations / f"instances_{found}.json", [f"images/{found}", found]
        else:
            raise DatasetError(
                f"coco in {str(self.root)!r} has neither instances.json nor annotations/instances_{names[0]}.json"
            )
        images = first_folder(self.root, *tried)
        if images is None:
            raise DatasetError(f"coco in {str(self.root)!r} has no images; looked for {', '.join(tried)}")
        return file, images

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"split": self.split, "limit": self.limit}


def _with_aliases(name: str, number: int, known: dict[str, ClassNames]) -> ClassNames:
    texts = known[name].texts if name in known else listed_class(name).texts
    return ClassNames(name, texts, number)


class NusWide(StoredLabels):
    """NUS-WIDE: 81 concepts of Flickr images.

    Files of the download: ``Concepts81.txt`` or ``ConceptsList/Concepts81.txt``; ``ImageList/TestImagelist.txt``;
    ``Groundtruth/TrainTestLabels/Labels_CONCEPT_Test.txt``, one 0 or 1 for each line of the list; and the images in
    ``Flickr`` or ``images``, in the list's folders or in one folder. Many images of the list have been removed from
    Flickr; ``skip_missing`` leaves out those that are not there.

    Args:
        root: the folder.
        split: ``"test"`` or ``"train"``.
        limit: number of images, from the start; by default all.
        skip_missing: whether to leave out images that are missing, and count them.

    Raises:
        DatasetError: the layout is not found, the files differ in length, or images are missing.
    """

    name = "nus_wide"
    IMAGES = ("Flickr", "images", "image", ".")

    def __init__(
        self, root: Path | str, split: str = "test", limit: int | None = None, *, skip_missing: bool = False
    ) -> None:
        if split not in ("test", "train"):
            raise InputError(f"the split of nus_wide must be test or train, not {split!r}")
        self.root, self.split, self.limit = existing_root(root, self.name), split, _limit(limit)
        concepts = _lines(
            self._file("list", "ConceptsList/Concepts81.txt", "Concepts81.txt", "ConceptsList/Concepts.txt"), "list"
        )
        names = _lines(self._file("list", f"ImageList/{split.title()}Imagelist.txt", f"{split.title()}Imagelist.txt"),
                       "list")  # fmt: skip
        self.classes = tuple(listed_class(concept).names for concept in concepts)
        columns = [self._column(concept, len(names)) for concept in concepts]
        files: dict[str, Path] = {}
        rows = []
        self.missing = 0
        images = first_folder(self.root, *self.IMAGES)
        assert images is not None
        for place, line in enumerate(names):
            name = line.replace("\\", "/")
            path = self._image(images, name)
            if path is None and skip_missing:
                self.missing += 1
                continue
            key = str(PurePosixPath(name).with_suffix(""))
            if key in files:
                raise DatasetError(f"the image {name!r} is listed twice in {split.title()}Imagelist.txt")
            files[key] = path or images / name
            rows.append(place)
            if limit is not None and len(files) == limit:
                break
        self._store(files, np.stack(columns, axis=1)[rows])

    def _file(self, what: str, *names: str) -> Path:
        found = next((self.root / name for name in names if os.path.exists(self.root / name)), None)
        if found is None:
            raise DatasetError(f"nus_wide in {str(self.root)!r} has no {what} {names[0]}")
        return found

    def _column(self, concept: str, count: int) -> NDArray[np.int8]:
        name = f"Labels_{concept}_{self.split.title()}.txt"
        file = self._file("file", f"Groundtruth/TrainTestLabels/{name}", f"TrainTestLabels/{name}", name)
        values = _lines(file, "labels")
        if len(values) != count or not set(values) <= {"0", "1"}:
            raise DatasetError(
                f"the labels {str(file)!r} are {len(values)} lines; they must be a 0 or 1 for each of {count} images"
            )
        return np.array(values, np.int8)

    def _image(self, images: Path, name: str) -> Path | None:
        for candidate in (name, PurePosixPath(name).name):
            if os.path.isfile(images / candidate):
                return images / candidate
        return None

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"split": self.split, "limit": self.limit, "missing": self.missing}


class MaskLabels(LabelData):
    """Image-level labels of a segmentation data set: a class is shown if a pixel has it, without the background.

    Args:
        data: the segmentation data set.
    """

    def __init__(self, data: SegmentationData) -> None:
        self.data = data
        self.name, self.root = data.name, data.root
        self._kept = [index for index in range(len(data.classes)) if index != data.background]
        self.classes = tuple(data.classes[index] for index in self._kept)

    def keys(self) -> Sequence[str]:
        return self.data.keys()

    def image_path(self, key: str) -> Path:
        return self.data.image_path(key)

    def labels(self, key: str) -> NDArray[np.int8]:
        shown = set(np.unique(self.data.labels(key)).tolist()) - {IGNORE}
        return np.array([index in shown for index in self._kept], np.int8)

    def check(self, keys: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        self.data.check(keys, progress)

    def describe(self) -> dict[str, Any]:
        return self.data.describe() | {"labels": "from masks", "class_count": len(self.classes)}

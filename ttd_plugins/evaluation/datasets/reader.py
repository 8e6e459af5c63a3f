"""What every reader gives, and what is checked before anything is computed."""

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
from PIL import Image, ImageOps

from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.evaluation.metrics import IGNORE

PICTURES = (".jpg", ".jpeg", ".png", ".JPEG", ".JPG")
Progress = Callable[[int], None]


class DatasetError(InputError):
    """A data set is not laid out or encoded as its reader expects; the message names the path."""


@dataclass(frozen=True)
class ClassNames:
    """One class: its name in the data set, and the texts that stand for it, the plainest first.

    Attributes:
        name: as the data set spells it.
        texts: what is put into templates: the name as people write it, then the usual aliases.
        id: the data set's own number of it, where it has one.
    """

    name: str
    texts: tuple[str, ...]
    id: int | None = None


@cache
def class_names(key: str) -> tuple[ClassNames, ...]:
    """A list of classes of ``classes.json``, in the order of their indices."""
    text = resources.files("ttd_plugins.evaluation.datasets").joinpath("classes.json").read_text(encoding="utf-8")
    return tuple(ClassNames(item["name"], tuple(item["texts"]), item.get("id")) for item in json.loads(text)[key])


class SegmentationData(ABC):
    """Pictures with a class for every pixel.

    Attributes:
        name: name of the data set, for results.
        root: its folder.
        classes: the C classes in the order of their indices.
        background: index of the class that stands for everything else, or ``None`` where there is none.
    """

    name: str
    root: Path
    classes: tuple[ClassNames, ...]
    background: int | None = None

    @abstractmethod
    def keys(self) -> Sequence[str]:
        """A name for each picture, all distinct, in a fixed order."""

    @abstractmethod
    def image_path(self, key: str) -> Path:
        """The file of a picture."""

    @abstractmethod
    def labels(self, key: str) -> NDArray[np.uint8]:
        """Class indices ``[height, width]`` of a picture, :data:`~ttd_plugins.evaluation.metrics.IGNORE` where void.

        Raises:
            DatasetError: the mask cannot be read, or holds an id that the data set does not know.
        """

    @abstractmethod
    def check(self, keys: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        """Look at every file that ``keys`` (all by default) need: present, of one size, ids known.

        Raises:
            DatasetError: one sentence with the first path that is wrong.
        """

    def __len__(self) -> int:
        return len(self.keys())

    def describe(self) -> dict[str, Any]:
        """What repeats it: the reader, its folder, its split and size."""
        return {"name": self.name, "reader": type(self).__name__, "root": str(self.root), "images": len(self)}


@dataclass(frozen=True)
class CaptionTruth:
    """A caption and what of it the picture shows.

    Attributes:
        caption: the text.
        mentions: what it names (:class:`ttd_plugins.evaluation.true_tags.Mention`).
        true: for each mention whether the picture shows it, or ``None`` where the data set cannot tell.
    """

    caption: str
    mentions: tuple[Any, ...]
    true: tuple[bool | None, ...]

    def true_tags(self) -> list[str]:
        """The distinct texts of the mentions that the picture shows, in order."""
        shown = [m.text for m, verdict in zip(self.mentions, self.true, strict=True) if verdict]
        return list(dict.fromkeys(shown))


@dataclass(frozen=True)
class CaptionedImage:
    """A picture with its captions and the masks of their true tags.

    Attributes:
        key: its name.
        path: its file.
        captions: one or more.
        masks: bool ``[height, width]`` for the text of each true tag of any of the captions.
        valid: bool ``[height, width]``, false where nothing is known, or ``None`` where all is.
        shown: names of the data set's classes that the picture shows, mentioned or not.
    """

    key: str
    path: Path
    captions: tuple[CaptionTruth, ...]
    masks: Mapping[str, NDArray[np.bool_]]
    valid: NDArray[np.bool_] | None = None
    shown: frozenset[str] = frozenset()


class CaptionData(ABC):
    """Pictures with captions, the captions' true tags, and their masks.

    Attributes:
        name: name of the data set, for results.
        root: its folder.
        classes: the classes that its pictures are labelled with, all of them; empty where there are none.
    """

    name: str
    root: Path
    classes: tuple[ClassNames, ...] = ()

    @abstractmethod
    def keys(self) -> Sequence[str]:
        """A name for each picture, all distinct, in a fixed order."""

    @abstractmethod
    def image_path(self, key: str) -> Path:
        """The file of a picture."""

    @abstractmethod
    def read(self, key: str) -> CaptionedImage:
        """Captions, true tags and masks of a picture.

        Raises:
            DatasetError: an annotation cannot be read or used.
        """

    def check(self, keys: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        """Read every annotation that ``keys`` (all by default) need, and see that masks and pictures are of one size.

        Raises:
            DatasetError: one sentence with the first path that is wrong.
        """
        for key in self.keys() if keys is None else keys:
            path = self.image_path(key)
            size = picture_size(path)
            found = self.read(key)
            for tag, mask in found.masks.items():
                if mask.shape != size:
                    raise DatasetError(
                        f"the mask of {tag!r} in {str(self.root)!r} is {mask.shape[1]} x {mask.shape[0]} pixels, and "
                        f"its picture {str(path)!r} is {size[1]} x {size[0]}"
                    )
            if progress is not None:
                progress(1)

    def __len__(self) -> int:
        return len(self.keys())

    def describe(self) -> dict[str, Any]:
        """What repeats it: the reader, its folder and size."""
        return {"name": self.name, "reader": type(self).__name__, "root": str(self.root), "images": len(self)}


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of an upright picture, from its header alone.

    Raises:
        DatasetError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            width, height = image.size
            return (width, height) if turned else (height, width)
    except FileNotFoundError:
        raise DatasetError(f"the picture {str(path)!r} is missing") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise DatasetError(f"the picture {str(path)!r} cannot be read: {one_sentence(error)}") from error


def read_indices(path: Path) -> NDArray[np.int64]:
    """Pixel values of a mask ``[height, width]``: palette indices, grey values, or ``R + 256 G + 65536 B``.

    Raises:
        DatasetError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1", "I", "I;16", "RGB"):
                raise DatasetError(
                    f"the mask {str(path)!r} has mode {image.mode}, where palette indices, grey values or RGB are due"
                )
            values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    except DatasetError:
        raise
    except FileNotFoundError:
        raise DatasetError(f"the mask {str(path)!r} is missing") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise DatasetError(f"the mask {str(path)!r} cannot be read: {one_sentence(error)}") from error
    return values if values.ndim == 2 else values[..., 0] + 256 * values[..., 1] + 65536 * values[..., 2]


def lookup_table(known: Mapping[int, int]) -> NDArray[np.int16]:
    """A table from pixel values 0 to 65535 to class indices; -1 for values that are not known."""
    table = np.full(65536, -1, np.int16)
    for value, index in known.items():
        table[value] = index
    return table


def apply_table(values: NDArray[np.int64], table: NDArray[np.int16], path: Path, what: str) -> NDArray[np.uint8]:
    """Class indices of pixel values.

    Raises:
        DatasetError: a value is not known.
    """
    inside = np.minimum(np.maximum(values, 0), len(table) - 1)
    found = np.where(values == inside, table[inside], -1)
    if (found < 0).any():
        unknown = int(values[found < 0][0])
        raise DatasetError(f"the mask {str(path)!r} holds the id {unknown}, which {what} does not know")
    return found.astype(np.uint8)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DatasetError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"the file {str(path)!r} is missing") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"the file {str(path)!r} cannot be read: {one_sentence(error)}") from error


def first_folder(root: Path, *candidates: str) -> Path | None:
    """The first of some folders below ``root`` that is there."""
    return next((root / name for name in candidates if (root / name).is_dir()), None)


def existing_root(root: Path | str, name: str) -> Path:
    """``root`` as a path.

    Raises:
        DatasetError: there is no such folder.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {str(folder)!r}, where {name} was looked for")
    return folder


__all__ = [
    "IGNORE",
    "CaptionData",
    "CaptionTruth",
    "CaptionedImage",
    "ClassNames",
    "DatasetError",
    "SegmentationData",
    "apply_table",
    "class_names",
    "existing_root",
    "first_folder",
    "lookup_table",
    "picture_size",
    "read_indices",
    "read_json",
]

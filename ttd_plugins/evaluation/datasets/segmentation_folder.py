"""Segmentation data of one's own: a folder of images, a folder of masks, and a list of classes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets.annotation_files import (
    DatasetError,
    existing_root,
    first_folder,
    has_mode,
    image_names,
    map_indices,
    read_colours,
)
from ttd_plugins.evaluation.datasets.class_lists import (
    BACKGROUND,
    BUILT_IN,
    LIST_FILES,
    ListedClass,
    open_classes,
)
from ttd_plugins.evaluation.datasets.segmentation import MaskFiles, Pairs
from ttd_plugins.evaluation.metrics import IGNORE
from ttd_plugins.tags import fold
from ttd_plugins.utils.user_files import walk_files

IMAGE_FOLDERS = ("images", "image", "img", "img_dir", "JPEGImages")
MASK_FOLDERS = ("masks", "mask", "annotations", "labels", "ann_dir", "semantic_masks", "SegmentationClass")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", ".webp")
"""Formats of masks; JPEG changes values and is refused."""
ENDINGS = ("", "_mask", "_masks", "_label", "_labels", "_gt", "_seg", "-mask", ".mask")
"""What may follow the image's name in the name of its mask."""
MAX_CLASSES = 255


class SegmentationFolder(MaskFiles):
    """Images, masks of the same names, and a list of classes, in one folder.

    Files: ``images`` and ``masks``, or other usual names (:data:`IMAGE_FOLDERS`, :data:`MASK_FOLDERS`), each with all
    images or with a subfolder for each split; ``classes.txt``, ``.csv``, ``.tsv`` or ``.json``, or CVAT's
    ``labelmap.txt`` (:func:`~ttd_plugins.evaluation.datasets.class_lists.read_class_list`). A file ``SPLIT.txt`` with
    one name a line selects the images of a split.

    A mask has the name of its image, with :data:`ENDINGS`. Its values are the ids of the list, or else positions in the
    list from 0, as grey values or palette indices; or, if the list has colours, its colours. A class named
    ``background`` is everything else. Rows named ``ignore`` or ``void`` have no label, and neither has the value 255
    (``ignore``), unless a class has that id.

    Args:
        root: the folder.
        split: name of a subfolder or of a list of names, if there are any; by default all images, or ``val``.
        limit: number of images, from the start; by default all.
        class_list: the list of classes, if it is not in the folder; a file, or the name of a known list.
        ignore: the mask value without a label.

    Raises:
        DatasetError: the layout is not found, the list of classes is missing or wrong, or an image has no mask.
    """

    name = "folder"

    def __init__(
        self,
        root: Path | str,
        split: str | None = None,
        limit: int | None = None,
        *,
        class_list: str | os.PathLike[str] | None = None,
        ignore: int = IGNORE,
    ) -> None:
        if isinstance(ignore, bool) or not isinstance(ignore, int) or not 0 <= ignore < 2**16:
            raise InputError(f"ignore must be a mask value from 0 to {2**16 - 1}, not {ignore!r}")
        if limit is not None and limit < 1:
            raise InputError(f"limit must be at least 1, not {limit}")
        if split is not None and (not split or split != PurePosixPath(split).name or split in (".", "..")):
            raise InputError(f"the split {split!r} is no name of a folder or list")
        self.root, self.ignore, self.limit = existing_root(root, self.name), ignore, limit
        self.split = split or ""
        self.layout = "folder"
        self.list_file = self._find_list(class_list)
        self._class_rows = open_classes(self.list_file)
        kept = [item for item in self._class_rows if not item.ignored]
        if len(kept) > MAX_CLASSES:
            raise DatasetError(f"the list of classes {self.list_file!r} has {len(kept)} classes, more than 255")
        self.classes = tuple(item.names for item in kept)
        self.background = next((i for i, item in enumerate(kept) if fold(item.name) == BACKGROUND), None)
        self._pairs = self.find()
        if not self._pairs:
            raise DatasetError(
                f"the folder {str(self.root)!r} has no images" + (f" of the split {split}" * bool(split))
            )
        if limit is not None:
            self._pairs = dict(list(self._pairs.items())[:limit])

    @classmethod
    def has_list(cls, root: Path | str) -> bool:
        """Return whether a folder has a list of classes of its own."""
        return any(os.path.isfile(Path(root) / name) for name in LIST_FILES)

    def _find_list(self, given: str | os.PathLike[str] | None) -> str:
        if given is not None:
            return os.fspath(given)
        found = [name for name in LIST_FILES if os.path.isfile(self.root / name)]
        if not found:
            raise DatasetError(
                f"the folder {str(self.root)!r} has no list of classes; write classes.txt with one name a line, in the "
                f"order of the values in the masks, or classes.csv with the columns name and id or colour"
            )
        if len(found) > 1:
            raise DatasetError(f"the folder {str(self.root)!r} has several lists of classes: {', '.join(found)}")
        return str(self.root / found[0])

    def find(self) -> Pairs:
        images = self._folder("images", *IMAGE_FOLDERS)
        masks = self._folder("masks", *MASK_FOLDERS)
        wanted: frozenset[str] | None = None
        if self.split or any((images / name).is_dir() and (masks / name).is_dir() for name in ("val", "train", "test")):
            split = self.split or "val"
            listed = next(
                (
                    file
                    for file in (self.root / f"{split}.txt", self.root / "splits" / f"{split}.txt")
                    if os.path.isfile(file)
                ),
                None,
            )
            inside = first_folder(images, split), first_folder(masks, split)
            if inside[0] is not None and inside[1] is not None:
                images, masks = inside[0], inside[1]
            elif listed is not None:
                wanted = frozenset(self._split_names(listed))
            else:
                raise DatasetError(
                    f"the folder {str(self.root)!r} has no split {split!r}; looked for {images.name}/{split} with "
                    f"{masks.name}/{split}, and for {split}.txt"
                )
            self.split = split
        return self._matched(images, masks, wanted)

    def _split_names(self, file: Path) -> list[str]:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"the list {str(file)!r} of the split cannot be read") from error
        names = [_stem(line.strip().replace("\\", "/")) for line in lines if line.strip()]
        if not names:
            raise DatasetError(f"the list {str(file)!r} of the split is empty")
        return names

    def _matched(self, images: Path, masks: Path, wanted: frozenset[str] | None) -> Pairs:
        """Return each image with its mask."""
        by_stem: dict[str, str] = {}
        lossy: dict[str, str] = {}
        try:
            files = sorted(walk_files(masks))
        except InputError as error:
            raise DatasetError(str(error)) from error
        for name in files:
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in (".jpg", ".jpeg"):
                lossy[_stem(name)] = name
            if suffix not in MASK_SUFFIXES:
                continue
            if _stem(name) in by_stem:
                raise DatasetError(
                    f"the masks {str(masks / by_stem[_stem(name)])!r} and {str(masks / name)!r} have one name"
                )
            by_stem[_stem(name)] = name
        pairs: Pairs = {}
        # The mask of one name cannot belong to two images, such as a.jpg and a.png.
        for name in image_names(images):
            key = _stem(name)
            if wanted is not None and key not in wanted:
                continue
            if key in pairs:
                raise DatasetError(
                    f"the images {str(pairs[key][0])!r} and {str(images / name)!r} have the same mask; rename one"
                )
            mask = next((by_stem[key + ending] for ending in ENDINGS if key + ending in by_stem), None)
            if mask is None:
                jpeg = next((lossy[key + ending] for ending in ENDINGS if key + ending in lossy), None)
                if jpeg is not None:
                    raise DatasetError(
                        f"the mask {str(masks / jpeg)!r} is a JPEG, which changes values; save masks as PNG"
                    )
                raise DatasetError(
                    f"the image {str(images / name)!r} has no mask; looked for {str(masks / (key + '.png'))!r}"
                )
            pairs[key] = (images / name, masks / mask)
        missing = [] if wanted is None else sorted(wanted - pairs.keys())
        if missing:
            raise DatasetError(f"the split {self.split!r} lists {missing[0]!r}, which is not in {str(images)!r}")
        return pairs

    # Values of masks --------------------------------------------------------------------------------------------------

    def ids(self, mask: Path) -> Mapping[int, int]:
        return self._by_id

    @cached_property
    def _indices(self) -> list[tuple[ListedClass, int]]:
        """Each row of the list with its class index, or with IGNORE."""
        found, index = [], 0
        for item in self._class_rows:
            found.append((item, IGNORE if item.ignored else index))
            index += not item.ignored
        return found

    @cached_property
    def _by_id(self) -> dict[int, int]:
        """Class index by mask value: the ids of the list, or else the positions of its rows."""
        numbered = any(item.id is not None for item in self._class_rows)
        by_id = {self.ignore: IGNORE}
        for position, (item, index) in enumerate(self._indices):
            # A known list, such as voc, numbers classes by their order.
            number = item.id if numbered and self.list_file not in BUILT_IN else position
            if number is None:
                if item.colour is None:
                    raise DatasetError(f"the list of classes {self.list_file!r} has ids, but none for {item.name!r}")
                continue
            if number >= 2**16:
                raise DatasetError(f"the id {number} of the class {item.name!r} is too large for a mask")
            by_id[number] = index
        return by_id

    @cached_property
    def _by_colour(self) -> dict[int, int]:
        """Class index by colour, as ``R + 256 G + 65536 B``."""
        return {
            item.colour[0] + 256 * item.colour[1] + 65536 * item.colour[2]: index
            for item, index in self._indices
            if item.colour is not None
        }

    def _values(self, path: Path) -> NDArray[np.int64]:
        values = super()._values(path)
        # Some tools store grey values three times.
        grey = values & 255
        return grey if has_mode(path, "RGB") and bool((values == grey * 0x010101).all()) else values

    def labels(self, key: str) -> NDArray[np.uint8]:
        path = self.mask_path(key)
        if not self._by_colour:
            values = self._values(path)
            return map_indices(values, self._table(path), path, f"the list of classes {self.list_file!r}")
        codes = read_colours(path)
        distinct, inverse = np.unique(codes, return_inverse=True)
        unknown = [int(code) for code in distinct if int(code) not in self._by_colour]
        if unknown:
            red, green, blue = unknown[0] & 255, unknown[0] >> 8 & 255, unknown[0] >> 16
            raise DatasetError(
                f"the mask {str(path)!r} contains the colour #{red:02x}{green:02x}{blue:02x}, which is not in the list "
                f"of classes {self.list_file!r}; a row named void or ignore lists pixels without a label"
            )
        table = np.array([self._by_colour[int(code)] for code in distinct], np.uint8)
        return table[inverse].reshape(codes.shape)

    def describe(self) -> dict[str, Any]:
        rows = [[item.name, item.id, None if item.colour is None else list(item.colour)] for item in self._class_rows]
        return super().describe() | {"classes": rows, "ignore": self.ignore}


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")) if PurePosixPath(name).suffix.lower() in _SUFFIXES else name


_SUFFIXES = frozenset({*MASK_SUFFIXES, ".jpg", ".jpeg", ".jpe", ".jfif", ".ppm", ".pgm", ".avif", ".jp2"})

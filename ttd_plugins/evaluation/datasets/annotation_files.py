"""Reading the files of annotated data sets: images, masks and JSON, with errors that name the path."""

from __future__ import annotations

import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ttd_plugins.data.caption_parsing import decode_text
from ttd_plugins.data.images import exif_orientation, open_image
from ttd_plugins.data.pair_source import IMAGE_SUFFIXES
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.utils.deprecation import renamed_names
from ttd_plugins.utils.user_files import read_regular, walk_files

__getattr__ = renamed_names(
    __name__, {"PICTURES": "IMAGE_SUFFIXES", "picture_size": "image_size", "apply_table": "map_indices"}
)


class DatasetError(InputError):
    """A data set has another layout or encoding than its reader expects; the message names the path."""


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image after its EXIF rotation, from the header alone.

    Raises:
        DatasetError: the file is missing or not an image.
    """
    (height, width), orientation = stored_image(path)
    return (width, height) if orientation >= 5 else (height, width)


def stored_image(path: Path) -> tuple[tuple[int, int], int]:
    """Return height and width of an image as it is stored, and its EXIF orientation, from the header alone.

    Raises:
        DatasetError: the file is missing or not an image.
    """
    with _opened(path, "image") as image:
        return (image.height, image.width), exif_orientation(image)


def image_names(folder: Path) -> list[str]:
    """Return the relative paths, with ``/``, of the images in a folder and its subfolders, sorted.

    Raises:
        DatasetError: a folder cannot be read.
    """
    try:
        return sorted(name for name in walk_files(folder) if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES)
    except InputError as error:
        raise DatasetError(str(error)) from error


def unique_keys(names: Sequence[str], *, short: bool = False) -> list[str]:
    """Return a key for each relative path: without the suffix, or with it if two paths differ in nothing else.

    Args:
        names: the paths.
        short: whether to leave out the folders too, if the keys are still unique.

    Raises:
        DatasetError: a path occurs twice.
    """
    forms: list[Callable[[str], str]] = [_path_without_suffix, str]
    for form in [_name_without_suffix, *forms] if short else forms:
        keys = [form(name) for name in names]
        if len(set(keys)) == len(keys):
            return keys
    twice = next(name for name, count in Counter(names).items() if count > 1)
    raise DatasetError(f"the image {twice!r} is listed twice")


def _path_without_suffix(name: str) -> str:
    # Unlike PurePosixPath.with_suffix, this raises nothing for a name such as "/".
    return posixpath.splitext(posixpath.normpath(name))[0]


def _name_without_suffix(name: str) -> str:
    return PurePosixPath(name).stem


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    try:
        if not os.path.exists(path):
            raise DatasetError(f"the {kind} {str(path)!r} is missing")
        with open_image(path, kind=kind) as image:
            yield image
    except DatasetError:
        raise
    except InputError as error:
        raise DatasetError(f"the {error}") from error


def has_mode(path: Path, mode: str) -> bool:
    """Return whether an image is stored in a mode of Pillow, such as ``"RGB"``.

    Raises:
        DatasetError: the file is missing or not an image.
    """
    with _opened(path, "mask") as image:
        return bool(image.mode == mode)


def read_indices(path: Path) -> NDArray[np.int64]:
    """Return the pixel values of a mask: palette indices, grey values, or ``R + 256 G + 65536 B``.

    Returns:
        int64 ``[height, width]``.

    Raises:
        DatasetError: the file is missing or not an image.
    """
    with _opened(path, "mask") as image:
        if image.mode not in ("P", "L", "1", "I", "I;16", "RGB"):
            raise DatasetError(
                f"the mask {str(path)!r} has mode {image.mode}; it must have palette indices, grey values or RGB"
            )
        values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    return values if values.ndim == 2 else values[..., 0] + 256 * values[..., 1] + 65536 * values[..., 2]


def read_colours(path: Path) -> NDArray[np.int64]:
    """Return the colours of a mask as ``R + 256 G + 65536 B``; those of its palette if it has one.

    Returns:
        int64 ``[height, width]``.

    Raises:
        DatasetError: the file is missing or not an image, or has neither colours nor grey values.
    """
    with _opened(path, "mask") as image:
        if image.mode not in ("P", "L", "1", "RGB", "RGBA"):
            raise DatasetError(f"the mask {str(path)!r} has mode {image.mode}; a mask of colours must be RGB")
        # Not to_rgb, which would blend transparent pixels with white.
        values = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(np.int64)
    return values[..., 0] + 256 * values[..., 1] + 65536 * values[..., 2]


def lookup_table(known: Mapping[int, int]) -> NDArray[np.int16]:
    """Return a table from pixel values to class indices, int16 ``[65536]``; -1 for unknown values."""
    table = np.full(65536, -1, np.int16)
    for value, index in known.items():
        table[value] = index
    return table


def map_indices(values: NDArray[np.int64], table: NDArray[np.int16], path: Path, what: str) -> NDArray[np.uint8]:
    """Map pixel values to class indices with a table of :func:`lookup_table`.

    Args:
        values: int64 ``[height, width]``.
        table: the table.
        path: the mask file, for messages.
        what: name of the data set, for messages.

    Raises:
        DatasetError: a value is unknown.
    """
    inside = np.minimum(np.maximum(values, 0), len(table) - 1)
    found = np.where(values == inside, table[inside], -1)
    if (found < 0).any():
        unknown = int(values[found < 0][0])
        raise DatasetError(f"the mask {str(path)!r} contains the id {unknown}, which is not an id of {what}")
    return found.astype(np.uint8)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        DatasetError: the file is missing or not valid JSON.
    """
    if not os.path.exists(path):
        raise DatasetError(f"the file {str(path)!r} is missing")
    try:
        return json.loads(decode_text(read_regular(path, f"the file {str(path)!r}")))
    except InputError as error:
        raise DatasetError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"the file {str(path)!r} cannot be read: {one_sentence(error)}") from error


def first_folder(root: Path, *candidates: str) -> Path | None:
    """Return the first of several folders below ``root`` that exists."""
    return next((root / name for name in candidates if (root / name).is_dir()), None)


def existing_root(root: Path | str, name: str) -> Path:
    """Return ``root`` as a path.

    Raises:
        DatasetError: the folder does not exist.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DatasetError(f"the folder {str(folder)!r} of {name} does not exist")
    return folder

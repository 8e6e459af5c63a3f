"""Where the images of a list are: the folder of relative paths, and paths that were written on Windows."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ttd_plugins.data.pair_source import IMAGE_SUFFIXES
from ttd_plugins.utils.deprecation import renamed_names

if not TYPE_CHECKING:
    __getattr__ = renamed_names(__name__, {"find_images": "find_image_folder"})

_SAMPLE = 50
_MOST_FOLDERS = 200
# Flickr's caption lists number the captions of an image: "1000268201_693b08cb0e.jpg#0".
_NUMBERED = re.compile(r"(.+\.[A-Za-z0-9]{3,4})#\d+", re.DOTALL)


def is_image_name(text: str) -> bool:
    """Return whether a text ends like the file name of an image."""
    return PurePosixPath(without_number(text.strip())).suffix.lower() in IMAGE_SUFFIXES


def without_number(path: str) -> str:
    """Return the path of an image without the ``#`` and number of a caption, as Flickr's lists have it."""
    found = _NUMBERED.fullmatch(path)
    return found[1] if found and PurePosixPath(found[1]).suffix.lower() in IMAGE_SUFFIXES else path


def with_slashes(root: Path, path: str) -> str:
    """Return a path below ``root`` with ``/`` instead of ``\\``, unless a file of exactly that name exists."""
    if "\\" not in path or os.path.lexists(os.path.join(root, path)):
        return path
    return path.replace("\\", "/")


def find_image_folder(
    file: Path, names: Sequence[str], first: Sequence[str] = (), *, around: bool = True
) -> tuple[Path | None, list[Path]]:
    """Search the folder that the paths of a list are relative to, near the file of the list.

    Args:
        file: the list.
        names: the paths in it.
        first: names of folders to try first, next to the file and above it.
        around: whether to try all other folders there too.

    Returns:
        The folder that contains most of a sample of the images, or ``None``; and the folders that were searched.
    """
    step = max(len(names) // _SAMPLE, 1)
    sample = [name.replace("\\", "/") for name in names[::step][:_SAMPLE]]
    parents = list(dict.fromkeys([file.parent, file.parent.parent]))
    named = [parent / name for parent in parents for name in first] + parents
    folders = [folder for folder in dict.fromkeys(named) if os.path.isdir(folder)]
    best = _best(folders, sample)
    if best is None and around:
        others = [folder for parent in parents for folder in _subfolders(parent) if folder not in folders]
        best = _best(others, sample)
        folders += others
    return best, folders


def _best(folders: Sequence[Path], sample: Sequence[str]) -> Path | None:
    found = {folder: sum(os.path.isfile(os.path.join(folder, name)) for name in sample) for folder in folders}
    best = max(found, key=lambda folder: found[folder], default=None)
    return best if best is not None and found[best] else None


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = (entry.path for entry in entries if not entry.name.startswith(".") and os.path.isdir(entry.path))
            return [Path(path) for path in sorted(islice(names, _MOST_FOLDERS))]
    except OSError:
        return []

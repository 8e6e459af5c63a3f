"""The images of a folder of a user, and names of result files for them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ttd_plugins.data.pair_source import IMAGE_SUFFIXES
from ttd_plugins.errors import InputError
from ttd_plugins.utils.user_files import require_regular, walk_files

_MAX_NAME_BYTES = 180


@dataclass(frozen=True)
class ImageFile:
    """One image of a user.

    Attributes:
        path: the file.
        key: its path inside the folder, with ``/``; its name where it is a single image.
        stem: name for result files without a suffix, unique among the images of a call.
    """

    path: Path
    key: str
    stem: str

    def stamp(self) -> list[int]:
        """Return size and modification time, which change when the file is replaced.

        Raises:
            InputError: the file is missing or is no regular file.
        """
        found = require_regular(self.path, f"the image {str(self.path)!r}")
        return [found.st_size, found.st_mtime_ns]


def find_images(source: Path | str, *, outside: Path | str | None = None) -> list[ImageFile]:
    """Return an image, or all images of a folder and its subfolders, sorted by path.

    Args:
        source: a file, or a folder.
        outside: a folder whose images are left out, such as that of the results.

    Raises:
        InputError: the source does not exist, or the folder contains no images.
    """
    source = Path(source)
    if not os.path.isdir(source):
        require_regular(source, f"the image {str(source)!r}")
        return name_images([source])
    left_out = None if outside is None else os.path.realpath(outside)
    keys = [
        key
        for key in walk_files(source)
        if PurePosixPath(key).suffix.lower() in IMAGE_SUFFIXES and not _is_inside(source / key, left_out)
    ]
    if not keys:
        raise InputError(f"the folder {str(source)!r} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    keys.sort()
    return [ImageFile(source / key, key, stem) for key, stem in zip(keys, _stems(keys), strict=True)]


def name_images(paths: Sequence[Path]) -> list[ImageFile]:
    """Return images from any folders, named by their file names.

    Raises:
        InputError: two have the same file name.
    """
    names = [path.name for path in paths]
    name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise InputError(f"{count} images are named {name!r}, and their results would be one file; rename them")
    return [ImageFile(path, path.name, stem) for path, stem in zip(paths, _stems(names), strict=True)]


def _is_inside(path: Path, folder: str | None) -> bool:
    if folder is None:
        return False
    real = os.path.realpath(path)
    return real.startswith(folder.rstrip(os.sep) + os.sep)


def _stems(keys: Sequence[str]) -> list[str]:
    """Keys without suffix; with it where two would be equal, also on file systems that ignore case."""
    shorts = [PurePosixPath(key).with_suffix("") for key in keys]
    count = Counter(str(short).casefold() for short in shorts)
    whole = Counter(key.casefold() for key in keys)
    stems = []
    for key, short in zip(keys, shorts, strict=True):
        # A short name may be the whole name of another image: a.jpg.png beside a.jpg.
        is_free = count[str(short).casefold()] == 1 and str(short).casefold() not in whole
        stem = short if is_free else PurePosixPath(key)
        name = os.fsencode(stem.name)
        # Whole names may differ in case only.
        if len(name) > _MAX_NAME_BYTES or (not is_free and whole[key.casefold()] > 1):
            # Room for the suffix and for the name of the temporary file.
            digest = hashlib.sha256(name).hexdigest()[:12]
            stem = stem.with_name(name[: _MAX_NAME_BYTES - 20].decode("utf-8", "ignore") + f"-{digest}")
        stems.append(str(stem))
    return stems

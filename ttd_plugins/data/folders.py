"""Folders: ``name.jpg`` with ``name.txt`` or ``name.json``, in one folder or in two parallel folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ttd_plugins.data.caption_parsing import BadPairError, Fields
from ttd_plugins.data.pair_source import IMAGE_SUFFIXES, MapSource, PackedTexts, RawPair
from ttd_plugins.data.sidecar import add_sidecar
from ttd_plugins.errors import InputError, one_sentence

IMAGE_FOLDERS = ("image", "images", "img", "imgs")
CAPTION_FOLDERS = ("json", "jsons", "json_refined", "captions", "caption", "txt", "text", "texts")


def paper_layout(folder: Path) -> tuple[Path, Path] | None:
    """Return the image folder and the caption folder of the paper's layout (``image/`` and ``json/``), if present."""
    images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    captions = next((folder / name for name in CAPTION_FOLDERS if (folder / name).is_dir()), None)
    return (images, captions) if images is not None and captions is not None else None


class FolderPairs(MapSource):
    """Images of a folder and its subfolders, sorted by path. A caption file has the image's path with another suffix.

    Each line of a ``.txt`` is a caption. A ``.json`` is a list of captions, or an object with one or several captions
    and optional tags. An image without a caption file, and a caption file without an image, are listed as skipped.

    Raises:
        InputError: a folder cannot be read, or contains no images.
    """

    kind = "folder"

    def __init__(self, images: Path, captions: Path | None = None, fields: Fields | None = None) -> None:
        self.name = str(images if captions is None else images.parent)
        self.images = images
        self.captions = captions or images
        self.fields = fields or Fields()
        paths: list[str] = []
        texts: dict[str, str] = {}
        records: dict[str, str] = {}
        for path in _files(images):
            _sort_in(path, paths, texts, records)
        if captions is not None:
            texts, records = {}, {}
            for path in _files(captions):
                _sort_in(path, [], texts, records)
        if not paths:
            raise InputError(f"the folder {str(images)!r} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        stems = {_stem(path) for path in paths}
        orphans = [stem for stem in {**texts, **records} if stem not in stems]
        # A caption file without an image has the position that its image would have.
        rows = sorted([*((path, _stem(path)) for path in paths), *((stem, stem) for stem in orphans)])
        lonely = set(orphans)
        self._paths = PackedTexts("" if path in lonely and path == stem else path for path, stem in rows)
        self._stems = PackedTexts(stem for _, stem in rows)
        self._texts = PackedTexts(texts.get(stem, "") for _, stem in rows)
        self._records = PackedTexts(records.get(stem, "") for _, stem in rows)
        if not stems & (texts.keys() | records.keys()):
            raise InputError(
                f"none of the {len(paths)} images in {str(images)!r} has a caption file; 'photo.jpg' needs "
                f"{self._caption_files('photo')}"
            )

    @property
    def summary(self) -> str:
        return f"folder {self.name}: {len(self):,} images"

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        return self._paths[index] or self._stems[index]

    def read(self, index: int) -> RawPair:
        path = self._paths[index]
        pair = RawPair(self.key(index), self.images / path if path else None)
        if not path:
            pair.problem = "the image is missing: there is only a caption file"
            return pair
        try:
            text, record = (self._content(names[index]) for names in (self._texts, self._records))
        except BadPairError as error:
            pair.problem = str(error)
            return pair
        return add_sidecar(pair, text, record, self.fields, lines=True, missing="it has no caption file")

    def caption_count(self, index: int) -> int:
        return max(len(self.read(index).captions), 1)

    def _caption_files(self, stem: str) -> str:
        place = "" if self.captions == self.images else f"{self.captions.name}/"
        return f"'{place}{stem}.txt' or '{place}{stem}.json'"

    def _content(self, path: str) -> bytes | None:
        if not path:
            return None
        try:
            return (self.captions / path).read_bytes()
        except OSError as error:
            raise BadPairError(f"the caption file cannot be read: {error.strerror}") from error


def _files(folder: Path) -> Iterator[str]:
    """Yield the relative paths, with ``/``, of all files of a folder and its subfolders, except hidden ones."""

    def refuse(error: OSError) -> None:
        raise InputError(f"the folder {error.filename!r} cannot be read: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        above = PurePosixPath(os.path.relpath(root, folder).replace(os.sep, "/"))
        yield from (str(above / name) for name in names if not name.startswith("."))


def _sort_in(path: str, images: list[str], texts: dict[str, str], records: dict[str, str]) -> None:
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        images.append(path)
    elif suffix == ".txt":
        texts[_stem(path)] = path
    elif suffix == ".json":
        records[_stem(path)] = path


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def explain_folder(folder: Path) -> str:
    """Return a short description of the content of an unrecognised folder, for a message."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"it cannot be read: {one_sentence(error)}"
    shown = ", ".join(repr(name) for name in names[:5])
    return f"it contains {shown}{' …' if len(names) > 5 else ''}" if names else "it is empty"

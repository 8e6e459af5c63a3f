"""Folders: ``name.jpg`` with ``name.txt``, ``.caption`` or ``.json``, in one folder or in two parallel folders."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from ttd_plugins.data.caption_parsing import BadPairError, Fields
from ttd_plugins.data.pair_source import IMAGE_SUFFIXES, MapSource, RawPair, TextArray
from ttd_plugins.data.sidecar import add_sidecar
from ttd_plugins.errors import InputError, one_sentence
from ttd_plugins.utils.user_files import read_regular, walk_files

TEXT_SUFFIXES = (".txt", ".caption")
MAX_SIDECAR_BYTES = 64 << 20
"""Size of the largest caption file that is read."""
IMAGE_FOLDERS = ("image", "images", "img", "imgs")
CAPTION_FOLDERS = ("json", "jsons", "json_refined", "captions", "caption", "txt", "text", "texts")


def paper_layout(folder: Path) -> tuple[Path, Path] | None:
    """Return the image folder and the caption folder of the paper's layout (``image/`` and ``json/``), if present."""
    images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    captions = next((folder / name for name in CAPTION_FOLDERS if (folder / name).is_dir()), None)
    return (images, captions) if images is not None and captions is not None else None


class FolderPairs(MapSource):
    """Images of a folder and its subfolders, sorted by path. A caption file has the image's path with another suffix.

    Each line of a ``.txt``, or of a ``.caption`` where there is no ``.txt``, is a caption. A ``.json`` is a list of
    captions, or an object with one or several captions and optional tags. The suffix replaces that of the image, or
    follows it. An image without a caption file, and a caption file without an image, are listed as skipped.

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
        for path in walk_files(images):
            _sort_in(path, paths, texts, records)
        if captions is not None:
            texts, records = {}, {}
            for path in walk_files(captions):
                _sort_in(path, [], texts, records)
        if not paths:
            raise InputError(f"the folder {str(images)!r} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        # "photo.jpg.txt" is another usual name of the captions of "photo.jpg".
        names = {name for path in paths for name in (path, _stem(path))}
        sidecars = texts.keys() | records.keys()
        orphans = sidecars - names
        # A caption file without an image has the position that its image would have.
        rows = sorted([*((path, _stem(path)) for path in paths), *((stem, stem) for stem in orphans)])
        self._paths = TextArray("" if path in orphans else path for path, _ in rows)
        self._stems = TextArray(stem for _, stem in rows)
        self._texts = TextArray(texts.get(path) or texts.get(stem, "") for path, stem in rows)
        self._records = TextArray(records.get(path) or records.get(stem, "") for path, stem in rows)
        if not names & sidecars:
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
            return read_regular(self.captions / path, "the caption file", MAX_SIDECAR_BYTES)
        except InputError as error:
            raise BadPairError(str(error)) from error


def _sort_in(path: str, images: list[str], texts: dict[str, str], records: dict[str, str]) -> None:
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        images.append(path)
    elif suffix == ".txt" or (suffix in TEXT_SUFFIXES and _stem(path) not in texts):
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

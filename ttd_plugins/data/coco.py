"""Captions in COCO's JSON format."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.data.caption_parsing import BadPairError, Fields, as_bytes
from ttd_plugins.data.image_paths import find_image_folder, with_slashes
from ttd_plugins.data.pair_source import MapSource, RawPair, TextArray, refuse_empty
from ttd_plugins.errors import InputError


class ImageIds:
    """The ids of the ``images`` of a COCO file, and which of them an annotation refers to.

    An ``image_id`` that is a string where the ids are integers (``"139"`` and 139), or the other way round, refers to
    the same image.

    Args:
        ids: the id of each image.

    Raises:
        ValueError: an id is not a number or a text, or two images have the same id.
    """

    def __init__(self, ids: Iterable[Any]) -> None:
        self._places: dict[Hashable, int] = {}
        self._alike: dict[str, int] = {}
        for place, value in enumerate(ids):
            if not _is_id(value):
                raise ValueError(f"an image has the id {_short(value)}, which is neither a number nor a text")
            if value in self._places:
                raise ValueError(f"two images have the id {_short(value)}")
            self._places[value] = place
            # Ids that look alike ("7" and "007") stand for themselves only.
            self._alike[_spelled(value)] = -1 if _spelled(value) in self._alike else place

    def place(self, image_id: Any) -> int | None:
        """Return the index of the image that ``image_id`` refers to, or ``None`` if there is no such image.

        Raises:
            ValueError: ``image_id`` is not a number or a text.
        """
        if not _is_id(image_id):
            raise ValueError(f"the image_id {_short(image_id)} is neither a number nor a text")
        found = self._places.get(image_id, self._alike.get(_spelled(image_id), -1))
        return None if found < 0 else found


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _spelled(value: Any) -> str:
    """Return an id in the form in which numbers and texts are compared: without leading zeros or a fraction of zero."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    return (text.lstrip("0") or "0") if text.isascii() and text.isdigit() else text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def is_coco(content: Any) -> bool:
    """Return whether parsed JSON is in COCO's format: an object with the lists ``images`` and ``annotations``."""
    return isinstance(content, Mapping) and all(
        isinstance(content.get(name), list) for name in ("images", "annotations")
    )


class CocoPairs(MapSource):
    """COCO captions: ``images`` in their order, each with the captions of its ``annotations``.

    Captions of images that ``images`` does not list are listed as skipped, once per image. Images of the same
    ``file_name`` are one image.

    Args:
        file: the JSON file.
        content: its content, for which :func:`is_coco` is true.
        images: the folder of images; by default it is searched near the file.
        fields: names of the annotation's fields. Ready-made tags of all annotations of an image are merged.

    Raises:
        InputError: the file is not in COCO's format, or the folder of images is not found.
    """

    kind = "coco"

    def __init__(
        self, file: Path, content: Mapping[str, Any], *, images: Path | None = None, fields: Fields | None = None
    ) -> None:
        self.name = str(file)
        fields = fields or Fields()
        entries = content["images"]
        if not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{str(file)!r} is not in COCO's format: an entry of 'images' is not an object")
        try:
            ids = ImageIds(entry.get("id") for entry in entries)
        except ValueError as error:
            raise InputError(f"{str(file)!r} is not in COCO's format: {error}") from error
        name = fields.caption or "caption"
        if not any(isinstance(annotation, dict) and name in annotation for annotation in content["annotations"]):
            raise InputError(
                f"no annotation in {str(file)!r} has a field {name!r}; give COCO's captions_*.json, not its "
                "instances_*.json"
            )
        names = [_file_name(entry) for entry in entries]
        self.images = images or _find_image_folder(file, names)
        rows: dict[str, list[bytes]] = {with_slashes(self.images, name): [] for name in names}
        place_names = [with_slashes(self.images, name) for name in names]
        strays: dict[str, list[bytes]] = {}
        tags: dict[str, list[str]] = {}
        for number, annotation in enumerate(content["annotations"], 1):
            if not isinstance(annotation, dict):
                raise InputError(f"{str(file)!r} is not in COCO's format: annotation {number} is not an object")
            if name not in annotation:
                continue
            try:
                place = ids.place(annotation.get("image_id"))
                given = fields.tags_of(annotation) or []
            except (ValueError, BadPairError) as error:
                raise InputError(f"{str(file)!r}: annotation {_short(annotation.get('id'))}: {error}") from error
            text = annotation[name]
            # What is no text becomes an empty caption, which is listed as skipped.
            caption = as_bytes(text) if isinstance(text, str) else b""
            if place is None:
                strays.setdefault(f"image_id {annotation.get('image_id')}", []).append(caption)
            else:
                rows[place_names[place]].append(caption)
                tags.setdefault(place_names[place], []).extend(given)
        refuse_empty(len(rows) + len(strays), f"{str(file)!r}")
        self._missing_from = len(rows)
        captions = [*rows.values(), *strays.values()]
        self._names = TextArray([*rows, *strays])
        self._texts = TextArray(text for row in captions for text in row)
        self._starts: NDArray[np.int64] = np.cumsum([0, *(len(row) for row in captions)])
        self._tags = {key: list(dict.fromkeys(found)) for key, found in tags.items() if found}

    @property
    def summary(self) -> str:
        return f"COCO captions {self.name}: {len(self):,} images, {len(self._texts):,} captions"

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> RawPair:
        key = self._names[index]
        if index >= self._missing_from:
            return RawPair(key, problem="its captions refer to an image that 'images' does not list")
        captions = [self._texts.raw(row) for row in range(self._starts[index], self._starts[index + 1])]
        problem = None if captions else "it has no caption"
        return RawPair(key, self.images / key, captions, self._tags.get(key, []) if self._tags else None, problem)

    def caption_count(self, index: int) -> int:
        return max(int(self._starts[index + 1] - self._starts[index]), 1)

    def caption_counts(self) -> NDArray[np.int64]:
        return np.maximum(np.diff(self._starts), 1)


def _file_name(entry: Mapping[str, Any]) -> str:
    name = entry.get("file_name")
    return name if isinstance(name, str) and name else f"{entry.get('id')}.jpg"


def _find_image_folder(file: Path, names: list[str]) -> Path:
    """Return the folder near a COCO file that contains most of a sample of its images."""
    split = re.sub(r"^(captions|instances|annotations)[_-]?", "", file.stem)
    best, folders = find_image_folder(file, names, (split, "images", f"images/{split}", "image"), around=False)
    if best is None:
        looked = ", ".join(repr(str(folder)) for folder in folders[:8] if folder.name)
        raise InputError(f"none of the images of {str(file)!r} is in {looked}; give their folder with images=")
    return best

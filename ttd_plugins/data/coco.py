"""Captions in COCO's JSON format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.data.caption_parsing import BadPairError, Fields, as_bytes, load_json_bytes
from ttd_plugins.data.pair_source import MapSource, PackedTexts, RawPair, refuse_empty
from ttd_plugins.errors import InputError, listed


class CocoPairs(MapSource):
    """COCO captions: ``images`` in their order, each with the captions of its ``annotations``.

    Args:
        file: the JSON file.
        images: the folder of images; by default it is searched next to the file.
        fields: names of the annotation's fields. Ready-made tags of all annotations of an image are merged.

    Raises:
        InputError: the file is not in COCO's format, or the folder of images is not found.
    """

    kind = "coco"

    def __init__(self, file: Path, *, images: Path | None = None, fields: Fields | None = None) -> None:
        self.name = str(file)
        fields = fields or Fields()
        try:
            content = load_json_bytes(file.read_bytes())
        except OSError as error:
            raise InputError(f"{str(file)!r} cannot be read: {error.strerror}") from error
        except BadPairError as error:
            raise InputError(f"{str(file)!r}: {error}") from error
        entries, annotations = _parts(file, content)
        captions: dict[Any, list[bytes]] = {}
        tags: dict[Any, list[str]] = {}
        name = fields.caption or "caption"
        for annotation in annotations:
            if isinstance(annotation, dict) and isinstance(annotation.get(name), str):
                place = annotation.get("image_id")
                captions.setdefault(place, []).append(as_bytes(annotation[name]))
                try:
                    tags.setdefault(place, []).extend(fields.tags_of(annotation) or [])
                except BadPairError as error:
                    raise InputError(f"{str(file)!r}: annotation {annotation.get('id')}: {error}") from error
        if not captions:
            raise InputError(
                f"no annotation in {str(file)!r} has a field {name!r}; give COCO's captions_*.json, not its "
                "instances_*.json"
            )
        names = [str(entry.get("file_name") or f"{entry.get('id')}.jpg") for entry in entries]
        ids = [entry.get("id") for entry in entries]
        known = set(ids)
        strays = [place for place in captions if place not in known]
        rows = [captions.get(place, []) for place in ids] + [captions[place] for place in strays]
        refuse_empty(len(rows), f"{str(file)!r}")
        self._missing_from = len(names)
        self._names = PackedTexts([*names, *(f"image_id {place}" for place in strays)])
        self._texts = PackedTexts(text for row in rows for text in row)
        self._starts: NDArray[np.int64] = np.cumsum([0, *(len(row) for row in rows)])
        self._tags: dict[str, list[str]] = {
            key: list(dict.fromkeys(tags[place])) for key, place in zip(names, ids, strict=True) if tags.get(place)
        }
        self.images = images or _find_images(file, names)

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


def _parts(file: Path, content: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    if isinstance(content, dict):
        images, annotations = content.get("images"), content.get("annotations")
        if (
            isinstance(images, list)
            and isinstance(annotations, list)
            and all(isinstance(image, dict) for image in images)
        ):
            return images, annotations
        keys = listed(str(key) for key in content)
        raise InputError(
            f"{str(file)!r} is not in COCO's format: it must have the lists 'images' and 'annotations', but has {keys}"
        )
    raise InputError(
        f"{str(file)!r} is not in COCO's format: its JSON must be an object with 'images' and 'annotations'"
    )


def _find_images(file: Path, names: list[str]) -> Path:
    """Return the folder near a COCO file that contains most of a sample of its images."""
    split = re.sub(r"^(captions|instances|annotations)[_-]?", "", file.stem)
    parents = [file.parent, file.parent.parent]
    folders = [parent / name for parent in parents for name in (split, "images", f"images/{split}", "image", ".")]
    step = max(len(names) // 50, 1)
    found = {folder: sum((folder / name).is_file() for name in names[::step]) for folder in folders if folder.is_dir()}
    best = max(found, key=lambda folder: found[folder], default=file.parent)
    if not found.get(best):
        looked = ", ".join(repr(str(folder)) for folder in found if folder.name)
        raise InputError(f"none of the images of {str(file)!r} is in {looked}; give their folder with images=")
    return best

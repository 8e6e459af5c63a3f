"""CC3M-TagMask, the paper's benchmark (arXiv 2404.00384): captions, their true tags, and a mask of each tag.

The folders of the data set are published, but not the format of its files. This reader assumes:

- ``image/KEY.jpg`` (or another format) is the image.
- ``json_refined/KEY.json`` is an object with the caption under ``caption`` or ``text``, and the true tags under
  ``tags``, ``true_tags`` or ``labels``: a list of strings, or an object whose keys are tags (a false value means that
  the tag is not true).
- ``mask_using_HQ-SAM/KEY/TAG.png`` or ``mask_using_HQ-SAM/KEY_TAG.png`` is the mask of one tag, nonzero inside, with
  spaces in TAG as spaces or ``_``; or ``mask_using_HQ-SAM/KEY.png`` has for each pixel the number of its tag in the
  list, from 1, and elsewhere 0 or 255.

A file of another format is an error that names it. For another layout, override :meth:`TagMask.read_json` or
:meth:`TagMask.read_masks` and pass the reader to the protocol.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttd_plugins.errors import InputError
from ttd_plugins.evaluation.datasets.annotation_files import (
    DatasetError,
    existing_root,
    image_names,
    image_size,
    read_indices,
    read_json,
)
from ttd_plugins.evaluation.datasets.reader import CaptionData, CaptionedImage, CaptionTruth, Progress
from ttd_plugins.evaluation.true_tags import Mention, mentions_of_tags
from ttd_plugins.utils.user_files import walk_files


class TagMask(CaptionData):
    """Reader of CC3M-TagMask under the assumptions above.

    A candidate is true if it ends where a tag ends in the caption. A tag whose words are not in the caption in that
    order cannot be a candidate, but its mask belongs to the caption's region.

    Args:
        root: the folder with ``image``, ``json_refined`` and ``mask_using_HQ-SAM``.
        limit: number of images, from the start; by default all.

    Raises:
        DatasetError: a folder or an image is missing, or there are no annotations.
    """

    name = "cc3m_tagmask"
    IMAGES, JSON, MASKS = "image", "json_refined", "mask_using_HQ-SAM"

    def __init__(self, root: Path | str, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise InputError(f"limit must be at least 1, not {limit}")
        self.root, self.limit = existing_root(root, self.name), limit
        for folder in (self.IMAGES, self.JSON, self.MASKS):
            if not (self.root / folder).is_dir():
                raise DatasetError(f"cc3m_tagmask in {str(self.root)!r} has no folder {folder!r}")
        annotations = sorted(
            name.removesuffix(".json") for name in walk_files(self.root / self.JSON) if name.endswith(".json")
        )
        if not annotations:
            raise DatasetError(f"the folder {str(self.root / self.JSON)!r} has no .json file")
        images: dict[str, Path] = {}
        for name in image_names(self.root / self.IMAGES):
            stem = str(PurePosixPath(name).with_suffix(""))
            if stem in images:
                raise DatasetError(
                    f"the images {str(images[stem])!r} and {str(self.root / self.IMAGES / name)!r} have the same "
                    "annotations; rename or remove one of them"
                )
            images[stem] = self.root / self.IMAGES / name
        missing = [stem for stem in annotations if stem not in images]
        if missing:
            raise DatasetError(
                f"the image of {str(self.root / self.JSON / (missing[0] + '.json'))!r} is missing from "
                f"{str(self.root / self.IMAGES)!r}"
            )
        self._images = {stem: images[stem] for stem in annotations[:limit]}

    def keys(self) -> Sequence[str]:
        return list(self._images)

    def image_path(self, key: str) -> Path:
        return self._images[key]

    def read_json(self, key: str) -> tuple[str, list[str]]:
        """Return caption and true tags of an image.

        Raises:
            DatasetError: the file has another format than assumed.
        """
        file = self.root / self.JSON / f"{key}.json"
        content = read_json(file)
        if not isinstance(content, dict):
            raise DatasetError(f"the file {str(file)!r} must contain an object with a caption and tags")
        caption = next((content[name] for name in ("caption", "text") if name in content), None)
        tags = next((content[name] for name in ("tags", "true_tags", "labels") if name in content), None)
        if not isinstance(caption, str):
            raise DatasetError(f"the file {str(file)!r} has no text under 'caption' or 'text'")
        if isinstance(tags, dict):
            tags = [tag for tag, true in tags.items() if true]
        if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
            raise DatasetError(f"the file {str(file)!r} has no list of strings under 'tags', 'true_tags' or 'labels'")
        return caption, list(dict.fromkeys(tags))

    def read_masks(self, key: str, tags: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
        """Return the mask of each true tag, bool ``[height, width]``.

        Raises:
            DatasetError: a mask is missing, or a map of tags contains a number without a tag.
        """
        folder = self.root / self.MASKS
        together = folder / f"{key}.png"
        if os.path.isfile(together):
            values = read_indices(together)
            unknown = np.setdiff1d(values, [0, 255, *range(1, len(tags) + 1)])
            if unknown.size:
                raise DatasetError(
                    f"the mask {str(together)!r} contains {int(unknown[0])}, but there are only {len(tags)} tags"
                )
            return {tag: values == number for number, tag in enumerate(tags, 1)}
        masks = {}
        for tag in tags:
            names = dict.fromkeys([tag, tag.replace(" ", "_")])
            tried = [path for name in names for path in (folder / key / f"{name}.png", folder / f"{key}_{name}.png")]
            path = next((path for path in tried if os.path.isfile(path)), None)
            if path is None:
                raise DatasetError(
                    f"the mask of the tag {tag!r} is missing; looked for {str(tried[0])!r} and {str(together)!r}"
                )
            masks[tag] = read_indices(path) > 0
        return masks

    def read(self, key: str) -> CaptionedImage:
        caption, tags = self.read_json(key)
        masks = self.read_masks(key, tags)
        # A tag is found by its words, which the caption may spell differently.
        mentions = mentions_of_tags(caption, tags)
        placed = {mention.classes[0] for mention in mentions}
        absent = [Mention(0, 0, tag, (tag,)) for tag in tags if tag not in placed]
        found = [Mention(m.start, m.end, m.classes[0], m.classes) for m in mentions] + absent
        truth = CaptionTruth(caption, tuple(found), tuple(True for _ in found))
        return CaptionedImage(key, self.image_path(key), (truth,), masks)

    def check(self, keys: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        for path in self._images.values():
            image_size(path)
        super().check(keys, progress)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"limit": self.limit}

"""JSON files of image-text pairs other than COCO's: lists of objects, Karpathy's splits, and captions by image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttd_plugins.data.caption_parsing import BadPairError, load_json_bytes
from ttd_plugins.data.image_paths import is_image_name
from ttd_plugins.data.tables import Table, json_records
from ttd_plugins.errors import InputError, choices_sentence, listed
from ttd_plugins.utils.user_files import read_regular

TRAIN_SPLITS = ("train", "restval")


def read_json_file(file: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        InputError: the file cannot be read or is not JSON.
    """
    try:
        return load_json_bytes(read_regular(file, f"the file {str(file)!r}"))
    except BadPairError as error:
        raise InputError(f"{str(file)!r}: {error}") from error


def is_karpathy(content: Any) -> bool:
    """Return whether parsed JSON is one of Karpathy's ``dataset_*.json``: ``images`` with ``sentences``."""
    images = content.get("images") if isinstance(content, Mapping) else None
    return (
        isinstance(images, list)
        and bool(images)
        and isinstance(images[0], Mapping)
        and "sentences" in images[0]
        and "annotations" not in content
    )


def karpathy_table(file: Path, content: Mapping[str, Any], split: str | None) -> Table:
    """Return the images of a split of a ``dataset_*.json`` as a table.

    Args:
        file: the file, for messages.
        content: its content, for which :func:`is_karpathy` is true.
        split: ``"train"`` (which includes ``restval``), another split, or ``"all"``; by default ``"train"``, or the
            only split.

    Raises:
        InputError: there is no such split.
    """
    images = content["images"]
    splits = Counter(str(image["split"]) for image in images if isinstance(image, Mapping) and image.get("split"))
    wanted = split or ("train" if "train" in splits else next(iter(splits), "all"))
    if split is None and len(splits) > 1 and "train" not in splits:
        raise InputError(f"{str(file)!r} has the splits {listed(splits)}; choose one with split=, or split='all'")
    if wanted != "all" and wanted not in splits:
        raise InputError(f"{str(file)!r}: {choices_sentence('split', wanted, [*splits, 'all'])}")
    chosen = TRAIN_SPLITS if wanted == "train" else (wanted,)
    return json_records(
        _karpathy_row(image)
        for image in images
        # What is no image, or has no split, is read too, and listed as skipped where it cannot be used.
        if wanted == "all" or not isinstance(image, Mapping) or image.get("split", wanted) in chosen
    )


def _karpathy_row(image: Any) -> Any:
    if not isinstance(image, Mapping):
        return image
    folder, name = image.get("filepath"), image.get("filename")
    path = f"{folder}/{name}" if folder and name else name
    return {"image": path, "captions": image.get("sentences")} | ({"tags": image["tags"]} if "tags" in image else {})


def json_table(file: Path, content: Any) -> Table:
    """Return a list of objects, or an object with the captions of each image, as a table.

    Args:
        file: the file, for messages.
        content: its content.

    Raises:
        InputError: the content has another form.
    """
    if isinstance(content, Mapping):
        lists = [value for value in content.values() if isinstance(value, list) and _is_list_of_objects(value)]
        if content and all(map(is_image_name, content)):
            return json_records({"image": name, "captions": captions} for name, captions in content.items())
        if len(lists) == 1 and not {"images", "annotations"} & content.keys():
            content = lists[0]
    if isinstance(content, list) and _is_list_of_objects(content):
        return json_records(content)
    if isinstance(content, Mapping):
        found = f"but has {listed(str(key) for key in content)}"
    else:
        found = f"but is a {type(content).__name__}" + (" without objects" if isinstance(content, list) else "")
    raise InputError(
        f"{str(file)!r} is not in COCO's format: it must have the lists 'images' and 'annotations', {found}; also read "
        "are a list of objects with image and caption, Karpathy's dataset_*.json, and an object with the captions of "
        "each image"
    )


def _is_list_of_objects(values: list[Any]) -> bool:
    return any(isinstance(value, Mapping) for value in values[:20])

"""Detecting the layout of image-text pairs: :func:`open_pairs`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ttd_plugins.data.caption_parsing import Fields
from ttd_plugins.data.coco import CocoPairs
from ttd_plugins.data.folders import FolderPairs, explain_folder, paper_layout
from ttd_plugins.data.hf_datasets import DatasetPairs, saved_dataset
from ttd_plugins.data.pair_source import IMAGE_SUFFIXES, PairSource
from ttd_plugins.data.score_filter import PairFilter
from ttd_plugins.data.shards import SHARD_SUFFIXES, ShardPairs, looks_like_shards
from ttd_plugins.data.tables import TABLE_SUFFIXES, TablePairs
from ttd_plugins.errors import InputError

LAYOUTS = (
    "a folder with name.txt or name.json next to each name.jpg, a folder with image/ and json/, a table (.csv, .tsv, "
    ".jsonl, .parquet), COCO captions (.json), webdataset shards (.tar), or a dataset (hf:NAME, or a saved folder)"
)
"""The supported layouts, for messages."""


def open_pairs(
    spec: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    tags_column: str | None = None,
    keep: str | os.PathLike[str] | PairFilter | None = None,
    threshold: float | None = None,
    quantile: float | None = None,
    **options: Any,
) -> PairSource:
    """Open image-text pairs in any supported layout, without decoding an image.

    Args:
        spec: a path, a pattern of shards such as ``cc3m/{00000..00331}.tar``, several sets of shards joined with
            ``::``, as in ``cc3m::cc12m``, or ``hf:NAME``.
        images: root folder of the paths in a table, COCO JSON or dataset.
        image_column: column of paths (tables) or of images (datasets).
        caption_column: column or JSON field of captions or lists of captions.
        tags_column: column or JSON field of ready-made candidate tags.
        keep: scores written by ``ttd prune``. Rejects the pairs below ``threshold``, or the fraction ``quantile`` of
            all pairs with the lowest scores.
        threshold, quantile: exactly one of them is needed with ``keep``.
        **options: ``delimiter`` for CSV; ``split``, ``config`` and arguments of ``load_dataset`` for datasets.

    Returns:
        A :class:`MapSource` (random access) or, for shards, a :class:`StreamSource`.

    Raises:
        InputError: nothing exists at ``spec``, the layout is not recognised, or an option does not apply to it.
        MissingDependencyError: the layout needs a package that is not installed.
    """
    fields = Fields(image_column, caption_column, tags_column)
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise InputError(f"the folder of images {str(folder)!r} does not exist")
    source = _detect(os.fspath(spec), folder, fields, options)
    if keep is not None:
        if isinstance(keep, PairFilter):
            if threshold is not None or quantile is not None:
                raise InputError("keep is a PairFilter already; pass its threshold or quantile to PairFilter")
            source.keep = keep
        else:
            source.keep = PairFilter.read(os.fspath(keep), threshold=threshold, quantile=quantile)
    elif threshold is not None or quantile is not None:
        raise InputError("threshold and quantile need keep=FILE, the scores written by `ttd prune`")
    return source


def _detect(spec: str, images: Path | None, fields: Fields, options: dict[str, Any]) -> PairSource:
    if spec.startswith("hf:"):
        return DatasetPairs(spec, images=images, fields=fields, **options)
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path, images, fields, options)
    if looks_like_shards(spec):
        _refuse_options("shards", options, images=images, image_column=fields.image)
        return ShardPairs(spec, fields)
    if not path.exists():
        name = spec.count("/") <= 1 and not spec.startswith((".", "/", "~")) and not path.suffix
        hint = f"; a dataset of the Hugging Face hub is named 'hf:{spec}'" if name else ""
        raise InputError(f"there are no pairs at {spec!r}: it does not exist{hint}")
    return _open_file(path, images, fields, options)


def _open_file(path: Path, images: Path | None, fields: Fields, options: dict[str, Any]) -> PairSource:
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        delimiter = options.pop("delimiter", None)
        _refuse_options("tables", options)
        return TablePairs(path, images=images, fields=fields, delimiter=delimiter)
    if suffix == ".json":
        _refuse_options("COCO JSON", options, image_column=fields.image)
        return CocoPairs(path, images=images, fields=fields)
    raise InputError(f"the file {str(path)!r} is not recognised as image-text pairs; supported: {LAYOUTS}")


def _open_folder(path: Path, images: Path | None, fields: Fields, options: dict[str, Any]) -> PairSource:
    if saved_dataset(path):
        return DatasetPairs(str(path), images=images, fields=fields, **options)
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise InputError(f"the folder {str(path)!r} cannot be read: {error.strerror}") from error
    if any(name.endswith(SHARD_SUFFIXES) for name in names):
        _refuse_options("shards", options, images=images, image_column=fields.image)
        return ShardPairs(str(path), fields)
    pair = paper_layout(path)
    if pair is not None:
        _refuse_options("folders", options, images=images, image_column=fields.image)
        return FolderPairs(*pair, fields)
    for name in ("metadata.csv", "metadata.jsonl", "metadata.parquet"):
        if name in names:
            return _open_file(path / name, images, fields, options)
    coco = [name for name in names if name.startswith("captions") and name.endswith(".json")]
    if len(coco) == 1:
        return _open_file(path / coco[0], images, fields, options)
    if len(coco) > 1:
        raise InputError(f"the folder {str(path)!r} contains several COCO files; open one of them: {', '.join(coco)}")
    if any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in _all_names(path)):
        _refuse_options("folders", options, images=images, image_column=fields.image)
        return FolderPairs(path, None, fields)
    tables = [name for name in names if Path(name).suffix.lower() in TABLE_SUFFIXES]
    if len(tables) == 1:
        return _open_file(path / tables[0], images, fields, options)
    raise InputError(
        f"the folder {str(path)!r} is not recognised as image-text pairs: {explain_folder(path)}; supported: {LAYOUTS}"
    )


def _all_names(path: Path) -> Any:
    return (name for _, _, names in os.walk(path, followlinks=True) for name in names)


def _refuse_options(kind: str, options: dict[str, Any], **more: Any) -> None:
    given = [*options, *(name for name, value in more.items() if value is not None)]
    if given:
        raise InputError(f"the option {given[0]!r} does not apply to {kind}")

"""Recognising what a user has: :func:`open_pairs`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ttd_plugins.data.coco import CocoPairs
from ttd_plugins.data.folders import FolderPairs, explain_folder, paper_layout
from ttd_plugins.data.hf_datasets import DatasetPairs, saved_dataset
from ttd_plugins.data.pairs import IMAGE_SUFFIXES, Fields, PairSource
from ttd_plugins.data.score_filter import PairFilter
from ttd_plugins.data.shards import SHARD_SUFFIXES, ShardPairs, looks_like_shards
from ttd_plugins.data.tables import TABLE_SUFFIXES, TablePairs
from ttd_plugins.errors import InputError

TAKEN = (
    "a folder of pictures with name.txt or name.json beside name.jpg, a folder with image/ and json/, a table (.csv, "
    ".tsv, .jsonl, .parquet), COCO captions (.json), webdataset shards (.tar), or a datasets folder (hf:NAME by name)"
)


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
    """Open image-text pairs, whatever they are kept in; nothing is decoded yet.

    Args:
        spec: a path, a pattern of shards such as ``cc3m/{00000..00331}.tar``, several sets of shards with ``::``
            between, as in ``cc3m::cc12m``, or ``hf:NAME``.
        images: folder that the paths of a table, COCO JSON or dataset start from.
        image_column: column of paths (tables) or of pictures (datasets).
        caption_column: column or JSON field of captions, which may be lists.
        tags_column: column or JSON field of ready-made candidate tags.
        keep: scores that ``ttd prune`` wrote; pairs below ``threshold`` are left out, or the share ``quantile`` of
            all pairs that have the lowest.
        threshold, quantile: see ``keep``; one of the two goes with it.
        **options: ``delimiter`` for CSV; ``split``, ``config`` and whatever ``load_dataset`` takes for datasets.

    Raises:
        InputError: there is nothing of that name, the layout is not recognised, or an option does not go with it.
        MissingDependencyError: the layout needs a package that is not installed.
    """
    fields = Fields(image_column, caption_column, tags_column)
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise InputError(f"the folder of pictures {str(folder)!r} does not exist")
    source = _recognise(os.fspath(spec), folder, fields, options)
    if keep is not None:
        if isinstance(keep, PairFilter):
            if threshold is not None or quantile is not None:
                raise InputError("the threshold or quantile of a PairFilter is given where it is made")
            source.keep = keep
        else:
            source.keep = PairFilter.read(os.fspath(keep), threshold=threshold, quantile=quantile)
    elif threshold is not None or quantile is not None:
        raise InputError("threshold and quantile go with keep=FILE, the scores that `ttd prune` writes")
    return source


def _recognise(spec: str, images: Path | None, fields: Fields, options: dict[str, Any]) -> PairSource:
    if spec.startswith("hf:"):
        return DatasetPairs(spec, images=images, fields=fields, **options)
    path = Path(spec)
    if path.is_dir():
        return _folder(path, images, fields, options)
    if looks_like_shards(spec):
        _refuse_options("shards", options, images=images, image_column=fields.image)
        return ShardPairs(spec, fields)
    if not path.exists():
        name = spec.count("/") <= 1 and not spec.startswith((".", "/", "~")) and not path.suffix
        hint = f"; a dataset of the Hugging Face hub is named 'hf:{spec}'" if name else ""
        raise InputError(f"there are no pairs at {spec!r}: it does not exist{hint}")
    return _file(path, images, fields, options)


def _file(path: Path, images: Path | None, fields: Fields, options: dict[str, Any]) -> PairSource:
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        delimiter = options.pop("delimiter", None)
        _refuse_options("tables", options)
        return TablePairs(path, images=images, fields=fields, delimiter=delimiter)
    if suffix == ".json":
        _refuse_options("COCO JSON", options, image_column=fields.image)
        return CocoPairs(path, images=images, fields=fields)
    raise InputError(f"the file {str(path)!r} is not recognised as image-text pairs, which are {TAKEN}")


def _folder(path: Path, images: Path | None, fields: Fields, options: dict[str, Any]) -> PairSource:
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
            return _file(path / name, images, fields, options)
    coco = [name for name in names if name.startswith("captions") and name.endswith(".json")]
    if len(coco) == 1:
        return _file(path / coco[0], images, fields, options)
    if len(coco) > 1:
        raise InputError(f"the folder {str(path)!r} holds several COCO files; open one of them: {', '.join(coco)}")
    if any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in _all_names(path)):
        _refuse_options("folders", options, images=images, image_column=fields.image)
        return FolderPairs(path, None, fields)
    tables = [name for name in names if Path(name).suffix.lower() in TABLE_SUFFIXES]
    if len(tables) == 1:
        return _file(path / tables[0], images, fields, options)
    raise InputError(
        f"the folder {str(path)!r} is not recognised as image-text pairs, which are {TAKEN}; {explain_folder(path)}"
    )


def _all_names(path: Path) -> Any:
    return (name for _, _, names in os.walk(path, followlinks=True) for name in names)


def _refuse_options(kind: str, options: dict[str, Any], **more: Any) -> None:
    given = [*options, *(name for name, value in more.items() if value is not None)]
    if given:
        raise InputError(f"the option {given[0]!r} does not go with {kind}")

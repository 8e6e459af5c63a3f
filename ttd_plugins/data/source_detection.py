"""Detecting the layout of image-text pairs: :func:`open_pairs`."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ttd_plugins.data.caption_parsing import Fields
from ttd_plugins.data.coco import CocoPairs, is_coco
from ttd_plugins.data.folders import TEXT_SUFFIXES, FolderPairs, explain_folder, paper_layout
from ttd_plugins.data.hf_datasets import is_dataset, open_dataset, saved_dataset
from ttd_plugins.data.image_paths import is_image_name
from ttd_plugins.data.joined_pairs import JoinedPairs
from ttd_plugins.data.json_lists import is_karpathy, json_table, karpathy_table, read_json_file
from ttd_plugins.data.pair_source import MapSource, PairSource
from ttd_plugins.data.score_filter import PairFilter
from ttd_plugins.data.shards import SHARD_SUFFIXES, ShardPairs, looks_like_shards
from ttd_plugins.data.tables import TABLE_SUFFIXES, TablePairs
from ttd_plugins.errors import InputError
from ttd_plugins.utils.user_files import require_regular, shown, walk_files

LAYOUTS = (
    "a folder with name.txt, name.caption or name.json next to each name.jpg, a folder with image/ and json/, a table "
    "(.csv, .tsv, .txt, .jsonl, .parquet), COCO captions or another list of images (.json), webdataset shards (.tar), "
    "or a dataset (hf:NAME, or a saved folder)"
)
"""The supported layouts, for messages."""


def open_pairs(
    spec: Any,
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
            ``::``, as in ``cc3m::cc12m``, ``hf:NAME``, or a ``Dataset`` or ``IterableDataset`` of Hugging Face.
        images: root folder of the paths in a table, COCO JSON or dataset.
        image_column: column of paths (tables) or of images (datasets).
        caption_column: column or JSON field of captions or lists of captions.
        tags_column: column or JSON field of ready-made candidate tags.
        keep: scores written by ``ttd prune``. Rejects the pairs below ``threshold``, or the fraction ``quantile`` of
            all pairs with the lowest scores.
        threshold, quantile: exactly one of them is needed with ``keep``.
        **options: ``delimiter`` for CSV; ``split`` for Karpathy's JSON; ``split``, ``config`` and arguments of
            ``load_dataset``, such as ``streaming``, for datasets.

    Returns:
        A :class:`MapSource` (random access) or, for shards and streamed datasets, a :class:`StreamSource`.

    Raises:
        InputError: nothing exists at ``spec``, the layout is not recognised, or an option does not apply to it.
        MissingDependencyError: the layout needs a package that is not installed.
    """
    fields = Fields(image_column, caption_column, tags_column)
    folder = None if images is None else Path(images)
    if folder is not None and not os.path.isdir(folder):
        raise InputError(f"the folder of images {str(folder)!r} does not exist")
    source: PairSource
    if is_dataset(spec):
        source = open_dataset(spec, images=folder, fields=fields, **options)
    elif isinstance(spec, str | os.PathLike):
        source = _detect(os.fsdecode(spec), folder, fields, options)
    else:
        raise InputError(f"a source of pairs is a path, a text or a dataset of Hugging Face, not {type(spec).__name__}")
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
        return open_dataset(spec, images=images, fields=fields, **options)
    path = Path(spec)
    # Unlike the methods of Path, these functions raise nothing for a name that is too long or invalid.
    if os.path.isdir(path):
        return _open_folder(path, images, fields, options)
    if looks_like_shards(spec):
        _refuse_options("shards", options, images=images, image_column=fields.image)
        return ShardPairs(spec, fields)
    if not os.path.exists(path):
        name = spec.count("/") <= 1 and not spec.startswith((".", "/", "~")) and not path.suffix and len(spec) < 100
        hint = f"; a dataset of the Hugging Face hub is named 'hf:{spec}'" if name else ""
        raise InputError(f"there are no pairs at {shown(spec)}: it does not exist{hint}")
    return _open_file(path, images, fields, options)


def _open_file(path: Path, images: Path | None, fields: Fields, options: dict[str, Any]) -> PairSource:
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        delimiter = options.pop("delimiter", None)
        _refuse_options("tables", options)
        return TablePairs(path, images=images, fields=fields, delimiter=delimiter)
    if suffix == ".json":
        return _open_json(path, images, fields, options)
    require_regular(path, f"the file {str(path)!r}")
    raise InputError(f"the file {str(path)!r} is not recognised as image-text pairs; supported: {LAYOUTS}")


def _open_json(path: Path, images: Path | None, fields: Fields, options: dict[str, Any]) -> PairSource:
    content = read_json_file(path)
    if is_karpathy(content):
        split = options.pop("split", None)
        _refuse_options("Karpathy's JSON", options)
        table = karpathy_table(path, content, split)
    elif is_coco(content):
        _refuse_options("COCO JSON", options, image_column=fields.image)
        return CocoPairs(path, content, images=images, fields=fields)
    else:
        _refuse_options("JSON lists", options)
        table = json_table(path, content)
    return TablePairs(path, images=images, fields=fields, table=table)


def _open_folder(path: Path, images: Path | None, fields: Fields, options: dict[str, Any]) -> PairSource:
    if saved_dataset(path):
        return open_dataset(str(path), images=images, fields=fields, **options)
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
    tables = [name for name in _METADATA if name in names]
    if not tables:
        for prefix, kind in (("captions", "COCO"), ("dataset_", "Karpathy's")):
            found = [name for name in names if name.startswith(prefix) and name.endswith(".json")]
            if len(found) == 1:
                return _open_file(path / found[0], images, fields, options)
            if len(found) > 1:
                raise InputError(
                    f"the folder {str(path)!r} contains several {kind} files; open one of them: {', '.join(found)}"
                )
    files = list(walk_files(path))
    own = _have_captions_of_their_own(files)
    if tables or not own:
        tables = _metadata(files)
        if len(tables) == 1:
            return _open_file(path / tables[0], images, fields, options)
        if tables:
            parts = [(name, _open_file(path / name, images, fields, dict(options))) for name in tables]
            return JoinedPairs(
                str(path), [(name[: name.rfind("/") + 1], cast("MapSource", part)) for name, part in parts]
            )
    lists = [name for name in names if Path(name).suffix.lower() in (*TABLE_SUFFIXES, ".json")]
    some = any(map(is_image_name, files))
    if len(lists) == 1 and not own:
        try:
            return _open_file(path / lists[0], images, fields, dict(options))
        except InputError:
            # A text beside images may be anything, such as a licence.
            if not some or not lists[0].endswith(".txt"):
                raise
    if some:
        _refuse_options("folders", options, images=images, image_column=fields.image)
        return FolderPairs(path, None, fields)
    raise InputError(
        f"the folder {str(path)!r} is not recognised as image-text pairs: {explain_folder(path)}; supported: {LAYOUTS}"
    )


_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def _metadata(files: list[str]) -> list[str]:
    """Return the metadata tables of a folder and its subfolders, one of each folder."""
    found: dict[str, str] = {}
    for table in _METADATA:
        for name in files:
            folder, _, last = name.rpartition("/")
            if last == table:
                found.setdefault(folder, name)
    return [found[folder] for folder in sorted(found)]


def _have_captions_of_their_own(files: list[str]) -> bool:
    """Return whether an image has a caption file of its own name."""
    names = {name for path in files if is_image_name(path) for name in (path, _stem(path))}
    suffixes = (*TEXT_SUFFIXES, ".json")
    return any(_stem(path) in names for path in files if path.lower().endswith(suffixes))


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _refuse_options(kind: str, options: dict[str, Any], **more: Any) -> None:
    given = [*options, *(name for name, value in more.items() if value is not None)]
    if given:
        raise InputError(f"the option {given[0]!r} does not apply to {kind}")
